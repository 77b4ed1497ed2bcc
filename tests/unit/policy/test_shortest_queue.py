"""Join the shortest queue, on both sides at once."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pdserve.core.ids import WorkerId
from pdserve.core.request import Role, RoutePreference
from pdserve.policy.cluster import ClusterView, RouteAsk, WorkerView
from pdserve.policy.shortest_queue import ShortestQueue

ASK = RouteAsk(num_tokens=100, num_blocks=8)
SPLIT = replace(ASK, preference=RoutePreference.SPLIT)
LOCAL = replace(ASK, preference=RoutePreference.LOCAL)


def worker(name: str, *, pending: int = 0, decoding: int = 0, free: int = 50) -> WorkerView:
    """``p0`` is a prefill worker, ``d0`` a decode worker, ``m0`` a mixed one."""
    roles = {"p": Role.PREFILL, "d": Role.DECODE, "m": Role.MIXED}
    return WorkerView(
        worker=WorkerId(name),
        role=roles[name[0]],
        pending_tokens=pending,
        num_decoding=decoding,
        free_blocks=free,
        numerics="class a",
    )


def route(ask: RouteAsk, *workers: WorkerView) -> str | None:
    chosen = ShortestQueue().choose(ClusterView(0.0, workers), ask)
    return None if chosen is None else f"{chosen.prefill} {chosen.decode}"


def test_both_sides_take_their_least_loaded_worker() -> None:
    prefill = (worker("p0", pending=9), worker("p1", pending=3))
    decode = (worker("d0", decoding=2), worker("d1", decoding=1))
    assert route(ASK, *prefill, *decode) == "p1 d1"


def test_ties_go_to_the_smaller_id() -> None:
    assert route(ASK, *map(worker, ("p0", "p1", "d0", "d1"))) == "p0 d0"


def test_a_decode_worker_must_have_room() -> None:
    decode = (worker("d0", free=7), worker("d1", decoding=5, free=8))
    assert route(ASK, worker("p0"), *decode) == "p0 d1"
    assert route(ASK, worker("p0"), worker("d0", free=7)) is None


def test_a_full_decode_pool_is_waited_for_not_replaced() -> None:
    """The prefill pool has room, and is not for decoding."""
    assert route(ASK, worker("p0"), worker("p1"), worker("d0", free=0)) is None


def test_a_mixed_worker_that_wins_the_prefill_keeps_the_request() -> None:
    workers = (worker("p0", pending=50), worker("d0"), worker("m0", pending=10))
    assert route(ASK, *workers) == "m0 m0"


def test_a_mixed_worker_without_room_hands_off() -> None:
    workers = (worker("p0", pending=50), worker("d0"), worker("m0", pending=10, free=3))
    assert route(ASK, *workers) == "m0 d0"


def test_a_mixed_worker_decodes_only_if_it_is_less_loaded() -> None:
    workers = (worker("p0"), worker("d0", decoding=4), worker("m0", pending=10, decoding=1))
    assert route(ASK, *workers) == "p0 m0"
    workers = (worker("p0"), worker("d0", decoding=1), worker("m0", pending=10, decoding=1))
    assert route(ASK, *workers) == "p0 d0"


@pytest.mark.parametrize("names", [("p0",), ("d0",), ("m0",)])
@pytest.mark.parametrize("ask", [ASK, SPLIT, LOCAL])
def test_the_only_worker_does_both(names: tuple[str], ask: RouteAsk) -> None:
    assert route(ask, worker(names[0])) == f"{names[0]} {names[0]}"
    assert route(ask, worker(names[0], free=0)) is None


def test_without_any_worker_there_is_no_route() -> None:
    assert route(ASK) is None


@pytest.mark.parametrize("kind", ["p", "d"])
def test_one_kind_of_worker_serves_locally_unless_asked_otherwise(kind: str) -> None:
    workers = (worker(f"{kind}0", decoding=3), worker(f"{kind}1", pending=5))
    assert route(ASK, *workers) == f"{kind}1 {kind}1"
    assert route(SPLIT, *workers) == f"{kind}0 {kind}1"


def test_a_local_wish_prefers_a_mixed_worker_with_room() -> None:
    workers = (worker("p0"), worker("d0"), worker("m0", decoding=9), worker("m1", decoding=8))
    assert route(LOCAL, *workers) == "m1 m1"
    assert route(LOCAL, worker("p0", decoding=1), worker("d0"), worker("m0", free=0)) == "d0 d0"


def test_a_split_wish_never_decodes_where_it_was_prefilled() -> None:
    assert route(SPLIT, worker("m0"), worker("m1", decoding=30)) == "m0 m1"
    assert route(SPLIT, worker("m0"), worker("m1", free=0)) is None


def test_a_resume_goes_back_to_the_prefix_cache_that_knows_it() -> None:
    ask = replace(ASK, last_prefill=WorkerId("p1"))
    assert route(ask, worker("p0"), worker("p1", pending=500), worker("d0")) == "p1 d0"
    assert route(ask, worker("p0"), worker("d0")) == "p0 d0"


def test_a_decode_worker_that_failed_is_avoided_while_there_is_another() -> None:
    ask = replace(ASK, avoid_decode=(WorkerId("d0"),))
    assert route(ask, worker("p0"), worker("d0"), worker("d1", decoding=9)) == "p0 d1"
    assert route(ask, worker("p0"), worker("d0")) == "p0 d0"


def test_after_failed_hand_offs_the_prefill_worker_keeps_it() -> None:
    ask = replace(SPLIT, last_prefill=WorkerId("p1"), in_place=True)
    assert route(ask, worker("p0"), worker("p1", decoding=9), worker("d0")) == "p1 p1"


def test_in_place_without_room_there_is_in_place_elsewhere() -> None:
    ask = replace(ASK, last_prefill=WorkerId("p0"), in_place=True)
    assert route(ask, worker("p0", free=0), worker("p1"), worker("d0", decoding=2)) == "p1 p1"


def test_a_resume_prefers_the_numerics_class_of_its_tokens() -> None:
    ask = replace(ASK, numerics="class b")
    other = replace(worker("d1", decoding=9), numerics="class b")
    assert route(ask, worker("p0"), worker("d0"), other) == "p0 d1"


workers_strategy = st.lists(
    st.builds(
        worker,
        st.sampled_from(["p0", "p1", "d0", "d1", "m0", "m1"]),
        pending=st.integers(0, 50),
        decoding=st.integers(0, 5),
        free=st.integers(0, 20),
    ),
    unique_by=lambda view: view.worker,
    max_size=6,
)
asks = st.builds(
    RouteAsk,
    num_tokens=st.just(10),
    num_blocks=st.integers(1, 15),
    preference=st.sampled_from(RoutePreference),
    last_prefill=st.sampled_from([None, WorkerId("p0"), WorkerId("m1")]),
    avoid_decode=st.lists(st.sampled_from([WorkerId("d0"), WorkerId("m0")])).map(tuple),
    in_place=st.booleans(),
)


@given(workers=workers_strategy, ask=asks, data=st.data())
def test_a_route_has_room_and_is_a_function_of_the_view(
    workers: list[WorkerView], ask: RouteAsk, data: st.DataObject
) -> None:
    policy = ShortestQueue()
    chosen = policy.choose(ClusterView(0.0, tuple(workers)), ask)
    shuffled = data.draw(st.permutations(workers))
    assert policy.choose(ClusterView(1.0, tuple(shuffled)), ask) == chosen
    by_id = {view.worker: view for view in workers}
    if chosen is None:
        if ask.in_place or ask.preference is RoutePreference.LOCAL:
            assert all(view.free_blocks < ask.num_blocks for view in workers)
    else:
        assert by_id[chosen.decode].free_blocks >= ask.num_blocks
        assert chosen.prefill in by_id
        if ask.preference is RoutePreference.SPLIT and not ask.in_place and len(workers) > 1:
            assert chosen.prefill != chosen.decode
