"""Join the shortest queue, on both sides at once.

The prefill worker with the fewest pending prompt tokens and the decode worker with the fewest
sequences, chosen together (Splitwise, sec. IV-A), whatever their speed. A mixed worker that wins
the prefill keeps the request.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from pdserve.policy.cluster import ClusterView, Route, RouteAsk, WorkerView
from pdserve.policy.constraints import choose_pair
from pdserve.policy.load import fewest_requests, shortest_queue


@dataclass(frozen=True, slots=True)
class ShortestQueue:
    """Fewest pending tokens on one side, fewest sequences on the other."""

    @property
    def reason(self) -> str:
        return "fewest pending tokens on both sides"

    def choose(self, view: ClusterView, ask: RouteAsk) -> Route | None:
        return choose_pair(self, view, ask)

    def pick_prefill(self, workers: Sequence[WorkerView], ask: RouteAsk) -> WorkerView:
        return shortest_queue(workers, ask, timed=False)

    def pick_decode(self, workers: Sequence[WorkerView], ask: RouteAsk) -> WorkerView:
        return fewest_requests(workers)

    def pick_local(self, workers: Sequence[WorkerView], ask: RouteAsk) -> WorkerView:
        return fewest_requests(workers)
