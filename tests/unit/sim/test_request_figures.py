"""What became of the requests, from calls that a simulation would make."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pdserve.core.errors import ConfigError
from pdserve.core.ids import RequestId
from pdserve.core.request import ServiceClass
from pdserve.sim.observe import Ended
from pdserve.sim.request_figures import RequestFigures
from pdserve.workload.outcome import Ending, Outcome
from pdserve.workload.slo import parse_slo, slo_of
from pdserve.workload.summary import judge, summarise


def test_latencies_of_one_request(an_end):
    figures = RequestFigures()
    figures.arrived(1.0, RequestId("r0"), 100)
    figures.ended(2.5, an_end())
    figures.gaps([0.2], 1)
    figures.gaps([0.2], 4)
    document = figures.document(duration_s=10.0)
    assert document["requests"] == document["completed"] == 1
    assert document["ttft_s"]["p50"] == 0.5
    assert document["tpot_s"]["p99"] == pytest.approx(0.2)
    assert document["e2e_s"]["max"] == 1.5
    assert document["second_token_gap_s"]["mean"] == pytest.approx(0.2)
    assert document["itl_s"]["num"] == 5
    assert document["itl_s"]["p50"] == 0.2
    assert document["goodput_rps"] == 0.1, "without an objective, completed requests count"
    assert document["cache_hit_rate"] == 0.2
    assert document["tokens"] == {"prompt": 100, "cached": 20, "output": 6}


def test_refusals_cancellations_and_resumes_are_counted(an_end):
    figures = RequestFigures(parse_slo(["ttft:600"]))
    for request in (
        an_end(),
        an_end(attempts=3),
        an_end(failure="overloaded", first_s=None, second_s=None, last_s=None, output_tokens=0),
        an_end(cancelled=True),
        an_end(first_s=1.7),
    ):
        figures.arrived(1.0, request.request_id, 100)
        figures.ended(2.5, request)
    figures.arrived(3.0, RequestId("open"), 7)
    document = figures.document(10.0)
    assert document["requests"] == 6
    assert (document["completed"], document["failed"], document["cancelled"]) == (3, 1, 1)
    assert document["unfinished"] == 1
    assert document["failures"] == {"overloaded": 1}
    assert document["good"] == 2
    assert document["attainment"] == 0.5, "of all that the client did not cancel itself"
    assert document["attainment_by_metric"] == {"ttft": 0.5}
    assert document["attempts"] == {"all": 7, "resumes": 2, "resumed_requests": 1}


def test_each_class_is_judged_by_its_own_promise(an_end):
    quick = ServiceClass(name="quick", ttft_s=0.1)
    slow = ServiceClass(name="slow", ttft_s=1.0)
    figures = RequestFigures(parse_slo(["ttft:1"]))
    for service in (quick, slow, ServiceClass()):
        figures.arrived(1.0, RequestId("r"), 100)
        figures.ended(2.5, an_end(service=service))
    document = figures.document(1.0)
    classes = document["classes"]
    assert [classes[name]["attainment"] for name in ("quick", "slow", "default")] == [0, 1, 0]
    assert document["attainment"] == pytest.approx(1 / 3)
    assert document["ttft_s"]["num"] == 3
    assert document["tokens"]["prompt"] == 300, "of all classes"


ends = st.builds(
    Ended,
    index=st.integers(0, 99),
    request_id=st.just(RequestId("r")),
    arrived_s=st.floats(0, 10),
    first_s=st.floats(10, 20),
    second_s=st.floats(20, 21),
    last_s=st.floats(20, 40),
    prompt_tokens=st.integers(1, 9999),
    cached_tokens=st.just(0),
    output_tokens=st.integers(1, 500),
    cancelled=st.booleans(),
    failure=st.sampled_from([None, None, "overloaded"]),
)


def as_outcome(request: Ended) -> Outcome:
    return Outcome(
        index=request.index,
        due_s=request.arrived_s,
        sent_s=request.arrived_s,
        ending=request.ending,
        first_s=request.first_s,
        last_s=request.last_s,
        prompt_tokens=request.prompt_tokens,
        output_tokens=request.output_tokens,
        failure=request.failure,
    )


@given(requests=st.lists(ends, min_size=1, max_size=30))
def test_a_simulated_run_and_a_real_one_of_equal_times_have_equal_figures(requests):
    slo = parse_slo(["ttft:12000", "tpot:200", "e2e:25s"])
    figures = RequestFigures(slo)
    for request in requests:
        figures.arrived(request.arrived_s, request.request_id, request.prompt_tokens)
        figures.ended(40.0, request)
    found = figures.document(40.0)
    outcomes = [as_outcome(request) for request in requests]
    real = summarise(outcomes, 40.0, slo)
    judged = judge(outcomes, 40.0, slo)
    assert found["good"] == judged.good
    assert found["attainment"] == judged.attainment
    assert found["goodput_rps"] == judged.goodput
    for name in ("ttft", "tpot", "e2e"):
        spread = getattr(real, f"{name}_ms")
        assert found[f"{name}_s"]["p50"] * 1e3 == pytest.approx(spread.median)
        assert found[f"{name}_s"]["p99"] * 1e3 == pytest.approx(spread.p99)
        assert found[f"{name}_s"]["num"] == spread.num
    assert found["tokens"]["prompt"] == sum(request.prompt_tokens for request in requests)
    assert found["tokens"]["output"] == sum(request.output_tokens for request in requests)


def test_how_a_request_ended(an_end):
    assert an_end().ending is Ending.COMPLETED
    assert an_end(failure="too_long").ending is Ending.FAILED
    assert an_end(cancelled=True).ending is Ending.CANCELLED
    assert an_end(second_s=None).second_gap_s is None


def test_objectives_as_a_class_promises_them_and_as_one_writes_them():
    assert slo_of(ServiceClass(ttft_s=0.5, tpot_s=0.05)) == parse_slo(["ttft=500ms", "tpot:0.05s"])
    assert slo_of(ServiceClass()) is None


@pytest.mark.parametrize(
    "text", ["ttft", "ttft:", "ttft:0", "ttft:-1", "ttft:1.2.3", "ttft=2m", "ttft:1e999", "itl:5"]
)
def test_objectives_that_cannot_be_are_refused_under_the_flag_s_name(text):
    with pytest.raises(ConfigError, match=r"--slo .*milliseconds above 0"):
        parse_slo([text], "--slo")
