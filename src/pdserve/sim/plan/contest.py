"""Designs compete: the best of each by few windows, of the better half by more, of the rest by all.

That is successive halving; it never drops the last split design, nor the last aggregated one, since
the answer is about these two. A design that cannot come near the best one of its kind so far is not
searched to its end.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from pdserve.sim.plan.race import Found, Race
from pdserve.sim.plan.trial import Design

NEAR = 2.0
"""A design is searched until it is known to be worse than the best of its kind by this factor."""
KEEP_LEAST = 3


@dataclass(frozen=True, slots=True)
class Standing:
    """A design with the best of it; ``level``: the last one at which it competed."""

    design: Design
    best: Found | None
    level: int


@dataclass(frozen=True, slots=True)
class Ranking:
    """``standings``: those that came furthest first, the best of them first."""

    standings: tuple[Standing, ...]
    last_level: int

    @property
    def finalists(self) -> list[Found]:
        """The best of each design that was judged by all windows."""
        return [
            standing.best
            for standing in self.standings
            if standing.level == self.last_level and standing.best is not None
        ]

    @property
    def winner(self) -> Found | None:
        return next(iter(self.finalists), None)

    def best_of_kind(self, *, is_split: bool) -> Found | None:
        """The best finalist that is split, or that is not."""
        return next((f for f in self.finalists if f.design.is_split == is_split), None)


def contest(
    race: Race,
    designs: Sequence[Design],
    *,
    levels: Sequence[int] | None = None,
    told: Callable[[str], None] = lambda doing: None,
) -> Ranking:
    """``levels`` of the book, ascending (default: all)."""
    chosen = range(len(race.book.levels)) if levels is None else levels
    standing: dict[Design, Standing] = {design: Standing(design, None, -1) for design in designs}
    alive = list(designs)
    for level in chosen:
        best: dict[bool, Found] = {}
        for design in alive:
            before = standing[design].best
            told(f"{design}: {race.book.levels[level]} windows")
            start = before.candidate.counts if before is not None else None
            leader = best.get(design.is_split)
            found = race.best_of(design, level, start, _near(race, leader), thorough=False)
            standing[design] = Standing(design, found, level)
            if found is not None and (
                leader is None or race.goal.key(found) < race.goal.key(leader)
            ):
                best[design.is_split] = found
        alive = _order(race, [standing[design] for design in alive])
        if level != chosen[-1]:
            alive = _better_half(alive, standing)
    ordered = sorted(standing.values(), key=lambda s: (-s.level, *_place(race, s)))
    return Ranking(tuple(ordered), chosen[-1])


def _near(race: Race, best: Found | None) -> float | None:
    if best is None:
        return None
    value = race.goal.value(best)
    return value * NEAR if race.goal.is_least else value / NEAR


def _order(race: Race, standings: Sequence[Standing]) -> list[Design]:
    return [s.design for s in sorted(standings, key=lambda s: _place(race, s))]


def _place(race: Race, standing: Standing) -> tuple[object, ...]:
    key = (math.inf,) if standing.best is None else race.goal.key(standing.best)
    return (key, standing.design)


def _better_half(ordered: Sequence[Design], standing: dict[Design, Standing]) -> list[Design]:
    """Those that have a best at all; half of them, but some, and the best of either kind."""
    able = [design for design in ordered if standing[design].best is not None]
    kept = able[: max(KEEP_LEAST, math.ceil(len(able) / 2))]
    for is_split in (True, False):
        if not any(design.is_split == is_split for design in kept):
            kept += [design for design in able if design.is_split == is_split][:1]
    return kept
