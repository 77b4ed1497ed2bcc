"""One worker after the other, by the number of the decision.

Both sides turn with the same number; the decode side has gone one further after each full round of
the prefill side, so that every pair comes to be used also where both pools have the same size.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from pdserve.policy.cluster import ClusterView, Route, RouteAsk, WorkerView
from pdserve.policy.constraints import choose_pair


@dataclass(frozen=True, slots=True)
class RoundRobin:
    """Workers in the order of their ids, in turn."""

    @property
    def reason(self) -> str:
        return "next in turn on both sides"

    def choose(self, view: ClusterView, ask: RouteAsk) -> Route | None:
        return choose_pair(self, view, ask)

    def pick_prefill(self, workers: Sequence[WorkerView], ask: RouteAsk) -> WorkerView:
        return workers[ask.number % len(workers)]

    def pick_decode(self, workers: Sequence[WorkerView], ask: RouteAsk) -> WorkerView:
        rounds, place = divmod(ask.number, len(workers))
        return workers[(place + rounds) % len(workers)]

    def pick_local(self, workers: Sequence[WorkerView], ask: RouteAsk) -> WorkerView:
        return workers[ask.number % len(workers)]
