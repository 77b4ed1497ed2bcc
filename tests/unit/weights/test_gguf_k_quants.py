"""Blocks of 256 values as llama.cpp's K-quantisations store them, read by hand.

The layouts are those of ggml-common.h (block_q4_K, block_q5_K, block_q6_K); the loops below follow
the format's description number by number, and what is restored from a GGUF file must be equal.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType

from pdserve.weights.folder import ModelFolder
from pdserve.weights.gguf_model import convert
from pdserve.weights.random_model import write_random_model


def halves(block: bytes, at: int) -> float:
    return float(np.frombuffer(block[at : at + 2], np.float16)[0])


def scale_and_minimum(packed: bytes, group: int) -> tuple[int, int]:
    """Six bits each, of eight groups in twelve bytes."""
    if group < 4:
        return packed[group] & 63, packed[group + 4] & 63
    low = packed[group + 4]
    return (
        (low & 15) | (packed[group - 4] >> 6 << 4),
        (low >> 4) | (packed[group] >> 6 << 4),
    )


def q4_k(block: bytes) -> list[float]:
    """d, dmin, 12 bytes of scales, 128 of nibbles: groups of 32, two in each 32 bytes."""
    d, d_min, quants = halves(block, 0), halves(block, 2), block[16:]
    values = []
    for group in range(8):
        scale, minimum = scale_and_minimum(block[4:16], group)
        for i in range(32):
            byte = quants[group // 2 * 32 + i]
            values.append(d * scale * (byte >> 4 * (group % 2) & 15) - d_min * minimum)
    return values


def q5_k(block: bytes) -> list[float]:
    """The same, with a fifth bit of each value in 32 bytes before the nibbles."""
    d, d_min, high, quants = halves(block, 0), halves(block, 2), block[16:48], block[48:]
    values = []
    for group in range(8):
        scale, minimum = scale_and_minimum(block[4:16], group)
        for i in range(32):
            low = quants[group // 2 * 32 + i] >> 4 * (group % 2) & 15
            value = low | (high[i] >> group & 1) << 4
            values.append(d * scale * value - d_min * minimum)
    return values


def q6_k(block: bytes) -> list[float]:
    """128 bytes of low nibbles, 64 of two high bits, 16 scales of eight bits, d."""
    low, high = block[:128], block[128:192]
    scales, d = np.frombuffer(block[192:208], np.int8), halves(block, 208)
    values = []
    for i in range(256):
        half, quarter, place = i // 128, i % 128 // 32, i % 32
        nibble = low[half * 64 + quarter % 2 * 32 + place] >> 4 * (quarter // 2) & 15
        two = high[half * 32 + place] >> 2 * quarter & 3
        values.append(d * int(scales[i // 16]) * ((nibble | two << 4) - 32))
    return values


BLOCKS: dict[str, tuple[Callable[[bytes], list[float]], int, tuple[int, ...]]] = {
    "Q4_K": (q4_k, 144, (0, 2)),
    "Q5_K": (q5_k, 176, (0, 2)),
    "Q6_K": (q6_k, 210, (208,)),
}
"""How it is read, its bytes, and where its fp16 numbers lie."""


@pytest.mark.parametrize("kind", BLOCKS)
def test_blocks_are_restored(tmp_path: Path, write_gguf: Callable[..., None], kind: str) -> None:
    read, num_bytes, scale_places = BLOCKS[kind]
    write_random_model(
        tmp_path / "m",
        hidden_size=256,
        intermediate_size=256,
        num_heads=16,
        tie_word_embeddings=True,
    )
    rng = np.random.default_rng(3)
    made: dict[tuple[int, ...], np.ndarray] = {}

    def blocks(values: np.ndarray) -> np.ndarray:
        packed = rng.integers(0, 256, (*values.shape[:-1], num_bytes), dtype=np.uint8)
        for place in scale_places:
            scale = rng.uniform(1e-4, 2e-3, packed.shape[:-1]).astype(np.float16)
            packed[..., place : place + 2] = scale[..., None].view(np.uint8)
        made[values.shape] = packed
        return packed

    write_gguf(
        tmp_path / "m.gguf",
        tmp_path / "m",
        quantisation=GGMLQuantizationType[kind],
        pack=blocks,
    )
    (tmp_path / "out").mkdir()
    convert(tmp_path / "m.gguf", tmp_path / "out")
    table = ModelFolder.open(tmp_path / "out").load_tensors()["model.embed_tokens.weight"]
    packed = made[tuple(table.shape)]
    for row in (0, 17, 383):
        expected = torch.tensor(read(packed[row].tobytes())).bfloat16()
        torch.testing.assert_close(table[row], expected, rtol=2**-7, atol=0)
