"""Python's search for garbage, held off while a simulation runs.

What a simulation makes by the million is freed as soon as nothing refers to it: no objects of it
refer to each other in circles. Python looks for circles all the same, through everything there is,
again and again: a third of the time of a run. It is told to look seldom, and not at what was there
before. Only the machines themselves, with all that they hold, are such a circle: what earlier
simulations left is looked for before the next one begins, or a plan would keep every cluster that
it tries.
"""

from __future__ import annotations

import gc
import math
import time
from collections.abc import Iterator
from contextlib import contextmanager

MADE_BETWEEN_LOOKS = 200_000
"""Objects more than there were at the last look: a few dozen megabytes."""

LOOKED_AFTER_S = 1.0
"""What earlier simulations left is looked for when this process has worked so long since the last
time: some fifty megabytes. A look takes a twentieth of that."""


class _Leftovers:
    """What earlier simulations left behind, and when it was last looked for."""

    def __init__(self) -> None:
        self._looked_at_s = -math.inf

    def look(self) -> None:
        """Through everything there is, if it is time."""
        if time.process_time() - self._looked_at_s >= LOOKED_AFTER_S:
            gc.collect()
            self._looked_at_s = time.process_time()


_leftovers = _Leftovers()


@contextmanager
def sought_seldom() -> Iterator[None]:
    """As long as this is entered."""
    before = gc.get_threshold()
    _leftovers.look()
    gc.freeze()
    gc.set_threshold(MADE_BETWEEN_LOOKS, *before[1:])
    try:
        yield
    finally:
        gc.set_threshold(*before)
        gc.unfreeze()
