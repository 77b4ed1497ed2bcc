"""Virtual time: what happens when, and in which order if at the same time.

Calls that are due at the same moment are made in the order in which they were asked for, so a run
is a function of its settings alone.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable
from typing import Any


class Clock:
    """``now`` in seconds from the start of the run. Only `run` moves it."""

    def __init__(self) -> None:
        self.now = 0.0
        self._heap: list[tuple[float, int, Callable[..., object], tuple[Any, ...]]] = []
        self._number = 0

    def at(self, at_s: float, call: Callable[..., object], *arguments: Any) -> None:
        """Call it then, or now if that is past."""
        self._number += 1
        heapq.heappush(self._heap, (max(at_s, self.now), self._number, call, arguments))

    def after(self, seconds: float, call: Callable[..., object], *arguments: Any) -> None:
        self._number += 1
        heapq.heappush(self._heap, (self.now + seconds, self._number, call, arguments))

    def run(self, goes_on: Callable[[], bool], until_s: float = float("inf")) -> None:
        """Make calls in order while ``goes_on`` says so, none that is due after ``until_s``."""
        heap, pop = self._heap, heapq.heappop
        while heap and heap[0][0] <= until_s and goes_on():
            self.now, _, call, arguments = pop(heap)
            call(*arguments)
