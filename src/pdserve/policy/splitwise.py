"""Splitwise's rules (ISCA 2024, sec. IV-A): three pools, and an overflow from one to the next.

Prefill and decode worker are chosen together at arrival, each by join-the-shortest-queue within its
own pool. Queues are weighted by measured speed: a prefill queue is as long as it takes to compute,
a decode worker's as long as a step takes that all its sequences and the new one share.

A prefill queue that is above the threshold sends the request to the mixed pool; if that is above it
too, a decode worker is drawn into the mixed pool. A decode pool without room for the prompt's KV
does the same: mixed pool, then a prefill worker is drawn. Where both phases come to the mixed pool,
one worker does both. If every queue is above the threshold, nothing is left to be gained from
splitting: the worker that answers soonest does all of it, and the cluster is an aggregated one.

Pools are disjoint: a drawn worker is a mixed one until it has gone home, which is not decided here.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from pdserve.core.request import Role, RoutePreference
from pdserve.policy.cluster import ClusterView, Route, RouteAsk, WorkerView
from pdserve.policy.constraints import (
    choose_local,
    decode_side,
    last_prefill,
    same_class,
    why_local,
    with_room,
)
from pdserve.policy.load import (
    all_timed,
    prompt_token_s,
    quickest_decode,
    shortest_queue,
    soonest_answer,
)

EVERY_QUEUE_IS_LONG = "every queue is above the threshold; this one answers soonest"


@dataclass(frozen=True, slots=True, kw_only=True)
class Splitwise:
    """``queue_threshold_tokens``: prompt tokens, the new ones included, that may stand in the queue
    of the fastest worker; on a worker of half that speed it is half as many. One prompt is taken by
    an empty queue whatever its length."""

    queue_threshold_tokens: int = 8192

    @property
    def reason(self) -> str:
        return "shortest queue in each pool"

    def choose(self, view: ClusterView, ask: RouteAsk) -> Route | None:
        local_reason = why_local(view, ask)
        if local_reason is not None:
            return choose_local(self, view, ask, local_reason)
        timed = all_timed(view.workers)
        prefill = self._prefill(view, ask, timed)
        if prefill is not None:
            return _with_decode(view, ask, prefill, timed)
        if ask.preference is RoutePreference.AUTO:
            all_on_one = _all_on_one(view, ask, timed)
            if all_on_one is not None:
                return all_on_one
        able = [w for w in view.workers if w.role is not Role.DECODE] or view.workers
        shortest = shortest_queue(able, ask, timed=timed)
        return _with_decode(view, ask, shortest, timed)

    def pick_prefill(self, workers: Sequence[WorkerView], ask: RouteAsk) -> WorkerView:
        return shortest_queue(workers, ask, timed=all_timed(workers))

    def pick_decode(self, workers: Sequence[WorkerView], ask: RouteAsk) -> WorkerView:
        return quickest_decode(workers, ask, timed=all_timed(workers))

    def pick_local(self, workers: Sequence[WorkerView], ask: RouteAsk) -> WorkerView:
        return soonest_answer(workers, ask, timed=all_timed(workers))

    def _prefill(self, view: ClusterView, ask: RouteAsk, timed: bool) -> WorkerView | None:
        """Who prefills: of the prefill pool, else of the mixed one, else a decode worker that is to
        be drawn; None if all of their queues are above the threshold."""
        workers = view.workers
        if ask.last_prefill is not None:
            known = [w for w in workers if w.role is not Role.DECODE]
            if len(again := last_prefill(known, ask)) == 1:
                return again[0]
        for role in (Role.PREFILL, Role.MIXED, Role.DECODE):
            pool = [w for w in workers if w.role is role and (w.mixes or role is not Role.DECODE)]
            if pool:
                best = shortest_queue(pool, ask, timed=timed)
                if not self._is_long(best, view, ask, timed):
                    return best
        return None

    def _is_long(self, worker: WorkerView, view: ClusterView, ask: RouteAsk, timed: bool) -> bool:
        """Whether the worker's queue would be above the threshold with the request in it."""
        tokens = worker.pending_tokens + ask.num_tokens
        if not worker.pending_tokens or tokens > self.queue_threshold_tokens:
            return worker.pending_tokens > 0
        if not timed:
            return False
        (own_s,) = prompt_token_s([worker])
        return tokens * own_s > self.queue_threshold_tokens * min(prompt_token_s(view.workers))


def _with_decode(
    view: ClusterView, ask: RouteAsk, prefill: WorkerView, timed: bool
) -> Route | None:
    """The route whose prefill worker is chosen, or None if nobody has room to decode."""
    drawn = () if prefill.role is not Role.DECODE else (prefill.worker,)
    why = _WHY_PREFILL[prefill.role]
    others = decode_side(view, ask, prefill)
    decoders = with_room([w for w in others if w.role is Role.DECODE], ask)
    if decoders:
        chosen = quickest_decode(decoders, ask, timed=timed)
        return Route(prefill.worker, chosen.worker, f"{why}; shortest decode queue", draws=drawn)
    keeps = ask.preference is RoutePreference.AUTO and prefill.free_blocks >= ask.num_blocks
    if keeps and prefill.role is not Role.PREFILL:
        reason = f"{why}; no decode worker has room, so it decodes too"
        return Route(prefill.worker, prefill.worker, reason, draws=drawn)
    mixed = with_room([w for w in others if w.role is Role.MIXED], ask)
    if mixed:
        chosen = quickest_decode(mixed, ask, timed=timed)
        reason = f"{why}; no decode worker has room, a mixed one has"
        return Route(prefill.worker, chosen.worker, reason, draws=drawn)
    if keeps and prefill.mixes:
        reason = f"{why}; no decode or mixed worker has room, so it is drawn to decode too"
        return Route(prefill.worker, prefill.worker, reason, draws=(prefill.worker,))
    opposite = with_room([w for w in others if w.role is Role.PREFILL and w.mixes], ask)
    if not opposite:
        return None
    chosen = quickest_decode(opposite, ask, timed=timed)
    reason = f"{why}; no decode or mixed worker has room, so a prefill worker is drawn"
    return Route(prefill.worker, chosen.worker, reason, draws=(*drawn, chosen.worker))


def _all_on_one(view: ClusterView, ask: RouteAsk, timed: bool) -> Route | None:
    roomy = [w for w in view.workers if w.mixes and w.free_blocks >= ask.num_blocks]
    workers = same_class(roomy, ask)
    if not workers:
        return None
    chosen = soonest_answer(workers, ask, timed=timed)
    draws = () if chosen.role is Role.MIXED else (chosen.worker,)
    return Route(chosen.worker, chosen.worker, EVERY_QUEUE_IS_LONG, draws=draws)


_WHY_PREFILL = {
    Role.PREFILL: "shortest prefill queue",
    Role.MIXED: "no prefill queue is below the threshold, a mixed worker's is",
    Role.DECODE: "no prefill or mixed queue is below the threshold, so a decode worker is drawn",
}
