"""Percentiles in flat memory: exact up to a bound, to a thousandth beyond."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pdserve.sim.distribution import (
    RELATIVE_ERROR,
    Distribution,
    LogHistogram,
    figures_of,
)
from pdserve.workload.summary import percentile

values = st.lists(st.floats(0.0, 1e6), min_size=1, max_size=300)
percents = st.sampled_from([0.0, 1.0, 50.0, 90.0, 99.0, 99.9, 100.0])
SLACK = 1 + 1e-9


def histogram(numbers: list[float]) -> LogHistogram:
    made = LogHistogram()
    for number in numbers:
        made.add(number)
    return made


@given(numbers=values, percent=percents)
def test_a_percentile_is_within_a_thousandth(numbers, percent):
    true = percentile(sorted(numbers), percent)
    found = histogram(numbers).percentile(percent)
    assert abs(found - true) <= RELATIVE_ERROR * SLACK * true + 1e-9


@given(numbers=values)
def test_what_is_exact_of_a_histogram(numbers):
    figures = figures_of(histogram(numbers))
    assert figures["max"] == max(numbers)
    assert figures["num"] == len(numbers)
    assert figures["mean"] == pytest.approx(math.fsum(numbers) / len(numbers))


@given(one=values, other=values)
def test_merging_is_counting_all(one, other):
    merged = histogram(one)
    merged.merge(histogram(other))
    whole = histogram([*one, *other])
    assert merged.counts == whole.counts
    assert (merged.num, merged.low, merged.high) == (whole.num, whole.low, whole.high)
    assert merged.total == pytest.approx(whole.total)


@given(
    first=st.floats(-1e-3, 10.0), growth=st.sampled_from([0.0, 1e-6, 1e-3, 0.1]),
    length=st.integers(0, 200), count=st.integers(1, 9),
)  # fmt: skip
def test_many_at_once_are_as_one_by_one(first, growth, length, count):
    """Also where they leave a bucket for the next one, or lie below all buckets."""
    numbers = [first + growth * place for place in range(length)]
    at_once, one_by_one = LogHistogram(), LogHistogram()
    at_once.add_each(numbers, count)
    for number in numbers:
        one_by_one.add(number, count)
    assert at_once.counts == one_by_one.counts
    assert (at_once.num, at_once.low, at_once.high) == (
        one_by_one.num, one_by_one.low, one_by_one.high,
    )  # fmt: skip
    assert at_once.total == pytest.approx(one_by_one.total)


@given(number=st.floats(1e-6, 1e6), count=st.integers(1, 1000))
def test_a_count_is_that_many_values(number, count):
    once = LogHistogram()
    once.add(number, count)
    many = histogram([number] * count)
    assert once.counts == many.counts
    assert once.num == many.num == count
    assert once.percentile(50) == number, "no value that there cannot be"


@given(numbers=values, percent=percents)
def test_a_distribution_is_exact_up_to_its_bound(numbers, percent):
    kept, counted = Distribution(exact=len(numbers)), Distribution(exact=len(numbers) - 1)
    for number in numbers:
        kept.add(number)
        counted.add(number)
    assert kept.is_exact
    assert not counted.is_exact
    true = percentile(sorted(numbers), percent)
    name = f"p{percent:g}"
    assert kept.figures(percent)[name] == true
    assert abs(counted.figures(percent)[name] - true) <= RELATIVE_ERROR * SLACK * true + 1e-9
    assert kept.figures()["num"] == counted.figures()["num"] == len(numbers)


@given(one=values, other=values, bounds=st.tuples(st.integers(0, 400), st.integers(0, 400)))
def test_distributions_merge_whichever_way_they_keep_their_values(one, other, bounds):
    first, second = Distribution(exact=bounds[0]), Distribution(exact=bounds[1])
    for number in one:
        first.add(number)
    for number in other:
        second.add(number)
    first.merge(second)
    both = sorted([*one, *other])
    figures = first.figures(50.0)
    assert figures["num"] == first.num == len(both)
    assert figures["max"] == both[-1]
    true = percentile(both, 50)
    assert abs(figures["p50"] - true) <= RELATIVE_ERROR * SLACK * true + 1e-9
    assert second.num == len(other), "what was added stays as it is"


@pytest.mark.parametrize("exact", [10, 1000])
def test_the_curve_rises_to_all_values(exact):
    made = Distribution(exact=exact)
    for number in range(1, 201):
        made.add(float(number))
    points = made.points()
    assert points[0] == (1.0, 0.0)
    assert points[-1] == (200.0, 1.0)
    assert points == sorted(points)


def test_of_nothing_all_figures_are_zero():
    for empty in (Distribution(), Distribution(exact=0)):
        assert set(empty.figures().values()) == {0.0}
        assert empty.points() == []


def test_counting_does_not_grow_with_the_number_of_values():
    made = LogHistogram()
    for number in range(100_000):
        made.add(1e-3 * (1 + number % 5000))
    assert len(made.counts) < 5000
