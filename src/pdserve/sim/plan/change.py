"""What would change the answer: the value of one thing at which another design wins.

Each `Knob` turns one thing (the rate or the budget, a bound of the SLO, the price of a hardware)
while the rest stays. Towards each of its two ends a place on the way and the end are tried; where
the winner is of another sort, the turning point before is bisected. Everything is searched anew at
each place, by the windows of one level: nothing is extrapolated.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from pdserve.sim.plan.race import Found, Goal, Race
from pdserve.sim.plan.trial import Design, factors

UNIT_OF_COST = "$/h"
CLOSE = 1.12
"""A turning point is known to this factor."""
PRICE_CLOSE = 1.02
"""Prices change no simulation, only which of them are of interest."""


@dataclass(frozen=True, slots=True)
class Knob:
    """``turn(race, factor)``: the problem with it at ``factor`` times what it is. ``ends``: the
    factors that are tried. ``by_hardware``: a change of hardware counts as one, not only one
    between split and aggregated."""

    name: str
    unit: str
    value: float
    turn: Callable[[Race, float], Race]
    ends: tuple[float, float]
    by_hardware: bool = False
    close: float = CLOSE


@dataclass(frozen=True, slots=True)
class Turn:
    """``at``: the value of the knob between which and what it is now the winner stays; beyond it
    ``winner`` wins (None: nothing holds the promise). ``at`` None: it stays until ``tried``.
    ``by_hardware`` as of the knob: what stays is the hardware, else it is to split or not to."""

    name: str
    unit: str
    value: float
    tried: float
    at: float | None
    winner: Found | None
    by_hardware: bool = False


def knobs_of(
    race: Race,
    designs: Sequence[Design],
    bounds: Sequence[tuple[str, float, str]],
    unit_of_cost: str = UNIT_OF_COST,
) -> list[Knob]:
    """``bounds``: of each latency that the promise bounds, its name, its value and its unit."""
    goal = race.goal
    if goal.rate is not None:
        knobs = [Knob("rate", "requests/s", goal.rate, _turn_goal, (1 / 16, 2.0))]
    else:
        assert goal.budget is not None
        unit = "W" if goal.measure == "power" else unit_of_cost
        knobs = [Knob("budget", unit, goal.budget, _turn_goal, (1 / 8, 2.0))]
    for metric, value, unit in bounds:
        knobs.append(Knob(f"{metric} bound", unit, value, _turn_bound(metric), (1 / 4, 4.0)))
    names = sorted({name for design in designs for name in design.hardware})
    if len(names) > 1 and goal.measure == "cost":
        for name in names:
            price = race.prices.cost[name]
            knobs.append(
                Knob(
                    f"price of {name}",
                    unit_of_cost,
                    price,
                    _turn_price(name),
                    (1 / 4, 4.0),
                    by_hardware=True,
                    close=PRICE_CLOSE,
                )
            )
    return knobs


def turns_of(
    race: Race,
    knob: Knob,
    designs: Sequence[Design],
    level: int,
    told: Callable[[str], None] = lambda doing: None,
) -> list[Turn]:
    """At either end. ``designs``: those that may win (the best of each hardware), the present
    winner's first."""

    def winner(factor: float) -> Found | None:
        told(f"{knob.name} {knob.value * factor:.4g} {knob.unit}")
        turned = knob.turn(race, factor)
        best: Found | None = None
        for design in designs:  # each has only to be better than those before it
            beat = None if best is None else turned.goal.value(best)
            found = turned.best_of(design, level, beat=beat)
            if found is not None and (
                best is None or turned.goal.key(found) < turned.goal.key(best)
            ):
                best = found
        return best

    now = _sort(knob, winner(1.0))
    return [_turn(knob, winner, now, end) for end in knob.ends]


def _turn(knob: Knob, winner: Callable[[float], Found | None], now: object, end: float) -> Turn:
    tried = knob.value * end
    stays = 1.0
    for turned in (math.sqrt(end), end):
        then = winner(turned)
        if _sort(knob, then) != now:
            break
        stays = turned
    else:
        return Turn(knob.name, knob.unit, knob.value, tried, None, then, knob.by_hardware)
    while max(stays / turned, turned / stays) > knob.close:
        middle = math.sqrt(stays * turned)
        found = winner(middle)
        if _sort(knob, found) == now:
            stays = middle
        else:
            turned, then = middle, found
    at = knob.value * math.sqrt(stays * turned)
    return Turn(knob.name, knob.unit, knob.value, tried, at, then, knob.by_hardware)


def _sort(knob: Knob, found: Found | None) -> object:
    if found is None:
        return None
    return found.design.hardware if knob.by_hardware else found.design.is_split


def _turn_goal(race: Race, factor: float) -> Race:
    goal = race.goal
    if goal.rate is not None:
        return replace(race, goal=Goal(goal.measure, rate=goal.rate * factor))
    assert goal.budget is not None
    return replace(race, goal=Goal(goal.measure, budget=goal.budget * factor))


def _turn_bound(metric: str) -> Callable[[Race, float], Race]:
    return lambda race, factor: replace(race, looser=factors(**{metric: factor}))


def _turn_price(hardware: str) -> Callable[[Race, float], Race]:
    return lambda race, factor: replace(race, prices=race.prices.times(hardware, factor))
