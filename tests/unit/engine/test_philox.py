"""The random numbers are Philox4x32-10's, and each depends on its key alone."""

from __future__ import annotations

import numpy as np
import pytest

from pdserve.engine.torch.philox import philox, uniforms

# kat_vectors of Random123 (Salmon et al.): counter, key, expected.
KNOWN_ANSWERS = [
    (
        [0, 0, 0, 0],
        [0, 0],
        [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8],
    ),
    (
        [0xFFFFFFFF] * 4,
        [0xFFFFFFFF] * 2,
        [0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD],
    ),
    (
        [0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344],
        [0xA4093822, 0x299F31D0],
        [0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1],
    ),
]


@pytest.mark.parametrize(("counter", "key", "expected"), KNOWN_ANSWERS)
def test_known_answers(counter: list[int], key: list[int], expected: list[int]) -> None:
    words = philox(
        np.array(counter, dtype=np.uint64)[:, None], np.array(key, dtype=np.uint64)[:, None]
    )
    assert words[:, 0].tolist() == expected


def test_all_at_once_is_each_for_itself() -> None:
    seeds = [0, 1, 2**63, -1, 12345]
    together = uniforms(seeds * 2, [0] * 5 + [3] * 5, list(range(10)))
    alone = [
        uniforms([seed], [choice], [index])[0]
        for seed, choice, index in zip(seeds * 2, [0] * 5 + [3] * 5, range(10), strict=True)
    ]
    assert together.tolist() == alone


def test_every_part_of_the_key_counts() -> None:
    keys = [(0, 0, 0), (1, 0, 0), (2**32, 0, 0), (2**63, 0, 0), (0, 1, 0), (0, 0, 1), (0, 1, 1)]
    numbers = uniforms(*zip(*keys, strict=True))
    assert len(set(numbers.tolist())) == len(keys)


def test_a_negative_seed_is_its_two_s_complement() -> None:
    assert uniforms([-1], [0], [0]) == uniforms([2**64 - 1], [0], [0])


def test_numbers_are_uniform() -> None:
    """Chi-squared over 64 bins; 114.8 is about the 99.99 % quantile for 63 degrees."""
    numbers = uniforms([42] * 20000, [0] * 20000, list(range(20000)))
    assert numbers.min() >= 0.0
    assert numbers.max() < 1.0
    counts, _ = np.histogram(numbers, bins=64, range=(0.0, 1.0))
    expected = 20000 / 64
    assert float(((counts - expected) ** 2 / expected).sum()) < 114.8
