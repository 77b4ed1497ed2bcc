"""A layer's kernels as one program: the same bits as one by one, and frames that are kept."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import pytest
import torch

from pdserve.engine.native import library
from pdserve.engine.torch.native_layers import HEAD_ROWS, KEPT_FRAMES, KEPT_TOKENS


def a_step(row: Callable[..., Any], sizes: list[int], rng: random.Random) -> list[Any]:
    rows, first = [], 0
    for size in sizes:
        num_blocks = -(-size // 16)
        rows.append(
            row([rng.randrange(384) for _ in range(size)], 0, range(first, first + num_blocks))
        )
        first += num_blocks
    return rows


@pytest.mark.parametrize("level", library.levels())
@pytest.mark.parametrize(("dtype", "kv"), [("fp32", "auto"), ("bf16", "auto"), ("bf16", "int8")])
def test_programs_give_the_bits_of_their_kernels(
    dtype: str, kv: str, level: str, make_bench: Callable[..., Any], row: Callable[..., Any]
) -> None:
    bench = make_bench(dtype, kernels=level, kv_dtype=kv)
    model = bench.runner._model
    programs = model._native
    assert programs is not None
    rng = random.Random(8)
    for sizes in ([1], [1, 1, 5], [300], [129, 1, 64], [1]):
        rows = a_step(row, sizes, rng)
        bench.fresh_pool()
        together, pool = bench.logits(rows), bytes(bench.memory)
        bench.fresh_pool()
        model._native = None
        apart = bench.logits(rows)
        model._native = programs
        assert torch.equal(together, apart)
        assert pool == bytes(bench.memory)


def test_only_some_small_frames_are_kept(
    make_bench: Callable[..., Any], row: Callable[..., Any]
) -> None:
    bench = make_bench("bf16", num_blocks=300)
    frames = bench.runner._model._native._kept
    rng = random.Random(9)
    for num_tokens in (*range(1, KEPT_FRAMES + 5), KEPT_TOKENS + 1, 2):
        bench.logits(a_step(row, [num_tokens], rng))
    assert len(bench.logits(a_step(row, [1] * (HEAD_ROWS + 1), rng))) == HEAD_ROWS + 1
    sizes = [num_tokens for num_tokens, _ in frames]
    assert len(sizes) == KEPT_FRAMES
    assert max(sizes) <= KEPT_TOKENS
    assert sizes[-1] == 2


def test_rows_that_must_be_padded_go_one_by_one(make_bench: Callable[..., Any]) -> None:
    """An odd width has no pairs: those products read a padded copy, which no program holds."""
    widths = {"intermediate_size": 101, "hidden_size": 64}
    assert make_bench("bf16", **widths).runner._model._native is None
    assert make_bench("fp32", **widths).runner._model._native is not None
    assert make_bench("bf16", kernels="torch").runner._model._native is None


def test_layers_that_somebody_waits_for_have_the_same_bits(
    make_bench: Callable[..., Any], row: Callable[..., Any]
) -> None:
    """One call for each layer, where there is a sink, or one for all."""
    bench = make_bench("bf16")
    rows = a_step(row, [1, 40, 7], random.Random(10))
    bench.fresh_pool()
    at_once, pool = bench.logits(rows), bytes(bench.memory)
    bench.fresh_pool()
    heard: list[int] = []

    class Sink:
        def layer_done(self, step_id: int, layer: int) -> None:
            heard.append(layer)

    one_by_one = bench.runner.logits(bench.plan(rows), Sink())
    assert heard == list(range(bench.runner.info.layout.num_layers))
    assert torch.equal(at_once, one_by_one)
    assert pool == bytes(bench.memory)


def test_logits_outlive_the_step(make_bench: Callable[..., Any], row: Callable[..., Any]) -> None:
    """What a caller is given is not the memory that the next step writes to."""
    bench = make_bench("bf16")
    rng = random.Random(11)
    first = bench.logits(a_step(row, [3], rng))
    before = first.clone()
    assert not torch.equal(bench.logits(a_step(row, [3], rng)), before)
    assert torch.equal(first, before)
