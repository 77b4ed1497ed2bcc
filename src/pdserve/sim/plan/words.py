"""A plan in a sentence, and in the few that belong to it."""

from __future__ import annotations

from pdserve.sim.plan.change import UNIT_OF_COST, Turn
from pdserve.sim.plan.planner import Plan
from pdserve.sim.plan.race import Found, Goal, Measure
from pdserve.sim.plan.sureness import Comparison

UNKNOWN_W = 1e-3
"""Less than this is no power: it was not known."""
EQUAL = 5e-4


def answer(plan: Plan, goal: Goal, unit: str = UNIT_OF_COST) -> list[str]:
    """The first one is the answer; the others say how sure, and what else there is. ``unit`` of
    cost."""
    winner = plan.winner
    verdict = "Split" if winner.design.is_split else "Do not split"
    what = f"{winner.candidate.words} ({winner.design.policy})"
    lines = [f"{verdict}: {what} {_serves(winner, goal, unit)}{_against(plan, goal)}."]
    lines += [_sure(plan, goal), _held(plan, unit)] if plan.sureness is not None else []
    lines.append(_runner_up(plan, goal, unit))
    lines.append(_other_measure(plan, goal, unit))
    lines.append(_present(plan, goal, unit))
    return [line for line in lines if line]


def price(found: Found, unit: str) -> str:
    return f"{found.cost:,.4g} {unit}" if found.cost < 1e4 else f"{found.cost:,.0f} {unit}"


def watts(power_w: float) -> str:
    return f"{power_w / 1e3:,.4g} kW" if power_w > UNKNOWN_W else "-"


def spent(found: Found, unit: str) -> str:
    """Cost and power, as far as they are known."""
    if found.power_w <= UNKNOWN_W:
        return price(found, unit)
    return f"{price(found, unit)}, {watts(found.power_w)}"


def turn_words(turn: Turn) -> str:
    """What would change the answer, or would not."""
    now = f"{turn.name} (now {_figure(turn.value)} {turn.unit})"
    if turn.at is None:
        side = "down" if turn.tried < turn.value else "up"
        stays = "no change"
        if turn.winner is not None and not turn.by_hardware:
            kind = "split" if turn.winner.design.is_split else "not split"
            stays = f"{kind}, and {turn.winner.candidate} in the end,"
        return f"{now}: {stays} {side} to {_figure(turn.tried)}"
    side = "below" if turn.at < turn.value else "above"
    then = "nothing holds the SLO" if turn.winner is None else f"{turn.winner.candidate} wins"
    return f"{now}: {side} about {_figure(turn.at)} {then}"


def _figure(value: float) -> str:
    """Three digits, without an exponent."""
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"


def _serves(found: Found, goal: Goal, unit: str) -> str:
    if goal.is_least:
        what = f"serve {goal.rate:.4g} requests/s within the SLO"
        return f"{what} for {spent(found, unit)}"
    what = f"serve {found.rate:.4g} requests/s within the SLO for {spent(found, unit)}"
    if goal.measure is Measure.POWER:
        return f"{what} (at most {watts(goal.budget or 0)})"
    return what if found.cost == goal.budget else f"{what} (at most {goal.budget:g} {unit})"


def _against(plan: Plan, goal: Goal) -> str:
    """What it saves."""
    if plan.other_kind is None:
        kind = "aggregated" if plan.winner.design.is_split else "split"
        return f"; no {kind} cluster that was tried holds it"
    kind = "split" if plan.other_kind.design.is_split else "aggregated"
    other = f"the best {kind} cluster, {plan.other_kind.candidate}"
    return f", {_compared(plan.winner, plan.other_kind, goal)} {other}"


def _compared(winner: Found, other: Found, goal: Goal) -> str:
    """``7.1 % cheaper than``; of equals what they differ in."""
    gain = goal.gain(winner, other)
    if abs(gain) < EQUAL:
        if not goal.is_least:
            return "as much as"
        if goal.measure is Measure.POWER:
            return "drawing as much as"
        less = 1 - winner.power_w / other.power_w
        if other.power_w <= UNKNOWN_W or less < EQUAL:
            return "as cheap as"
        return f"drawing {_percent(less)} less than, and as cheap as,"
    if not goal.is_least:
        return f"{_percent(gain)} more than"
    if goal.measure is Measure.POWER:
        return f"drawing {_percent(gain)} less than"
    return f"{_percent(gain)} cheaper than"


def _sure(plan: Plan, goal: Goal) -> str:
    sure = plan.sureness
    assert sure is not None
    off = ", ".join(f"{name} {_percent(error)}" for name, error in sorted(sure.errors.items()))
    line = (
        f"How sure: it stays the best in {_percent(sure.stays)} of {sure.num_redraws} redraws of "
        f"the trace's {sure.num_windows} windows with the step times off as well (by {off} in the "
        "mean)"
    )
    kind = next((c for c in sure.comparisons if c.other == plan.other_kind), None)
    return f"{line}{'' if kind is None else '; ' + _interval(kind, goal)}."


def _interval(comparison: Comparison, goal: Goal) -> str:
    kind = "split" if comparison.other.design.is_split else "aggregated"
    low, _, high = comparison.gain
    does = "saves" if goal.is_least else "gains"
    if max(abs(low), abs(high)) < EQUAL:
        return f"against {kind} it {does} nothing"
    return f"against {kind} it {does} {_percent(low)} to {_percent(high)} in nine of ten"


def _held(plan: Plan, unit: str) -> str:
    sure = plan.sureness
    assert sure is not None
    line = (
        f"As it stands it holds the SLO in {_percent(sure.holds)} of them, and in "
        f"{_percent(sure.holds_as_modelled)} of those in which the cost model is right"
    )
    if sure.safe is None:
        return f"{line}; nothing that was tried of its design holds it in 95 %."
    if sure.safe == plan.winner:
        return f"{line}."
    at = f" at {sure.safe.rate:.4g} requests/s" if sure.safe.rate != plan.winner.rate else ""
    return f"{line}; to hold it in 95 %, take {sure.safe.candidate}{at} ({price(sure.safe, unit)})."


def _runner_up(plan: Plan, goal: Goal, unit: str) -> str:
    found = plan.runner_up
    if found is None:
        return ""
    what = f"{found.rate:.4g} requests/s, " if not goal.is_least else ""
    compared = _compared(plan.winner, found, goal)
    does = "is" if goal.is_least else "serves"
    what += spent(found, unit)
    return f"Runner-up: {found.candidate}, {what}; the winner {does} {compared} it."


def _other_measure(plan: Plan, goal: Goal, unit: str) -> str:
    found = plan.by_other_measure
    if found is None or found.power_w <= UNKNOWN_W:
        return ""
    sought = "Least power" if goal.measure is Measure.COST else "Cheapest"
    if found.candidate == plan.winner.candidate:
        return f"{sought}: the same."
    return f"{sought}: {found.candidate}, {watts(found.power_w)}, {price(found, unit)}."


def _present(plan: Plan, goal: Goal, unit: str) -> str:
    found = plan.present
    if found is None:
        return ""
    line = f"The present layout, {found.candidate} ({price(found, unit)}),"
    if not found.rate:
        return f"{line} does not hold the SLO."
    if not goal.is_least:
        gain = _compared(plan.winner, found, goal)
        return f"{line} serves {found.rate:.4g} requests/s; the winner {gain} that."
    only = "only " if found.rate < (goal.rate or 0) * (1 - 1e-9) else ""
    return f"{line} holds the SLO {only}up to {found.rate:.3g} requests/s."


def _percent(share: float) -> str:
    return f"{100 * share:.0f} %" if abs(share) >= 0.095 else f"{100 * share:.1f} %"
