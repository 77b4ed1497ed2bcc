"""The life-event log: what it keeps, what it forgets, whom it tells."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from pdserve.obs.life import MAX_EVENTS_PER_REQUEST, LifeLog


def test_events_come_back_by_time(split_life) -> None:
    log = LifeLog()
    for moment in reversed(split_life):
        log.append(moment)
    assert log.timeline("req-1") == split_life
    assert log.timeline("req-2") is None


def test_events_of_the_same_time_stay_in_order(event) -> None:
    log = LifeLog()
    moments = [event(name, 1.0) for name in ("submitted", "resumed", "routed", "failed")]
    for moment in moments:
        log.append(moment)
    assert log.timeline("req-1") == tuple(moments)


def test_every_listener_hears_every_event(split_life) -> None:
    log = LifeLog(max_requests=1)
    heard: list[tuple[int, object]] = []
    log.subscribe(lambda moment: heard.append((1, moment)))
    log.append(split_life[0])
    log.subscribe(lambda moment: heard.append((2, moment)))
    log.append(split_life[1])
    assert heard == [(1, split_life[0]), (1, split_life[1]), (2, split_life[1])]


def test_the_request_that_ended_first_is_forgotten_first(event) -> None:
    log = LifeLog(max_requests=3)
    for at_s, request in enumerate("abc"):
        log.append(event("submitted", float(at_s), request=request))
    log.append(event("finished", 3.0, request="c"))
    log.append(event("failed", 4.0, request="b"))
    for at_s, request, gone in ((5.0, "d", "c"), (6.0, "e", "b"), (7.0, "f", "a")):
        log.append(event("submitted", at_s, request=request))
        assert log.timeline(request) is not None
        assert log.timeline(gone) is None
        assert len(log) == 3


def test_late_events_of_a_forgotten_request_push_nobody_out(event) -> None:
    log = LifeLog(max_requests=2)
    log.append(event("submitted", 0.0, request="a"))
    log.append(event("submitted", 1.0, request="b"))
    log.append(event("decode_started", 2.0, "d0", request="old"))
    assert log.timeline("old") is None
    assert log.timeline("a") is not None
    assert log.timeline("b") is not None


def test_a_request_known_by_halves_is_forgotten_by_its_end_too(event) -> None:
    log = LifeLog(max_requests=2)
    log.append(event("routed", 0.0, request="a"))
    log.append(event("submitted", 1.0, request="b"))
    log.append(event("finished", 2.0, request="b"))
    log.append(event("finished", 3.0, request="a"))
    log.append(event("submitted", 4.0, request="c"))
    assert log.timeline("b") is None
    assert log.timeline("a") is not None


def test_events_that_overtake_the_submission_are_kept(split_life) -> None:
    log = LifeLog(max_requests=1)
    log.append(split_life[3])
    log.append(split_life[0])
    assert log.timeline("req-1") == (split_life[0], split_life[3])


def test_an_id_that_is_used_again_starts_a_new_life(event) -> None:
    log = LifeLog()
    log.append(event("submitted", 0.0))
    log.append(event("finished", 1.0))
    log.append(event("handoff_closed", 0.5, "d0"))
    again = event("submitted", 2.0)
    log.append(again)
    assert log.timeline("req-1") == (again,)


def test_a_life_without_end_is_cut(event) -> None:
    log = LifeLog()
    log.append(event("submitted", 0.0))
    for number in range(2 * MAX_EVENTS_PER_REQUEST):
        log.append(event("preempted", 1.0 + number, "d0"))
    log.append(event("finished", 1e6))
    kept = log.timeline("req-1")
    assert len(kept) == MAX_EVENTS_PER_REQUEST + 1
    assert (kept[0].name, kept[-1].name) == ("submitted", "finished")


@settings(derandomize=True)
@given(
    st.integers(1, 4),
    st.lists(
        st.tuples(
            st.sampled_from(["submitted", "routed", "finished", "failed"]),
            st.sampled_from("abcdefg"),
        )
    ),
)
def test_memory_is_bounded_and_running_requests_stay(event, limit: int, moments) -> None:
    log = LifeLog(max_requests=limit)
    running: dict[str, None] = {}
    for at_s, (name, request) in enumerate(moments):
        log.append(event(name, float(at_s), request=request))
        if name == "submitted":
            running[request] = None
        elif name != "routed":
            running.pop(request, None)
        assert len(log) <= limit
        if len(running) > limit:
            return
        assert all(log.timeline(other) is not None for other in running)
        assert len(log._forgettable) == len(log) - len(running)
