"""Splitwise's rules: shortest queues by speed, the overflow from pool to pool, and draws."""

from __future__ import annotations

from dataclasses import replace

import pytest

from pdserve.core.ids import WorkerId
from pdserve.core.request import Role, RoutePreference
from pdserve.cost.step import StepModel
from pdserve.policy.cluster import ClusterView, Route, RouteAsk, WorkerView
from pdserve.policy.splitwise import Splitwise

ASK = RouteAsk(num_tokens=100, num_blocks=8)
SPLIT = replace(ASK, preference=RoutePreference.SPLIT)
LOCAL = replace(ASK, preference=RoutePreference.LOCAL)
FAST = StepModel(
    prompt_base_s=0.0,
    per_prompt_token_s=0.001,
    per_pair_s=0.0,
    decode_base_s=0.010,
    per_sequence_s=0.001,
    per_context_token_s=0.000_01,
)
SLOW = StepModel(
    prompt_base_s=0.0,
    per_prompt_token_s=0.002,
    per_pair_s=0.0,
    decode_base_s=0.020,
    per_sequence_s=0.002,
    per_context_token_s=0.000_02,
)
LIMIT = 1000


def worker(
    name: str,
    *,
    pending: int = 0,
    decoding: int = 0,
    free: int = 50,
    steps: StepModel | None = None,
    mixes: bool = True,
    context: int = 0,
) -> WorkerView:
    """``p0`` is a prefill worker, ``d0`` a decode worker, ``m0`` a mixed one."""
    roles = {"p": Role.PREFILL, "d": Role.DECODE, "m": Role.MIXED}
    return WorkerView(
        worker=WorkerId(name),
        role=roles[name[0]],
        home_role=roles[name[0]],
        pending_tokens=pending,
        num_decoding=decoding,
        context_tokens=context,
        free_blocks=free,
        numerics="class a",
        steps=steps,
        mixes=mixes,
    )


def choose(ask: RouteAsk, *workers: WorkerView) -> Route | None:
    return Splitwise(queue_threshold_tokens=LIMIT).choose(ClusterView(0.0, workers), ask)


def route(ask: RouteAsk, *workers: WorkerView) -> str | None:
    """``p0 d0``, and behind a bar who is drawn: ``d0 d1 | d0``."""
    chosen = choose(ask, *workers)
    if chosen is None:
        return None
    assert chosen.reason
    drawn = f" | {' '.join(chosen.draws)}" if chosen.draws else ""
    return f"{chosen.prefill} {chosen.decode}{drawn}"


def test_each_side_joins_the_shortest_queue_of_its_own_pool() -> None:
    prefill = (worker("p0", pending=9), worker("p1", pending=3), worker("m0"))
    decode = (worker("d0", decoding=2), worker("d1", decoding=1))
    assert route(ASK, *prefill, *decode) == "p1 d1"


def test_queues_are_compared_in_seconds() -> None:
    prefill = (worker("p0", pending=500, steps=SLOW), worker("p1", pending=900, steps=FAST))
    decode = (worker("d0", decoding=1, steps=SLOW), worker("d1", decoding=9, steps=FAST))
    assert route(ASK, *prefill, *decode) == "p1 d1"


def test_one_worker_without_a_model_makes_them_compare_tokens() -> None:
    prefill = (worker("p0", pending=500, steps=SLOW), worker("p1", pending=900, steps=FAST))
    assert route(ASK, *prefill, worker("d0")) == "p0 d0"


def test_a_decode_worker_with_long_contexts_is_slower() -> None:
    decode = (
        worker("d0", decoding=4, context=9000, steps=FAST),
        worker("d1", decoding=6, context=600, steps=FAST),
    )
    assert route(ASK, worker("p0", steps=FAST), *decode) == "p0 d1"


@pytest.mark.parametrize(
    ("pending", "expected"),
    [(0, "p0 d0"), (LIMIT - 100, "p0 d0"), (LIMIT - 99, "m0 d0"), (LIMIT + 1, "m0 d0")],
)
def test_above_the_threshold_the_mixed_pool_prefills(pending: int, expected: str) -> None:
    assert route(ASK, worker("p0", pending=pending), worker("m0"), worker("d0")) == expected


def test_an_empty_queue_takes_a_prompt_of_any_length() -> None:
    long = replace(ASK, num_tokens=50 * LIMIT)
    assert route(long, worker("p0"), worker("m0"), worker("d0")) == "p0 d0"


def test_the_threshold_of_a_slow_worker_is_lower() -> None:
    others = (worker("m0", steps=FAST), worker("d0", steps=FAST))
    assert route(ASK, worker("p0", pending=400, steps=SLOW), *others) == "p0 d0"
    assert route(ASK, worker("p0", pending=401, steps=SLOW), *others) == "m0 d0"


def test_above_both_thresholds_the_decode_worker_with_least_to_do_is_drawn() -> None:
    full = (worker("p0", pending=LIMIT), worker("m0", pending=LIMIT))
    decode = (worker("d0", decoding=5), worker("d1", decoding=3), worker("d2", decoding=4))
    assert route(ASK, *full, *decode) == "d1 d2 | d1"


def test_a_drawn_worker_decodes_too_if_it_was_the_last() -> None:
    assert route(ASK, worker("p0", pending=LIMIT), worker("d0")) == "d0 d0 | d0"


def test_with_every_queue_long_one_worker_does_all_of_it() -> None:
    """The cluster has become an aggregated one."""
    full = [worker(n, pending=LIMIT, decoding=3) for n in ("p0", "m0", "d0")]
    assert route(ASK, *full, worker("d1", pending=LIMIT, decoding=2)) == "d1 d1 | d1"
    assert route(ASK, *full[:2], replace(full[2], free_blocks=0)) == "m0 m0"
    assert route(SPLIT, *full) == "p0 d0"


def test_without_room_to_decode_the_mixed_pool_decodes() -> None:
    prefill = worker("p0")
    mixed = (worker("m0", decoding=3), worker("m1", decoding=2))
    assert route(ASK, prefill, *mixed, worker("d0", free=7)) == "p0 m1"


def test_without_mixed_workers_the_prefill_worker_is_drawn_to_decode() -> None:
    decode = worker("d0", free=0)
    assert route(ASK, worker("p0"), worker("p1", pending=5), decode) == "p0 p0 | p0"
    assert route(SPLIT, worker("p0"), worker("p1", pending=5), decode) == "p0 p1 | p1"


def test_without_room_on_the_prefill_worker_another_one_is_drawn() -> None:
    workers = (worker("p0", free=0), worker("p1", pending=5), worker("d0", free=0))
    assert route(ASK, *workers) == "p0 p1 | p1"


def test_nobody_with_room_means_waiting() -> None:
    assert route(ASK, *(worker(name, free=7) for name in ("p0", "m0", "d0"))) is None
    full = [worker(n, free=7, pending=LIMIT) for n in ("p0", "m0", "d0")]
    assert route(ASK, *full) is None


def test_a_mixed_worker_that_prefills_hands_off_while_the_decode_pool_has_room() -> None:
    workers = (worker("p0", pending=LIMIT), worker("m0"), worker("d0", decoding=20))
    assert route(ASK, *workers) == "m0 d0"
    assert route(ASK, *workers[:2], worker("d0", free=0)) == "m0 m0"
    assert route(SPLIT, *workers[:2], worker("m1"), worker("d0", free=0)) == "m0 m1"


def test_a_cluster_of_mixed_workers_keeps_what_it_prefills() -> None:
    assert route(ASK, worker("m0", pending=5), worker("m1", pending=3)) == "m1 m1"
    assert route(SPLIT, worker("m0", pending=5), worker("m1", pending=3)) == "m1 m0"


def test_a_drawn_worker_is_a_mixed_one_until_it_has_gone_home() -> None:
    drawn = replace(worker("d0"), role=Role.MIXED)
    assert route(ASK, worker("p0"), drawn, worker("d1", decoding=9)) == "p0 d1"
    assert route(ASK, worker("p0", pending=LIMIT), drawn, worker("d1", decoding=9)) == "d0 d1"


def test_an_engine_that_cannot_mix_is_never_drawn() -> None:
    stiff = worker("d0", mixes=False)
    assert route(ASK, worker("p0", pending=LIMIT), stiff) == "p0 p0 | p0"
    assert route(ASK, worker("p0", pending=LIMIT, mixes=False), stiff) == "p0 d0"
    full = worker("d0", mixes=False, free=0)
    assert route(ASK, worker("p0", mixes=False), full) is None
    assert route(ASK, worker("p0", mixes=False), worker("p1"), full) == "p0 p1 | p1"


@pytest.mark.parametrize("ask", [ASK, SPLIT, LOCAL])
@pytest.mark.parametrize("name", ["p0", "d0", "m0"])
def test_the_only_worker_does_both(name: str, ask: RouteAsk) -> None:
    assert route(ask, worker(name)) == f"{name} {name}"


@pytest.mark.parametrize("kind", ["p", "d"])
def test_one_kind_of_worker_is_split_only_on_demand(kind: str) -> None:
    one, other = f"{kind}0", f"{kind}1"
    drawn = other if kind == "p" else one
    assert route(ASK, worker(one), worker(other)) == f"{one} {one}"
    assert route(SPLIT, worker(one), worker(other)) == f"{one} {other} | {drawn}"


def test_a_local_wish_draws_nobody() -> None:
    assert route(LOCAL, worker("p0"), worker("d0"), worker("m0", pending=50)) == "m0 m0"
    assert route(LOCAL, worker("p0", decoding=1), worker("d0")) == "d0 d0"


def test_a_resume_goes_back_to_its_prefill_worker_above_any_threshold() -> None:
    ask = replace(ASK, last_prefill=WorkerId("p1"))
    workers = (worker("p0"), worker("p1", pending=9 * LIMIT), worker("d0"))
    assert route(ask, *workers) == "p1 d0"
    assert route(replace(ask, last_prefill=WorkerId("d0")), *workers) == "p0 d0"


def test_failed_decode_workers_are_avoided_and_in_place_is_in_place() -> None:
    ask = replace(ASK, avoid_decode=(WorkerId("d0"),))
    assert route(ask, worker("p0"), worker("d0"), worker("d1", decoding=9)) == "p0 d1"
    assert route(ask, worker("p0"), worker("d0")) == "p0 d0"
    stays = replace(SPLIT, in_place=True, last_prefill=WorkerId("p1"))
    assert route(stays, worker("p0"), worker("p1", pending=LIMIT), worker("d0")) == "p1 p1"


def test_a_resume_prefers_the_numerics_class_of_its_tokens() -> None:
    other = replace(worker("d1", decoding=9), numerics="class b")
    assert route(replace(ASK, numerics="class b"), worker("p0"), worker("d0"), other) == "p0 d1"


def test_the_reason_says_which_pool_and_why() -> None:
    full = worker("p0", pending=LIMIT)
    told = [
        choose(ASK, worker("p0"), worker("d0")),
        choose(ASK, full, worker("m0"), worker("d0")),
        choose(ASK, full, worker("d0"), worker("d1")),
        choose(ASK, worker("p0"), worker("d0", free=0)),
    ]
    reasons = [route.reason for route in told if route is not None]
    assert len(set(reasons)) == 4
    assert all("threshold" in reasons[number] for number in (1, 2))
    assert "drawn" in reasons[2]
    assert "drawn" in reasons[3]
