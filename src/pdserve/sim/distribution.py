"""Many values, a few figures: percentiles in memory that does not grow with their number.

Up to a bound values are kept as they are, and percentiles are exact (linear between neighbours, as
``workload.summary`` has them). Beyond it they are counted in a `LogHistogram`, whose buckets each
reach 0.2 % further than the one before: a percentile is then right to a thousandth. The minimum,
the maximum and the number are exact always, the mean up to rounding.
"""

from __future__ import annotations

import math
from array import array
from collections.abc import Sequence

from pdserve.plot.cdf import MAX_POINTS, cdf_points
from pdserve.workload.summary import percentile

RELATIVE_ERROR = 0.001
EXACT_VALUES = 1_000_000
"""8 MB of them, and 32 MB for a moment while they are sorted."""

PERCENTS = (50.0, 90.0, 99.0)
_SMALLEST = 1e-9
"""What is less counts as zero: times are seconds."""


class LogHistogram:
    """Counts of values from 0. Each percentile is within `RELATIVE_ERROR` of the true value, or
    within 1e-9 of it."""

    def __init__(self) -> None:
        self.counts: dict[int, int] = {}
        self.num = 0
        self.total = 0.0
        self.low = math.inf
        self.high = 0.0
        self._per_log = 1.0 / math.log((1 + RELATIVE_ERROR) / (1 - RELATIVE_ERROR))

    def add(self, value: float, count: int = 1) -> None:
        """``count`` times this value; one below 0 counts as 0 (a clock that went backwards)."""
        index = self._index(value)
        self.counts[index] = self.counts.get(index, 0) + count
        self.num += count
        self.total += value * count
        self.low = min(self.low, value)
        self.high = max(self.high, value)

    def add_each(self, values: Sequence[float], count: int) -> None:
        """``count`` times each of these. Steps of a stretch differ by little: mostly all of them
        are in one bucket, and else in that of the one before."""
        if not values:
            return
        counts, lowest, highest = self.counts, min(values), max(values)
        self.num += len(values) * count
        self.total += math.fsum(values) * count
        self.low = min(self.low, lowest)
        self.high = max(self.high, highest)
        index = self._index(lowest)
        if index == self._index(highest):
            counts[index] = counts.get(index, 0) + len(values) * count
            return
        lower, upper = 0.0, 0.0
        for value in values:
            if not lower < value <= upper:
                index = self._index(value)
                lower, upper = self._border(index - 1), self._border(index)
                counts.setdefault(index, 0)
            counts[index] += count

    def _index(self, value: float) -> int:
        return _ZERO if value < _SMALLEST else math.ceil(math.log(value) * self._per_log)

    def _border(self, index: int) -> float:
        """The largest value of a bucket."""
        return 0.0 if index <= _ZERO else math.exp(index / self._per_log)

    def merge(self, other: LogHistogram) -> None:
        """Add all that the other has."""
        for index, count in other.counts.items():
            self.counts[index] = self.counts.get(index, 0) + count
        self.num += other.num
        self.total += other.total
        self.low = min(self.low, other.low)
        self.high = max(self.high, other.high)

    def percentile(self, percent: float) -> float:
        """Linear between neighbours; 0 if there are no values."""
        position = (self.num - 1) * percent / 100
        below = math.floor(position)
        values = self._at_ranks(below, min(below + 1, self.num - 1)) if self.num else (0.0, 0.0)
        return values[0] + (values[1] - values[0]) * (position - below)

    def points(self) -> list[tuple[float, float]]:
        """The cumulative curve: (value, share up to it)."""
        if not self.num:
            return []
        found, passed = [(self.low, 0.0)], 0
        for index in sorted(self.counts):
            passed += self.counts[index]
            found.append((self._value(index), passed / self.num))
        step = max(1, len(found) // MAX_POINTS)
        return [*found[:-1:step], found[-1]]

    def _at_ranks(self, first: int, second: int) -> tuple[float, float]:
        passed, values = 0, []
        wanted = [first, second]
        for index in sorted(self.counts):
            passed += self.counts[index]
            while wanted and passed > wanted[0]:
                values.append(self._value(index))
                wanted.pop(0)
            if not wanted:
                break
        return values[0], values[1]

    def _value(self, index: int) -> float:
        """The middle of a bucket, by relative distance, and no value that there cannot be."""
        if index == _ZERO:
            return max(self.low, 0.0)
        value = math.exp(index / self._per_log) * (1 - RELATIVE_ERROR)
        return min(self.high, max(self.low, value))


_ZERO = -(1 << 40)


class Distribution:
    """Values as they are while there are at most ``exact`` of them, counted afterwards."""

    def __init__(self, exact: int = EXACT_VALUES) -> None:
        self._exact = exact
        self._values = array("d")
        self._counted: LogHistogram | None = None

    @property
    def is_exact(self) -> bool:
        return self._counted is None

    @property
    def num(self) -> int:
        return len(self._values) if self._counted is None else self._counted.num

    def add(self, value: float) -> None:
        if self._counted is not None:
            self._counted.add(value)
            return
        self._values.append(value)
        if len(self._values) > self._exact:
            self._count_all()

    def merge(self, other: Distribution) -> None:
        """Add all that the other has, which stays as it is."""
        if other._counted is None:
            for value in other._values:
                self.add(value)
            return
        if self._counted is None:
            self._count_all()
        assert self._counted is not None
        self._counted.merge(other._counted)

    def figures(self, *percents: float) -> dict[str, float]:
        """``p50``, ``p90``, ``p99`` (or as asked), ``mean``, ``max`` and ``num``; without values
        all are 0."""
        percents = percents or PERCENTS
        if self._counted is not None:
            return figures_of(self._counted, *percents)
        if not self._values:
            return figures_of(LogHistogram(), *percents)
        ordered = sorted(self._values)
        figures = {f"p{percent:g}": percentile(ordered, percent) for percent in percents}
        mean = math.fsum(self._values) / len(self._values)
        return figures | {"mean": mean, "max": ordered[-1], "num": len(self._values)}

    def points(self) -> list[tuple[float, float]]:
        """The cumulative curve, in some hundred points: (value, share up to it)."""
        if self._counted is not None:
            return self._counted.points()
        if not self._values:
            return []
        return cdf_points(sorted(self._values))

    def _count_all(self) -> None:
        self._counted = LogHistogram()
        for value in self._values:
            self._counted.add(value)
        self._values = array("d")


def figures_of(histogram: LogHistogram, *percents: float) -> dict[str, float]:
    """As `Distribution.figures`."""
    figures = {
        f"p{percent:g}": histogram.percentile(percent) for percent in percents or (50.0, 90.0, 99.0)
    }
    mean = histogram.total / histogram.num if histogram.num else 0.0
    return figures | {"mean": mean, "max": histogram.high, "num": histogram.num}
