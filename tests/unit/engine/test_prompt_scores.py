"""Log-probabilities of a prompt are those of the model, however the prompt is cut into steps."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch

from pdserve.core.step import PromptScore, StepRow, TokenLogprobs

NUM_TOP = 3


def scores_by_chunks(bench: Any, row: Callable[..., StepRow], tokens: list[int], cuts: list[int]):
    """Of all tokens after the first, in one step per chunk in a fresh pool."""
    bench.fresh_pool()
    scores: list[TokenLogprobs] = []
    table = range(-(-len(tokens) // bench.block_size))
    for start, end in zip([0, *cuts], [*cuts, len(tokens)], strict=True):
        asked = replace(
            row(tokens[start:end], start, table, sampled=end == len(tokens)),
            score=PromptScore(tuple(tokens[start + 1 : end + 1]), NUM_TOP),
        )
        result = bench.runner.execute(bench.plan([asked]))
        scores.extend(result.scores[0])
    return scores


@pytest.mark.parametrize("kernels", ["", "torch"])
def test_scores_are_the_models_and_do_not_depend_on_chunks(
    kernels: str, make_bench: Callable[..., Any], row: Callable[..., StepRow], rng: random.Random
) -> None:
    bench = make_bench("fp32", kernels=kernels)
    tokens = [rng.randrange(bench.runner.info.vocab_size) for _ in range(150)]
    whole = scores_by_chunks(bench, row, tokens, [])
    assert len(whole) == len(tokens) - 1
    for cuts in ([1], [64], [16, 17, 149], [70, 140]):
        assert scores_by_chunks(bench, row, tokens, cuts) == whole
    for place in (1, 2, 64, 65, 149):
        logprobs = bench.logits_of(tokens[:place]).log_softmax(dim=-1)
        score = whole[place - 1]
        assert score.logprob == logprobs[tokens[place]].item()
        assert score.rank == int((logprobs > score.logprob).sum()) + 1
        best = torch.topk(logprobs, NUM_TOP)
        assert score.top == tuple(zip(best.indices.tolist(), best.values.tolist(), strict=True))


def test_other_rows_of_the_step_have_none(
    make_bench: Callable[..., Any], row: Callable[..., StepRow], rng: random.Random
) -> None:
    bench = make_bench("fp32")
    bench.fresh_pool()
    tokens = [rng.randrange(bench.runner.info.vocab_size) for _ in range(20)]
    plain = row(tokens, 0, [0, 1])
    asked = replace(row(tokens, 0, [2, 3]), score=PromptScore(tuple(tokens[1:]), 0))
    result = bench.runner.execute(bench.plan([plain, asked]))
    assert result.scores[0] == ()
    assert len(result.scores[1]) == 19
    assert all(score.top == () for score in result.scores[1])
    assert bench.runner.execute(bench.plan([plain])).scores == ()
