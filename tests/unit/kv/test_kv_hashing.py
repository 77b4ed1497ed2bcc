"""Chained block hashes: equal exactly for equal prefixes under equal settings."""

from __future__ import annotations

import struct
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pdserve.core.layout import KvLayout
from pdserve.kv.hashing import HASH_BYTES, block_hashes, extend_hash, root_hash

LAYOUT = KvLayout(
    num_layers=2,
    num_kv_heads=2,
    head_dim=8,
    block_size=16,
    dtype="bf16",
    numerics="cpu/bf16",
    weights_digest="abc",
)
ROOT = root_hash(LAYOUT, "")
U32_MAX = 2**32 - 1
tokens = st.lists(st.integers(0, U32_MAX), max_size=40)


def test_hashes_are_the_same_in_every_build() -> None:
    """Pinned: another process may have made the hash that is looked up here."""
    assert ROOT.hex() == "e423d2851e50e6b456314c6d35ed950a"
    assert extend_hash(ROOT, [1, 2, 3]).hex() == "3aa28dee6d4d218b0b63f6ca007e1a1a"


@settings(derandomize=True)
@given(tokens, st.integers(1, 9))
def test_one_hash_per_full_block(token_ids: list[int], block_size: int) -> None:
    hashes = block_hashes(ROOT, token_ids, block_size)
    assert len(hashes) == len(token_ids) // block_size
    assert len(set(hashes)) == len(hashes)
    assert all(len(block_hash) == HASH_BYTES for block_hash in hashes)


@settings(derandomize=True)
@given(tokens, tokens, st.integers(1, 9))
def test_hashes_agree_exactly_as_far_as_the_tokens_do(
    first: list[int], second: list[int], block_size: int
) -> None:
    pairs = zip(
        block_hashes(ROOT, first, block_size), block_hashes(ROOT, second, block_size), strict=False
    )
    for index, (mine, theirs) in enumerate(pairs):
        end = (index + 1) * block_size
        assert (mine == theirs) == (first[:end] == second[:end])


@settings(derandomize=True)
@given(tokens, st.integers(0, 39), st.integers(0, 31), st.integers(1, 9))
def test_a_changed_token_changes_its_block_and_all_after_it(
    token_ids: list[int], position: int, bit: int, block_size: int
) -> None:
    if position >= len(token_ids):
        return
    changed = list(token_ids)
    changed[position] ^= 1 << bit
    before = block_hashes(ROOT, token_ids, block_size)
    after = block_hashes(ROOT, changed, block_size)
    first = position // block_size
    assert before[:first] == after[:first]
    assert all(x != y for x, y in zip(before[first:], after[first:], strict=True))


@settings(derandomize=True)
@given(tokens, st.integers(1, 9), st.integers(0, 5))
def test_a_chain_can_be_continued(token_ids: list[int], block_size: int, split: int) -> None:
    head = block_hashes(ROOT, token_ids[: split * block_size], block_size)
    rest = block_hashes(head[-1] if head else ROOT, token_ids[split * block_size :], block_size)
    assert head + rest == block_hashes(ROOT, token_ids, block_size)


@pytest.mark.parametrize(
    "other",
    [
        root_hash(LAYOUT, "tenant"),
        root_hash(replace(LAYOUT, weights_digest="abd"), ""),
        root_hash(replace(LAYOUT, numerics="cuda/bf16"), ""),
        root_hash(replace(LAYOUT, block_size=32), ""),
        root_hash(replace(LAYOUT, dtype="fp32"), ""),
    ],
)
def test_what_must_not_share_has_another_root(other: bytes) -> None:
    assert other != ROOT


@settings(derandomize=True)
@given(st.lists(st.text(max_size=4), min_size=3, max_size=3), st.data())
def test_a_root_does_not_depend_on_where_fields_end(fields: list[str], data: st.DataObject) -> None:
    """Shifting characters from one field into the next makes another root."""
    joined = "".join(fields)
    ends = sorted(data.draw(st.lists(st.integers(0, len(joined)), min_size=2, max_size=2)))
    shifted = [joined[: ends[0]], joined[ends[0] : ends[1]], joined[ends[1] :]]

    def root(parts: list[str]) -> bytes:
        return root_hash(replace(LAYOUT, weights_digest=parts[0], numerics=parts[1]), parts[2])

    assert (root(fields) == root(shifted)) == (fields == shifted)


def test_a_salt_that_is_no_valid_text_is_a_salt_all_the_same() -> None:
    assert root_hash(LAYOUT, "\ud800") not in (ROOT, root_hash(LAYOUT, "\ud801"))


def test_token_ids_are_u32() -> None:
    assert extend_hash(ROOT, [0]) != extend_hash(ROOT, [U32_MAX])
    for bad in (-1, U32_MAX + 1):
        with pytest.raises(struct.error):
            extend_hash(ROOT, [bad])


def test_a_parent_is_a_whole_hash() -> None:
    with pytest.raises(AssertionError):
        extend_hash(ROOT[:8], [1])
