"""How loaded a worker is, in seconds of its own speed where that is known.

A queue of prompt tokens takes as long as the worker takes to compute them; decodes take as long as
a step of all of them. Workers of unlike speed are compared in seconds. Where one of the compared
workers has no model of its steps, all of them count as equally fast: then seconds stand for tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

from pdserve.core.ids import WorkerId
from pdserve.core.request import Role
from pdserve.policy.cluster import RouteAsk, WorkerView
from pdserve.policy.constraints import is_other_class

FULL_STEP_TOKENS = 2048
"""Speeds are compared on prompt steps of this size, above which throughput falls (Splitwise,
sec. III-C)."""

PrefillKey = tuple[float, bool, bool, int, WorkerId]
DecodeKey = tuple[float, int, WorkerId]


def all_timed(workers: Iterable[WorkerView]) -> bool:
    """Whether the speed of each is known, so that they can be compared in seconds."""
    return all(w.steps is not None for w in workers)


def token_s(worker: WorkerView) -> float:
    """Seconds for a prompt token of a full step; 1 if the worker's speed is not known."""
    steps = worker.steps
    if steps is None:
        return 1.0
    return (
        steps.prompt_base_s / FULL_STEP_TOKENS
        + steps.per_prompt_token_s
        + steps.per_pair_s * FULL_STEP_TOKENS
    )


def decode_step_s(worker: WorkerView, ask: RouteAsk) -> float:
    """Seconds of a decode step once the request has joined; without a model, their number."""
    steps = worker.steps
    if steps is None:
        return worker.num_decoding + 1.0
    return (
        steps.decode_base_s
        + steps.per_sequence_s * (worker.num_decoding + 1)
        + steps.per_context_token_s * (worker.context_tokens + ask.num_tokens)
    )


def by_queue(
    ask: RouteAsk, *, timed: bool, own: bool = False
) -> Callable[[WorkerView], PrefillKey]:
    """Order of prefill workers: time until the queue is computed, and with ``own`` the request's
    tokens that the worker has not cached as well. Mixed workers lose ties, and among them those
    with more to decode."""
    cached = ask.cached_tokens

    def key(worker: WorkerView) -> PrefillKey:
        tokens = worker.pending_tokens
        if own:
            tokens += max(1, ask.num_tokens - cached.get(worker.worker, 0))
        return (
            tokens * token_s(worker) if timed else tokens,
            worker.role is Role.MIXED,
            is_other_class(worker, ask),
            worker.num_decoding,
            worker.worker,
        )

    return key


def by_decode_step(ask: RouteAsk, *, timed: bool) -> Callable[[WorkerView], DecodeKey]:
    """Order of decode workers: the time between tokens that the request would see there."""

    def key(worker: WorkerView) -> DecodeKey:
        load = decode_step_s(worker, ask) if timed else worker.num_decoding
        return (load, worker.pending_tokens, worker.worker)

    return key


def by_requests(worker: WorkerView) -> tuple[int, bool, int, WorkerId]:
    """Order of workers that decode: fewest requests, then fewest pending tokens."""
    return (
        worker.num_decoding,
        worker.role is Role.MIXED,
        worker.pending_tokens,
        worker.worker,
    )


def by_answer(
    workers: Sequence[WorkerView], ask: RouteAsk
) -> Callable[[WorkerView], tuple[float, float, WorkerId]]:
    """Order of workers that do all of it: seconds until the answer is complete, which are the
    queue, the prompt, and a step for each token that is expected.

    Without models, those with the fewest requests come first, then with the fewest pending tokens.
    """
    timed = all_timed(workers)

    def key(worker: WorkerView) -> tuple[float, float, WorkerId]:
        if not timed:
            return (worker.num_decoding, worker.pending_tokens, worker.worker)
        tokens = worker.pending_tokens + ask.num_tokens
        step_s = decode_step_s(worker, ask)
        return (tokens * token_s(worker) + ask.output_tokens * step_s, step_s, worker.worker)

    return key
