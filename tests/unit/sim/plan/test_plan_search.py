"""The pruned search finds what an exhaustive one finds, if clusters are as monotone as it takes
them to be."""

from __future__ import annotations

import itertools
import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pdserve.sim.plan.least import least
from pdserve.sim.plan.most import RateGrid, affordable, most

weights_of_two = st.tuples(*[st.floats(0.5, 5.0)] * 2)


@st.composite
def upward_closed(draw: st.DrawFn) -> list[tuple[int, int]]:
    """Corners: what has as much of both as one of them is accepted."""
    corner = st.tuples(st.integers(1, 12), st.integers(1, 12))
    return draw(st.lists(corner, min_size=1, max_size=5))


@given(
    corners=upward_closed(),
    weights=weights_of_two,
    start=st.tuples(*[st.floats(0.05, 20.0)] * 2),
)
@settings(max_examples=100)
def test_the_least_of_two_kinds_is_what_trying_all_gives(corners, weights, start):
    def holds(counts):
        return any(counts[0] >= p and counts[1] >= d for p, d in corners)

    def weigh(counts):
        return (counts[0] * weights[0] + counts[1] * weights[1], *counts)

    found = least(holds, weigh, start)
    everything = (c for c in itertools.product(range(1, 13), repeat=2) if holds(c))
    assert found == min(everything, key=weigh)


@given(
    corners=upward_closed(),
    weights=weights_of_two,
    start=st.tuples(*[st.floats(0.5, 8.0)] * 2),
    refused_sum=st.integers(2, 10),
)
@settings(max_examples=60)
def test_what_is_refused_is_not_asked_and_does_not_change_the_answer(
    corners, weights, start, refused_sum
):
    def refused(counts):
        return sum(counts) < refused_sum

    asked = []

    def holds(counts):
        asked.append(counts)
        return any(counts[0] >= p and counts[1] >= d for p, d in corners) and not refused(counts)

    def weigh(counts):
        return (counts[0] * weights[0] + counts[1] * weights[1], *counts)

    found = least(holds, weigh, start, refused=refused)
    assert not any(map(refused, asked))
    everything = (c for c in itertools.product(range(1, 24), repeat=2) if holds(c))
    assert found == min(everything, key=weigh)


@given(true=st.integers(1, 300), start=st.floats(0.1, 400.0))
def test_the_least_of_one_kind(true, start):
    questions = []

    def holds(counts):
        questions.append(counts)
        return counts[0] >= true

    assert least(holds, lambda counts: (float(counts[0]),), (start,)) == (true,) or (
        true > start * 64
    )
    assert len(questions) < 60


@given(
    corners=upward_closed(),
    weights=weights_of_two,
    start=st.tuples(*[st.floats(0.05, 20.0)] * 2),
    limit=st.floats(1.0, 40.0),
)
@settings(max_examples=60)
def test_with_a_limit_it_finds_what_weighs_less_if_there_is_any(corners, weights, start, limit):
    def holds(counts):
        return any(counts[0] >= p and counts[1] >= d for p, d in corners)

    def weigh(counts):
        return (counts[0] * weights[0] + counts[1] * weights[1], *counts)

    found = least(holds, weigh, start, limit=limit)
    everything = (c for c in itertools.product(range(1, 13), repeat=2) if holds(c))
    best = min(everything, key=weigh)
    assert found == (best if weigh(best)[0] <= limit else None)


def test_a_large_cluster_takes_few_questions():
    """27 prefill and 3 decode workers, found from an estimate that is a third off."""
    questions = set()

    def holds(counts):
        questions.add(counts)
        return counts[0] >= 27 and counts[1] >= 3

    assert least(holds, lambda counts: (float(sum(counts)), *counts), (20.0, 4.5)) == (27, 3)
    assert len(questions) < 40


def test_nothing_is_least_if_nothing_within_the_limit_holds():
    assert least(lambda c: c[0] >= 9, lambda c: (2.0 * c[0],), (1.0,), limit=10.0) is None
    assert least(lambda c: False, lambda c: (1.0 * c[0],), (1.0,), most_workers=50) is None


@given(weights=weights_of_two, budget=st.floats(0.1, 30.0))
@settings(max_examples=50)
def test_affordable_is_all_to_which_nothing_can_be_added(weights, budget):
    def fits(counts):
        return sum(c * w for c, w in zip(counts, weights, strict=True)) <= budget * (1 + 1e-9)

    everything = [c for c in itertools.product(range(1, 65), repeat=2) if fits(c)]
    maximal = {c for c in everything if not fits((c[0] + 1, c[1])) and not fits((c[0], c[1] + 1))}
    assert set(affordable(weights, budget)) == maximal


@given(
    capacities=st.lists(st.integers(-1, 60), min_size=1, max_size=8),
    likely=st.lists(st.integers(-1, 60), min_size=8, max_size=8),
    slack=st.integers(0, 10),
    beat=st.integers(-1, 20),
)
@settings(max_examples=100)
def test_the_most_is_what_trying_all_gives(capacities, likely, slack, beat):
    candidates = [((n + 1,), likely[n]) for n in range(len(capacities))]
    above_ceiling = []

    def holds(counts, index):
        if index > capacities[counts[0] - 1] + slack:
            above_ceiling.append(counts)
        return index <= capacities[counts[0] - 1]

    found = most(
        holds, candidates, ceiling=lambda counts: capacities[counts[0] - 1] + slack, beat=beat
    )
    best = max(capacities)
    if best <= beat:
        assert found is None
    else:
        assert found is not None
        assert found[1] == best
        assert capacities[found[0][0] - 1] == best
    assert not above_ceiling


def test_what_cannot_win_costs_one_question():
    questions = []

    def holds(counts, index):
        questions.append((counts, index))
        return index <= {1: 100, 2: 40, 3: 99}[counts[0]]

    assert most(holds, [((1,), 98), ((2,), 90), ((3,), 97)]) == ((1,), 100)
    assert [counts for counts, _ in questions].count((2,)) == 1
    assert [counts for counts, _ in questions].count((3,)) == 1


@given(st.floats(0.0011, 1e5), st.floats(0.005, 0.5))
def test_the_grid_gives_the_highest_rate_not_above(rate, precision):
    grid = RateGrid(precision)
    index = grid.at_most(rate)
    assert grid.rate(index) <= rate * (1 + 1e-9) < grid.rate(index + 1) * (1 + 1e-8)
    assert math.isclose(grid.rate(index + 1) / grid.rate(index), 1 + precision)


def test_a_rate_below_the_grid_has_no_place_on_it():
    assert RateGrid().at_most(1e-9) == -1
    assert RateGrid().rate(RateGrid().at_most(70.0)) == pytest.approx(70.0, rel=0.02)
