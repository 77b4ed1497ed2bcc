"""Any worker, by chance: the baseline that knows nothing.

The draw is a hash of the decision's number, so a replay draws the same.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from pdserve.policy.cluster import ClusterView, Route, RouteAsk, WorkerView
from pdserve.policy.constraints import choose_pair
from pdserve.policy.draws import draw


@dataclass(frozen=True, slots=True)
class RandomChoice:
    """Every worker that may is equally likely, on each side on its own."""

    @property
    def reason(self) -> str:
        return "drawn at random on both sides"

    def choose(self, view: ClusterView, ask: RouteAsk) -> Route | None:
        return choose_pair(self, view, ask)

    def pick_prefill(self, workers: Sequence[WorkerView], ask: RouteAsk) -> WorkerView:
        return workers[draw(ask.number, "prefill", len(workers))]

    def pick_decode(self, workers: Sequence[WorkerView], ask: RouteAsk) -> WorkerView:
        return workers[draw(ask.number, "decode", len(workers))]

    def pick_local(self, workers: Sequence[WorkerView], ask: RouteAsk) -> WorkerView:
        return workers[draw(ask.number, "local", len(workers))]
