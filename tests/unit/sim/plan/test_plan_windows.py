"""The trace in windows, promises on them, and what no cluster can do better than."""

from __future__ import annotations

import itertools
import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pdserve.core.errors import ConfigError
from pdserve.core.request import Role
from pdserve.sim.plan.bounds import WorkBounds, _divides, new_tokens
from pdserve.sim.plan.promise import LOST, NINE_LIMITS, Bounds, Latencies, Slowdowns, allowed_misses
from pdserve.sim.plan.simulate import SimEvaluate, slowed
from pdserve.sim.plan.trial import Candidate, Conditions, Design, Trial
from pdserve.sim.plan.windows import ALWAYS, cut
from pdserve.sim.settings import SimSettings
from pdserve.sim.spec import ClusterSpec
from pdserve.workload.arrivals import arrivals
from pdserve.workload.lengths import length_distribution
from pdserve.workload.request import Segment, TraceRequest, own_segment
from pdserve.workload.slo import parse_slo
from pdserve.workload.synthetic import synthetic

SLO = Bounds(parse_slo(["ttft:400", "tpot:60"]))
SPLIT = Design(("round", "round"), "splitwise")
MIXED = Design(("round",), "aggregated")


def a_trace(num, rate=5.0, prompt="300:900", output="5:40"):
    lengths = length_distribution(prompt), length_distribution(output)
    return list(itertools.islice(synthetic(arrivals("poisson", rate, 1.0, 3), *lengths, 3), num))


def bounds_of(machine, trace, *, promise=SLO, windows=1):
    cutting = cut(trace, windows, len(trace) // windows)
    return WorkBounds(cutting, windows, {"round": machine}, promise), cutting


def test_windows_share_no_request_and_the_first_is_of_median_load():
    trace = a_trace(400)
    windows = cut(trace, 4, 60)
    assert [len(requests) for requests in windows.requests] == [60] * 4
    lengths = [[r.segments for r in requests] for requests in windows.requests]
    names = [segments for window in lengths for segments in window]
    assert len(set(names)) == len(names)
    loads = [
        sum(r.prompt_tokens + 8 * r.output_tokens for r in requests) / requests[-1].at_s
        for requests in windows.requests
    ]
    assert loads[0] == sorted(loads)[1]
    assert loads[1:] == sorted(loads[1:], reverse=True)
    assert windows.num_judged == 48


def test_a_short_trace_is_repeated_within_each_window():
    shared = Segment(ALWAYS, 10)
    trace = [
        TraceRequest(index=i, at_s=float(i), segments=(shared, own_segment(i, 5)), output_tokens=2)
        for i in range(50)
    ]
    windows = cut(trace, 2, 60)
    first = windows.requests[1]
    assert len(first) == 60
    assert [r.at_s for r in first] == [float(i) for i in range(60)]
    own = [r.segments[1].name for r in first]
    assert len(set(own)) == 60
    assert {r.segments[0] for r in first} == {shared}


def test_a_window_comes_at_any_rate():
    windows = cut(a_trace(200, rate=5.0), 2, 100)
    times = [request.at_s for request in windows.at(1, windows.rate * 4)]
    assert times == pytest.approx([request.at_s / 4 for request in windows.requests[1]])
    poisson = cut(a_trace(200), 2, 100, poisson=1)
    times = [request.at_s for request in poisson.at(0, 50.0)]
    assert 100 / times[-1] == pytest.approx(50.0, rel=0.3)
    assert times == [request.at_s for request in poisson.at(0, 50.0)]
    assert times != [request.at_s for request in poisson.at(1, 50.0)]


def test_a_trace_that_is_too_short_is_refused():
    with pytest.raises(ConfigError, match=r"30 requests make no 6 windows of 20: give .* 120"):
        cut(a_trace(30), 6, 100)
    at_once = [TraceRequest(index=i, at_s=0.0, segments=(own_segment(i, 5),), output_tokens=1)
               for i in range(40)]  # fmt: skip
    with pytest.raises(ConfigError, match="at once"):
        cut(at_once, 1, 40)


def test_bounds_count_the_worst_of_all_latencies():
    assert allowed_misses(SLO, 300) == (3,)
    assert SLO.missed(Latencies(0.4, 0.06, 9.0), 1, 9) == (False,)
    assert SLO.missed(Latencies(0.41, 0.01, 0.5), 1, 9) == (True,)
    assert SLO.missed(LOST, 1, 9) == (True,)
    assert SLO.scaled({"tpot": 0.5}).missed(Latencies(0.1, 0.04, 1.0), 1, 9) == (True,)
    with pytest.raises(ConfigError, match="share of requests"):
        Bounds(SLO.slo, 1.0)


def test_nine_slowdowns_are_strict_and_against_an_idle_machine(a_machine):
    nine = Slowdowns(a_machine().steps, "round", NINE_LIMITS)
    idle = nine.idle(1000, 11)
    assert (idle.ttft, idle.tpot) == pytest.approx((0.11, 0.021))
    assert idle.e2e == pytest.approx(0.11 + 10 * 0.021)
    assert not any(nine.missed(idle, 1000, 11))
    twice = Latencies(2 * idle.ttft, idle.tpot, idle.e2e)
    assert nine.missed(twice, 1000, 11) == [True, *[False] * 8]
    assert all(nine.missed(LOST, 1000, 11))
    assert allowed_misses(nine, 200) == (100, 20, 2) * 3
    assert nine.limit_s("tpot", 5, 1000, 11) == pytest.approx(5 * 0.021)
    assert nine.limit_s("tpot", 0, 1000, 11) == math.inf
    assert not nine.scaled({"ttft": 1.01}).missed(twice, 1000, 11)[0]


def test_a_prefix_is_new_once():
    shared = Segment("system", 100)
    requests = [
        TraceRequest(index=i, at_s=0.0, segments=(shared, own_segment(i, 30)), output_tokens=1)
        for i in range(2)
    ]
    assert new_tokens(requests, prefix_cache=True) == [130, 30]
    assert new_tokens(requests, prefix_cache=False) == [130, 130]


times = st.floats(0.01, 10.0)


@given(st.tuples(times, times), st.tuples(times, times), times, times)
@settings(max_examples=100)
def test_two_kinds_of_workers_can_do_what_some_division_lets_them(on_a, on_b, a_s, b_s):
    """Against all divisions on a grid."""
    slack = 1.1
    grid = [i / 20 for i in range(21)]
    some = any(
        x * on_a[0] + y * on_a[1] <= a_s and (1 - x) * on_b[0] + (1 - y) * on_b[1] <= b_s
        for x in grid
        for y in grid
    )
    if some:
        assert _divides([on_a, on_b], [a_s, b_s])
    if _divides([on_a, on_b], [a_s / slack - 0.01 * sum(on_a), b_s / slack - 0.01 * sum(on_b)]):
        shares = itertools.product([i / 200 for i in range(201)], repeat=2)
        assert any(
            x * on_a[0] + y * on_a[1] <= a_s and (1 - x) * on_b[0] + (1 - y) * on_b[1] <= b_s
            for x, y in shares
        )


def test_work_conservation_refuses_nothing_that_the_simulator_lets_pass(a_machine):
    """At rates around what two workers can do; and it does refuse what is far beyond."""
    machine = a_machine(num_blocks=4000)
    bounds, windows = bounds_of(machine, a_trace(160))
    machines = {("round", role): machine for role in Role}
    template = SimSettings(cluster=ClusterSpec(()), machines=(), declared_tokens=64)
    evaluate = SimEvaluate(windows, SLO, machines, template)
    verdicts = []
    for candidate, rate in itertools.product(
        (Candidate(SPLIT, (1, 1)), Candidate(MIXED, (2,))), (6.0, 12.0, 20.0, 30.0, 60.0)
    ):
        refused = bounds.refuses(candidate.design, candidate.counts, rate)
        trial = Trial(candidate, Conditions(rate), 0)
        found = evaluate(trial, allowed_misses(SLO, windows.num_judged))
        verdicts.append((refused, found.complete))
        assert not (refused and found.complete), (candidate, rate)
        assert refused or rate < 60.0
    assert (False, True) in verdicts


def test_the_estimate_is_of_the_right_size(a_machine):
    """Two prefills a second and a half of a worker each: about four workers at a load of 0.75."""
    trace = a_trace(200, prompt="10000", output="1")
    bounds, _ = bounds_of(a_machine(), trace, promise=Bounds(parse_slo(["ttft:5000"])))
    prefill, decode = bounds.likely(SPLIT, 3.0)
    assert prefill == pytest.approx(3.0 * 1.01 / 0.75, rel=0.25)
    assert decode == 0.0


def test_below_the_floor_of_the_hardware_nothing_helps(a_machine):
    trace = a_trace(200)
    tight = Bounds(parse_slo(["ttft:50", "tpot:60"]))
    broken, _ = bounds_of(a_machine(), trace, promise=tight)
    assert "an idle round worker has at P99 at best ttft" in (broken.floor_breaks(SPLIT) or "")
    kept, _ = bounds_of(a_machine(), trace)
    assert kept.floor_breaks(SPLIT) is None


def test_a_slowed_machine_takes_longer_and_says_so(a_machine):
    machine = a_machine()
    slow = slowed(machine, 1.5)
    assert slow.linear.prefill_s(100) == pytest.approx(1.5 * machine.linear.prefill_s(100))
    assert slowed(machine, 1.0) is machine
