"""What was asked lately, out of life events."""

from __future__ import annotations

from pdserve.obs.life import LifeLog
from pdserve.obs.traffic import recent_traffic


def test_a_request_is_its_time_its_lengths_and_its_end(split_life, failed_life, event) -> None:
    log = LifeLog()
    for moment in (*split_life, event("submitted", 3.0, request="open", prompt_tokens=5)):
        log.append(moment)
    for moment in (
        event("submitted", 5.0, request="lost", prompt_tokens=9, choices=2),
        event("failed", 5.5, request="lost", kind="overloaded", detail="no room"),
        event("submitted", 6.0, request="two", prompt_tokens=7, choices=2),
        event("finished", 7.0, request="two", reason="length", output_tokens=20, choices=2),
    ):
        log.append(moment)
    lost, two, split = recent_traffic(log)
    assert split == {
        "at_s": 10.0,
        "prompt_tokens": 100,
        "cached_tokens": 32,
        "output_tokens": 11,
        "failure": None,
    }
    assert (lost["at_s"], lost["failure"], lost["output_tokens"]) == (5.0, "overloaded", 0)
    assert (two["output_tokens"], two["cached_tokens"]) == (10, 0)
