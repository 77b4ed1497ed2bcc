"""When a running request should leave a crowded decode worker, which one, and for where."""

from __future__ import annotations

from dataclasses import replace

from hypothesis import given
from hypothesis import strategies as st

from pdserve.core.ids import AttemptId, Epoch, RequestId, WorkerId
from pdserve.core.request import Role
from pdserve.cost.link import LinkModel
from pdserve.cost.step import StepModel
from pdserve.policy.cluster import ClusterView, WorkerView
from pdserve.policy.rebalance import Movable, Move, MoveWhenCheaper

STEPS = StepModel(
    prompt_base_s=0.01,
    per_prompt_token_s=0.001,
    per_pair_s=0.0,
    decode_base_s=0.01,
    per_sequence_s=0.0001,
    per_context_token_s=0.0,
)
LINK = LinkModel(fixed_s=0.002, per_byte_s=1e-9)
POLICY = MoveWhenCheaper()


def worker(name: str, *, free: int, decoding: int = 0, role: Role = Role.DECODE) -> WorkerView:
    return WorkerView(
        worker=WorkerId(name),
        role=role,
        pending_tokens=0,
        num_decoding=decoding,
        free_blocks=free,
        total_blocks=200,
        block_size=16,
        numerics="class a",
        steps=STEPS,
    )


def movable(name: str, context: int = 500, left: float = 200.0) -> Movable:
    attempt = AttemptId(RequestId(name), Epoch(1))
    return Movable(attempt=attempt, context_tokens=context, tokens_left=left)


CROWDED = worker("d0", free=2, decoding=2)
RUNNING = (movable("old"), movable("young"))


def propose(
    *others: WorkerView,
    crowded: WorkerView = CROWDED,
    running: tuple[Movable, ...] = RUNNING,
    link: LinkModel = LINK,
) -> Move | None:
    view = ClusterView(0.0, (crowded, *others), link=link, token_bytes=10_000)
    return POLICY.propose(view, crowded, running)


def test_the_younger_of_equals_goes_to_the_worker_with_most_room() -> None:
    move = propose(worker("d1", free=90), worker("d2", free=100))
    assert move is not None
    assert (move.attempt.request_id, move.to) == ("young", "d2")
    assert "2 free blocks for 2 sequences" in move.reason


def test_the_pause_is_the_transfer_and_it_saves_the_recompute() -> None:
    move = propose(worker("d1", free=90))
    assert move is not None
    assert abs(move.pause_s - (0.002 + 500 * 10_000 * 1e-9)) < 1e-12
    assert 0.4 < move.saves_s < 0.6


def test_the_longer_context_is_the_better_bargain() -> None:
    move = propose(worker("d1", free=90), running=(movable("old", 900), movable("young", 300)))
    assert move is not None
    assert move.attempt.request_id == "old"


def test_nobody_leaves_without_need() -> None:
    target = worker("d1", free=90)
    assert propose(target, crowded=replace(CROWDED, free_blocks=30)) is None
    assert propose(target, running=(movable("a", left=8.0), movable("b", left=8.0))) is None
    assert propose(target, running=RUNNING[:1]) is None


def test_nobody_goes_where_it_soon_would_be_as_crowded() -> None:
    assert propose(worker("d1", free=50)) is not None
    assert propose(worker("d1", free=46)) is None
    assert propose(worker("d1", free=50, decoding=9)) is None


def test_nobody_goes_to_a_prefill_worker_or_another_numerics_class() -> None:
    assert propose(worker("p0", free=150, role=Role.PREFILL)) is None
    assert propose(replace(worker("d1", free=150), numerics="class b")) is None
    assert propose(worker("m0", free=150, role=Role.MIXED)) is not None


def test_a_slow_link_is_worse_than_a_recompute() -> None:
    slow = LinkModel(fixed_s=0.002, per_byte_s=1e-7)
    assert propose(worker("d1", free=150), link=slow) is None


@given(
    free=st.integers(0, 30),
    others=st.lists(st.tuples(st.integers(0, 200), st.integers(0, 20)), max_size=5),
    contexts=st.lists(st.tuples(st.integers(1, 2000), st.floats(1, 500)), max_size=6),
)
def test_a_move_always_pays_and_leaves_room(
    free: int, others: list[tuple[int, int]], contexts: list[tuple[int, float]]
) -> None:
    running = tuple(movable(f"r{i}", *each) for i, each in enumerate(contexts))
    crowded = replace(CROWDED, free_blocks=free, num_decoding=len(running))
    targets = [worker(f"d{i + 1}", free=f, decoding=n) for i, (f, n) in enumerate(others)]
    move = propose(*targets, crowded=crowded, running=running)
    again = propose(*targets, crowded=crowded, running=running)
    assert move == again
    if move is not None:
        assert move.saves_s > 0
        assert POLICY.is_crowded(crowded, running)
        (target,) = [each for each in targets if each.worker == move.to]
        (moved,) = [each for each in running if each.attempt == move.attempt]
        assert target.free_blocks * 16 > moved.context_tokens + moved.tokens_left
