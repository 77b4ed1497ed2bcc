"""The least cluster of one design that holds the promise.

From where the estimate points, a ray through all kinds of workers is stretched until its end holds
the promise, and bisected. Then the border between what holds and what does not is followed: of all
clusters that weigh less than the best one so far, only the largest are asked (if one of them fails,
all that are in it fail), nearest to the best one first. When none is left, no smaller one can do.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence

from pdserve.sim.plan.trial import Counts

Weigh = Callable[[Counts], tuple[float, ...]]
"""Grows with every count; the least weight is best. Its first part is what is minimised."""
Holds = Callable[[Counts], bool]

STRETCH = 1.4
ROUNDING = 1e-9


def least(
    holds: Holds,
    weigh: Weigh,
    start: Sequence[float],
    *,
    refused: Holds = lambda counts: False,
    limit: float = math.inf,
    most_workers: int = 1024,
    most_stretch: float = 64.0,
    step: float = STRETCH,
) -> Counts | None:
    """The counts that ``holds`` accepts and that weigh least, or None if there are none among those
    on the ray from ``start`` (fractions) that weigh at most ``limit`` and have at most
    ``most_workers`` and stretch by at most ``most_stretch``. ``step``: by which factor the ray is
    stretched at first.

    ``holds`` is monotone: what it accepts it accepts with more workers. What is ``refused`` it
    would not accept, so it is not asked.
    """

    def asked(counts: Counts) -> bool:
        return not refused(counts) and holds(counts)

    best = _on_ray(asked, weigh, start, limit, (most_workers, most_stretch), step)
    while best is not None:
        better = next((c for c in _maximal(weigh, best) if asked(c)), None)
        if better is None:
            return best
        best = better
    return None


def _on_ray(
    asked: Holds,
    weigh: Weigh,
    start: Sequence[float],
    limit: float,
    largest: tuple[int, float],
    step: float,
) -> Counts | None:
    """``largest``: number of workers, and stretch."""
    most_workers, most_stretch = largest

    def at(stretch: float) -> Counts:
        return tuple(max(1, math.ceil(max(part, 0.5) * stretch - ROUNDING)) for part in start)

    def is_beyond(stretch: float) -> bool:
        counts = at(stretch)
        return weigh(counts)[0] > limit * (1 + ROUNDING) or sum(counts) > most_workers

    if is_beyond(0.0):
        return None
    low, high = 0.0, 1.0
    while True:
        last = is_beyond(high) or high > most_stretch
        if last:
            high = _largest(lambda stretch: not is_beyond(stretch), low, min(high, most_stretch))
        if asked(at(high)):
            break
        if last:
            return None
        low, high = high, high * step
    if low == 0.0:
        low = high
        while max(at(low)) > 1 and asked(at(low / step)):
            low /= step
        low, high = low / step, low
    while len(between := _stops(at, low, high)) > 0:
        middle = between[len(between) // 2]
        if asked(at(middle)):
            high = middle
        else:
            low = middle
    return at(high)


def _largest(is_so: Callable[[float], bool], low: float, high: float) -> float:
    """About the largest for which it is so; it is for ``low``."""
    if is_so(high):
        return high
    for _ in range(_HALVINGS):
        middle = (low + high) / 2
        low, high = (middle, high) if is_so(middle) else (low, middle)
    return low


def _stops(at: Callable[[float], Counts], low: float, high: float) -> list[float]:
    """Stretches between the two, one for each of some different counts there."""
    ends = {at(low), at(high)}
    found: dict[Counts, float] = {}
    for step in range(1, _STOPS):
        stretch = low + (high - low) * step / _STOPS
        if at(stretch) not in ends:
            found.setdefault(at(stretch), stretch)
    return list(found.values())


_STOPS = 64
_HALVINGS = 20


def _maximal(weigh: Weigh, best: Counts) -> Iterator[Counts]:
    """Counts that weigh less than ``best``, such that one more of any kind would not; those that
    are most like it first."""
    weight = weigh(best)
    found: list[Counts] = []
    if len(best) == 1:
        found = [(count,) for count in (best[0] - 1,) if count]
    else:
        second = 1
        while weigh((1, second)) < weight:
            second *= 2
        first = 1
        while second:  # the border, from few of the first kind to few of the second
            if not weigh((first, second)) < weight:
                second -= 1
                continue
            while weigh((first + 1, second)) < weight:
                first += 1
            found.append((first, second))
            first += 1
    yield from sorted(found, key=lambda counts: (_distance(counts, best), counts))


def _distance(counts: Counts, other: Counts) -> float:
    return sum(abs(math.log(a / b)) for a, b in zip(counts, other, strict=True))
