"""What the load wants from each phase, as the role controller sees it."""

from __future__ import annotations

import pytest

from pdserve.core.ids import WorkerId
from pdserve.core.request import DEFAULT_SERVICE, Role, ServiceClass
from pdserve.cost.step import StepModel
from pdserve.node.demand import WINDOW_S, Demand
from pdserve.policy.cluster import WorkerView

STEPS = StepModel(
    prompt_base_s=0.01,
    per_prompt_token_s=0.001,
    per_pair_s=0.0,
    decode_base_s=0.010,
    per_sequence_s=0.001,
    per_context_token_s=0.0,
)


def worker(
    *, pending: int = 0, decoding: int = 0, context: int = 0, total_blocks: int = 0
) -> WorkerView:
    return WorkerView(
        worker=WorkerId("w"),
        role=Role.MIXED,
        pending_tokens=pending,
        num_decoding=decoding,
        context_tokens=context,
        free_blocks=9,
        total_blocks=total_blocks,
        block_size=16,
        numerics="",
        steps=STEPS,
    )


def test_nothing_has_happened() -> None:
    load = Demand().load(5.0, [worker()])
    assert (load.prefill_workers, load.decode_workers) == (0.0, 0.0)
    assert load.ttft_attainment == load.tpot_attainment == 1.0


def test_prefill_work_is_what_arrives_per_second() -> None:
    """Two prefills of half a second each second keep one worker busy."""
    demand = Demand()
    for tenth in range(100):
        if tenth % 5 == 0:
            demand.routed(tenth / 10, 0.5, DEFAULT_SERVICE)
    assert demand.load(9.9, [worker()]).prefill_workers == pytest.approx(1.0)


def test_what_is_older_than_the_window_is_forgotten() -> None:
    demand = Demand()
    demand.routed(0.0, 3.0, DEFAULT_SERVICE)
    demand.first_token(0.0, 9.0, ServiceClass(ttft_s=1.0))
    assert demand.load(1.0, [worker()]).ttft_attainment == 0.0
    later = demand.load(WINDOW_S + 0.1, [worker()])
    assert (later.prefill_workers, later.ttft_attainment) == (0.0, 1.0)


def test_a_backlog_is_to_be_gone_within_the_promise() -> None:
    demand = Demand()
    demand.routed(0.0, 0.0, DEFAULT_SERVICE)
    assert demand.load(1.0, [worker(pending=1990)]).prefill_workers == pytest.approx(1.0)
    demand.routed(0.5, 0.0, ServiceClass(ttft_s=0.5))
    load = demand.load(1.0, [worker(pending=1990)])
    assert load.prefill_workers == pytest.approx(4.0)
    assert load.queue_s == pytest.approx(2.0)


def test_decode_workers_are_filled_by_the_promised_pace() -> None:
    """0.9 of 20 ms leaves room for 8 sequences of 1 ms beside the 10 ms of the weights."""
    demand = Demand()
    demand.routed(0.0, 0.0, ServiceClass(tpot_s=0.020))
    assert demand.load(1.0, [worker(decoding=8)]).decode_workers == pytest.approx(1.0)
    assert demand.load(1.0, [worker(decoding=4)] * 3).decode_workers == pytest.approx(1.5)


def test_without_a_promise_a_batch_may_double_the_step() -> None:
    demand = Demand()
    demand.routed(0.0, 0.0, DEFAULT_SERVICE)
    assert demand.load(1.0, [worker(decoding=12)]).decode_workers == pytest.approx(1.0)


def test_or_by_their_memory() -> None:
    demand = Demand()
    demand.routed(0.0, 0.0, DEFAULT_SERVICE)
    full = worker(decoding=1, context=1600, total_blocks=100)
    assert demand.load(1.0, [full]).decode_workers == pytest.approx(1.0)


def test_what_is_old_is_not_kept_though_nobody_asks() -> None:
    """With fixed roles nobody ever does."""
    demand = Demand()
    for second in range(1000):
        demand.routed(float(second), 0.1, ServiceClass(ttft_s=1.0))
        demand.first_token(float(second), 0.5, DEFAULT_SERVICE)
        demand.finished(float(second), 0.5, DEFAULT_SERVICE)
    kept = [demand._prefill_s, *demand._ttft, *demand._tpot]
    assert max(len(window._added) for window in kept) <= WINDOW_S
    assert len(demand._bounds) <= WINDOW_S
