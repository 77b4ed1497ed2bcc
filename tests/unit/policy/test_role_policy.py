"""The role controller: when it moves a worker, which one, and when it holds."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pdserve.core.ids import WorkerId
from pdserve.core.request import Role
from pdserve.policy.cluster import WorkerView
from pdserve.policy.roles import (
    LoadBalancedRoles,
    PhaseLoad,
    RolesView,
    best_split,
    busiest,
    target_sign,
)

ROLES = {"p": Role.PREFILL, "d": Role.DECODE, "m": Role.MIXED}
POLICY = LoadBalancedRoles()


def worker(name: str, *, home: str | None = None, pending: int = 0, context: int = 0) -> WorkerView:
    return WorkerView(
        worker=WorkerId(name),
        role=ROLES[name[0]],
        home_role=ROLES[home or name[0]],
        pending_tokens=pending,
        context_tokens=context,
        num_decoding=0,
        free_blocks=9,
        numerics="",
    )


def view_of(*workers: WorkerView, prefill: float, decode: float) -> RolesView:
    """A load whose wish has lasted long enough."""
    load = PhaseLoad(prefill_workers=prefill, decode_workers=decode)
    target = best_split(load, sum(w.role is not Role.MIXED for w in workers))
    return RolesView(
        now=100.0,
        workers=workers,
        load=load,
        changed_s={},
        target_prefill=target,
        target_since_s=90.0,
    )


FOUR = (worker("p0"), worker("p1"), worker("d0"), worker("d1"))


def test_the_busier_phase_gets_a_worker() -> None:
    assert POLICY.propose(view_of(*FOUR, prefill=3, decode=1)).move == ("d0", Role.PREFILL)
    assert POLICY.propose(view_of(*FOUR, prefill=1, decode=3)).move == ("p0", Role.DECODE)


def test_the_reason_has_the_figures() -> None:
    reason = POLICY.propose(view_of(*FOUR, prefill=3, decode=1)).reason
    assert reason == (
        "d0 to prefill: 3 of 4 to prefill (load 1.00) against 2 (1.50): "
        "prefill wants 3.00 workers, decode 1.00"
    )


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({"load": PhaseLoad(prefill_workers=2, decode_workers=2)}, "as it should be"),
        ({"load": PhaseLoad(prefill_workers=0.9, decode_workers=0.1)}, "nobody is busy"),
        ({"load": PhaseLoad(prefill_workers=2.35, decode_workers=2.1)}, "as it should be"),
        ({"target_prefill": None}, "wanted for the first time"),
        ({"target_prefill": 1}, "wanted for the first time"),
        ({"target_since_s": 99.5}, "wanted for 0.5 s"),
        ({"changed_s": {WorkerId("p0"): 99.4}}, "the last change was 0.6 s ago"),
        ({"changed_s": {WorkerId("d0"): 98.0, WorkerId("d1"): 98.0}}, "all changed just now"),
    ],
)
def test_it_holds_with_a_reason(change: dict[str, object], why: str) -> None:
    view = replace(view_of(*FOUR, prefill=3, decode=1), **change)  # type: ignore[arg-type]
    proposal = POLICY.propose(view)
    assert proposal.move is None
    assert proposal.reason.startswith(f"hold ({why})")


def test_little_is_not_worth_a_move() -> None:
    """Three of four would be best, by less than the margin."""
    proposal = POLICY.propose(view_of(*FOUR, prefill=2.2, decode=1.0))
    assert proposal.target_prefill == 3
    assert proposal.reason.startswith("hold (too little to gain)")


def test_a_worker_that_was_lent_goes_home_first() -> None:
    lent = worker("d1", home="p")
    assert POLICY.propose(view_of(*FOUR[:3], lent, prefill=3, decode=1)).move == (
        "d1",
        Role.PREFILL,
    )


def test_then_the_one_with_the_least_work_left() -> None:
    busy = replace(FOUR[2], context_tokens=500)
    assert POLICY.propose(view_of(*FOUR[:2], busy, FOUR[3], prefill=3, decode=1)).move == (
        "d1",
        Role.PREFILL,
    )


def test_mixed_workers_and_engines_that_cannot_mix_stay() -> None:
    mixed = (worker("m0"), worker("m1"), worker("p0"))
    assert POLICY.propose(
        replace(view_of(*FOUR, prefill=3, decode=1), workers=mixed)
    ).reason.startswith("hold: fewer than two")
    foreign = tuple(replace(w, mixes=False) for w in FOUR)
    assert (
        POLICY.propose(replace(view_of(*FOUR, prefill=3, decode=1), workers=foreign)).move is None
    )


@given(
    prefill=st.floats(0, 20),
    decode=st.floats(0, 20),
    num_workers=st.integers(2, 9),
)
def test_each_phase_keeps_a_worker_and_no_split_is_better(
    prefill: float, decode: float, num_workers: int
) -> None:
    load = PhaseLoad(prefill_workers=prefill, decode_workers=decode)
    best = best_split(load, num_workers)
    assert 1 <= best < num_workers
    for other in range(1, num_workers):
        assert busiest(load, best, num_workers) <= busiest(load, other, num_workers)


@given(
    steps=st.lists(st.tuples(st.floats(0, 8), st.floats(0, 8)), min_size=1, max_size=40),
)
def test_no_worker_moves_twice_within_its_dwell(steps: list[tuple[float, float]]) -> None:
    """Whatever the load does: the pool is never whipped about."""
    workers = {name: worker(name) for name in ("p0", "p1", "p2", "d0", "d1", "d2")}
    changed: dict[WorkerId, float] = {}
    target: int | None = None
    since_s = now = 0.0
    for prefill, decode in steps:
        now += 0.5
        view = RolesView(
            now=now,
            workers=tuple(workers.values()),
            load=PhaseLoad(prefill_workers=prefill, decode_workers=decode),
            changed_s=dict(changed),
            target_prefill=target,
            target_since_s=since_s,
        )
        proposal = POLICY.propose(view)
        num_prefill = sum(w.role is Role.PREFILL for w in workers.values())
        if target_sign(target, num_prefill) != target_sign(proposal.target_prefill, num_prefill):
            since_s = now
        target = proposal.target_prefill
        if proposal.move is not None:
            name, role = proposal.move
            assert now - changed.get(name, -100.0) >= POLICY.dwell_s
            assert all(now - at_s >= POLICY.pause_s for at_s in changed.values())
            changed[name] = now
            workers[name] = replace(workers[name], role=role)
        roles = [w.role for w in workers.values()]
        assert Role.PREFILL in roles
        assert Role.DECODE in roles
