"""Designs compete: the best of each by few windows, of the better half by more, of the rest by all.

That is successive halving, of split and of aggregated designs each, since the answer is about the
best of either. A design that cannot come near the best one of its kind so far is not
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
KEEP_LEAST = 2


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
    _bring_back(race, standing, chosen[-1], told)
    ordered = sorted(standing.values(), key=lambda s: (-s.level, *_place(race, s)))
    return Ranking(tuple(ordered), chosen[-1])


def _bring_back(
    race: Race, standing: dict[Design, Standing], last: int, told: Callable[[str], None]
) -> None:
    """Few windows may have been too friendly to some: a design that was dropped, but looked better
    than what the best of its kind turned out to be, is judged by all windows after all."""
    for design in _order(race, list(standing.values())):
        own = standing[design]
        kind = [s for d, s in standing.items() if d.is_split == design.is_split]
        finals = [s.best for s in kind if s.level == last and s.best is not None]
        best = min(map(race.goal.key, finals), default=(math.inf,))
        if own.level < last and own.best is not None and race.goal.key(own.best) < best:
            told(f"{design}: brought back")
            found = race.best_of(design, last, own.best.candidate.counts, thorough=False)
            standing[design] = Standing(design, found, last)


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
    """Of either kind half of those that have a best at all, but two."""
    able = [design for design in ordered if standing[design].best is not None]
    kept: list[Design] = []
    for is_split in (True, False):
        kind = [design for design in able if design.is_split == is_split]
        kept += kind[: max(KEEP_LEAST, math.ceil(len(kind) / 2))]
    return kept
