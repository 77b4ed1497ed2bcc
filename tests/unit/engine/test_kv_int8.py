"""A pool of int8: what is written, how near it stays, and what attention makes of it everywhere."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pdserve.core.errors import ConfigError
from pdserve.core.layout import KvLayout
from pdserve.engine.native import library
from pdserve.engine.torch import kv_int8
from pdserve.engine.torch.attention import SdpaAttention, TiledAttention
from pdserve.engine.torch.batch import RowSpan, StepBatch
from pdserve.engine.torch.native_attention import NativeAttention
from pdserve.engine.torch.numerics import DTYPES, Numerics
from pdserve.engine.torch.pool import HostPool
from pdserve.engine.torch.rows import NativeRows, TorchRows
from pdserve.weights.config import ModelConfig
from pdserve.weights.random_model import random_config

SHAPES = ((9, 3, 64), (4, 2, 16), (6, 3, 12), (5, 1, 80), (30, 1, 36), (2, 2, 128))
"""Heads, kv heads, head_dim."""
EDGES = (1, 2, 8, 9, 15, 16, 17, 48, 63, 64, 65, 127, 128, 129, 200)
LARGEST = 127


def a_config(shape: tuple[int, int, int]) -> ModelConfig:
    heads, kv_heads, head_dim = shape
    return random_config(num_heads=heads, num_kv_heads=kv_heads, head_dim=head_dim)


def a_pool(kv_heads: int, head_dim: int, block_size: int, num_blocks: int) -> HostPool:
    """One layer, all its bytes 0xff: scales of NaN."""
    layout = KvLayout(
        num_layers=1,
        num_kv_heads=kv_heads,
        head_dim=head_dim,
        block_size=block_size,
        dtype="int8",
        numerics="test",
        weights_digest="test",
    )
    memory = bytearray(b"\xff" * layout.pool_bytes(num_blocks))
    return HostPool(memoryview(memory), layout, num_blocks)


def read(pool: HostPool, head_dim: int, table: list[int], length: int) -> torch.Tensor:
    """``[2, kv head, position, head_dim]`` of a sequence, in fp32."""
    parts = []
    for kind, widen in enumerate((kv_int8.read_keys, kv_int8.read_values)):
        runs = pool.layer(0)[table, kind]  # [block, kv head, bytes]
        wide = widen(runs.flatten(0, 1), head_dim).unflatten(0, runs.shape[:2])
        parts.append(wide.transpose(0, 1).flatten(1, 2)[:, :length])
    return torch.stack(parts)


@dataclass(frozen=True)
class Known:
    """All that attention sees of one sequence, before rounding."""

    queries: torch.Tensor  # [token, head, head_dim] fp32
    keys: torch.Tensor  # [token, kv head, head_dim]
    values: torch.Tensor


def a_sequence(length: int, shape: tuple[int, int, int], seed: int) -> Known:
    generator = torch.Generator().manual_seed(seed)
    heads, kv_heads, head_dim = shape
    return Known(
        torch.randn(length, heads, head_dim, generator=generator) * 2,
        torch.randn(length, kv_heads, head_dim, generator=generator),
        torch.randn(length, kv_heads, head_dim, generator=generator),
    )


Step = tuple[HostPool, StepBatch, torch.Tensor]


def a_step(chunks: list[tuple[Known, int, int]], block_size: int, rng: random.Random) -> Step:
    """A step over (sequence, start, end) in scattered blocks: pool, batch, queries with padding."""
    counts = [-(-end // block_size) for _, _, end in chunks]
    free = rng.sample(range(sum(counts) + 3), sum(counts))
    pool = a_pool(*chunks[0][0].keys.shape[1:], block_size, sum(counts) + 3)
    rows, queries = [], []
    for (sequence, start, end), count in zip(chunks, counts, strict=True):
        table = [free.pop() for _ in range(count)]
        positions = torch.arange(end)
        blocks = torch.tensor(table)[positions // block_size]
        offsets = positions % block_size
        pool.write(0, blocks, offsets, sequence.keys[:end], sequence.values[:end])
        done = sum(row.num_tokens for row in rows)
        rows.append(RowSpan(done, end - start, start, tuple(table)))
        queries.append(sequence.queries[start:end])
    queries.append(torch.full((rng.randrange(3), *queries[0].shape[1:]), float("nan")))
    num_tokens = sum(row.num_tokens for row in rows)
    ids = torch.zeros(num_tokens + len(queries[-1]), dtype=torch.int64)
    batch = StepBatch(num_tokens, ids, ids[:0], 0, tuple(rows), block_size)
    return pool, batch, torch.cat(queries)


def attend(
    attention: TiledAttention | NativeAttention | SdpaAttention,
    chunks: list[tuple[Known, int, int]],
    block_size: int = 16,
    seed: int = 0,
    num_threads: int = 1,
) -> list[torch.Tensor]:
    pool, batch, queries = a_step(chunks, block_size, random.Random(seed))
    torch.set_num_threads(num_threads)
    prepared = attention.prepare(batch, torch.device("cpu"))
    out = attention.attend(queries, pool.layer(0), prepared)[: batch.num_tokens]
    return list(torch.split(out, [end - start for _, start, end in chunks]))


def test_rounding_is_to_the_nearest_of_255_steps() -> None:
    rows = torch.randn(50, 3, 20, generator=torch.Generator().manual_seed(1)) * 5
    numbers, scales = kv_int8.quantise(rows)
    assert numbers.abs().amax(-1).eq(LARGEST).all()
    error = (numbers * scales[..., None] - rows).abs()
    assert (error <= scales[..., None] * 0.5001).all()
    assert torch.equal(kv_int8.quantise(rows * 4)[0], numbers)


@pytest.mark.parametrize("broken", [float("nan"), float("inf"), float("-inf")])
def test_what_is_no_number_stays_none(broken: float) -> None:
    rows = torch.ones(2, 8)
    rows[1, 3] = broken
    numbers, scales = kv_int8.quantise(rows)
    assert scales.isnan().tolist() == [False, True]
    assert not numbers[1].any()


def test_zeros_stay_zeros() -> None:
    numbers, scales = kv_int8.quantise(torch.zeros(3, 8))
    assert not numbers.any()
    assert not scales.any()


@pytest.mark.parametrize("block_size", [16, 32])
def test_what_is_written_is_read_again(block_size: int) -> None:
    sequence = a_sequence(70, SHAPES[2], seed=3)
    chunk = (sequence, 0, 70)
    pool, batch, _ = a_step([chunk], block_size, random.Random(3))
    found = read(pool, 12, list(batch.rows[0].block_ids), 70)
    for wide, rows in zip(found, (sequence.keys, sequence.values), strict=True):
        numbers, scales = kv_int8.quantise(rows)
        assert torch.equal(wide, (numbers * scales[..., None]).transpose(0, 1))


def test_what_the_kernels_multiply_lies_side_by_side() -> None:
    """Four dimensions of a key, four positions of a value; scales behind all numbers of a run."""
    pool = a_pool(1, 8, 16, 2)
    keys = torch.arange(1, 9).float().view(1, 1, 8) * (LARGEST / 8)
    pool.write(0, torch.tensor([1]), torch.tensor([5]), keys, keys * 2)
    numbers = kv_int8.quantise(keys)[0].flatten().tolist()
    key_run, value_run = pool.layer(0)[1, :, 0]
    assert key_run[20:24].tolist() == numbers[:4]
    assert key_run[64 + 20 : 64 + 24].tolist() == numbers[4:]
    assert value_run[32:64].view(8, 4)[:, 1].tolist() == numbers
    scales = [run[128:].view(torch.float32)[5].item() for run in (key_run, value_run)]
    assert scales == [1.0, 2.0]


@pytest.mark.parametrize("level", library.levels())
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_kernels_write_what_torch_writes(
    shape: tuple[int, int, int], dtype: str, level: str
) -> None:
    """To the byte for values; a key may be rounded otherwise, since its rotation may."""
    config = a_config(shape)
    rows = (RowSpan(0, 1, 30, (7, 3)), RowSpan(1, 40, 5, (1, 4, 2)), RowSpan(41, 1, 0, (9,)))
    ids = torch.zeros(42, dtype=torch.int64)
    batch = StepBatch(42, ids, ids[:0], 0, rows, 16)
    generator = torch.Generator().manual_seed(6)
    num_heads = config.num_heads + 2 * config.num_kv_heads
    heads = torch.randn(42, num_heads, config.head_dim, generator=generator)
    heads[:, -1, :] *= torch.tensor([0.0, 1e-33, 1.0])[torch.arange(42) % 3][:, None]
    heads = heads.to(DTYPES[dtype])
    pools = []
    for each in (NativeRows(config, DTYPES[dtype], level), TorchRows(config, torch.device("cpu"))):
        pool = a_pool(config.num_kv_heads, config.head_dim, 16, 11)
        each.place(heads.clone(), pool, 0, None, each.prepare(batch))
        pools.append(pool)
    native, expected = pools
    assert torch.equal(native.layer(0)[:, 1], expected.layer(0)[:, 1])
    assert torch.equal(native.layer(0)[[0, 5, 6, 8, 10]], expected.layer(0)[[0, 5, 6, 8, 10]])
    for row in rows:
        table = list(row.block_ids)
        ours, theirs = (read(pool, config.head_dim, table, row.end)[0] for pool in pools)
        ours, theirs = ours[:, row.start :], theirs[:, row.start :]
        step = theirs.abs().amax(-1, keepdim=True) / LARGEST
        assert ((ours - theirs).abs() <= step * 1.01 + 1e-6).all()


@pytest.mark.parametrize("level", library.levels())
def test_kernels_write_what_is_no_number(level: str) -> None:
    config = a_config((2, 1, 12))
    heads = torch.ones(3, 4, 12)
    heads[0, 3, 11], heads[1, 2, 0], heads[2, 3, 2] = float("nan"), float("inf"), float("-inf")
    ids = torch.zeros(3, dtype=torch.int64)
    batch = StepBatch(3, ids, ids[:0], 0, (RowSpan(0, 3, 0, (0,)),), 16)
    pool = a_pool(1, 12, 16, 1)
    each = NativeRows(config, torch.float32, level)
    each.place(heads, pool, 0, None, each.prepare(batch))
    keys, values = read(pool, 12, [0], 3)
    assert keys.isnan().all(-1).tolist() == [[False, True, False]]
    assert values.isnan().all(-1).tolist() == [[True, False, True]]


@pytest.mark.parametrize("level", library.levels())
@pytest.mark.parametrize("shape", SHAPES)
def test_kernels_attend_as_the_reference_does(shape: tuple[int, int, int], level: str) -> None:
    """On the same bytes; 16 bits of a query and of a weight cost next to nothing."""
    sequence = a_sequence(200, shape, seed=2)
    chunks = [(sequence, 0, 200), (sequence, 70, 71), (sequence, 64, 130), (sequence, 3, 4)]
    reference = TiledAttention(*shape, 16, Numerics(exact=True, granule=16))
    expected = attend(reference, chunks)
    for actual, wanted in zip(
        attend(NativeAttention(*shape, torch.float32, level), chunks), expected, strict=True
    ):
        torch.testing.assert_close(actual, wanted, rtol=1e-3, atol=3e-4)


def test_the_reference_attends_to_what_was_written() -> None:
    shape = SHAPES[0]
    sequence = a_sequence(150, shape, seed=4)
    chunk = (sequence, 0, 150)
    keys, values = (
        numbers * scales[..., None]
        for numbers, scales in (kv_int8.quantise(sequence.keys), kv_int8.quantise(sequence.values))
    )
    wide = [part.repeat_interleave(3, dim=1).double() for part in (keys, values)]
    scores = torch.einsum("qhd,khd->hqk", sequence.queries.double(), wide[0]) * 64**-0.5
    hidden = torch.ones(150, 150, dtype=torch.bool).triu(1)
    weights = scores.masked_fill(hidden, float("-inf")).softmax(-1)
    expected = torch.einsum("hqk,khd->qhd", weights, wide[1])
    reference = TiledAttention(*shape, 16, Numerics(exact=True, granule=16))
    for attention in (reference, SdpaAttention(torch.float32)):
        (actual,) = attend(attention, [chunk])
        torch.testing.assert_close(actual.double(), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("level", library.levels())
@settings(max_examples=25, derandomize=True, database=None)
@given(seed=st.integers(0, 2**32))
def test_a_query_has_the_same_bits_in_any_step(seed: int, level: str) -> None:
    """Any mixture of chunks, block size, scattered tables and threads, with NaN around it."""
    rng = random.Random(seed)
    shape = rng.choice(SHAPES)
    attention = NativeAttention(*shape, rng.choice((torch.bfloat16, torch.float32)), level)
    lengths = [rng.choice(EDGES) if rng.random() < 0.5 else rng.randint(1, 260) for _ in range(3)]
    sequences = [a_sequence(n, shape, seed % 1000 + i) for i, n in enumerate(lengths)]
    wholes = [
        attend(attention, [(one, 0, n)])[0] for one, n in zip(sequences, lengths, strict=True)
    ]
    for _ in range(3):
        chosen = rng.choices(range(3), k=rng.randint(1, 5))
        chunks = []
        for index in chosen:
            end = rng.randint(1, lengths[index])
            size = rng.choice((1, 1, rng.choice(EDGES), end))
            chunks.append((sequences[index], max(0, end - size), end))
        block_size, threads = rng.choice((16, 32, 64, 128)), rng.choice((1, 2, 3))
        results = attend(attention, chunks, block_size, rng.randrange(100), threads)
        for index, (_, start, end), result in zip(chosen, chunks, results, strict=True):
            assert torch.equal(result, wholes[index][start:end])


@pytest.mark.parametrize("level", library.levels())
@pytest.mark.parametrize("part", ["keys", "values", "queries"])
def test_a_number_that_is_none_shows(part: str, level: str) -> None:
    """A broken model must not look like one that works, from the broken token on."""
    shape = (2, 1, 16)
    sequence = a_sequence(150, shape, seed=5)
    attention = NativeAttention(*shape, torch.float32, level)
    (whole,) = attend(attention, [(sequence, 0, 150)])
    getattr(sequence, part)[70, 0, 5] = float("nan")
    (result,) = attend(attention, [(sequence, 0, 150)])
    shown = result[70:] if part != "queries" else result[70, 0]
    assert shown.isnan().all()
    assert torch.equal(result[:70], whole[:70])


def test_scores_of_any_size_and_values_of_none() -> None:
    shape, level = (2, 1, 16), library.levels()[-1]
    attention = NativeAttention(*shape, torch.float32, level)
    reference = TiledAttention(*shape, 16, Numerics(exact=True, granule=16))
    plain = a_sequence(100, shape, seed=6)
    # A query of 1e4 has steps that its softmax feels.
    cases = ((1e4, 1.0, 5e-2), (0.0, 1.0, 1e-3), (1.0, 0.0, 0.0), (1e-20, 1e20, 1e17))
    for queries, values, tolerance in cases:
        scaled = Known(plain.queries * queries, plain.keys, plain.values * values)
        (actual,), (expected,) = (
            attend(each, [(scaled, 0, 100)]) for each in (attention, reference)
        )
        assert (actual - expected).abs().max() <= tolerance


@pytest.mark.parametrize("kernels", ["", "torch"])
def test_it_is_a_class_and_a_layout_of_its_own(
    kernels: str, make_bench: Callable[..., Any]
) -> None:
    layouts = [
        make_bench("bf16", kernels=kernels, kv_dtype=kv_dtype).runner.info.layout
        for kv_dtype in ("auto", "int8")
    ]
    assert layouts[0].numerics != layouts[1].numerics
    assert layouts[1].mismatch(layouts[0]) == "dtype is bf16 there and int8 here"
    assert layouts[1].block_bytes * 2 * 16 == layouts[0].block_bytes * (16 + 4)


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"kv_dtype": "fp8"}, "'fp8' is unknown: choose one of auto, int8"),
        ({"kv_dtype": "int8", "block_size": 8}, "a multiple of 16 tokens, not of 8"),
        ({"kv_dtype": "int8", "head_dim": 18}, "dimensions, and this model's have 18"),
    ],
)
@pytest.mark.parametrize("kernels", ["", "torch"])
def test_what_cannot_be_had_is_refused(
    kernels: str, options: dict[str, Any], reason: str, make_bench: Callable[..., Any]
) -> None:
    with pytest.raises(ConfigError, match=reason):
        make_bench("bf16", kernels=kernels, **options)
