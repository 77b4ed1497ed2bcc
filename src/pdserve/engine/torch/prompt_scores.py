"""Log-probabilities of a prompt's own tokens, told by the steps that compute it.

The logits of all positions of a long chunk are gigabytes, so they are made a few rows at a time. A
row's logits have the same bits in any batch (`numerics`), and what is made of them here looks along
the row alone: the result does not depend on how a prompt was cut into chunks.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch

from pdserve.core.step import PromptScore, StepPlan, TokenLogprobs
from pdserve.engine.torch.sampler import most_likely

ROWS_AT_ONCE = 64
"""Positions whose logits are held at the same time."""

LogitsOf = Callable[[list[int]], torch.Tensor]
"""Logits ``[n, vocab]`` fp32 after the step's tokens of these indexes."""


def scores_of(plan: StepPlan, logits_of: LogitsOf) -> tuple[tuple[TokenLogprobs, ...], ...]:
    """`StepResult.scores` of the plan; empty if no row asks for any."""
    if all(row.score is None for row in plan.rows):
        return ()
    scores = []
    first = 0
    for row in plan.rows:
        scores.append(() if row.score is None else tuple(_row(row.score, first, logits_of)))
        first += len(row.token_ids)
    return tuple(scores)


def _row(score: PromptScore, first: int, logits_of: LogitsOf) -> Iterator[TokenLogprobs]:
    for begin in range(0, len(score.targets), ROWS_AT_ONCE):
        targets = list(score.targets[begin : begin + ROWS_AT_ONCE])
        places = [first + begin + i for i in range(len(targets))]
        logprobs = logits_of(places).log_softmax(dim=-1)  # [n, vocab]
        own = logprobs.gather(1, torch.tensor(targets, device=logprobs.device)[:, None])
        ranks = (logprobs > own).sum(dim=-1) + 1
        told = zip(logprobs, own[:, 0].tolist(), ranks.tolist(), strict=True)
        for row, logprob, rank in told:
            yield TokenLogprobs(logprob, rank, most_likely(row, min(score.num_top, len(row))))
