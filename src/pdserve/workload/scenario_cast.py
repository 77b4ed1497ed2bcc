"""Who is hit: from the selectors of a scenario to workers, as the cluster is at that moment.

Live and simulated runs ask here, so with the same workers up and the same seed they hit the same
ones. What came of each event is written down in a `Hit`.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, field

from pdserve.core.ids import WorkerId
from pdserve.core.request import Role
from pdserve.workload.scenario import EVERYBODY_ELSE, Event, Scenario


@dataclass(frozen=True, slots=True)
class Member:
    """A worker slot at a moment. ``role`` is the pool that it is in; ``up``: its process serves."""

    worker: WorkerId
    role: Role
    up: bool


@dataclass(slots=True)
class Hit:
    """An event that has happened. ``pairs`` are the links of one of links, ``workers`` who is in
    it. ``over_s`` None: it is not over. ``detail`` says what was not done, and why."""

    event: Event
    at_s: float
    workers: tuple[WorkerId, ...] = ()
    pairs: tuple[tuple[WorkerId, WorkerId], ...] = ()
    over_s: float | None = None
    detail: str = ""
    waits_for: set[WorkerId] = field(default_factory=set, repr=False)

    def worker_up(self, worker: WorkerId, at_s: float) -> None:
        """A new process of a worker is up: it was hit by a kill, or the hang ended so."""
        if worker in self.waits_for:
            self.waits_for.discard(worker)
            if not self.waits_for and self.over_s is None:
                self.over_s = at_s


class Cast:
    """Chooses for one run of a scenario."""

    def __init__(self, scenario: Scenario) -> None:
        self._seed = scenario.seed

    def hit(self, number: int, event: Event, members: Sequence[Member], at_s: float) -> Hit:
        """Event ``number`` of the scenario, at ``at_s``. Its workers may be none."""
        choice = random.Random(f"{self._seed}/{number}")
        members = sorted(members, key=lambda member: member.worker)
        sides = [_select(selector, members, choice) for selector in event.targets]
        if not event.kind.is_of_links:
            hit = Hit(event, at_s, workers=tuple(sides[0]))
        else:
            if event.targets[1] == EVERYBODY_ELSE:
                sides[1] = [member.worker for member in members]
            pairs = {(min(a, b), max(a, b)) for a in sides[0] for b in sides[1] if a != b}
            workers = dict.fromkeys(worker for pair in sorted(pairs) for worker in pair)
            hit = Hit(event, at_s, workers=tuple(workers), pairs=tuple(sorted(pairs)))
        if not hit.workers:
            hit.detail = f"no worker is {' | '.join(event.targets)} now"
            hit.over_s = at_s
        return hit


def _select(selector: str, members: Sequence[Member], choice: random.Random) -> list[WorkerId]:
    """Those that the selector means. An id means its slot, up or not; the others mean who is up."""
    up = [member for member in members if member.up]
    if selector == "random":
        return [choice.choice(up).worker] if up else []
    pool, _, which = selector.partition("/")
    if pool not in set(Role):
        return [member.worker for member in members if member.worker == selector]
    pooled = [member.worker for member in up if member.role == pool]
    if not which:
        return pooled
    if which == "random":
        return [choice.choice(pooled)] if pooled else []
    return pooled[int(which) : int(which) + 1]
