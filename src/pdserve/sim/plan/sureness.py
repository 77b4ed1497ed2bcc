"""How sure the answer is.

Two things may be otherwise than they were taken to be. *The traffic*: the trace is one of many that
there might have been, so its windows are drawn anew, with replacement, as often as there are
windows (a bootstrap). *The cost model*: the steps of each hardware may take longer or shorter than
it says, by as much as it says of itself; every design on that hardware has it alike.

For each design a *ladder* of clusters around its best (or of rates, for a budget) is evaluated on
every window; a redraw of the windows then has a best rung for each design. How much more, or less,
a design needs with other steps is searched by one window, at sqrt(3) standard deviations to either
side, which with weights 2/3 for none and 1/6 for each have the mean and the variance of a normal
error; it is taken to multiply what the redraw needs. How often the winner stays the winner, and by
how much, is the answer.
"""

from __future__ import annotations

import math
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from pdserve.sim.plan.book import Book
from pdserve.sim.plan.race import Found, Race
from pdserve.sim.plan.trial import Candidate, Conditions, factors

SIZES = (0.7, 0.8, 0.9, 1.0, 1.1, 1.2, 1.3, 1.4, 1.5, 1.75, 2.0)
RATES = (1.3, 1.2, 1.1, 1.05, 1.0, 0.95, 0.9, 0.8, 0.7, 0.6, 0.5)
NUM_REDRAWS = 1000
SAFE = 0.95
ASSUMED_ERROR = 0.15
"""Of step times, where the cost model does not know its own error."""
STD_PER_MEAN_ERROR = math.sqrt(math.pi / 2)
"""Of a normal error."""
_WEIGHTS = (1 / 6, 2 / 3, 1 / 6)
_MIN_FACTOR = 0.3
NOTHING = 16.0
"""By what a design needs more, of which no number would do."""
BEYOND = 1.1
"""By what a design needs more than its last rung, if that does not hold."""

Counts = npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True, kw_only=True)
class Comparison:
    """Of the winner with another: ``stays`` is the share of redraws in which it is not worse;
    ``gain`` as `Goal.gain` (5th, 50th and 95th percentile)."""

    other: Found
    stays: float
    gain: tuple[float, float, float]


@dataclass(frozen=True, slots=True, kw_only=True)
class Sureness:
    """``stays``: the share of redraws in which no other design is better than the winner's.
    ``holds``: in which the winner as it is holds the promise. ``holds_as_modelled``: the same, if
    the cost model is right. ``safe``: the best of its design that holds it in `SAFE` of them, if
    one of those that were looked at does. ``errors`` by hardware: mean relative ones of step
    times."""

    stays: float
    holds: float
    holds_as_modelled: float
    safe: Found | None
    comparisons: tuple[Comparison, ...]
    errors: Mapping[str, float]
    num_windows: int
    num_redraws: int = NUM_REDRAWS


@dataclass(frozen=True, slots=True)
class _Ladder:
    """``rungs``, the best first. ``misses`` of each rung, window and bound. ``factors``: by
    hardware and side (-1: faster steps, 1: slower ones), by what the value of the goal changes."""

    rungs: tuple[Found, ...]
    misses: Counts
    factors: Mapping[tuple[str, int], float]


def sureness(
    race: Race, finalists: Sequence[Found], errors: Mapping[str, float], seed: int
) -> Sureness:
    """Of ``finalists``, the winner first. ``errors`` by hardware."""
    num_windows = race.book.levels[-1]
    ladders = [_ladder(race, found, errors) for found in finalists]
    allowed = np.array(race.book.may_miss(race.book.num_judged(0) * num_windows))
    draws = random.Random(f"{seed}/redraws")
    own_value = race.goal.value(finalists[0])
    rungs = ladders[0].rungs
    values: list[list[float]] = [[] for _ in ladders]
    held = {rung.candidate if race.goal.is_least else rung.rate: 0 for rung in rungs}
    stays = held_as_modelled = as_modelled = held_itself = 0
    for _ in range(NUM_REDRAWS):
        sides = {name: draws.choices((-1, 0, 1), _WEIGHTS)[0] for name in sorted(errors)}
        drawn = [draws.randrange(num_windows) for _ in range(num_windows)]
        times = np.bincount(drawn, minlength=num_windows)
        needs = [_needed(race, ladder, times, allowed, sides) for ladder in ladders]
        for kept, need in zip(values, needs, strict=True):
            kept.append(need)
        own = _not_worse(race, needs[0], own_value)
        held_itself += own
        if not any(sides.values()):
            as_modelled += 1
            held_as_modelled += own
        for rung in rungs:
            key = rung.candidate if race.goal.is_least else rung.rate
            held[key] += _not_worse(race, needs[0], race.goal.value(rung))
        stays += all(_not_worse(race, needs[0], need) for need in needs[1:])
    safe = [
        rung for rung, num in zip(rungs, held.values(), strict=True) if num >= SAFE * NUM_REDRAWS
    ]
    return Sureness(
        stays=stays / NUM_REDRAWS,
        holds=held_itself / NUM_REDRAWS,
        holds_as_modelled=held_as_modelled / max(1, as_modelled),
        safe=safe[0] if safe else None,
        comparisons=tuple(
            _compared(race, found, values[0], values[number])
            for number, found in enumerate(finalists)
            if number
        ),
        errors=dict(errors),
        num_windows=num_windows,
    )


def _needed(
    race: Race,
    ladder: _Ladder,
    times: Counts,
    allowed: Counts,
    sides: Mapping[str, int],
) -> float:
    """The best value of the goal that the design has in a redraw: cost or power that it needs, or
    the rate that it serves. What holds on no rung is taken to need a step more than the last."""
    sums = np.tensordot(times, ladder.misses, axes=(0, 1))
    good = np.all(sums <= allowed, axis=1)
    rung = int(np.argmax(good)) if good.any() else -1
    value = race.goal.value(ladder.rungs[rung])
    if not good.any():
        value *= BEYOND if race.goal.is_least else 1 / BEYOND
    for name in dict.fromkeys(ladder.rungs[0].design.hardware):
        value *= ladder.factors.get((name, sides.get(name, 0)), 1.0)
    return value


def _not_worse(race: Race, value: float, other: float) -> bool:
    return value <= other * (1 + 1e-9) if race.goal.is_least else value >= other * (1 - 1e-9)


def _compared(
    race: Race, other: Found, own: Sequence[float], others: Sequence[float]
) -> Comparison:
    pairs = list(zip(own, others, strict=True))
    gains = sorted(1 - a / b if race.goal.is_least else a / b - 1 for a, b in pairs)
    low, middle, high = (gains[round(share * (len(gains) - 1))] for share in (0.05, 0.5, 0.95))
    return Comparison(
        other=other,
        stays=sum(_not_worse(race, a, b) for a, b in pairs) / len(pairs),
        gain=(low, middle, high),
    )


def _ladder(race: Race, found: Found, errors: Mapping[str, float]) -> _Ladder:
    rungs = _sizes(race, found) if race.goal.is_least else _rates(race, found)
    misses = _climb(race.book, rungs, rungs.index(found))
    return _Ladder(tuple(rungs), misses, _factors(race, found, errors))


def _factors(race: Race, found: Found, errors: Mapping[str, float]) -> dict[tuple[str, int], float]:
    """By the first window, each hardware by itself."""
    made: dict[tuple[str, int], float] = {}
    start = found.candidate.counts
    usual = race.best_of(found.design, 0, start)
    for name in dict.fromkeys(found.design.hardware):
        for side in (-1, 1) if errors.get(name) and usual is not None else ():
            off = math.sqrt(3) * STD_PER_MEAN_ERROR * errors[name] * side
            speed = max(_MIN_FACTOR, 1 + off)
            turned = replace(race, slower=factors(**{name: speed}))
            other = turned.best_of(found.design, 0, start)
            assert usual is not None
            if other is None:
                made[(name, side)] = NOTHING if race.goal.is_least else 1 / NOTHING
            else:
                made[(name, side)] = race.goal.value(other) / race.goal.value(usual)
    return made


def _sizes(race: Race, found: Found) -> list[Found]:
    sizes = {
        tuple(max(1, round(count * size)) for count in found.candidate.counts) for size in SIZES
    } | {tuple(count + 1 for count in found.candidate.counts)}
    clusters = [Candidate(found.design, counts) for counts in sizes]
    rungs = [race.found(candidate, found.rate) for candidate in clusters]
    return sorted(rungs, key=lambda rung: (race.goal.key(rung), rung.candidate))


def _rates(race: Race, found: Found) -> list[Found]:
    return [race.found(found.candidate, found.rate * factor) for factor in RATES]


def _climb(book: Book, rungs: Sequence[Found], start: int) -> Counts:
    """Misses of every rung. From ``start`` to the worse (larger) end until a rung has next to no
    misses in any window, then to the better end until one is lost in all; beyond, it is taken that
    they miss as few, and all."""
    num = book.num_judged(0)
    each_may = np.array(book.may_miss(num))
    rows: dict[int, Counts] = {}
    for index in range(start, len(rungs)):
        rows[index] = _row(book, rungs[index])
        if (rows[index] <= each_may).all():
            break
    last = rows[max(rows)]
    rows |= dict.fromkeys(range(max(rows) + 1, len(rungs)), last)
    for index in reversed(range(start)):
        rows[index] = _row(book, rungs[index])
        if (rows[index] > each_may).any(axis=1).all():
            break
    lost = np.full_like(last, num * len(last))
    rows |= dict.fromkeys(range(min(rows)), lost)
    return np.stack([rows[index] for index in range(len(rungs))])


def _row(book: Book, rung: Found) -> Counts:
    conditions = Conditions(rate=rung.rate)
    windows = range(book.levels[-1])
    return np.array([book.window(rung.candidate, conditions, w).misses for w in windows])
