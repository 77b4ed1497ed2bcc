"""From logits to tokens, for all rows of a step at once.

The order is vLLM's: tokens that a row's constraint does not allow are masked, and ending tokens
before ``min_tokens``, then bias, then penalties (repetition, frequency, presence); that is what
greedy sampling sees. Then temperature, min_p, top_k and top_p, and a draw by the inverse of the
cumulative distribution with the token's own random number (`philox`). Reported log-probabilities
are those of the raw logits, of a constrained row after the constraint's mask, as vLLM's are.

Every operation gives a row the same bits whatever the other rows are: it is elementwise, exact
(maximum, selection), or a cumulative sum along the row, which is added in order. ``sum`` is not
used: over one long row it is split between threads. Filters are thresholds on values: a token that
equals the last one kept is kept too, so no result hangs on the order in which ties are sorted.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from itertools import zip_longest
from math import gcd

import torch

from pdserve.core.request import SamplingParams
from pdserve.core.step import SampledToken, SampleSpec, TokenLogprobs
from pdserve.engine.torch.penalties import apply_penalties
from pdserve.engine.torch.philox import uniforms
from pdserve.text.structured.masks import Masks

GREEDY_BELOW = 1e-5
"""A smaller temperature is greedy, as in vLLM: dividing by it would overflow."""

LEAST_EXPONENT = -87.0
"""Tokens this far below the best are never drawn: a fp32 probability has no normal number for it,
and a random number of 53 bits would not find it."""

TOP_P_CANDIDATES = 256
"""Top-p looks at so many tokens first and sorts the vocabulary only where they do not suffice."""


def sample(
    logits: torch.Tensor,
    specs: Sequence[SampleSpec],
    find_best: Callable[[torch.Tensor], torch.Tensor] | None = None,
    masks: Masks | None = None,
) -> tuple[tuple[SampledToken, ...], ...]:
    """One token per row and choice of its spec. ``logits [row, vocab]`` fp32 are not changed.

    ``find_best`` computes what `first_best` does, which it replaces. ``masks`` are those of the
    constrained rows.
    """
    if masks is not None:
        logits = constrain(logits, masks)
    adjusted = adjust_logits(logits, specs)
    best = (find_best or first_best)(adjusted).tolist()
    chosen = [[token] * len(spec.choices) for token, spec in zip(best, specs, strict=True)]
    drawn = [i for i, spec in enumerate(specs) if spec.params.temperature >= GREEDY_BELOW]
    if drawn:
        tokens = draw(adjusted[drawn], [specs[i] for i in drawn])
        for i, row_tokens in zip(drawn, tokens, strict=True):
            chosen[i] = row_tokens
    return tuple(
        _with_logprobs(logits, row, tokens, spec.params.logprobs)
        for row, (tokens, spec) in enumerate(zip(chosen, specs, strict=True))
    )


def first_best(rows: torch.Tensor) -> torch.Tensor:
    """The first index of the greatest value of each of ``rows [n, vocab]``, as `argmax` has it.

    On a CPU `argmax` is ten times as slow as a maximum; so it searches only the part that has it.
    """
    width = gcd(rows.shape[1], 1024)
    if width < 64:
        return rows.argmax(dim=-1)
    parts = rows.reshape(rows.shape[0], -1, width)
    part = parts.amax(dim=-1).argmax(dim=-1)  # the first one, if several have it
    found = parts[torch.arange(len(rows), device=rows.device), part]
    return part * width + found.argmax(dim=-1)


def constrain(logits: torch.Tensor, masks: Masks) -> torch.Tensor:
    """A copy of ``logits [row, vocab]`` without what the constrained rows may not draw."""
    rows = torch.tensor(masks.rows, device=logits.device)
    bias = torch.from_numpy(masks.bias).to(logits.device)
    return logits.clone().index_add_(0, rows, bias)


def adjust_logits(logits: torch.Tensor, specs: Sequence[SampleSpec]) -> torch.Tensor:
    """Logits after ``min_tokens``, ``logit_bias`` and penalties; a copy if any row has some."""
    adjusted = logits
    masked = _entries(
        (row, token, float("-inf"))
        for row, spec in enumerate(specs)
        # The masks of constrained rows know of `min_tokens`.
        if spec.index < spec.params.min_tokens and spec.params.constraint is None
        for token in spec.params.ending_token_ids
        if 0 <= token < logits.shape[1]
    )
    biased = _entries(
        (row, token, bias)
        for row, spec in enumerate(specs)
        for token, bias in spec.params.logit_bias
        if 0 <= token < logits.shape[1]
    )
    for rows, tokens, values in filter(None, (masked, biased)):
        adjusted = adjusted.clone() if adjusted is logits else adjusted
        device = adjusted.device
        adjusted.index_put_(
            (torch.tensor(rows, device=device), torch.tensor(tokens, device=device)),
            torch.tensor(values, dtype=torch.float32, device=device),
            accumulate=True,
        )
    if any(spec.params.has_penalties for spec in specs):
        adjusted = apply_penalties(adjusted, specs)
    return adjusted


def _entries(
    triples: Iterable[tuple[int, int, float]],
) -> tuple[list[int], list[int], list[float]] | None:
    """Columns of (row, token, value), or None if there are none."""
    rows, tokens, values = [], [], []
    for row, token, value in triples:
        rows.append(row)
        tokens.append(token)
        values.append(value)
    return (rows, tokens, values) if rows else None


def draw(adjusted: torch.Tensor, specs: Sequence[SampleSpec]) -> list[list[int]]:
    """Random tokens, one per choice, from ``adjusted [row, vocab]``."""
    device = adjusted.device
    params = [spec.params for spec in specs]
    temperature = torch.tensor([p.temperature for p in params], device=device)
    # The maximum comes off first, so that no quotient overflows: the best token has exactly 0.
    scaled = (adjusted - adjusted.amax(dim=-1, keepdim=True)).div_(temperature[:, None])
    weights = weights_above_(scaled, keep_threshold(scaled, params))
    cumulative = weights.cumsum(dim=-1, dtype=torch.float64)  # [row, vocab]
    total = cumulative[:, -1:]
    numbers = _random_numbers(specs).to(device)  # [row, most choices]
    # Strictly below the total, so that rounding cannot pass over the last token kept.
    targets = torch.minimum(numbers * total, torch.nextafter(total, torch.zeros_like(total)))
    tokens = torch.searchsorted(cumulative, targets, right=True)
    # A row of NaN, from a broken model, finds no token: it must not leave the vocabulary.
    drawn = tokens.clamp_(max=adjusted.shape[1] - 1).tolist()
    return [row[: len(spec.choices)] for row, spec in zip(drawn, specs, strict=True)]


def weights_above_(scaled: torch.Tensor, threshold: torch.Tensor) -> torch.Tensor:
    """In place of ``scaled [row, vocab]`` its exponential, and 0 below ``threshold [row]``.

    The exponential of what is below `LEAST_EXPONENT` is slow to compute, of minus infinity too; so
    it is not asked for.
    """
    kept = scaled >= threshold.clamp_min(LEAST_EXPONENT)[:, None]
    return scaled.clamp_min_(LEAST_EXPONENT).exp_().mul_(kept)


def _random_numbers(specs: Sequence[SampleSpec]) -> torch.Tensor:
    """``[row, most choices]`` fp64 in [0, 1), filled up with 0."""
    keys = [(spec.params.seed, choice, spec.index) for spec in specs for choice in spec.choices]
    flat = iter(uniforms(*zip(*keys, strict=True)).tolist())
    rows = [[next(flat) for _ in spec.choices] for spec in specs]
    columns = zip_longest(*rows, fillvalue=0.0)
    return torch.tensor(list(columns), dtype=torch.float64).T.contiguous()


def keep_threshold(scaled: torch.Tensor, params: Sequence[SamplingParams]) -> torch.Tensor:
    """Least value of ``scaled [row, vocab]`` that a row's filters keep, ``[row]``.

    ``scaled`` has maximum 0 in each row, so the exponential of a value is its probability relative
    to the best token's: min_p is a threshold by itself.
    """
    device, vocab = scaled.device, scaled.shape[1]
    min_p = torch.tensor([p.min_p for p in params], dtype=torch.float32, device=device)
    threshold = min_p.log()  # -inf for 0: keeps all
    limits = [p.top_k if 0 < p.top_k < vocab else 0 for p in params]
    if any(limits):
        rows = torch.tensor([i for i, k in enumerate(limits) if k], device=device)
        last = torch.tensor([k - 1 for k in limits if k], device=device)
        best = scaled[rows].topk(max(limits), dim=-1).values
        kth = best.gather(1, last[:, None])[:, 0]
        threshold[rows] = torch.maximum(threshold[rows], kth)
    nucleus = [i for i, p in enumerate(params) if p.top_p < 1.0]
    if nucleus:
        rows = torch.tensor(nucleus, device=device)
        kept = scaled[rows]
        kept = kept.masked_fill_(kept < threshold[rows, None], float("-inf"))
        mass = torch.tensor([params[i].top_p for i in nucleus], dtype=torch.float64, device=device)
        threshold[rows] = torch.maximum(threshold[rows], _nucleus_threshold(kept, mass))
    return threshold


def _nucleus_threshold(scaled: torch.Tensor, top_p: torch.Tensor) -> torch.Tensor:
    """Value of the last token of the smallest set of best tokens that has ``top_p`` of the mass."""
    lowest = torch.full_like(scaled[:, 0], float("-inf"))
    needed = (
        weights_above_(scaled.clone(), lowest).cumsum(dim=-1, dtype=torch.float64)[:, -1] * top_p
    )  # [row]
    size = min(TOP_P_CANDIDATES, scaled.shape[1])
    values = scaled.topk(size, dim=-1).values
    threshold, reached = _where_reached(values, needed)
    short = (~reached).nonzero()[:, 0]
    if len(short):
        ordered = scaled[short].sort(dim=-1, descending=True).values
        threshold[short] = _where_reached(ordered, needed[short])[0]
    return threshold


def _where_reached(
    ordered: torch.Tensor, needed: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """First value of each descending row up to which the mass is ``needed``, and if it is ever."""
    cumulative = ordered.exp().cumsum(dim=-1, dtype=torch.float64)
    position = torch.searchsorted(cumulative, needed[:, None])
    reached = (position < ordered.shape[1])[:, 0]
    return ordered.gather(1, position.clamp_(max=ordered.shape[1] - 1))[:, 0], reached


def _with_logprobs(
    logits: torch.Tensor, row: int, tokens: Sequence[int], num_top: int | None
) -> tuple[SampledToken, ...]:
    """A row's tokens, with log-probabilities of its raw ``logits [row, vocab]`` if wanted."""
    if num_top is None:
        return tuple(SampledToken(token) for token in tokens)
    logprobs = logits[row].log_softmax(dim=-1)
    top = most_likely(logprobs, min(num_top, logprobs.shape[0]))
    sampled = []
    for token in tokens:
        own = logprobs[token]
        rank = int((logprobs > own).count_nonzero()) + 1
        sampled.append(SampledToken(token, TokenLogprobs(float(own), rank, top)))
    return tuple(sampled)


def most_likely(logprobs: torch.Tensor, count: int) -> tuple[tuple[int, float], ...]:
    """(token, log-probability) of the ``count`` best of ``logprobs [vocab]``, ties by token id."""
    if count == 0:
        return ()
    least = logprobs.topk(count).values[-1]
    ids = (logprobs >= least).nonzero()[:, 0]  # ascending, so a stable sort keeps that for ties
    values, order = logprobs[ids].sort(descending=True, stable=True)
    return tuple(zip(ids[order[:count]].tolist(), values[:count].tolist(), strict=True))
