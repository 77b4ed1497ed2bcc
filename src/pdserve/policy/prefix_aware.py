"""Local cache-aware routing: the shortest way to a first token, own caches counted.

Mooncake (FAST'25, sec. 6) compares its own scheduler with this: a prefill worker's queue and the
prompt's tokens that this worker has not cached are what stands before the first token; caches of
others are not asked. The decode worker is the least loaded one.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from pdserve.policy.cluster import ClusterView, Route, RouteAsk, WorkerView
from pdserve.policy.constraints import choose_pair
from pdserve.policy.load import all_timed, quickest_decode, shortest_queue


@dataclass(frozen=True, slots=True)
class PrefixAware:
    """Queue and uncached tokens, by the speed of the worker where all speeds are known."""

    @property
    def reason(self) -> str:
        return "shortest queue and uncached prompt together"

    def choose(self, view: ClusterView, ask: RouteAsk) -> Route | None:
        return choose_pair(self, view, ask)

    def pick_prefill(self, workers: Sequence[WorkerView], ask: RouteAsk) -> WorkerView:
        return shortest_queue(workers, ask, timed=all_timed(workers), own=True)

    def pick_decode(self, workers: Sequence[WorkerView], ask: RouteAsk) -> WorkerView:
        return quickest_decode(workers, ask, timed=all_timed(workers))

    def pick_local(self, workers: Sequence[WorkerView], ask: RouteAsk) -> WorkerView:
        return self.pick_prefill(workers, ask)
