"""How loaded workers are, in seconds of their own speed where that is known, and who is least so.

A queue of prompt tokens takes as long as the worker takes to compute them; decodes take as long as
a step of all of them. Workers of unlike speed are compared in seconds (``timed``). Where one of
them has no model of its steps, all of them count as equally fast, and tokens are compared.

Each function gives one of the workers, of which there is at least one. Ties end with the id.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

from pdserve.core.request import Role
from pdserve.policy.cluster import RouteAsk, WorkerView
from pdserve.policy.constraints import is_other_class

FULL_STEP_TOKENS = 2048
"""Speeds are compared on prompt steps of this size, above which throughput falls (Splitwise,
sec. III-C)."""


def all_timed(workers: Iterable[WorkerView]) -> bool:
    """Whether the speed of each is known, so that they can be compared in seconds."""
    return all(w.steps is not None for w in workers)


def prompt_token_s(workers: Sequence[WorkerView]) -> list[float]:
    """Seconds for a prompt token of a full step, for each; all of them have a model."""
    models = [w.steps for w in workers if w.steps is not None]
    assert len(models) == len(workers), "a worker's speed is not known"
    return [
        m.prompt_base_s / FULL_STEP_TOKENS + m.per_prompt_token_s + m.per_pair_s * FULL_STEP_TOKENS
        for m in models
    ]


def shortest_queue(
    workers: Sequence[WorkerView], ask: RouteAsk, *, timed: bool, own: bool = False
) -> WorkerView:
    """Whose queue is computed first, and with ``own`` the request's tokens that it has not cached
    as well. Mixed workers lose ties, and then those with more to decode."""
    loads: list[float] = [w.pending_tokens for w in workers]
    if own:
        cached, num_tokens = ask.cached_tokens, ask.num_tokens
        loads = [
            load + max(1, num_tokens - cached.get(w.worker, 0))
            for load, w in zip(loads, workers, strict=True)
        ]
    if timed:
        speeds = prompt_token_s(workers)
        loads = [load * token_s for load, token_s in zip(loads, speeds, strict=True)]
    return _least(
        workers,
        loads,
        lambda w: (w.role is Role.MIXED, is_other_class(w, ask), w.num_decoding, w.worker),
    )


def quickest_decode(workers: Sequence[WorkerView], ask: RouteAsk, *, timed: bool) -> WorkerView:
    """Who has the shortest step once the request has joined; without models, the fewest
    sequences. Pending prompt tokens lose ties."""
    loads = _decode_step_s(workers, ask) if timed else [w.num_decoding for w in workers]
    return _least(workers, loads, lambda w: (w.pending_tokens, w.worker))


def soonest_answer(workers: Sequence[WorkerView], ask: RouteAsk, *, timed: bool) -> WorkerView:
    """Who has done all of it first: the queue, the prompt, and a step for each expected token;
    without models, who has the fewest requests, and then the fewest pending tokens."""
    if not timed:
        return min(workers, key=lambda w: (w.num_decoding, w.pending_tokens, w.worker))
    num_tokens, num_steps = ask.num_tokens, ask.output_tokens
    speeds = zip(workers, prompt_token_s(workers), _decode_step_s(workers, ask), strict=True)
    loads = [(w.pending_tokens + num_tokens) * one + num_steps * step for w, one, step in speeds]
    return _least(workers, loads, lambda w: (w.num_decoding, w.worker))


def fewest_requests(workers: Sequence[WorkerView]) -> WorkerView:
    """Who decodes the fewest sequences; mixed workers lose ties, and then pending tokens."""
    return min(
        workers,
        key=lambda w: (w.num_decoding, w.role is Role.MIXED, w.pending_tokens, w.worker),
    )


def _decode_step_s(workers: Sequence[WorkerView], ask: RouteAsk) -> list[float]:
    num_tokens = ask.num_tokens
    return [
        m.decode_base_s
        + m.per_sequence_s * (w.num_decoding + 1)
        + m.per_context_token_s * (w.context_tokens + num_tokens)
        for w in workers
        if (m := w.steps) is not None
    ]


def _least(
    workers: Sequence[WorkerView], loads: Sequence[float], tie: Callable[[WorkerView], Any]
) -> WorkerView:
    """The worker of the smallest load; of several, the first by ``tie``."""
    least = min(loads)
    return min((w for w, load in zip(workers, loads, strict=True) if load == least), key=tie)
