"""The less loaded of two that are drawn: nearly as even as the shortest queue, with two looks.

Choosing the best of two random workers avoids the herd that follows a stale report to whoever
looked idle in it (Mitzenmacher 2001).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from pdserve.policy.cluster import ClusterView, Route, RouteAsk, WorkerView
from pdserve.policy.constraints import choose_pair
from pdserve.policy.draws import draw
from pdserve.policy.load import fewest_requests, shortest_queue


@dataclass(frozen=True, slots=True)
class PowerOfTwo:
    """Two different workers are drawn on each side; the one with the shorter queue wins."""

    @property
    def reason(self) -> str:
        return "less loaded of two drawn on each side"

    def choose(self, view: ClusterView, ask: RouteAsk) -> Route | None:
        return choose_pair(self, view, ask)

    def pick_prefill(self, workers: Sequence[WorkerView], ask: RouteAsk) -> WorkerView:
        return shortest_queue(_two(workers, ask, "prefill"), ask, timed=False)

    def pick_decode(self, workers: Sequence[WorkerView], ask: RouteAsk) -> WorkerView:
        return fewest_requests(_two(workers, ask, "decode"))

    def pick_local(self, workers: Sequence[WorkerView], ask: RouteAsk) -> WorkerView:
        return fewest_requests(_two(workers, ask, "local"))


def _two(workers: Sequence[WorkerView], ask: RouteAsk, side: str) -> list[WorkerView]:
    """Two different workers, every two equally likely; the only one if there is one."""
    if len(workers) == 1:
        return [workers[0]]
    first = draw(ask.number, f"{side} first", len(workers))
    second = draw(ask.number, f"{side} second", len(workers) - 1)
    return [workers[first], workers[second + (second >= first)]]
