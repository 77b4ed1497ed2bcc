"""Python's search for garbage, held off while a simulation runs.

What a simulation makes by the million is freed as soon as nothing refers to it: no objects of it
refer to each other in circles. Python looks for circles all the same, through everything there is,
again and again: a third of the time of a run. It is told to look seldom, and not at what was there
before.
"""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager

MADE_BETWEEN_LOOKS = 200_000
"""Objects more than there were at the last look: a few dozen megabytes."""


@contextmanager
def sought_seldom() -> Iterator[None]:
    """As long as this is entered."""
    before = gc.get_threshold()
    gc.freeze()
    gc.set_threshold(MADE_BETWEEN_LOOKS, *before[1:])
    try:
        yield
    finally:
        gc.set_threshold(*before)
        gc.unfreeze()
