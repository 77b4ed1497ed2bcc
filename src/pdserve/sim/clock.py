"""Virtual time: what happens when, and in which order if at the same time.

Calls that are due at the same moment are made in the order in which they were asked for, so a run
is a function of its settings alone. Those that are due at once, which are most where messages take
no time, stand in a queue of their own: whatever else is due now was asked for before them.
"""

from __future__ import annotations

import heapq
from collections import deque
from collections.abc import Callable
from math import inf
from typing import Any

_Call = Callable[..., object]


class Clock:
    """``now`` in seconds from the start of the run. Only `run` moves it."""

    def __init__(self) -> None:
        self.now = 0.0
        self._heap: list[tuple[float, int, _Call, tuple[Any, ...]]] = []
        self._soon: deque[tuple[_Call, tuple[Any, ...]]] = deque()
        self._number = 0
        self._runs = False

    def at(self, at_s: float, call: _Call, *arguments: Any) -> None:
        """Call it then, or now if that is past; never if that is never."""
        if at_s <= self.now:
            self._soon.append((call, arguments))
        elif at_s < inf:
            self._number += 1
            heapq.heappush(self._heap, (at_s, self._number, call, arguments))

    def after(self, seconds: float, call: _Call, *arguments: Any) -> None:
        self.at(self.now + seconds, call, *arguments)

    def run(self, until_s: float = inf) -> None:
        """Make calls in order until one says `stop`, none that is due after ``until_s``."""
        self._runs = True
        self._go(until_s)

    def step(self, until_s: float) -> bool:
        """Make the next call; False if none is due until then."""
        self._runs = False
        return self._go(until_s)

    def stop(self) -> None:
        """`run` returns after the call that is being made."""
        self._runs = False

    def _go(self, until_s: float) -> bool:
        """Make one call, and others while it runs; False if none is due any more."""
        heap, soon, pop = self._heap, self._soon, heapq.heappop
        while True:
            if soon and not (heap and heap[0][0] <= self.now):
                call, arguments = soon.popleft()
            elif heap and heap[0][0] <= until_s:
                self.now, _, call, arguments = pop(heap)
            else:
                return False
            call(*arguments)
            if not self._runs:
                return True
