"""One axis of a chart: from values to shares of its length, and the round numbers beside it."""

from __future__ import annotations

import math
from dataclasses import dataclass

LOG_SPAN = 20.0
"""Positive values that span more than this factor are shown on a logarithmic axis."""

_MAX_LOG_TICKS = 12


@dataclass(frozen=True, slots=True)
class Axis:
    """``ticks`` enclose what is shown, and the first and the last are its ends, unless ``ends``
    says which are."""

    ticks: tuple[float, ...]
    is_log: bool = False
    ends: tuple[float, float] | None = None

    @property
    def low(self) -> float:
        return self.ticks[0] if self.ends is None else self.ends[0]

    @property
    def high(self) -> float:
        return self.ticks[-1] if self.ends is None else self.ends[1]

    def share(self, value: float) -> float:
        """0 at the low end, 1 at the high end; a value beyond an end is put onto it."""
        if self.is_log:
            value = max(value, self.low)
            share = math.log(value / self.low) / math.log(self.high / self.low)
        else:
            share = (value - self.low) / (self.high - self.low)
        return min(1.0, max(0.0, share))


def axis_of(low: float, high: float, *bounds: float) -> Axis:
    """For values from low to high; logarithmic if they span more than `LOG_SPAN`. ``bounds`` are
    shown as well, but do not count for that."""
    high = _above(low, high)
    is_log = low > 1e-9 and high / low > LOG_SPAN
    shown = [bound for bound in bounds if bound > 0]
    low, high = min([low, *shown]), max([high, *shown])
    return Axis(tuple(_log_ticks(low, high)), True) if is_log else even_axis(low, high)


def even_axis(low: float, high: float) -> Axis:
    """Some five round numbers that enclose low and high."""
    high = _above(low, high)
    step = 10.0 ** math.floor(math.log10((high - low) / 4))
    step *= next(factor for factor in (1, 2, 5, 10) if (high - low) / (step * factor) <= 6)
    first = math.floor(low / step)
    last = max(first + 1, math.ceil(high / step))
    return Axis(tuple(round(index * step, 12) for index in range(first, last + 1)))


def tight_axis(low: float, high: float) -> Axis:
    """From low to high and no further, with the round numbers in between: for time."""
    high = _above(low, high)
    inside = tuple(tick for tick in even_axis(low, high).ticks if low <= tick <= high)
    return Axis(inside, ends=(low, high))


def _above(low: float, high: float) -> float:
    """The high end, at least so far from the low one that ticks between them differ."""
    return max(high, low + 1e-6 * max(1.0, abs(low)))


def _log_ticks(low: float, high: float) -> list[float]:
    """1, 2, 5, 10, ... from the last at or under low to the first at or over high."""
    decades = range(math.floor(math.log10(low)) - 1, math.ceil(math.log10(high)) + 2)
    ticks = [round(factor * 10.0**decade, 12) for decade in decades for factor in (1, 2, 5)]
    first = max(i for i, tick in enumerate(ticks) if tick <= low)
    last = min(i for i, tick in enumerate(ticks) if tick >= high)
    chosen = ticks[first : last + 1]
    step = 1
    while len(chosen[:-1:step]) >= _MAX_LOG_TICKS:
        step = 3 if step == 1 else step + 3  # whole decades
    return [*chosen[:-1:step], chosen[-1]]
