"""Designs compete, the winner is questioned: over a formula whose true answers are known."""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass, field, replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pdserve.core.errors import ConfigError
from pdserve.core.request import Role
from pdserve.sim.plan.book import Book, Journal
from pdserve.sim.plan.change import Knob, knobs_of, turns_of
from pdserve.sim.plan.contest import contest
from pdserve.sim.plan.fake import FormulaEvaluate
from pdserve.sim.plan.front import pareto
from pdserve.sim.plan.most import ROUNDING, RateGrid
from pdserve.sim.plan.planner import Questions, make_plan
from pdserve.sim.plan.promise import Bounds
from pdserve.sim.plan.race import Goal, Measure, Prices, Race
from pdserve.sim.plan.sureness import sureness
from pdserve.sim.plan.trial import Candidate, Conditions, Design, Trial
from pdserve.sim.plan.words import answer
from pdserve.workload.slo import Slo

PROMISE = Bounds(Slo((("ttft", 500.0),)))
PREFILL = {"a": 2.0, "b": 5.0}
DECODE = {"a": 3.0, "b": 4.0}
PRICES = Prices(
    cost={"a": 1.0, "b": 2.2},
    watts={(name, role): watts for name, watts in (("a", 10.0), ("b", 17.0)) for role in Role},
)
DESIGNS = [
    *(Design(pair, "splitwise") for pair in itertools.product("ab", repeat=2)),
    *(Design((name,), "aggregated") for name in "ab"),
]


@dataclass
class OffLimits:
    """Estimates that are off by a factor, and no bounds."""

    evaluate: FormulaEvaluate
    factor: float = 0.7
    asked: list[object] = field(default_factory=list)

    def refuses(self, design, counts, rate):
        return False

    def floor_breaks(self, design):
        return None

    def likely(self, design, rate):
        if design.is_split:
            prefill = rate / self.evaluate.prefill_rps[design.hardware[0]]
            return prefill * self.factor, rate / self.evaluate.decode_rps[design.hardware[1]]
        one = Candidate(design, (1,))
        return (rate / self.evaluate.capacity(one) * self.factor,)


def make_race(goal, *, prefill=PREFILL, decode=DECODE, prices=PRICES, loads=(1.0,), factor=0.7):
    evaluate = FormulaEvaluate(prefill_rps=prefill, decode_rps=decode, loads=loads)
    levels = sorted({1, len(loads)})
    limits = OffLimits(evaluate, factor)
    return Race(
        book=Book(evaluate, PROMISE, levels),
        prices=prices,
        goal=goal,
        bounds_of=lambda level, looser, slower: limits,
        grid=RateGrid(0.02, 0.05),
        spread=math.inf,
    ), evaluate


def all_clusters(design, most=30):
    return (
        Candidate(design, c) for c in itertools.product(range(1, most), repeat=len(design.hardware))
    )


speeds = st.fixed_dictionaries({"a": st.floats(0.8, 6.0), "b": st.floats(0.8, 6.0)})
two_prices = st.fixed_dictionaries({"a": st.floats(0.5, 3.0), "b": st.floats(0.5, 3.0)})


@given(prefill=speeds, decode=speeds, cost=two_prices, rate=st.floats(0.5, 12.0))
@settings(max_examples=20)
def test_the_contest_finds_the_cheapest_of_all_clusters(prefill, decode, cost, rate):
    prices = replace(PRICES, cost=cost)
    goal = Goal(Measure.COST, rate=rate)
    race, evaluate = make_race(goal, prefill=prefill, decode=decode, prices=prices)
    ranking = contest(race, DESIGNS)
    cheapest = min(
        prices.of(candidate, Measure.COST)
        for design in DESIGNS
        for candidate in all_clusters(design)
        if evaluate.capacity(candidate) >= rate
    )
    assert ranking.winner.cost == pytest.approx(cheapest)


@given(prefill=speeds, decode=speeds, cost=two_prices, budget=st.floats(4.0, 20.0))
@settings(max_examples=20)
def test_the_contest_finds_the_most_of_all_clusters_within_a_budget(prefill, decode, cost, budget):
    prices = replace(PRICES, cost=cost)
    goal = Goal(Measure.COST, budget=budget)
    race, evaluate = make_race(goal, prefill=prefill, decode=decode, prices=prices)
    ranking = contest(race, DESIGNS)
    most = max(
        evaluate.capacity(candidate)
        for design in DESIGNS
        for candidate in all_clusters(design, 41)
        if prices.of(candidate, Measure.COST) <= budget * (1 + ROUNDING)
    )
    assert ranking.winner.rate == race.grid.rate(race.grid.at_most(most))
    assert ranking.winner.cost <= budget * (1 + ROUNDING)


def test_the_last_of_each_kind_is_judged_by_all_windows():
    """However bad aggregated clusters are, the answer names the best one."""
    race, _ = make_race(Goal(Measure.COST, rate=30.0), loads=(1.0, 1.1, 0.9))
    ranking = contest(race, DESIGNS)
    assert ranking.best_of_kind(is_split=True) is not None
    assert ranking.best_of_kind(is_split=False) is not None


def test_nothing_is_asked_twice_and_little_for_what_is_known(tmp_path):
    race, evaluate = make_race(Goal(Measure.COST, rate=40.0))
    contest(race, DESIGNS)
    num = len(evaluate.trials)
    assert len(set(evaluate.trials)) == num < 150
    contest(race, DESIGNS)
    contest(replace(race, prices=PRICES.times("a", 1.01)), DESIGNS)
    assert len(evaluate.trials) <= num + 4


def test_a_search_goes_on_from_its_journal(tmp_path):
    path = tmp_path / "journal.jsonl"
    answers = []
    for _ in range(2):
        evaluate = FormulaEvaluate(prefill_rps=PREFILL, decode_rps=DECODE, loads=(1.0, 1.2))
        limits = OffLimits(evaluate)
        book = Book(evaluate, PROMISE, (1, 2), Journal(path, "problem"))
        race = Race(
            book=book,
            prices=PRICES,
            goal=Goal(Measure.COST, rate=20.0),
            bounds_of=lambda level, looser, slower, limits=limits: limits,
        )
        answers.append((contest(race, DESIGNS), len(evaluate.trials)))
        with path.open("a") as file:
            file.write('{"key": "brok')
    assert answers[0][0] == answers[1][0]
    assert answers[0][1] > 0
    assert answers[1][1] == 0


def test_what_is_no_journal_is_not_written_to(tmp_path):
    path = tmp_path / "trace.csv"
    path.write_text("TIMESTAMP,ContextTokens,GeneratedTokens\n")
    with pytest.raises(ConfigError, match=r"trace\.csv is no file that a plan has written"):
        Journal(path, "problem")
    assert path.read_text() == "TIMESTAMP,ContextTokens,GeneratedTokens\n"


def test_a_journal_of_another_problem_says_nothing(tmp_path):
    path = tmp_path / "journal.jsonl"
    candidate = Candidate(DESIGNS[0], (1, 1))
    for problem in ("one", "other"):
        evaluate = FormulaEvaluate(prefill_rps=PREFILL, decode_rps=DECODE)
        Book(evaluate, PROMISE, (1,), Journal(path, problem)).meets(candidate, Conditions(1.0), 0)
        assert len(evaluate.trials) == 1


def test_a_broken_off_evaluation_is_done_again_if_more_may_be_missed(tmp_path):
    """What was enough to lose one question may not be enough for the next one."""
    evaluate = FormulaEvaluate(prefill_rps=PREFILL, decode_rps=DECODE, loads=(1.0, 0.1, 0.1))
    book = Book(evaluate, Bounds(PROMISE.slo, 0.97), (1, 3))
    candidate, conditions = Candidate(DESIGNS[0], (1, 1)), Conditions(2.1)
    assert not book.meets(candidate, conditions, 0)
    assert book.meets(candidate, conditions, 1)
    heavy = Trial(candidate, conditions, 0)
    assert evaluate.trials.count(heavy) == 2


def test_more_workers_and_lower_rates_are_not_asked():
    evaluate = FormulaEvaluate(prefill_rps=PREFILL, decode_rps=DECODE)
    book = Book(evaluate, PROMISE, (1,))
    design = DESIGNS[0]
    assert book.meets(Candidate(design, (2, 2)), Conditions(4.0), 0)
    assert not book.meets(Candidate(design, (2, 2)), Conditions(4.5), 0)
    asked = len(evaluate.trials)
    assert book.meets(Candidate(design, (3, 2)), Conditions(4.0), 0)
    assert book.meets(Candidate(design, (2, 2)), Conditions(1.0), 0)
    assert not book.meets(Candidate(design, (2, 1)), Conditions(4.5), 0)
    assert not book.meets(Candidate(design, (1, 2)), Conditions(9.0), 0)
    assert len(evaluate.trials) == asked


def test_sure_of_what_no_window_doubts():
    race, _ = make_race(Goal(Measure.COST, rate=30.0), loads=(1.0, 1.0, 1.0, 1.0))
    finalists = contest(race, DESIGNS).finalists
    sure = sureness(race, finalists[:2], {"a": 0.0, "b": 0.0}, seed=0)
    assert (sure.stays, sure.holds) == (1.0, 1.0)
    assert sure.comparisons[0].gain[0] == pytest.approx(race.goal.gain(*finalists[:2]), abs=0.12)


def test_windows_that_differ_and_a_model_that_errs_make_less_sure():
    goal = Goal(Measure.COST, rate=300.0)
    race, _ = make_race(goal, loads=(1.0, 1.3, 0.6, 0.9, 1.2, 0.8))
    finalists = contest(race, DESIGNS).finalists
    exact = sureness(race, finalists[:2], {}, seed=0)
    assert 0.2 < exact.holds < 1.0
    assert exact.holds == exact.holds_as_modelled
    erring = sureness(race, finalists[:2], {"a": 0.2, "b": 0.2}, seed=0)
    assert erring.holds < erring.holds_as_modelled
    assert erring.safe is None or erring.safe.cost >= finalists[0].cost
    assert sureness(race, finalists[:2], {}, seed=0) == exact


def test_the_price_at_which_the_hardware_flips_is_where_both_cost_the_same():
    race, _ = make_race(Goal(Measure.COST, rate=60.0))
    knob = next(k for k in knobs_of(race, DESIGNS, ()) if k.name == "price of b")
    down, up = turns_of(race, knob, DESIGNS, 0)
    turn = up if up.at is not None else down
    assert turn.at is not None
    for factor, wins in ((0.93, False), (1.07, True)):
        towards = factor if turn is up else 1 / factor
        there = knob.turn(race, turn.at / knob.value * towards)
        winner = contest(there, DESIGNS).winner
        now = contest(race, DESIGNS).winner
        assert (winner.design.hardware != now.design.hardware) == wins


def test_a_design_that_wins_on_the_way_only_is_found():
    race, _ = make_race(Goal(Measure.COST, rate=60.0))

    def turn(race, factor):
        return replace(race, prices=race.prices.times("b", 4.0 if 1.5 < factor < 3 else 1.0))

    knob = Knob("price of b", "$/h", 2.0, turn, (1 / 4, 4.0), by_hardware=True)
    down, up = turns_of(race, knob, DESIGNS, 0)
    assert down.at is None
    assert up.at == pytest.approx(2.0 * 1.5, rel=0.07)


def test_a_plan_says_it_in_a_sentence():
    race, _ = make_race(Goal(Measure.COST, rate=30.0), loads=(1.0, 1.1))
    plan = make_plan(race, DESIGNS, None, Questions(errors={"a": 0.1, "b": 0.1}))
    first, second, *rest = answer(plan, race.goal)
    assert first.startswith("Split: 7 b prefill and 11 a decode workers (splitwise) serve 30")
    assert "cheaper than the best aggregated cluster" in first
    assert "How sure" in second
    assert any(line.startswith("Runner-up") for line in rest)
    assert plan.front == tuple(pareto(plan.front))


def test_what_a_budget_cannot_buy_is_refused_with_the_least_that_can_be_bought():
    race, _ = make_race(Goal(Measure.COST, budget=0.5))
    with pytest.raises(ConfigError, match=r"smallest such cluster takes 1 of the budget of 0\.5"):
        make_plan(race, DESIGNS, None, Questions(errors={}))


def test_what_no_number_of_workers_holds_is_refused():
    race, _ = make_race(Goal(Measure.COST, rate=5e4))
    with pytest.raises(ConfigError, match="no cluster of up to 1024 workers"):
        make_plan(race, DESIGNS, None, Questions(errors={}))
