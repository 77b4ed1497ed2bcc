"""Generated times and lengths: their statistics, their seeds, what is refused."""

from __future__ import annotations

import itertools
import math
import random
import statistics

import pytest

from pdserve.core.errors import ConfigError
from pdserve.workload.arrivals import RateStep, arrivals, parse_steps
from pdserve.workload.lengths import length_distribution
from pdserve.workload.synthetic import PrefixGroups, synthetic


def gaps(kind, rate, burstiness=1.0, seed=0, n=20_000):
    times = [0.0, *itertools.islice(arrivals(kind, rate, burstiness, seed), n)]
    return [after - before for before, after in itertools.pairwise(times)]


@pytest.mark.parametrize(
    ("kind", "burstiness", "variation"),
    [("poisson", 1.0, 1.0), ("gamma", 0.25, 2.0), ("gamma", 1.0, 1.0), ("gamma", 4.0, 0.5)],
)
def test_gaps_have_the_asked_mean_and_variation(kind, burstiness, variation):
    drawn = gaps(kind, 5.0, burstiness)
    mean = statistics.fmean(drawn)
    assert mean == pytest.approx(0.2, rel=0.03)
    assert statistics.pstdev(drawn) / mean == pytest.approx(variation, rel=0.05)
    assert min(drawn) >= 0


def test_poisson_counts_vary_as_their_mean():
    times = itertools.accumulate(gaps("poisson", 10.0))
    counts = [len(list(group)) for _, group in itertools.groupby(times, key=lambda t: int(t))]
    assert statistics.variance(counts) / statistics.fmean(counts) == pytest.approx(1.0, abs=0.15)


def test_poisson_is_memoryless():
    drawn = gaps("poisson", 1.0)
    longer = [gap for gap in drawn if gap > 1.0]
    assert len(longer) / len(drawn) == pytest.approx(math.exp(-1), abs=0.02)
    assert statistics.fmean(longer) - 1.0 == pytest.approx(1.0, rel=0.05)


def test_constant_arrivals_do_not_drift():
    times = list(itertools.islice(arrivals("constant", 3.0, 1.0, 0), 3001))
    assert times[0] == 0.0
    assert times[3000] == 1000.0


def test_seeds_make_the_times():
    assert gaps("poisson", 2.0, seed=1, n=50) == gaps("poisson", 2.0, seed=1, n=50)
    assert gaps("poisson", 2.0, seed=1, n=50) != gaps("poisson", 2.0, seed=2, n=50)


def test_the_rate_only_stretches_the_times():
    fast, slow = gaps("gamma", 4.0, 0.5, n=50), gaps("gamma", 2.0, 0.5, n=50)
    assert [2 * gap for gap in fast] == pytest.approx(slow)


def test_closed_and_infinite_arrivals_are_all_at_once():
    assert set(gaps("closed", 1.0, n=10)) == {0.0}
    assert set(gaps("poisson", math.inf, n=10)) == {0.0}


@pytest.mark.parametrize(
    ("kind", "rate", "burstiness"),
    [("poison", 1, 1), ("poisson", 0, 1), ("poisson", -1, 1), ("poisson", math.nan, 1),
     ("gamma", 1, 0), ("gamma", 1, math.inf)],
)  # fmt: skip
def test_impossible_arrivals_are_refused(kind, rate, burstiness):
    with pytest.raises(ConfigError):
        arrivals(kind, rate, burstiness, 0)


def counts(times, width_s, end_s):
    found = [0] * round(end_s / width_s)
    for at_s in itertools.takewhile(lambda t: t < end_s, times):
        found[int(at_s / width_s)] += 1
    return found


def test_a_sinusoid_rises_and_falls_around_its_rate():
    times = arrivals("sinusoid", 50.0, 1.0, 4, amplitude=0.8, period_s=40.0)
    found = counts(times, 10.0, 4000.0)
    quarters = [statistics.fmean(found[number::4]) / 10.0 for number in range(4)]
    # The mean of a sine over a quarter of its turn is 2 / pi.
    high, low = 50 * (1 + 0.8 * 2 / math.pi), 50 * (1 - 0.8 * 2 / math.pi)
    assert quarters == pytest.approx([high, high, low, low], rel=0.03)
    # Within one phase it is a Poisson process: counts vary as their mean.
    first = found[::4]
    assert statistics.variance(first) / statistics.fmean(first) == pytest.approx(1.0, abs=0.35)


def test_a_full_amplitude_comes_down_to_nothing():
    times = arrivals("sinusoid", 100.0, 1.0, 0, amplitude=1.0, period_s=100.0)
    at_zero = [t for t in itertools.takewhile(lambda t: t < 1000, times) if 74 < t % 100 < 76]
    assert len(at_zero) < 10
    assert counts(arrivals("sinusoid", 9.0, 1.0, 1, amplitude=0.0, period_s=1.0), 500.0, 500.0) == [
        pytest.approx(4500, rel=0.05)
    ]


def test_steps_hold_their_rates_and_come_again():
    steps = parse_steps("2:60,0:30,20:10")
    assert steps == (RateStep(2, 60), RateStep(0, 30), RateStep(20, 10))
    times = list(
        itertools.takewhile(lambda t: t < 20_000, arrivals("steps", math.inf, 1.0, 5, steps=steps))
    )
    assert times == sorted(times)
    phases = [t % 100 for t in times]
    assert sum(t < 60 for t in phases) == pytest.approx(200 * 120, rel=0.03)
    assert not any(60 <= t < 90 for t in phases)
    assert sum(t >= 90 for t in phases) == pytest.approx(200 * 200, rel=0.03)


@pytest.mark.parametrize(
    "text", ["", "2", "2:0", "-1:5", "2:60,", "0:60", "x:60", "2:inf", "nan:5", "2:60:3"]
)
def test_what_is_no_step_is_refused(text):
    with pytest.raises(ConfigError, match=r"write RATE:SECONDS|give one above 0"):
        parse_steps(text)


@pytest.mark.parametrize(
    "values",
    [{"amplitude": 1.1, "period_s": 9.0}, {"amplitude": -0.1, "period_s": 9.0}, {"amplitude": 0.5}],
)
def test_impossible_sinusoids_are_refused(values):
    with pytest.raises(ConfigError, match="amplitude"):
        arrivals("sinusoid", 5.0, 1.0, 0, **values)
    with pytest.raises(ConfigError, match="some rate above 0"):
        arrivals("steps", 5.0, 1.0, 0)


def drawn_lengths(text, n=20_000):
    rng, draw = random.Random(7), length_distribution(text)
    return [draw(rng) for _ in range(n)]


def test_lengths_follow_their_description():
    assert set(drawn_lengths("512", 10)) == {512}
    even = drawn_lengths("3:7")
    assert set(even) == {3, 4, 5, 6, 7}
    assert statistics.fmean(even) == pytest.approx(5, rel=0.02)
    assert statistics.fmean(drawn_lengths("exp:200")) == pytest.approx(200, rel=0.03)
    logs = [math.log(value) for value in drawn_lengths("lognormal:500:0.8")]
    assert statistics.median(logs) == pytest.approx(math.log(500), rel=0.01)
    assert statistics.pstdev(logs) == pytest.approx(0.8, rel=0.03)
    assert min(drawn_lengths("exp:1")) == 1


@pytest.mark.parametrize(
    "text",
    ["", "0", "1.5", "7:3", "1:2:3", "exp:0", "normal:5:1", "lognormal:5", "x", "nan", "inf"],
)
def test_what_is_no_length_is_refused(text):
    with pytest.raises(ConfigError, match="lognormal:MEDIAN:SIGMA"):
        length_distribution(text)


def workload(seed=0, kind="poisson", groups=None, n=200):
    return list(
        itertools.islice(
            synthetic(
                arrivals(kind, 3.0, 1.0, seed),
                length_distribution("10:20"),
                length_distribution("exp:30"),
                seed,
                groups,
            ),
            n,
        )
    )


def test_each_property_has_a_seed_of_its_own():
    paced, closed, other = workload(), workload(kind="closed"), workload(seed=1)
    sizes = [[(r.prompt_tokens, r.output_tokens) for r in of] for of in (paced, closed, other)]
    assert sizes[0] == sizes[1]
    assert sizes[0] != sizes[2]
    assert paced == workload()


def test_prompts_share_nothing_unless_asked():
    names = [segment.name for request in workload() for segment in request.segments]
    assert len(set(names)) == len(names)


def test_groups_share_their_prefix_and_nothing_else():
    requests = workload(groups=PrefixGroups(num_groups=4, prefix_tokens=64), n=2000)
    counts = {}
    for request in requests:
        prefix, own = request.segments
        assert prefix.num_tokens == 64
        assert 10 <= own.num_tokens <= 20
        assert own.name == f"own:{request.index}"
        counts[prefix] = counts.get(prefix, 0) + 1
    assert len(counts) == 4
    assert min(counts.values()) > 400
