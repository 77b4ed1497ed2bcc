"""The highest rate that a design can serve within a budget.

Rates lie on a grid, each so many per cent above the one before (`RateGrid`), so that answers can be
shared and compared. Of all clusters within the budget only those are asked to which nothing could
be added. They race: one that cannot serve more than the best so far is out after one question, or
after none if work conservation refuses it; one that can gallops to its own best rate.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

from pdserve.sim.plan.trial import Counts

HoldsAt = Callable[[Counts, int], bool]
DEFAULT_PRECISION = 0.02
ROUNDING = 1e-9
FIRST_STEP = 4


@dataclass(frozen=True, slots=True)
class RateGrid:
    """``precision``: how far, relatively, one rate is above the one before."""

    precision: float = DEFAULT_PRECISION
    lowest: float = 1e-3

    def rate(self, index: int) -> float:
        """In requests per second."""
        return self.lowest * (1 + self.precision) ** index

    def at_most(self, rate: float) -> int:
        """The highest index whose rate is not above ``rate``; -1 if there is none."""
        if rate < self.lowest:
            return -1
        index = math.floor(math.log(rate / self.lowest) / math.log1p(self.precision))
        return index + 1 if self.rate(index + 1) <= rate * (1 + ROUNDING) else index


def affordable(weights: Sequence[float], budget: float) -> list[Counts]:
    """All counts (each at least 1) within the budget to which nothing can be added. ``weights``:
    what a worker of each kind takes of it."""
    if sum(weights) > budget * (1 + ROUNDING):
        return []
    if len(weights) == 1:
        return [(_times(budget, weights[0]),)]
    found: list[Counts] = []
    for first in range(1, _times(budget - weights[1], weights[0]) + 1):
        second = _times(budget - first * weights[0], weights[1])
        if second and _times(budget - second * weights[1], weights[0]) == first:
            found.append((first, second))
    return found


def _times(whole: float, part: float) -> int:
    return math.floor(whole / part * (1 + ROUNDING) + ROUNDING)


def most(
    holds: HoldsAt,
    candidates: Sequence[tuple[Counts, int]],
    *,
    ceiling: Callable[[Counts], int] = lambda counts: 1 << 20,
    beat: int = -1,
) -> tuple[Counts, int] | None:
    """The counts that serve the highest rate, and its index; None if none serves a higher one than
    ``beat``. ``candidates``: each with the rate that it will likely serve. ``holds(counts, i)`` is
    monotone in the rate; above ``ceiling(counts)`` it is known to be False."""
    best: Counts | None = None
    ordered = sorted(candidates, key=lambda candidate: (-candidate[1], candidate[0]))
    for counts, likely in ordered:
        highest = ceiling(counts)
        if highest <= beat:
            continue
        first = min(highest, max(likely, beat + 1)) if best is None else beat + 1
        if best is None or holds(counts, first):
            index = _gallop(partial(holds, counts), beat, highest, first, likely)
            if index > beat:
                best, beat = counts, index
    return None if best is None else (best, beat)


def _gallop(holds: Callable[[int], bool], met: int, highest: int, first: int, likely: int) -> int:
    """The highest index that holds, from ``met`` (which does, or is as good as none) to
    ``highest``. ``first`` is asked first, then steps double until the answer changes."""
    failed, probe = highest + 1, first
    rose = fell = False
    step = FIRST_STEP
    while failed - met > 1:
        if holds(probe):
            met, rose = probe, True
        else:
            failed, fell = probe, True
        if rose and fell:
            probe = (met + failed) // 2
        elif rose:
            probe = min(failed - 1, max(met + step, likely))
        else:
            probe = max(met + 1, failed - step)
        step *= 2
    return met
