"""The timeline document: phases of whole, broken and partial lives."""

from __future__ import annotations

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pdserve.obs.timeline import describe


def test_an_undisturbed_split_request(split_life) -> None:
    document = describe(split_life)
    assert document["request_id"] == "req-1"
    assert document["status"] == "finished"
    assert document["request"] == {
        "prompt_tokens": 100,
        "choices": 1,
        "max_tokens": 11,
        "route": "auto",
    }
    assert document["result"] == {"reason": "length", "output_tokens": 11, "choices": 1}
    assert document["phases"] == {
        "total": {"start_ms": 0.0, "duration_ms": 2000.0},
        "ttft": {"start_ms": 0.0, "duration_ms": 450.0},
    }
    (attempt,) = document["attempts"]
    phases = attempt.pop("phases")
    assert attempt == {
        "epoch": 1,
        "route": "split",
        "prefill_worker": "p0",
        "decode_worker": "d0",
        "reason": "fewest tokens",
        "candidates": [],
        "moves": [],
        "resumed": None,
        "preemptions": 0,
    }
    assert phases == {
        "queue": {"start_ms": 0.0, "duration_ms": 100.0, "worker": "p0"},
        "prefill": {
            "start_ms": 100.0,
            "duration_ms": 300.0,
            "worker": "p0",
            "cached_tokens": 32,
            "tokens": 68,
        },
        "handoff": {
            "start_ms": 110.0,
            "duration_ms": 390.0,
            "worker": "p0",
            "peer": "d0",
            "blocks": 7,
            "reused_blocks": 2,
            "ok": True,
            "bytes": 4096,
            "detail": "",
        },
        "decode_wait": {"start_ms": 510.0, "duration_ms": 90.0, "worker": "d0"},
        "decode": {"start_ms": 600.0, "duration_ms": 1400.0, "worker": "d0"},
        "total": {"start_ms": 0.0, "duration_ms": 2000.0},
    }
    assert [entry["name"] for entry in document["events"]] == [e.name for e in split_life]
    assert document["events"][1] == {
        "name": "routed",
        "at_ms": 10.0,
        "node": "gateway",
        "epoch": 1,
        "detail": {"prefill": "p0", "decode": "d0", "local": False, "reason": "fewest tokens"},
    }


def test_a_resumed_request_has_two_attempts(resumed_life) -> None:
    document = describe(resumed_life)
    first, second = document["attempts"]
    assert (first["route"], second["route"]) == ("split", "local")
    assert (first["resumed"], first["preemptions"]) == (None, 1)
    assert second["resumed"] == {"reason": "worker_lost", "taken_tokens": 5}
    assert first["phases"]["decode"] == {"start_ms": 100.0, "duration_ms": 900.0, "worker": "d0"}
    assert first["phases"]["total"] == {"start_ms": 0.0, "duration_ms": 1000.0}
    assert second["phases"]["queue"] == {"start_ms": 1000.0, "duration_ms": 100.0, "worker": "p0"}
    assert second["phases"]["total"] == {"start_ms": 1000.0, "duration_ms": 2000.0}
    assert "handoff" not in second["phases"]
    assert document["phases"]["ttft"]["duration_ms"] == 60.0


def test_a_running_request_has_open_phases(split_life) -> None:
    document = describe(split_life[:5])
    phases = document["attempts"][0]["phases"]
    assert document["status"] == "running"
    assert document["phases"] == {"total": {"start_ms": 0.0, "duration_ms": None}}
    assert set(phases) == {"queue", "prefill", "handoff", "total"}
    assert phases["queue"]["duration_ms"] == 100.0
    assert [phases[name]["duration_ms"] for name in ("prefill", "handoff", "total")] == [None] * 3


def test_a_refused_request_has_no_attempt(failed_life) -> None:
    document = describe(failed_life)
    assert (document["status"], document["attempts"]) == ("failed", [])
    assert document["result"] == {"kind": "overloaded", "detail": "no room"}
    assert document["phases"]["total"]["duration_ms"] == 500.0


def test_an_attempt_that_failed_in_prefill_ends_where_the_next_one_starts(event) -> None:
    document = describe(
        [
            event("submitted", 0.0),
            event("prefill_started", 0.1, "p0"),
            event("resumed", 0.3, epoch=2, reason="engine"),
            event("prefill_started", 0.4, "p1", epoch=2),
            event("failed", 0.9, epoch=2, kind="unavailable"),
        ]
    )
    first, second = (attempt["phases"]["prefill"] for attempt in document["attempts"])
    assert first == {"start_ms": 100.0, "duration_ms": 200.0, "worker": "p0"}
    assert second == {"start_ms": 400.0, "duration_ms": 500.0, "worker": "p1"}


def test_attempts_of_diverged_choices_run_side_by_side(event) -> None:
    document = describe(
        [
            event("submitted", 0.0),
            event("decode_started", 0.1, "d0"),
            event("resumed", 1.0, epoch=2),
            event("resumed", 1.0, epoch=3),
            event("decode_started", 1.1, "d1", epoch=2),
            event("decode_started", 1.2, "d1", epoch=3),
            event("finished", 2.0, epoch=3),
        ]
    )
    totals = [attempt["phases"]["total"]["duration_ms"] for attempt in document["attempts"]]
    assert totals == [1000.0, 1000.0, 1000.0]


@pytest.mark.parametrize(
    ("values", "route"),
    [
        ({"local": True}, "local"),
        ({"prefill": "p0", "decode": "p0"}, "local"),
        ({"prefill": "p0", "decode": "d0"}, "split"),
        ({"reason": "?"}, None),
    ],
)
def test_the_route_is_told_as_far_as_it_is_known(event, values, route) -> None:
    document = describe([event("submitted", 0.0), event("routed", 0.1, **values)])
    assert document["attempts"][0]["route"] == route


@settings(derandomize=True)
@given(st.data())
def test_any_part_of_a_life_in_any_order_is_described(split_life, resumed_life, data) -> None:
    life = data.draw(st.sampled_from([split_life, resumed_life]))
    part = data.draw(st.lists(st.sampled_from(life), min_size=1, unique_by=id))
    document = describe(part)
    assert json.loads(json.dumps(document, allow_nan=False)) == document
    assert len(document["events"]) == len(part)
    times = [entry["at_ms"] for entry in document["events"]]
    assert times == sorted(times)
    for attempt in document["attempts"]:
        for phase in attempt["phases"].values():
            assert phase["duration_ms"] is None or phase["duration_ms"] >= 0.0
            if document["status"] != "running":
                assert phase["duration_ms"] is not None


def test_order_of_arrival_does_not_matter(split_life) -> None:
    assert describe(split_life[::-1]) == describe(split_life)


def test_clocks_that_disagree_give_empty_phases_not_negative_ones(event) -> None:
    document = describe(
        [
            event("submitted", 5.0),
            event("prefill_started", 4.0, "p0"),
            event("prefill_ended", 3.0, "p0"),
            event("finished", 6.0),
        ]
    )
    phases = document["attempts"][0]["phases"]
    assert phases["prefill"] == {"start_ms": -1000.0, "duration_ms": 0.0, "worker": "p0"}
    assert phases["queue"]["duration_ms"] == 0.0
