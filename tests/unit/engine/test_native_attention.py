"""Compiled attention: right, and equal to itself bit by bit, at every level this machine has."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pdserve.core.errors import ConfigError
from pdserve.engine.native import library
from pdserve.engine.torch.attention import TiledAttention
from pdserve.engine.torch.attention_registry import AttentionKind, choose_attention
from pdserve.engine.torch.batch import RowSpan, StepBatch
from pdserve.engine.torch.native_attention import NativeAttention
from pdserve.engine.torch.numerics import Numerics

DTYPES = (torch.bfloat16, torch.float32)
SHAPES = ((9, 3, 64), (4, 2, 16), (6, 3, 12), (5, 1, 80), (30, 1, 34), (2, 2, 128))
"""Heads, kv heads, head_dim."""
EDGES = (1, 2, 3, 8, 9, 24, 25, 63, 64, 65, 127, 128, 129, 200)


@dataclass(frozen=True)
class Known:
    """All that attention sees of one sequence, and its result when computed whole and alone."""

    queries: torch.Tensor  # [token, head, head_dim] fp32
    keys: torch.Tensor  # [token, kv head, head_dim]
    values: torch.Tensor
    whole: torch.Tensor  # [token, head, head_dim]


def a_sequence(
    length: int, shape: tuple[int, int, int], dtype: torch.dtype, level: str, seed: int
) -> Known:
    generator = torch.Generator().manual_seed(seed)
    heads, kv_heads, head_dim = shape
    queries = torch.randn(length, heads, head_dim, generator=generator) * 2
    keys = torch.randn(length, kv_heads, head_dim, generator=generator).to(dtype)
    values = torch.randn(length, kv_heads, head_dim, generator=generator).to(dtype)
    alone = Known(queries, keys, values, queries)
    attention = NativeAttention(*shape, dtype, level)
    (whole,) = attend(attention, [(alone, 0, length)], 16, random.Random(seed), 1)
    return Known(queries, keys, values, whole)


def attend(
    attention: TiledAttention | NativeAttention,
    chunks: Sequence[tuple[Known, int, int]],
    block_size: int,
    rng: random.Random,
    num_threads: int,
) -> list[torch.Tensor]:
    """One step over (sequence, start, end) in scattered blocks; all other memory is NaN."""
    counts = [-(-end // block_size) for _, _, end in chunks]
    free = rng.sample(range(sum(counts) + 3), sum(counts))
    first = chunks[0][0]
    kv_heads, head_dim = first.keys.shape[1:]
    kv = torch.full((sum(counts) + 3, 2, kv_heads, block_size, head_dim), float("nan"))
    kv = kv.to(first.keys.dtype)
    rows, queries = [], []
    for (sequence, start, end), count in zip(chunks, counts, strict=True):
        table = [free.pop() for _ in range(count)]
        slots = torch.tensor([table[p // block_size] * block_size for p in range(end)])
        slots += torch.arange(end) % block_size
        flat = kv.permute(0, 3, 1, 2, 4).reshape(-1, 2, kv_heads, head_dim)
        flat[slots, 0], flat[slots, 1] = sequence.keys[:end], sequence.values[:end]
        kv = flat.view(-1, block_size, 2, kv_heads, head_dim).permute(0, 2, 3, 1, 4).contiguous()
        done = sum(row.num_tokens for row in rows)
        rows.append(RowSpan(done, end - start, start, tuple(table)))
        queries.append(sequence.queries[start:end])
    num_tokens = sum(row.num_tokens for row in rows)
    none = torch.zeros(0, dtype=torch.int64)
    padding = torch.full((rng.randrange(3), *first.queries.shape[1:]), float("nan"))
    ids = torch.zeros(num_tokens + len(padding), dtype=torch.int64)
    batch = StepBatch(num_tokens, ids, none, 0, tuple(rows), block_size)
    before = torch.get_num_threads()
    torch.set_num_threads(num_threads)
    prepared = attention.prepare(batch, torch.device("cpu"))
    out = attention.attend(torch.cat([*queries, padding]), kv, prepared)
    torch.set_num_threads(before)
    assert not out[num_tokens:].any()
    return list(torch.split(out[:num_tokens], [row.num_tokens for row in rows]))


def exactly(sequence: Known) -> torch.Tensor:
    """Softmax attention in fp64, from the formula."""
    heads, (length, kv_heads, head_dim) = sequence.queries.shape[1], sequence.keys.shape
    keys = sequence.keys.double().repeat_interleave(heads // kv_heads, dim=1)
    values = sequence.values.double().repeat_interleave(heads // kv_heads, dim=1)
    scores = torch.einsum("qhd,khd->hqk", sequence.queries.double(), keys) * head_dim**-0.5
    hidden = torch.ones(length, length, dtype=torch.bool).triu(1)
    weights = scores.masked_fill(hidden, float("-inf")).softmax(dim=-1)
    return torch.einsum("hqk,khd->qhd", weights, values)


@pytest.mark.parametrize("level", library.levels())
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_it_is_softmax_attention(
    shape: tuple[int, int, int], dtype: torch.dtype, level: str
) -> None:
    sequence = a_sequence(150, shape, dtype, level, seed=1)
    assert sequence.whole.dtype == dtype
    tolerance = 1e-5 if dtype == torch.float32 else 4e-2
    torch.testing.assert_close(
        sequence.whole.double(), exactly(sequence), rtol=tolerance, atol=tolerance
    )


@pytest.mark.parametrize("level", library.levels())
@pytest.mark.parametrize("dtype", DTYPES)
def test_it_agrees_with_the_reference(dtype: torch.dtype, level: str) -> None:
    shape = SHAPES[0]
    sequence = a_sequence(200, shape, dtype, level, seed=2)
    reference = TiledAttention(*shape, 16, Numerics(exact=True, granule=16))
    chunks = [(sequence, 0, 200), (sequence, 70, 71), (sequence, 64, 130)]
    results = attend(reference, chunks, 16, random.Random(2), 1)
    tolerance = 1e-5 if dtype == torch.float32 else 3e-2
    for (_, start, end), result in zip(chunks, results, strict=True):
        torch.testing.assert_close(
            sequence.whole[start:end].float(), result, rtol=tolerance, atol=tolerance
        )


@pytest.mark.parametrize("level", library.levels())
@pytest.mark.parametrize("dtype", DTYPES)
@settings(max_examples=25, derandomize=True, database=None)
@given(seed=st.integers(0, 2**32))
def test_a_query_has_the_same_bits_in_any_step(seed: int, dtype: torch.dtype, level: str) -> None:
    """Any mixture of chunks, block size, scattered tables and threads, with NaN around it."""
    rng = random.Random(seed)
    shape = rng.choice(SHAPES)
    attention = NativeAttention(*shape, dtype, level)
    lengths = [rng.choice(EDGES) if rng.random() < 0.5 else rng.randint(1, 260) for _ in range(3)]
    sequences = [a_sequence(n, shape, dtype, level, seed + i) for i, n in enumerate(lengths)]
    for _ in range(3):
        chunks = []
        for sequence in rng.choices(sequences, k=rng.randint(1, 5)):
            end = rng.randint(1, len(sequence.queries))
            size = rng.choice((1, 1, rng.choice(EDGES), end))
            chunks.append((sequence, max(0, end - size), end))
        block_size = rng.choice((1, 8, 16, 64, 128))
        results = attend(attention, chunks, block_size, rng, rng.choice((1, 2, 3)))
        for (sequence, start, end), result in zip(chunks, results, strict=True):
            assert torch.equal(result, sequence.whole[start:end])


def test_more_sequence_than_is_packed_at_once() -> None:
    """Long prompts are packed some kv heads at a time; the bits do not show it."""
    shape, level = (8, 8, 128), library.levels()[-1]
    sequence = a_sequence(9000, shape, torch.float32, level, seed=3)
    attention = NativeAttention(*shape, torch.float32, level)
    chunks = [(sequence, 8960, 9000), (sequence, 8999, 9000)]
    for result in attend(attention, chunks, 64, random.Random(3), 2):
        assert torch.equal(result, sequence.whole[-len(result) :])


def test_large_scores_neither_overflow_nor_vanish() -> None:
    shape, level = (2, 1, 16), library.levels()[-1]
    huge = a_sequence(100, shape, torch.float32, level, seed=4)
    scaled = Known(huge.queries * 1e4, huge.keys * 1e4, huge.values, huge.whole)
    (result,) = attend(
        NativeAttention(*shape, torch.float32, level), [(scaled, 0, 100)], 16, random.Random(4), 1
    )
    torch.testing.assert_close(result.double(), exactly(scaled), rtol=1e-4, atol=1e-4)


def test_a_value_that_is_no_number_shows() -> None:
    """A broken model must not look like one that works."""
    shape, level = (2, 1, 16), library.levels()[-1]
    broken = a_sequence(70, shape, torch.float32, level, seed=5)
    broken.keys[3, 0, 5] = float("nan")
    (result,) = attend(
        NativeAttention(*shape, torch.float32, level), [(broken, 0, 70)], 16, random.Random(5), 1
    )
    assert result[3:].isnan().any(dim=-1).all()
    assert torch.equal(result[:3], broken.whole[:3])


@pytest.mark.parametrize("level", library.levels())
def test_a_level_can_be_forced(level: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(library.KERNELS_VARIABLE, level)
    assert library.choose_level() == level
    kind = choose_attention("cpu", "exact", library.choose_level())
    assert kind == AttentionKind("native", level)
    assert level in kind.name


def test_torch_alone_can_be_forced(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(library.KERNELS_VARIABLE, "torch")
    assert library.choose_level() is None
    assert choose_attention("cpu", "exact", None).name == "tiled"
    assert choose_attention("cpu", "fast", None).name == "sdpa"
    assert choose_attention("cuda:0", "exact", "avx2").name == "tiled"


def test_a_level_that_cannot_be_had_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(library.KERNELS_VARIABLE, "altivec")
    with pytest.raises(ConfigError, match="'altivec' cannot be had here: choose one of torch, "):
        library.choose_level()


def test_by_default_the_best_level_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(library.KERNELS_VARIABLE, raising=False)
    assert library.choose_level() == library.levels()[-1]
