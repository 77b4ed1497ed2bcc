"""Whether a request is let in: early rejection (Mooncake, FAST 2025; technical report, sec. 7).

A request whose class has latency bounds is judged once, on arrival, before anything is spent on it:
would its first token come within the TTFT bound, and would its answer come at the pace of the TPOT
bound? A request that would miss either is refused at once, with the time after which it is worth
trying again.

The decode load that counts is not today's. It takes a prefill until the request decodes, and with
today's load (`EarlyRejection`) everybody is let in who comes in that time: too many, then nobody,
then too many again; both loads swing. `PredictedRejection` counts who will decode at the moment
when the prefill ends: those that will have finished are gone, those in prefill have arrived, and so
have as many as come at the pace of late whose prefill is a shorter one.

A bound that an idle cluster could not keep either is no matter of load, so it refuses nobody: such
a request is let in when nothing stands in its way. What has no bounds, and what cannot be predicted
because no worker has a step model, is always let in.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterator
from dataclasses import dataclass
from math import inf
from typing import Protocol

from pdserve.core.request import Role, RoutePreference
from pdserve.cost.step import StepModel
from pdserve.policy.cluster import RouteAsk, WorkerView
from pdserve.policy.course import NOBODY
from pdserve.policy.forecast import (
    DecodeForecast,
    LoadView,
    backlog_s,
    idle_prefill_s,
    prefill_s,
)

NUM_LOOKED_AT = 3
"""Workers of each side that are forecast: those with the least to do now, by a cheaper measure, and
the one with the longest cached prefix. It keeps the cost of a judgement flat."""
TPOT_MARGIN = 0.9
"""Share of the promised TPOT that a step may take. What is promised is the mean of many steps, and
a server that lets in up to the bound hovers at it: half of the answers would be just too slow."""


@dataclass(frozen=True, slots=True)
class Admission:
    """``reason`` in words; ``retry_after_s`` (of a refusal): when the bounds could be kept."""

    accepted: bool
    reason: str
    retry_after_s: float = 0.0


class AdmissionPolicy(Protocol):
    def judge(self, view: LoadView, ask: RouteAsk) -> Admission:
        """Of a new request; resumes are not judged."""
        ...


class NoRejection:
    """Lets everybody in; only the limits of the router's queue refuse."""

    def judge(self, view: LoadView, ask: RouteAsk) -> Admission:
        return Admission(True, "nobody is refused early")


class PredictedRejection:
    """By the decode load of the moment when the prefill will have ended."""

    def judge(self, view: LoadView, ask: RouteAsk) -> Admission:
        return _judge(view, ask)


class EarlyRejection:
    """By the decode load of now: those that decode at this moment. To be compared with."""

    def judge(self, view: LoadView, ask: RouteAsk) -> Admission:
        return _judge(view, ask, only_now=True)


ADMISSION_POLICIES: dict[str, type[AdmissionPolicy]] = {
    "none": NoRejection,
    "early": EarlyRejection,
    "predicted": PredictedRejection,
}
"""By the name of ``--admission``, and in recordings."""


@dataclass(frozen=True, slots=True)
class _Outlook:
    """What the request would get, by way of one decode worker. ``excess_s``: how long until its
    bounds could be kept; none if they are."""

    ttft_s: float
    tpot_s: float
    late: bool
    slow: bool
    excess_s: float


def _judge(view: LoadView, ask: RouteAsk, *, only_now: bool = False) -> Admission:
    service = ask.service
    if not service.is_bounded:
        return Admission(True, f"class {service.name} has no bounds")
    if not view.cluster.workers:
        return Admission(True, "no worker is there to be judged by")
    prefills, decodes = _sides(view.cluster.workers, ask)
    if not prefills or not decodes:
        return Admission(True, "nothing is known of how fast the workers are")
    outlooks = []
    for outlook in _outlooks(view, ask, prefills, decodes, only_now=only_now):
        if not outlook.late and not outlook.slow:
            return Admission(True, f"expected: {_figures(outlook)}")
        outlooks.append(outlook)
    best = min(outlooks, key=lambda outlook: outlook.excess_s)
    if best.late:
        broken = f"{_ms(service.ttft_s)} to the first token"
    else:
        broken = f"{_ms(service.tpot_s)} per token, a tenth of which is kept back"
    detail = f"class {service.name} promises {broken}; expected now: {_figures(best)}"
    return Admission(False, detail, best.excess_s)


def _outlooks(
    view: LoadView,
    ask: RouteAsk,
    prefills: list[tuple[WorkerView, StepModel]],
    decodes: list[tuple[WorkerView, StepModel]],
    *,
    only_now: bool,
) -> Iterator[_Outlook]:
    """By way of each decode worker, with the prefill worker that is ready first."""
    waiting = view.waiting_tokens / len(view.cluster.workers)
    queue_s, own_s = min((_prefill_times(*prefill, ask, waiting) for prefill in prefills), key=sum)
    link = view.cluster.link
    exposed_s = link.exposed_s(ask.num_tokens * view.cluster.token_bytes, own_s)
    ttft_bound_s = max(ask.service.ttft_s, min(_idle_s(*prefill, ask) for prefill in prefills))
    for worker, steps in decodes:
        flights = view.flights.get(worker.worker, ())
        newcomers = NOBODY
        if only_now:
            flights = [flight for flight in flights if flight.starts_in_s <= 0.0]
        elif flights:
            newcomers = view.newcomers.get(worker.worker, NOBODY)
        forecast = DecodeForecast(worker, steps, flights, newcomers)
        room_s = forecast.room_in_s(ask.num_blocks + waiting / worker.block_size)
        ttft_s = max(queue_s, room_s) + own_s
        at_s = 0.0 if only_now else ttft_s + exposed_s
        yield _outlook(forecast, steps, ask, (ttft_s, ttft_bound_s), at_s)


def _outlook(
    forecast: DecodeForecast,
    steps: StepModel,
    ask: RouteAsk,
    ttft: tuple[float, float],
    at_s: float,
) -> _Outlook:
    """``ttft``: what it will be, and its bound. ``at_s``: the moment whose decode load counts."""
    ttft_s, ttft_bound_s = ttft
    num_tokens, num_choices = ask.num_tokens, ask.num_choices
    tpot_s = forecast.tpot_s(at_s, num_tokens, num_choices)
    tpot_s += forecast.prompts_s(at_s, num_tokens, ask.output_tokens)
    idle_s = DecodeForecast(forecast.worker, steps, ()).tpot_s(0.0, num_tokens, num_choices)
    tpot_bound_s = max(TPOT_MARGIN * ask.service.tpot_s, idle_s)
    late, slow = ttft_s > ttft_bound_s, tpot_s > tpot_bound_s
    excess_s = ttft_s - ttft_bound_s if late else 0.0
    if slow:
        calm_s = forecast.calm_in_s(tpot_bound_s, num_tokens, num_choices, at_s)
        excess_s = max(excess_s, calm_s - at_s)
    return _Outlook(ttft_s, tpot_s, late, slow, excess_s)


def _prefill_times(
    worker: WorkerView, steps: StepModel, ask: RouteAsk, waiting_tokens: float
) -> tuple[float, float]:
    """(wait, own prefill) in seconds, with the worker's share of what waits in the router."""
    cached = ask.cached_tokens.get(worker.worker, 0)
    own_s = prefill_s(worker, steps, ask.num_tokens, cached)
    return backlog_s(worker, steps, ask.num_tokens, waiting_tokens), own_s


def _idle_s(worker: WorkerView, steps: StepModel, ask: RouteAsk) -> float:
    return idle_prefill_s(steps, ask.num_tokens, ask.cached_tokens.get(worker.worker, 0))


def _sides(
    workers: tuple[WorkerView, ...], ask: RouteAsk
) -> tuple[list[tuple[WorkerView, StepModel]], list[tuple[WorkerView, StepModel]]]:
    """Workers that would prefill it, and those that would decode it, the least busy ones."""
    prefills = _pool(workers, Role.PREFILL)
    decodes = _pool(workers, Role.DECODE)
    if ask.preference is RoutePreference.LOCAL:
        prefills = decodes = [w for w in workers if w.role is Role.MIXED] or list(workers)
    chosen = heapq.nsmallest(NUM_LOOKED_AT, prefills, key=lambda w: (w.pending_tokens, w.worker))
    if ask.cached_tokens:
        holder = max(prefills, key=lambda w: ask.cached_tokens.get(w.worker, 0))
        if holder not in chosen:
            chosen.append(holder)
    roomy = heapq.nsmallest(
        NUM_LOOKED_AT,
        decodes,
        key=lambda w: (w.free_blocks < ask.num_blocks, w.num_decoding, w.worker),
    )
    return _with_steps(chosen), _with_steps(roomy)


def _pool(workers: tuple[WorkerView, ...], role: Role) -> list[WorkerView]:
    return [w for w in workers if w.role in (role, Role.MIXED)] or list(workers)


def _with_steps(workers: list[WorkerView]) -> list[tuple[WorkerView, StepModel]]:
    return [(worker, worker.steps) for worker in workers if worker.steps is not None]


def _figures(outlook: _Outlook) -> str:
    return f"{_ms(outlook.ttft_s)} to the first token, {_ms(outlook.tpot_s)} per token"


def _ms(seconds: float) -> str:
    if seconds == inf:
        return "no room in sight"
    return f"{1000 * seconds:.0f} ms" if seconds >= 0.001 else f"{1000 * seconds:g} ms"
