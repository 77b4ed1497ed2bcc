"""When the process of a slot that has ended is started again.

After a pause that doubles from half a second to half a minute, and starts over once a process has
been ready for a minute. Who wants to see a worker missed may hold its slot: its next process then
starts when it is told, whatever the rule.
"""

from __future__ import annotations

import math

FIRST_PAUSE_S = 0.5
LONGEST_PAUSE_S = 30.0
HEALTHY_AFTER_S = 60.0


class Restarts:
    """Of one slot."""

    def __init__(self) -> None:
        self._failures = 0
        self._hold_s: float | None = None

    def hold(self, for_s: float | None) -> None:
        """Once the present process ends, wait so long; None: until somebody starts it. For one
        end."""
        self._hold_s = math.inf if for_s is None else for_s

    def release(self) -> None:
        """Hold it no more."""
        self._hold_s = None

    def pause_s(self, ready_s: float | None) -> float:
        """A process has ended that had been ready for so long (None: it never was): seconds until
        the next one is started, infinite if it is held."""
        if self._hold_s is not None:
            pause_s, self._hold_s = self._hold_s, None
            return pause_s
        if ready_s is not None and ready_s >= HEALTHY_AFTER_S:
            self._failures = 0
        pause_s = min(LONGEST_PAUSE_S, FIRST_PAUSE_S * 2.0**self._failures)
        self._failures += 1
        return pause_s
