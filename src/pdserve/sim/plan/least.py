"""The least cluster of one design that holds the promise.

From where the estimate points, a ray through all kinds of workers is stretched until its end holds
the promise, and bisected. Then the border between what holds and what does not is followed: of all
clusters that weigh less than the best one so far, only the largest are asked (if one of them fails,
all that are in it fail), nearest to the best one first. When none is left, no smaller one can do.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from functools import partial

from pdserve.sim.plan.trial import Counts

Weigh = Callable[[Counts], tuple[float, ...]]
"""Grows with every count; the least weight is best, and equal ones are as good. Its first part is
what is minimised."""
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
    thorough: bool = True,
    spread: float = math.inf,
) -> Counts | None:
    """The counts that ``holds`` accepts and that weigh least, or None if none do that weigh at most
    ``limit``. Without a limit, or not ``thorough``: none on the ray from ``start`` (fractions)
    with at most ``most_workers`` and stretched by at most ``most_stretch``. ``step``: by which
    factor the ray is stretched at first. ``spread``: clusters of another shape than the best one so
    far (by so much in the sum of the logarithms of their counts' ratios) are not asked.

    ``holds`` is monotone: what it accepts it accepts with more workers. What is ``refused`` it
    would not accept, so it is not asked.
    """

    def asked(counts: Counts) -> bool:
        return not refused(counts) and holds(counts)

    best = _on_ray(asked, weigh, start, limit, (most_workers, most_stretch), step)
    if best is None and thorough and limit < math.inf:
        shape = tuple(max(1, round(part)) for part in start)
        within = partial(_is_within, weigh, limit * (1 + ROUNDING))
        best = next((c for c in _maximal(within, shape, spread) if asked(c)), None)
    while best is not None:
        lighter = partial(_is_lighter, weigh, weigh(best))
        better = next((c for c in _maximal(lighter, best, spread) if asked(c)), None)
        if better is None:
            return best
        best = better
    return None


def _is_within(weigh: Weigh, limit: float, counts: Counts) -> bool:
    return weigh(counts)[0] <= limit


def _is_lighter(weigh: Weigh, weight: tuple[float, ...], counts: Counts) -> bool:
    return weigh(counts) < weight


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


def _maximal(fits: Holds, like: Counts, spread: float) -> Iterator[Counts]:
    """Counts that fit, such that one more of any kind would not; those most ``like`` first."""
    found: list[Counts] = []
    if len(like) == 1:
        most = _gallop(lambda count: fits((count,)))
        found = [(most,)] if most else []
    else:
        second = _gallop(lambda count: fits((1, count)))
        first = 1
        while second:  # along the border, from few of the first kind to few of the second
            if not fits((first, second)):
                second -= 1
                continue
            while fits((first + 1, second)):
                first += 1
            found.append((first, second))
            first += 1
    near = [(_distance(counts, like), counts) for counts in found]
    yield from (counts for distance, counts in sorted(near) if distance <= spread)


def _gallop(fits: Callable[[int], bool]) -> int:
    """The largest count that fits; 0 if 1 does not."""
    low, high = 0, 1
    while fits(high):
        low, high = high, high * 2
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low


def _distance(counts: Counts, other: Counts) -> float:
    return sum(abs(math.log(a / b)) for a, b in zip(counts, other, strict=True))
