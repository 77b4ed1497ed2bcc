"""Why a request went where it went, and what came of it."""

from __future__ import annotations

import json

import pytest
from virtual_cluster import ClusterSpec, VirtualCluster, make_ask

from pdserve.core.ids import WorkerId
from pdserve.node.ledger import Decision, reasons
from pdserve.policy.cluster import Candidate, ClusterView, Route, RouteAsk
from pdserve.policy.shortest_queue import ShortestQueue

PREFILL, DECODE = WorkerId("prefill-0"), WorkerId("decode-0")
SPLIT = Candidate(
    prefill=PREFILL,
    decode=DECODE,
    queue_s=0.010,
    prefill_s=0.200,
    exposed_s=0.005,
    decode_wait_s=0.015,
    tpot_s=0.010,
    score_s=0.4,
)
LOCAL = Candidate(prefill=DECODE, decode=DECODE, prefill_s=0.300, tpot_s=0.020, score_s=0.6)


class Predicting:
    """Says what it compared."""

    def choose(self, view: ClusterView, ask: RouteAsk) -> Route | None:
        if len(view.workers) < 2:
            return ShortestQueue().choose(view, ask)
        return Route(PREFILL, DECODE, "cheaper", candidates=(SPLIT, LOCAL))


def test_regret_is_measured_against_the_runner_up() -> None:
    decision = Decision.of(Route(PREFILL, DECODE, "", candidates=(SPLIT, LOCAL)))
    assert decision is not None
    outcome = decision.outcome(ttft_s=0.250, tpot_s=0.012, num_output_tokens=11)
    assert outcome == {
        "ttft_ms": 250.0,
        "predicted_ttft_ms": 210.0,
        "tpot_ms": 12.0,
        "predicted_tpot_ms": 12.0,  # the pause of 20 ms is spread over ten gaps
        "regret_ms": pytest.approx(250 + 120 - (300 + 200)),
    }


def test_an_answer_of_one_token_has_no_pace() -> None:
    decision = Decision(SPLIT, LOCAL)
    outcome = decision.outcome(ttft_s=0.250, tpot_s=None, num_output_tokens=1)
    assert outcome == {"ttft_ms": 250.0, "predicted_ttft_ms": 210.0, "regret_ms": -50.0}


def test_who_predicts_nothing_regrets_nothing() -> None:
    assert Decision.of(Route(PREFILL, DECODE, "by turns")) is None
    assert reasons(Route(PREFILL, DECODE, "by turns")) == {"reason": "by turns"}


def test_the_life_of_a_request_tells_it() -> None:
    cluster = VirtualCluster(ClusterSpec())
    cluster.router.dispatch._policy = Predicting()
    cluster.run()
    cluster.submit(make_ask("r", tuple(range(2, 12)), max_tokens=4))
    cluster.run_for(1)
    events = {event.name: dict(event.detail) for event in cluster.life}
    best, second = json.loads(str(events["routed"]["candidates"]))
    assert (best["prefill"], best["ttft_ms"], best["exposed_ms"]) == (PREFILL, 210.0, 5.0)
    assert (second["prefill"], second["score_ms"]) == (DECODE, 600.0)
    assert events["finished"]["predicted_ttft_ms"] == 210.0
    assert "regret_ms" in events["finished"]


def test_a_resume_says_nothing_about_the_first_decision() -> None:
    cluster = VirtualCluster(ClusterSpec())
    cluster.router.dispatch._policy = Predicting()
    cluster.run()
    cluster.submit(make_ask("r", tuple(range(2, 12)), max_tokens=8))
    cluster.run(until=lambda: len(cluster.client.answers["r"].tokens[0]) == 2)
    cluster.kill(cluster.current[DECODE])
    cluster.run_for(2)
    events = {event.name: dict(event.detail) for event in cluster.life}
    assert "resumed" in events
    assert "regret_ms" not in events["finished"]
