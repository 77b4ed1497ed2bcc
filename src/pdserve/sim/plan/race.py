"""One problem: what is to be held, what things cost, what is sought; and the best of a design.

What is sought is the least cluster for a rate (by cost or by power), or the highest rate for a
budget (of cost or of power). Either way the best of a design is `Found`, and two of them compare.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from enum import StrEnum
from typing import Protocol

from pdserve.core.request import Role
from pdserve.sim.plan.book import Book
from pdserve.sim.plan.least import STRETCH, least
from pdserve.sim.plan.most import RateGrid, affordable, most
from pdserve.sim.plan.trial import Candidate, Conditions, Counts, Design, Factors

HOPELESS = 32.0
"""A design that serves less than the estimate by this factor serves nothing."""
FINE_STRETCH = 1.12
"""From counts that were the best by fewer windows."""
SPREAD = 1.2
"""See `least.least`: e to this is what the ratio of prefill to decode workers may be off."""
MOST_STRETCH = 16.0
"""A design that needs more workers than the estimate by this factor will not do."""


class Measure(StrEnum):
    COST = "cost"
    POWER = "power"


@dataclass(frozen=True, slots=True)
class Prices:
    """Of a worker, by hardware: cost per hour, and watts by hardware and role (of a whole worker
    at its most: what must be provisioned). All above 0."""

    cost: Mapping[str, float]
    watts: Mapping[tuple[str, Role], float]

    def weights(self, design: Design, measure: Measure) -> tuple[float, ...]:
        """Of one worker of each kind."""
        if measure is Measure.COST:
            return tuple(self.cost[name] for name in design.hardware)
        pairs = zip(design.hardware, design.roles, strict=True)
        return tuple(self.watts[pair] for pair in pairs)

    def of(self, candidate: Candidate, measure: Measure) -> float:
        weights = self.weights(candidate.design, measure)
        return sum(count * weight for count, weight in zip(candidate.counts, weights, strict=True))

    def times(self, hardware: str, factor: float) -> Prices:
        """With one hardware's cost so many times as high."""
        return replace(self, cost={**self.cost, hardware: self.cost[hardware] * factor})


@dataclass(frozen=True, slots=True)
class Goal:
    """``rate``: the least that serves it is sought, by ``measure``. ``budget`` of ``measure``: the
    most that it serves. One of the two is given."""

    measure: Measure
    rate: float | None = None
    budget: float | None = None

    @property
    def is_least(self) -> bool:
        return self.rate is not None

    def key(self, found: Found) -> tuple[float, ...]:
        """Less is better."""
        own = found.power_w if self.measure is Measure.POWER else found.cost
        other = found.cost if self.measure is Measure.POWER else found.power_w
        return (own, other) if self.is_least else (-found.rate, own, other)

    def value(self, found: Found) -> float:
        """What is sought: cost, watts or rate."""
        return -self.key(found)[0] if not self.is_least else self.key(found)[0]

    def gain(self, better: Found, worse: Found) -> float:
        """0.2: a fifth less, or a fifth more."""
        ratio = self.value(better) / self.value(worse)
        return 1 - ratio if self.is_least else ratio - 1


@dataclass(frozen=True, slots=True)
class Found:
    """The best of a design: ``rate`` is the highest that was seen to be served (for a goal with a
    rate: that rate)."""

    candidate: Candidate
    rate: float
    cost: float
    power_w: float

    @property
    def design(self) -> Design:
        return self.candidate.design


class Limits(Protocol):
    """What is known without a simulation (``bounds.WorkBounds``)."""

    def refuses(self, design: Design, counts: Counts, rate: float) -> bool: ...

    def likely(self, design: Design, rate: float) -> tuple[float, ...]: ...

    def floor_breaks(self, design: Design) -> str | None: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Race:
    """``bounds_of``: what is known of a level's windows, under factors on the promise and on step
    times (``looser`` and ``slower``, as in `Conditions`)."""

    book: Book
    prices: Prices
    goal: Goal
    bounds_of: Callable[[int, Factors, Factors], Limits]
    grid: RateGrid = field(default_factory=RateGrid)
    most_workers: int = 1024
    spread: float = SPREAD
    looser: Factors = ()
    slower: Factors = ()

    def best_of(
        self,
        design: Design,
        level: int,
        start: Counts | None = None,
        beat: float | None = None,
        *,
        thorough: bool = True,
    ) -> Found | None:
        """The best of the design. ``start``: where to begin. None if none holds the promise, or
        none comes up to ``beat``, a value of the goal; if not ``thorough``, none that is of about
        the expected shape."""
        if self.limits(level).floor_breaks(design) is not None:
            return None
        if self.goal.is_least:
            return self._least_of(design, level, start, beat, thorough=thorough)
        return self._most_of(design, level, beat)

    def found(self, candidate: Candidate, rate: float) -> Found:
        cost, power_w = (self.prices.of(candidate, measure) for measure in Measure)
        return Found(candidate, rate, cost, power_w)

    def conditions(self, rate: float) -> Conditions:
        return Conditions(rate=rate, looser=self.looser, slower=self.slower)

    def limits(self, level: int) -> Limits:
        return self.bounds_of(level, self.looser, self.slower)

    def holds(self, candidate: Candidate, rate: float, level: int) -> bool:
        return self.book.meets(candidate, self.conditions(rate), level)

    def refuses(self, candidate: Candidate, rate: float, level: int) -> bool:
        """By work conservation, without a simulation."""
        return self.limits(level).refuses(candidate.design, candidate.counts, rate)

    def highest_rate(self, candidate: Candidate, level: int, met: float) -> float:
        """That the candidate serves, on the grid from ``met``, which it does serve."""
        index = self.grid.at_most(met)
        best = most(
            lambda counts, i: self.holds(candidate, self.grid.rate(i), level),
            [(candidate.counts, index + 2)],
            ceiling=self._ceiling(candidate.design, level),
            beat=index,
        )
        return met if best is None else max(met, self.grid.rate(best[1]))

    def _least_of(
        self,
        design: Design,
        level: int,
        start: Counts | None,
        beat: float | None,
        *,
        thorough: bool,
    ) -> Found | None:
        rate = self.goal.rate
        assert rate is not None
        bounds = self.limits(level)
        own = self.prices.weights(design, self.goal.measure)
        second = Measure.POWER if self.goal.measure is Measure.COST else Measure.COST
        other = self.prices.weights(design, second)

        def weigh(counts: Counts) -> tuple[float, ...]:
            sums = [sum(c * w for c, w in zip(counts, ws, strict=True)) for ws in (own, other)]
            return tuple(round(total, 9) for total in sums)

        counts = least(
            lambda counts: self.holds(Candidate(design, counts), rate, level),
            weigh,
            start or bounds.likely(design, rate),
            refused=lambda counts: bounds.refuses(design, counts, rate),
            limit=math.inf if beat is None else beat,
            most_workers=self.most_workers,
            most_stretch=MOST_STRETCH,
            step=STRETCH if start is None else FINE_STRETCH,
            thorough=thorough,
            spread=self.spread,
        )
        return None if counts is None else self.found(Candidate(design, counts), rate)

    def _most_of(self, design: Design, level: int, beat: float | None) -> Found | None:
        budget = self.goal.budget
        assert budget is not None
        bounds = self.limits(level)
        likely, top = [], 0.0
        for counts in affordable(self.prices.weights(design, self.goal.measure), budget):
            per_rate = bounds.likely(design, 1.0)
            rate = min(count / need for count, need in zip(counts, per_rate, strict=True))
            likely.append((counts, self.grid.at_most(rate)))
            top = max(top, rate)
        best = most(
            lambda counts, i: self.holds(Candidate(design, counts), self.grid.rate(i), level),
            likely,
            ceiling=self._ceiling(design, level),
            beat=self.grid.at_most(top / HOPELESS if beat is None else beat),
        )
        if best is None:
            return None
        return self.found(Candidate(design, best[0]), self.grid.rate(best[1]))

    def _ceiling(self, design: Design, level: int) -> Callable[[Counts], int]:
        """The highest index that work conservation does not refuse."""
        bounds = self.limits(level)

        def ceiling(counts: Counts) -> int:
            low, high = -1, self.grid.at_most(1e6)
            if not bounds.refuses(design, counts, self.grid.rate(high)):
                return high
            while high - low > 1:
                middle = (low + high) // 2
                is_too_much = bounds.refuses(design, counts, self.grid.rate(middle))
                low, high = (low, middle) if is_too_much else (middle, high)
            return low

        return ceiling
