"""Compiled norms and rotation: what torch computes, and a token's own bits in any batch."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest
import torch

from pdserve.core.layout import KvLayout
from pdserve.engine.native import library
from pdserve.engine.torch.batch import RowSpan, StepBatch
from pdserve.engine.torch.numerics import DTYPES
from pdserve.engine.torch.pool import HostPool
from pdserve.engine.torch.rows import HeadNorms, NativeRows, Rows, TorchRows
from pdserve.weights.config import ModelConfig
from pdserve.weights.random_model import random_config

BLOCK_SIZE = 8
NUM_BLOCKS = 40
SHAPES = ((4, 2, 16), (6, 3, 12), (9, 3, 64), (2, 1, 80))
"""Heads, kv heads, head_dim."""


def a_config(shape: tuple[int, int, int]) -> ModelConfig:
    heads, kv_heads, head_dim = shape
    return random_config(
        num_heads=heads, num_kv_heads=kv_heads, head_dim=head_dim, unrotated_layers=(0,)
    )


def a_pool(config: ModelConfig, dtype: str) -> HostPool:
    layout = KvLayout(
        num_layers=2,
        num_kv_heads=config.num_kv_heads,
        head_dim=config.head_dim,
        block_size=BLOCK_SIZE,
        dtype=dtype,
        numerics="test",
        weights_digest="test",
    )
    return HostPool(memoryview(bytearray(layout.pool_bytes(NUM_BLOCKS))), layout, NUM_BLOCKS)


def a_batch(rows: list[RowSpan], num_padding: int) -> StepBatch:
    num_tokens = sum(row.num_tokens for row in rows)
    token_ids = torch.zeros(num_tokens + num_padding, dtype=torch.int64)
    return StepBatch(num_tokens, token_ids, token_ids[:0], 0, tuple(rows), BLOCK_SIZE)


def test_places_of_a_step() -> None:
    """Positions and slots of scattered rows, by hand; padding stands at position 0."""
    batch = a_batch([RowSpan(0, 3, 7, (5, 2)), RowSpan(3, 1, 16, (9, 8, 1))], num_padding=2)
    assert batch.positions().tolist() == [7, 8, 9, 16, 0, 0]
    blocks, offsets = batch.slots()
    assert blocks.tolist() == [5, 2, 2, 1]
    assert offsets.tolist() == [7, 0, 1, 0]


@pytest.mark.parametrize("level", library.levels())
@pytest.mark.parametrize("width", [1, 63, 301, 3072])
@pytest.mark.parametrize("num_threads", [1, 2])
def test_the_first_of_the_best(num_threads: int, width: int, level: str) -> None:
    torch.set_num_threads(num_threads)
    generator = torch.Generator().manual_seed(width)
    rows = torch.randint(-40, 40, (50, width), generator=generator).float()
    rows[3] = float("-inf")
    rows[4, width // 2] = float("nan")
    rows[5, width // 3 :] = float("nan")
    rows[6, width - 1] = float("inf")
    rows[7, 0] = rows[8, width - 1] = float("nan")
    config = a_config(SHAPES[0])
    native = NativeRows(config, torch.float32, level)
    assert native.first_best(rows).tolist() == rows.argmax(dim=-1).tolist()
    reference = TorchRows(config, torch.device("cpu"))
    assert reference.first_best(rows).tolist() == rows.argmax(dim=-1).tolist()


def placed(
    rows: Rows,
    config: ModelConfig,
    dtype: str,
    batch: StepBatch,
    heads: torch.Tensor,
    norms: HeadNorms | None = None,
    layer: int = 1,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Queries, and all of the pool, after a step in a layer; layer 0 rotates nothing."""
    pool = a_pool(config, dtype)
    queries = rows.place(heads.clone(), pool, layer, norms, rows.prepare(batch))
    return queries[: batch.num_tokens].float(), pool.blocks


@pytest.mark.parametrize("level", library.levels())
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", [16, 64, 100, 576])
def test_norm(width: int, dtype: str, level: str) -> None:
    generator = torch.Generator().manual_seed(width)
    rows = (torch.randn(300, width, generator=generator) * 3).to(DTYPES[dtype])
    weight = torch.randn(width, generator=generator).to(DTYPES[dtype])
    config = a_config(SHAPES[0])
    native = NativeRows(config, DTYPES[dtype], level)
    actual = native.norm(rows, weight)
    expected = TorchRows(config, torch.device("cpu")).norm(rows, weight)
    tolerance = {"rtol": 1e-5, "atol": 1e-6} if dtype == "fp32" else {"rtol": 1e-2, "atol": 1e-2}
    torch.testing.assert_close(actual, expected, **tolerance)
    for first, count in ((0, 1), (17, 1), (3, 5), (250, 50)):
        assert torch.equal(native.norm(rows[first : first + count], weight), actual[first:][:count])


@pytest.mark.parametrize("level", library.levels())
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("num_threads", [1, 2])
def test_place(num_threads: int, shape: tuple[int, int, int], dtype: str, level: str) -> None:
    """The pool and the queries are what torch makes, and slots of no token stay untouched."""
    torch.set_num_threads(num_threads)
    config = a_config(shape)
    blocks = random.Random(6).sample(range(NUM_BLOCKS), NUM_BLOCKS)
    rows = [
        RowSpan(0, 1, 30, tuple(blocks[:4])),
        RowSpan(1, 90, 5, tuple(blocks[4:16])),
        RowSpan(91, 7, 0, tuple(blocks[16:17])),
        *(RowSpan(98 + 2 * i, 2, 3 + i, (blocks[17 + i], blocks[27 + i])) for i in range(10)),
    ]
    batch = a_batch(rows, num_padding=2)
    generator = torch.Generator().manual_seed(6)
    num_heads = config.num_heads + 2 * config.num_kv_heads
    heads = torch.randn(120, num_heads, config.head_dim, generator=generator).to(DTYPES[dtype])
    native = NativeRows(config, DTYPES[dtype], level)
    queries, pool = placed(native, config, dtype, batch, heads)
    expected = placed(TorchRows(config, torch.device("cpu")), config, dtype, batch, heads)
    tolerance = {"rtol": 1e-5, "atol": 1e-5} if dtype == "fp32" else {"rtol": 1e-2, "atol": 1e-2}
    torch.testing.assert_close(queries, expected[0], **tolerance)
    torch.testing.assert_close(pool, expected[1], **tolerance)
    assert torch.equal(pool == 0, expected[1] == 0)
    alone = a_batch([RowSpan(0, 1, 40, rows[1].block_ids)], num_padding=0)
    queries_alone, pool_alone = placed(native, config, dtype, alone, heads[36:37])
    assert torch.equal(queries_alone[0], queries[36])
    block = rows[1].block_ids[5]
    assert torch.equal(pool_alone[1, block, :, :, 0], pool[1, block, :, :, 0])


@pytest.mark.parametrize("level", library.levels())
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rotary_dim", [12, 32, 48])
def test_heads_that_are_normalised_or_rotated_in_part(
    rotary_dim: int, dtype: str, level: str
) -> None:
    """With norms and without, in a layer that rotates and in one that does not: as torch has it."""
    config = replace(a_config((4, 2, 48)), rotary_dim=rotary_dim)
    generator = torch.Generator().manual_seed(rotary_dim)
    heads = torch.randn(9, 8, 48, generator=generator).to(DTYPES[dtype])
    weights = 1 + torch.randn(2, 48, generator=generator).to(DTYPES[dtype])
    batch = a_batch([RowSpan(0, 8, 3, (4, 7)), RowSpan(8, 1, 30, (1, 2, 3, 5))], num_padding=0)
    native = NativeRows(config, DTYPES[dtype], level)
    reference = TorchRows(config, torch.device("cpu"))
    tolerance = {"rtol": 1e-5, "atol": 1e-5} if dtype == "fp32" else {"rtol": 2e-2, "atol": 2e-2}
    for layer in (0, 1):
        for norms in (None, HeadNorms(weights[0], weights[1])):
            actual = placed(native, config, dtype, batch, heads, norms, layer)
            expected = placed(reference, config, dtype, batch, heads, norms, layer)
            torch.testing.assert_close(actual[0], expected[0], **tolerance)
            torch.testing.assert_close(actual[1], expected[1], **tolerance)
            if rotary_dim < 48 and norms is None:
                assert torch.equal(actual[0][:, :, rotary_dim:], heads[:, :4, rotary_dim:].float())


def test_the_tables_are_of_the_step() -> None:
    """Nothing of one step is left in the next, be it longer or shorter."""
    config, level = a_config(SHAPES[0]), library.levels()[-1]
    native = NativeRows(config, torch.float32, level)
    heads = torch.ones(20, 8, 16)
    first = placed(native, config, "fp32", a_batch([RowSpan(0, 20, 0, (3, 4, 5))], 0), heads)
    again = placed(native, config, "fp32", a_batch([RowSpan(0, 2, 0, (7,))], 0), heads[:2])
    assert torch.equal(first[0][:2], again[0])
    assert again[1][1, 7].any()
    assert not again[1][1, 3:6].any()
