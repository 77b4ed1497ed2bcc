"""Who starts simulated processes again, by the live launcher's rule.

A process that is started needs ``load_s`` until it can serve, and then says so; what else a start
takes is not modelled.
"""

from __future__ import annotations

import math
from collections.abc import Callable

from pdserve.core.ids import WorkerId
from pdserve.core.restarts import Restarts
from pdserve.sim.clock import Clock


class VirtualLauncher:
    """Of all slots. ``start`` makes the slot's next process, ready."""

    def __init__(self, clock: Clock, start: Callable[[WorkerId], None], load_s: float) -> None:
        self._clock = clock
        self._start = start
        self._load_s = load_s
        self._rules: dict[WorkerId, Restarts] = {}
        self._ready_since_s: dict[WorkerId, float] = {}
        self._waiting: dict[WorkerId, int] = {}
        self._missing: set[WorkerId] = set()
        self._number = 0

    @property
    def is_idle(self) -> bool:
        """True if no slot's process is to come."""
        return not self._missing

    def ready(self, worker: WorkerId) -> None:
        """A process of the slot can serve."""
        self._ready_since_s[worker] = self._clock.now
        self._missing.discard(worker)

    def ended(self, worker: WorkerId) -> None:
        """The slot's process is dead."""
        self._missing.add(worker)
        ready_s = self._clock.now - self._ready_since_s[worker]
        pause_s = self._rule(worker).pause_s(ready_s)
        self._number += 1
        self._waiting[worker] = self._number
        if math.isfinite(pause_s):
            self._clock.after(pause_s, self._load, worker, self._number)

    def hold(self, worker: WorkerId, for_s: float | None) -> None:
        self._rule(worker).hold(for_s)

    def release(self) -> None:
        """Hold no slot any more: whoever waits is started."""
        for rule in self._rules.values():
            rule.release()
        for worker, number in list(self._waiting.items()):
            self._load(worker, number)

    # --- inside -------------------------------------------------------------------------------

    def _rule(self, worker: WorkerId) -> Restarts:
        return self._rules.setdefault(worker, Restarts())

    def _load(self, worker: WorkerId, number: int) -> None:
        if self._waiting.get(worker) == number:
            del self._waiting[worker]
            self._clock.after(self._load_s, self._start, worker)
