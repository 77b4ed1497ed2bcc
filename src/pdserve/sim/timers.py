"""The named timers of one simulated machine: one that was replaced or cancelled never fires."""

from __future__ import annotations

from collections.abc import Callable

from pdserve.core.effects import CancelTimer, Input, SetTimer, TimerFired
from pdserve.sim.clock import Clock


class VirtualTimers:
    """``hear`` takes what its machine is to hear."""

    def __init__(self, clock: Clock, hear: Callable[[Input], None]) -> None:
        self._clock = clock
        self._hear = hear
        self._numbers: dict[str, int] = {}
        self._num_set = 0

    def set(self, effect: SetTimer) -> None:
        self._num_set += 1
        self._numbers[effect.timer] = self._num_set
        self._clock.at(effect.at_s, self._due, effect.timer, self._num_set)

    def cancel(self, effect: CancelTimer) -> None:
        self._numbers.pop(effect.timer, None)

    def _due(self, timer: str, number: int) -> None:
        if self._numbers.get(timer) == number:
            del self._numbers[timer]
            self._hear(TimerFired(timer))
