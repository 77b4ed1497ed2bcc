"""From a problem to a plan: what cannot be is refused, designs compete, the winner is asked."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

from pdserve.core.errors import ConfigError
from pdserve.sim.plan.bounds import WorkBounds
from pdserve.sim.plan.change import UNIT_OF_COST, Turn, knobs_of, turns_of
from pdserve.sim.plan.contest import Ranking, contest
from pdserve.sim.plan.front import pareto
from pdserve.sim.plan.race import Found, Goal, Measure, Race
from pdserve.sim.plan.sureness import Sureness, sureness
from pdserve.sim.plan.trial import Candidate, Design

MAX_FRONT = 6
"""Members of the front whose highest rate is looked for."""
Told = Callable[[str], None]


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """``winner``; ``runner_up``: the best of another design; ``other_kind``: the best aggregated
    cluster if the winner is split, else the best split one. ``by_other_measure``: the one of least
    power if the cheapest was sought, and the other way round; None for a budget. ``left_out``:
    designs that could not hold the promise, with the reason. ``present``: the cluster that is
    there, and the highest rate at which it holds (0: none)."""

    winner: Found
    runner_up: Found | None
    other_kind: Found | None
    by_other_measure: Found | None
    ranking: Ranking
    left_out: Mapping[Design, str]
    sureness: Sureness | None
    turns: tuple[Turn, ...]
    front: tuple[Found, ...]
    present: Found | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Questions:
    """What is asked beside who wins. ``bounds``: of each bounded latency its value and unit, for
    what would change the answer."""

    errors: Mapping[str, float]
    bounds: Sequence[tuple[str, float, str]] = ()
    sureness: bool = True
    turns: bool = True
    present: Candidate | None = None
    seed: int = 0
    unit_of_cost: str = UNIT_OF_COST


def make_plan(
    race: Race,
    designs: Sequence[Design],
    floors: WorkBounds | None,
    questions: Questions,
    told: Told = lambda doing: None,
) -> Plan:
    """``floors``: of all windows. Raises `ConfigError` with the bound if nothing can do it."""
    able, left_out = _able(race, designs, floors)
    ranking = contest(race, able, told=told)
    winner = ranking.winner
    if winner is None:
        raise ConfigError(_nothing(race, able))
    finalists = ranking.finalists
    other_kind = ranking.best_of_kind(is_split=not winner.design.is_split)
    runner_up = finalists[1] if len(finalists) > 1 else None
    last = ranking.last_level
    present = None
    if questions.present is not None:
        told(f"{questions.present} as it is")
        present = _present(race, questions.present, last)
    rivals = [winner]
    rivals += [f for f in (other_kind, runner_up) if f is not None and f not in rivals]
    sure = None
    if questions.sureness:
        told("how sure")
        sure = sureness(race, list(dict.fromkeys(rivals)), questions.errors, questions.seed)
    return Plan(
        winner=winner,
        runner_up=runner_up,
        other_kind=other_kind,
        by_other_measure=_by_other_measure(race, ranking, told),
        ranking=ranking,
        left_out=left_out,
        sureness=sure,
        turns=tuple(_turns(race, ranking, able, questions, told)) if questions.turns else (),
        front=tuple(_front(race, ranking, told)),
        present=present,
    )


def _able(
    race: Race, designs: Sequence[Design], floors: WorkBounds | None
) -> tuple[list[Design], dict[Design, str]]:
    able, left_out = [], {}
    too_small: dict[Design, float] = {}
    for design in designs:
        reason = None if floors is None else floors.floor_breaks(design)
        budget = race.goal.budget
        least = sum(race.prices.weights(design, race.goal.measure))
        if reason is None and budget is not None and least > budget * (1 + 1e-9):
            reason = f"the smallest such cluster takes {least:g} of the budget of {budget:g}"
            too_small[design] = least
        if reason is None:
            able.append(design)
        else:
            left_out[design] = reason
    if not able:
        reasons = [reason for design, reason in left_out.items() if design not in too_small]
        if too_small:  # of those, the one that comes nearest
            reasons.append(left_out[min(too_small, key=lambda design: too_small[design])])
        raise ConfigError(f"no cluster can do this: {'; '.join(dict.fromkeys(reasons))}")
    return able, left_out


def _nothing(race: Race, designs: Sequence[Design]) -> str:
    if race.goal.is_least:
        return (
            f"no cluster of up to {race.most_workers} workers holds the SLO at "
            f"{race.goal.rate:g} requests/s with {', '.join(map(str, designs))}: loosen it, or "
            "allow other hardware or policies"
        )
    return (
        f"nothing within the budget of {race.goal.budget:g} holds the SLO at a rate worth serving: "
        "loosen it, or allow other hardware or policies"
    )


def _by_other_measure(race: Race, ranking: Ranking, told: Told) -> Found | None:
    """For a rate: the best by the measure that was not asked for."""
    if not race.goal.is_least:
        return None
    other = Measure.POWER if race.goal.measure is Measure.COST else Measure.COST
    turned = replace(race, goal=Goal(other, rate=race.goal.rate))
    bests = [standing.best for standing in ranking.standings if standing.best is not None]
    bests.sort(key=lambda found: (turned.goal.key(found), found.design))
    designs = [found.design for found in (*bests[:1], *ranking.finalists)]
    return contest(
        turned, list(dict.fromkeys(designs)), levels=[ranking.last_level], told=told
    ).winner


def _present(race: Race, candidate: Candidate, level: int) -> Found:
    """The layout that is there: what it serves."""
    likely = race.limits(level).likely(candidate.design, 1.0)
    rate = min(count / need for count, need in zip(candidate.counts, likely, strict=True))
    if race.goal.rate is not None:
        rate = race.goal.rate
    lowest = race.grid.at_most(rate / 32)
    while race.grid.at_most(rate) > lowest and not race.holds(candidate, rate, level):
        rate /= 1.5
    if race.grid.at_most(rate) <= lowest:
        return race.found(candidate, 0.0)
    return race.found(candidate, race.highest_rate(candidate, level, rate))


def _turns(
    race: Race, ranking: Ranking, designs: Sequence[Design], questions: Questions, told: Told
) -> list[Turn]:
    level = 0
    likely: dict[tuple[str, ...], Design] = {}
    for standing in ranking.standings:  # the winner's comes first
        if standing.best is not None:
            likely.setdefault(standing.design.hardware, standing.design)
    turns: list[Turn] = []
    if len(likely) < 2:
        return turns
    for knob in knobs_of(race, designs, questions.bounds, questions.unit_of_cost):
        turns += turns_of(race, knob, list(likely.values()), level, told)
    return turns


def _front(race: Race, ranking: Ranking, told: Told) -> list[Found]:
    """Of all that were seen to hold the promise by all windows; with the highest rates of the
    first few."""
    last = ranking.last_level
    highest: dict[Candidate, float] = {}
    for candidate, rate in race.book.met(last):
        highest[candidate] = max(rate, highest.get(candidate, 0.0))
    front = pareto(race.found(candidate, rate) for candidate, rate in highest.items())
    if not race.goal.is_least:
        return front
    told("highest rates of the front")
    raised = [
        race.found(f.candidate, race.highest_rate(f.candidate, last, f.rate))
        for f in front[:MAX_FRONT]
    ]
    return pareto([*raised, *front])
