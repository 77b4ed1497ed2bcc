"""A plan as plain data, and as tables."""

from __future__ import annotations

from typing import Any

from rich.console import Console
from rich.table import Table

from pdserve.sim.plan.change import Turn
from pdserve.sim.plan.planner import Plan
from pdserve.sim.plan.race import Found, Goal
from pdserve.sim.plan.sureness import Comparison, Sureness
from pdserve.sim.plan.words import answer, price, turn_words, watts


def document(plan: Plan, goal: Goal, unit: str) -> dict[str, Any]:
    """All of it; ``answer`` is a list of sentences."""
    return {
        "answer": answer(plan, goal, unit),
        "split": plan.winner.design.is_split,
        "goal": {"measure": goal.measure.value, "rate": goal.rate, "budget": goal.budget},
        "unit_of_cost": unit,
        "winner": _found(plan.winner),
        "runner_up": _found(plan.runner_up),
        "other_kind": _found(plan.other_kind),
        "by_other_measure": _found(plan.by_other_measure),
        "present": _found(plan.present),
        "saving": None if plan.other_kind is None else goal.gain(plan.winner, plan.other_kind),
        "sureness": _sureness(plan.sureness),
        "changes": [_turn(turn) for turn in plan.turns],
        "front": [_found(found) for found in plan.front],
        "designs": [
            {
                "design": str(standing.design),
                "windows_level": standing.level,
                "best": _found(standing.best),
            }
            for standing in plan.ranking.standings
        ],
        "left_out": {str(design): reason for design, reason in plan.left_out.items()},
    }


def print_plan(console: Console, plan: Plan, goal: Goal, unit: str) -> None:
    for number, line in enumerate(answer(plan, goal, unit)):
        console.print(line, style="bold" if number == 0 else None, soft_wrap=True)
    console.print()
    console.print(_table("Pareto front: cost, power, rate", plan.front, unit))
    last = plan.ranking.last_level
    dropped = [s.best for s in plan.ranking.standings if s.best is not None and s.level < last]
    console.print(_table("The best of each design", plan.ranking.finalists, unit))
    if dropped:
        console.print(_table("Dropped after fewer windows", dropped, unit))
    for design, reason in plan.left_out.items():
        console.print(f"left out: {design}: {reason}", soft_wrap=True)
    if plan.turns:
        console.print("\nWhat would change the answer, by one window:", style="bold")
        for turn in plan.turns:
            console.print(f"  {turn_words(turn)}", soft_wrap=True)


def _table(title: str, rows: list[Found] | tuple[Found, ...], unit: str) -> Table:
    table = Table(title=title, title_justify="left", box=None)
    for name in ("cluster", "policy"):
        table.add_column(name, overflow="fold")
    for name in ("cost", "power", "requests/s"):
        table.add_column(name, justify="right", no_wrap=True)
    for found in rows:
        table.add_row(
            str(found.candidate.cluster),
            found.design.policy,
            price(found, unit),
            watts(found.power_w),
            f"{found.rate:.4g}",
        )
    return table


def _found(found: Found | None) -> dict[str, Any] | None:
    if found is None:
        return None
    return {
        "cluster": str(found.candidate.cluster),
        "policy": found.design.policy,
        "split": found.design.is_split,
        "rate_rps": found.rate,
        "cost": found.cost,
        "power_w": found.power_w,
    }


def _sureness(sure: Sureness | None) -> dict[str, Any] | None:
    if sure is None:
        return None
    return {
        "stays": sure.stays,
        "holds": sure.holds,
        "holds_as_modelled": sure.holds_as_modelled,
        "safe": _found(sure.safe),
        "against": [_comparison(comparison) for comparison in sure.comparisons],
        "step_time_errors": dict(sure.errors),
        "windows": sure.num_windows,
        "redraws": sure.num_redraws,
    }


def _comparison(comparison: Comparison) -> dict[str, Any]:
    low, middle, high = comparison.gain
    return {
        "other": _found(comparison.other),
        "stays": comparison.stays,
        "gain": {"p5": low, "p50": middle, "p95": high},
    }


def _turn(turn: Turn) -> dict[str, Any]:
    return {
        "what": turn.name,
        "unit": turn.unit,
        "now": turn.value,
        "tried": turn.tried,
        "at": turn.at,
        "winner": _found(turn.winner),
        "words": turn_words(turn),
    }
