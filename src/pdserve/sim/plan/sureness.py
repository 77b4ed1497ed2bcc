"""How sure the answer is.

Two things may be otherwise than they were taken to be. *The traffic*: the trace is one of many that
there might have been, so its windows are drawn anew, with replacement, as often as there are
windows (a bootstrap). *The cost model*: the steps of each hardware may take longer or shorter than
it says, by as much as it says of itself; every design on that hardware has it alike.

For each design a *ladder* of clusters around its best (or of rates, for a budget) is evaluated on
every window, at three speeds of each hardware: as predicted and off by sqrt(3) standard deviations,
which with weights 2/3, 1/6 and 1/6 have the mean and the variance of a normal error. Each redraw
then has a best rung for each design; how often the winner stays it, and by how much, is the answer.
"""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from pdserve.sim.plan.book import Book
from pdserve.sim.plan.race import Found, Race
from pdserve.sim.plan.trial import Candidate, Conditions, Factors, factors

SIZES = (0.7, 0.8, 0.9, 1.0, 1.1, 1.25, 1.5)
RATES = (1.3, 1.2, 1.1, 1.05, 1.0, 0.95, 0.9, 0.8, 0.65)
NUM_REDRAWS = 1000
SAFE = 0.95
ASSUMED_ERROR = 0.15
"""Of step times, where the cost model does not know its own error."""
STD_PER_MEAN_ERROR = math.sqrt(math.pi / 2)
"""Of a normal error."""
_WEIGHTS = (1 / 6, 2 / 3, 1 / 6)
_MIN_FACTOR = 0.3

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
    """``rungs``, the best first. ``misses`` by speeds: of each rung, window and bound."""

    rungs: tuple[Found, ...]
    misses: Mapping[Factors, Counts]


def sureness(
    race: Race, finalists: Sequence[Found], errors: Mapping[str, float], seed: int
) -> Sureness:
    """Of ``finalists``, the winner first. ``errors`` by hardware."""
    book, num_windows = race.book, race.book.levels[-1]
    ladders = [_ladder(race, found, errors) for found in finalists]
    num = book.num_judged(0)
    allowed = np.array(book.may_miss(num * num_windows))
    draws = random.Random(f"{seed}/redraws")
    names = sorted(errors)
    values: list[list[float]] = [[] for _ in ladders]
    stays, holds_as_modelled, as_modelled = 0, 0, 0
    own = ladders[0].rungs.index(finalists[0])
    held = np.zeros(len(ladders[0].rungs), dtype=np.int64)
    for _ in range(NUM_REDRAWS):
        nodes = {name: draws.choices((-1, 0, 1), _WEIGHTS)[0] for name in names}
        drawn = [draws.randrange(num_windows) for _ in range(num_windows)]
        times = np.bincount(drawn, minlength=num_windows)
        for number, (found, ladder) in enumerate(zip(finalists, ladders, strict=True)):
            speeds = _speeds(found.candidate, errors, nodes)
            sums = np.tensordot(times, ladder.misses[speeds], axes=(0, 1))
            good = np.all(sums <= allowed, axis=1)
            if number == 0:
                held += good
                as_modelled += not any(nodes.values())
                holds_as_modelled += good[own] and not any(nodes.values())
                wins = bool(good.any())
            # One that holds on no rung is at least as bad as its worst.
            best = int(np.argmax(good)) if good.any() else -1
            values[number].append(race.goal.value(ladder.rungs[best]))
        stays += wins and all(_not_worse(race, values[0][-1], v[-1]) for v in values[1:])
    safe = [
        rung for rung, num in zip(ladders[0].rungs, held, strict=True) if num >= SAFE * NUM_REDRAWS
    ]
    return Sureness(
        stays=stays / NUM_REDRAWS,
        holds=float(held[own]) / NUM_REDRAWS,
        holds_as_modelled=float(holds_as_modelled) / max(1, as_modelled),
        safe=safe[0] if safe else None,
        comparisons=tuple(
            _compared(race, found, values[0], values[number])
            for number, found in enumerate(finalists)
            if number
        ),
        errors=dict(errors),
        num_windows=num_windows,
    )


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
    names = sorted({name for name in found.design.hardware if errors.get(name)})
    misses = {}
    for nodes in itertools.product((-1, 0, 1), repeat=len(names)):
        speeds = _speeds(found.candidate, errors, dict(zip(names, nodes, strict=True)))
        misses[speeds] = _climb(race.book, rungs, rungs.index(found), speeds)
    return _Ladder(tuple(rungs), misses)


def _sizes(race: Race, found: Found) -> list[Found]:
    sizes = {
        tuple(max(1, round(count * size)) for count in found.candidate.counts) for size in SIZES
    } | {tuple(count + 1 for count in found.candidate.counts)}
    clusters = [Candidate(found.design, counts) for counts in sizes]
    rungs = [race.found(candidate, found.rate) for candidate in clusters]
    return sorted(rungs, key=lambda rung: (race.goal.key(rung), rung.candidate))


def _rates(race: Race, found: Found) -> list[Found]:
    return [race.found(found.candidate, found.rate * factor) for factor in RATES]


def _speeds(candidate: Candidate, errors: Mapping[str, float], nodes: Mapping[str, int]) -> Factors:
    by_name = {}
    for name in candidate.design.hardware:
        off = math.sqrt(3) * STD_PER_MEAN_ERROR * errors.get(name, 0.0) * nodes.get(name, 0)
        by_name[name] = max(_MIN_FACTOR, 1 + off)
    return factors(**by_name)


def _climb(book: Book, rungs: Sequence[Found], start: int, speeds: Factors) -> Counts:
    """Misses of every rung. From ``start`` to the worse (larger) end until a rung has next to no
    misses in any window, then to the better end until one is lost in all; beyond, it is taken that
    they miss as few, and all."""
    num = book.num_judged(0)
    each_may = np.array(book.may_miss(num))
    rows: dict[int, Counts] = {}
    for index in range(start, len(rungs)):
        rows[index] = _row(book, rungs[index], speeds)
        if (rows[index] <= each_may).all():
            break
    last = rows[max(rows)]
    rows |= dict.fromkeys(range(max(rows) + 1, len(rungs)), last)
    for index in reversed(range(start)):
        rows[index] = _row(book, rungs[index], speeds)
        if (rows[index] > each_may).any(axis=1).all():
            break
    lost = np.full_like(last, num * len(last))
    rows |= dict.fromkeys(range(min(rows)), lost)
    return np.stack([rows[index] for index in range(len(rungs))])


def _row(book: Book, rung: Found, speeds: Factors) -> Counts:
    conditions = Conditions(rate=rung.rate, slower=speeds)
    windows = range(book.levels[-1])
    return np.array([book.window(rung.candidate, conditions, w).misses for w in windows])
