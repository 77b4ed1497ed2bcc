"""Every figure against numbers worked out by hand (and percentiles against numpy)."""

from __future__ import annotations

import random
from itertools import pairwise

import numpy as np
import pytest

from pdserve.core.errors import ConfigError
from pdserve.workload.outcome import CountedBy, Ending, Outcome
from pdserve.workload.slo import parse_slo
from pdserve.workload.summary import percentile, spread, summarise


def outcome(index=0, *, sent=0.0, times=(), tokens=None, ending=Ending.COMPLETED, **fields):
    gaps = tuple(b - a for a, b in pairwise(times))
    return Outcome(
        index=index,
        due_s=fields.pop("due", sent),
        sent_s=sent,
        ending=ending,
        first_s=times[0] if times else None,
        last_s=times[-1] if times else None,
        gaps_s=gaps,
        output_tokens=len(times) if tokens is None else tokens,
        **fields,
    )


# Sent at 1 s: TTFT 500 ms, E2E 2 s, four tokens: TPOT 500 ms.
SLOW = outcome(0, sent=1.0, times=(1.5, 2.0, 2.25, 3.0), prompt_tokens=10, finish_reason="length")
# Sent at 2 s: TTFT 100 ms, E2E 300 ms; 5 tokens in two chunks: TPOT 50 ms, one gap of 200 ms.
QUICK = outcome(1, sent=2.0, times=(2.1, 2.3), tokens=5, prompt_tokens=30, finish_reason="stop")
# One token: no TPOT, no gap.
SINGLE = outcome(2, sent=3.0, times=(3.4,), prompt_tokens=5, cached_tokens=4)
REFUSED = outcome(3, sent=3.0, ending=Ending.FAILED, failure="429", message="no room")
BROKEN = outcome(4, times=(0.1, 0.2), ending=Ending.FAILED, failure="error event", message="oh")
LEFT = outcome(5, times=(0.1,), ending=Ending.CANCELLED, due=-0.25)
ALL = [SLOW, QUICK, SINGLE, REFUSED, BROKEN, LEFT]


def test_latencies_of_one_request():
    assert (SLOW.ttft_s, SLOW.e2e_s, SLOW.tpot_s) == (0.5, 2.0, 0.5)
    assert QUICK.ttft_s == pytest.approx(0.1)
    assert QUICK.tpot_s == pytest.approx(0.05)
    assert SINGLE.tpot_s is None
    assert (REFUSED.ttft_s, REFUSED.e2e_s, REFUSED.tpot_s) == (None, None, None)
    assert LEFT.lag_s == 0.25


def test_a_run():
    summary = summarise(ALL, duration_s=4.0)
    assert (summary.sent, summary.completed, summary.cancelled, summary.failed) == (6, 3, 1, 2)
    assert summary.failures == {"429": 1, "error event": 1}
    assert summary.messages == {"429": "no room", "error event": "oh"}
    assert summary.finish_reasons == {"length": 1, "stop": 1, "None": 1}
    assert (summary.prompt_tokens, summary.cached_tokens, summary.output_tokens) == (45, 4, 10)
    assert summary.counted_by == {"usage": 3}
    assert summary.tokens_per_chunk == pytest.approx(10 / 7)
    assert summary.request_throughput == 0.75
    assert summary.output_throughput == 2.5
    assert summary.total_token_throughput == 13.75
    assert summary.ttft_ms.mean == pytest.approx((500 + 100 + 400) / 3)
    assert summary.ttft_ms.median == pytest.approx(400)
    assert summary.tpot_ms.num == 2
    assert summary.tpot_ms.mean == pytest.approx(275)
    assert summary.itl_ms.num == 4
    assert summary.itl_ms.mean == pytest.approx((500 + 250 + 750 + 200) / 4)
    assert summary.e2e_ms.max == pytest.approx(2000)
    assert summary.lag_ms.max == 250
    assert summary.slo is None


def test_goodput_and_attainment_have_all_sent_requests_under_the_line():
    report = summarise(ALL, 4.0, parse_slo(["ttft:450", "tpot:60"])).slo
    assert report is not None
    assert (report.good, report.judged) == (2, 5)  # QUICK and SINGLE of all but LEFT
    assert report.goodput == 0.5
    assert report.attainment == pytest.approx(0.4)
    assert report.by_metric == {"ttft": 0.4, "tpot": 0.4}
    alone = summarise(ALL, 4.0, parse_slo(["e2e:2000"])).slo
    assert alone is not None
    assert alone.good == 3, "a bound includes its value, and what failed is never good"


def test_a_fast_failure_meets_nothing():
    report = summarise([BROKEN], 1.0, parse_slo(["ttft:1000"])).slo
    assert report is not None
    assert (report.good, report.attainment, report.by_metric) == (0, 0.0, {"ttft": 0.0})


def test_nothing_at_all():
    summary = summarise([], 1.0, parse_slo(["ttft:1"]))
    assert summary.sent == summary.ttft_ms.num == 0
    assert summary.slo is not None
    assert summary.slo.attainment == 0.0


def test_chunk_counts_are_told():
    counted = outcome(times=(1.0, 2.0), counted_by=CountedBy.CHUNKS)
    assert summarise([counted], 1.0).counted_by == {"chunks": 1}


@pytest.mark.parametrize("num", [1, 2, 3, 10, 101])
def test_spreads_are_numpys(num):
    rng = random.Random(num)
    values = [rng.lognormvariate(3, 1) for _ in range(num)]
    ours = spread(values)
    assert ours.num == num
    assert ours.mean == pytest.approx(np.mean(values))
    assert ours.std == pytest.approx(np.std(values))
    assert [ours.median, ours.p90, ours.p99] == pytest.approx(np.percentile(values, [50, 90, 99]))
    assert ours.max == max(values)


def test_percentiles_by_hand():
    assert percentile([10, 20, 30, 40], 50) == 25
    assert percentile([10, 20, 30, 40], 100) == 40
    assert percentile([10, 20], 90) == pytest.approx(19)


@pytest.mark.parametrize(
    "texts",
    [["ttft"], ["ttft:0"], ["ttft:x"], ["itl:5"], ["ttft:5", "ttft:6"], ["e2e:1", "e2el:1"]],
)
def test_what_is_no_objective_is_refused(texts):
    with pytest.raises(ConfigError, match="ttft, tpot and e2e"):
        parse_slo(texts)


def test_vllms_name_for_e2e_is_taken():
    assert parse_slo(["e2el:40", "ttft:1.5"]).bounds_ms == (("e2e", 40.0), ("ttft", 1.5))
