"""Who is routed next: fair order, and two bounds on every wait."""

from __future__ import annotations

import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pdserve.core.ids import RequestId
from pdserve.core.request import Request, SamplingParams, ServiceClass
from pdserve.node.waiting import AGED_TURN, WaitingRoom

PATIENCE_S = 10.0
QUICK = ServiceClass(name="quick", weight=9.0)
BATCH = ServiceClass(name="batch")


def request(
    name: str, service: ServiceClass = BATCH, tenant: str = "", num_tokens: int = 50
) -> Request:
    return Request(
        request_id=RequestId(name),
        prompt_token_ids=(1,) * num_tokens,
        params=SamplingParams(max_tokens=100, seed=1),
        service=service,
        tenant=tenant,
    )


def room(*requests: Request, now: float = 0.0) -> WaitingRoom:
    made = WaitingRoom(PATIENCE_S)
    for one in requests:
        made.add(one, 50.0, now)
    return made


def served(waiting: WaitingRoom, now: float, number: int = 1) -> str:
    """Names of the next ones, all of which find room."""
    names = []
    for _ in range(number):
        names.append(waiting.candidates(now)[0])
        waiting.served(names[-1])
    return " ".join(names)


def test_resumes_come_first_and_only_one_by_one() -> None:
    waiting = room(request("a"), request("b"), request("c"))
    waiting.add_resume(RequestId("c"))
    waiting.add_resume(RequestId("z"))
    assert waiting.candidates(0.0) == ["c"]
    waiting.found_no_room(RequestId("c"), 0.0)
    assert waiting.candidates(99.0) == ["c"]
    assert waiting.by_arrival == ["c", "z", "a", "b"]
    assert served(waiting, 0.0, 4) == "c z a b"
    assert len(waiting) == 0
    assert waiting.candidates(0.0) == []


def test_without_classes_and_keys_it_is_first_come_first_served() -> None:
    waiting = room(*(request(name) for name in "abcd"))
    assert waiting.candidates(0.0) == ["a"]
    waiting.drop(RequestId("b"))
    assert served(waiting, 0.0, 3) == "a c d"


def test_of_a_flow_that_finds_no_room_nobody_overtakes_but_others_may() -> None:
    waiting = room(request("a1", tenant="a"), request("a2", tenant="a"), request("b1", tenant="b"))
    assert waiting.candidates(0.0) == ["a1", "b1"]
    waiting.found_no_room(RequestId("a1"), 0.0)
    waiting.served(RequestId("b1"))
    assert waiting.candidates(0.0) == ["a1"]


def test_a_request_that_found_no_room_is_overtaken_for_so_long_and_no_longer() -> None:
    waiting = room(request("large", tenant="a"), request("s0", tenant="b"))
    for number in range(1, 40):
        now = number * 0.5
        head, *others = waiting.candidates(now)
        if "large" in (head, *others):
            waiting.found_no_room(RequestId("large"), now)
        if now >= PATIENCE_S + 0.5:
            assert (head, *others) == ("large",)
        else:
            waiting.served(RequestId(f"s{number - 1}"))
            waiting.add(request(f"s{number}", tenant="b"), 50.0, now)
    waiting.served(RequestId("large"))
    assert waiting.candidates(99.0)[0].startswith("s")


def test_whoever_has_waited_too_long_gets_one_turn_in_four() -> None:
    """The flood of old batch requests does not push the quick ones aside."""
    waiting = room(*(request(f"b{i}") for i in range(40)))
    for number in range(40):
        waiting.add(request(f"q{number}", QUICK), 50.0, 0.0)
    order = served(waiting, PATIENCE_S, 40).split()
    assert sum(name.startswith("b") for name in order) == pytest.approx(10, abs=2)
    young = room(*(request(f"b{i}") for i in range(40)))
    for number in range(40):
        young.add(request(f"q{number}", QUICK), 50.0, 0.0)
    order = served(young, PATIENCE_S - 0.1, 40).split()
    assert sum(name.startswith("b") for name in order) == pytest.approx(4, abs=1)


def test_endless_new_tenants_do_not_starve_an_old_request() -> None:
    """Each comes with the lowest start tag there is."""
    waiting = room(request("w1", tenant="w", num_tokens=4000), request("w2", tenant="w"))
    served(waiting, 0.0)
    for number in range(1000):
        now = number * 0.1
        waiting.add(request(f"n{number}", tenant=f"n{number}"), 50.0, now)
        if served(waiting, now) == "w2":
            break
    assert PATIENCE_S <= now <= PATIENCE_S + 0.1 * AGED_TURN


@settings(max_examples=60)
@given(
    arrivals=st.lists(
        st.tuples(st.sampled_from([QUICK, BATCH]), st.sampled_from("xyz"), st.integers(1, 3000)),
        min_size=30,
        max_size=150,
    ),
    waits=st.integers(0, 29),
)
def test_waiting_is_bounded_under_any_order_of_arrivals(
    arrivals: list[tuple[ServiceClass, str, int]], waits: int
) -> None:
    """One turn a second, one arrival a second. Whoever has waited for ten seconds is served within
    four turns for each that came before and waits still, whoever comes later."""
    waiting = WaitingRoom(PATIENCE_S)
    came: dict[str, int] = {}
    for turn, (service, tenant, num_tokens) in enumerate(arrivals):
        for copy in range(2 if turn < 30 else 1):
            name = f"{turn}.{copy}"
            waiting.add(request(name, service, tenant, num_tokens), 50.0, float(turn))
            came[name] = turn
        name = served(waiting, float(turn))
        del came[name]
    watched = f"{waits}.1"
    older = sum(other <= waits for other in came.values())
    turn = len(arrivals)
    while watched in came:
        waiting.add(request(f"late{turn}", QUICK, f"late{turn}", 1), 50.0, float(turn))
        came.pop(served(waiting, float(turn)), None)
        turn += 1
    assert turn <= len(arrivals) + PATIENCE_S + AGED_TURN * (older + 1)


def test_prompt_tokens_ahead_are_those_of_the_own_class_and_the_others_share() -> None:
    waiting = room(*(request(f"b{i}") for i in range(10)), request("q", QUICK))
    assert waiting.prompt_tokens_ahead(QUICK) == pytest.approx(50 * 10 / 9)
    assert waiting.prompt_tokens_ahead(BATCH) == pytest.approx(550)
    assert waiting.prompt_tokens_ahead(ServiceClass(name="other")) == 0
    while len(waiting):
        served(waiting, 0.0)
    assert waiting.prompt_tokens_ahead(BATCH) == 0


def test_thousands_may_wait() -> None:
    """10,000 requests of 1,000 tenants come and go in well under 30 us a call."""
    requests = [request(f"r{i}", (QUICK, BATCH)[i % 2], f"t{i % 1000}", 5) for i in range(10_000)]
    begun_s = time.process_time()
    waiting = room(*requests)
    while len(waiting):
        served(waiting, 99.0)
    assert time.process_time() - begun_s < 3.0
