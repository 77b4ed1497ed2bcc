"""``pdserve plan``: which cluster to buy, or what to make of the one that is there."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping
from contextlib import closing
from functools import cache

from pdserve.cost.machine import MachineModel
from pdserve.page import page
from pdserve.plot.files import write_pictures
from pdserve.sim.command import check_place, write_json
from pdserve.sim.plan.arguments import PlanOptions
from pdserve.sim.plan.bar import SearchBar
from pdserve.sim.plan.book import Book, Journal
from pdserve.sim.plan.bounds import WorkBounds
from pdserve.sim.plan.document import document, print_plan
from pdserve.sim.plan.live import Fetch, live_problem
from pdserve.sim.plan.most import RateGrid
from pdserve.sim.plan.picture import front_svg
from pdserve.sim.plan.planner import Plan, Questions, make_plan
from pdserve.sim.plan.problem import Problem, problem_of
from pdserve.sim.plan.promise import Bounds, Promise
from pdserve.sim.plan.race import Race
from pdserve.sim.plan.simulate import SimEvaluate, slowed
from pdserve.sim.plan.trial import Factors


def run(typed: argparse.Namespace, fetch: Fetch) -> int:
    """Gives the exit status. ``fetch`` asks a running server."""
    options = PlanOptions.of(typed)
    parsed = options.parsed
    check_place(parsed.json, parsed.plot)
    if parsed.live:
        problem = live_problem(options, fetch(parsed.live, parsed.api_key))
    else:
        problem = problem_of(options)
    for note in problem.notes:
        print(f"note: {note}", file=sys.stderr)
    try:
        plan, book, wall_s = solve(problem, options)
    except KeyboardInterrupt:
        if parsed.resume is not None:
            print(f"interrupted: {parsed.resume} has what is known so far", file=sys.stderr)
        raise
    whole = document(plan, problem.goal, problem.unit) | {
        "slo": str(problem.promise),
        "notes": list(problem.notes),
        "windows": {
            "num": len(problem.windows),
            "requests": problem.windows.num_judged,
            "seconds": [
                round(problem.windows.span_s(window, plan.winner.rate), 3)
                for window in range(len(problem.windows))
            ],
        },
        "simulations": book.num_asked,
        "wall_s": round(wall_s, 3),
    }
    if parsed.json is not None:
        write_json(parsed.json, whole)
    if parsed.json != "-":
        console = page()
        print_plan(console, plan, problem.goal, problem.unit)
        console.print(f"\n{book.num_asked} simulations in {wall_s:.0f} s", style="dim")
    if parsed.plot is not None:
        for path in write_pictures(parsed.plot, _pictures(plan, problem)):
            if parsed.json != "-":
                print(path)
    return 0


def solve(problem: Problem, options: PlanOptions) -> tuple[Plan, Book, float]:
    """The plan, the book of what was asked for it, and how long that took."""
    parsed = options.parsed
    evaluate = SimEvaluate(problem.windows, problem.promise, problem.machines, problem.template)
    num = len(problem.windows)
    bar = SearchBar(shown=not parsed.no_progress)
    with bar, closing(Journal(parsed.resume, problem.digest)) as journal:
        book = Book(evaluate, problem.promise, _levels(num), journal, bar.evaluated)
        bounds = _Bounds(problem, book.levels)
        race = Race(
            book=book,
            prices=problem.prices,
            goal=problem.goal,
            bounds_of=bounds.of,
            grid=RateGrid(parsed.precision),
            most_workers=parsed.max_workers,
        )
        questions = Questions(
            errors=problem.errors,
            bounds=_bounded(problem.promise),
            sureness=parsed.sureness,
            turns=parsed.changes,
            present=problem.present,
            seed=parsed.seed,
            unit_of_cost=problem.unit,
        )
        floors = bounds.of(len(book.levels) - 1, (), ())
        plan = make_plan(race, problem.designs, floors, questions, bar.doing)
    return plan, book, bar.passed_s


def _levels(num_windows: int) -> list[int]:
    """One window, some, all."""
    return sorted({1, max(1, round(num_windows**0.5)), num_windows})


class _Bounds:
    """Analytic bounds by level and by factors on the promise, each made once."""

    def __init__(self, problem: Problem, levels: tuple[int, ...]) -> None:
        machines: Mapping[str, MachineModel] = problem.by_hardware

        @cache
        def of(level: int, looser: Factors, slower: Factors) -> WorkBounds:
            by_name = dict(slower)
            return WorkBounds(
                problem.windows,
                levels[level],
                {name: slowed(each, by_name.get(name, 1.0)) for name, each in machines.items()},
                problem.promise.scaled(dict(looser)),
                prefix_cache=problem.template.prefix_cache,
            )

        self.of = of


def _bounded(promise: Promise) -> list[tuple[str, float, str]]:
    if isinstance(promise, Bounds):
        return [(metric, ms, "ms") for metric, ms in promise.slo.bounds_ms]
    return [(metric, 1.0, "times its limits") for metric in promise.metrics]


def _pictures(plan: Plan, problem: Problem) -> dict[str, str]:
    bests = [s.best for s in plan.ranking.standings if s.best is not None]
    return {
        name: front_svg(title, bests, plan.front, power=power, unit=problem.unit)
        for name, title, power in (
            ("plan-cost", "Rate and cost", False),
            ("plan-power", "Rate and power", True),
        )
    }
