"""Steps, bytes, joules and money: what is added up is all that there was."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pdserve.core.ids import WorkerId
from pdserve.core.request import Role
from pdserve.core.step import StepShape
from pdserve.cost.machine import StepRange
from pdserve.sim.worker_figures import WorkerFigures, num_outside

A, B = WorkerId("prefill-0"), WorkerId("decode-0")
PROMPT = StepShape(prompt_tokens=100, prompt_pairs=10_000)
MIXED = StepShape(prompt_tokens=50, prompt_pairs=2_500, num_decoding=2, context_tokens=200)
DECODE = StepShape(num_decoding=4, context_tokens=400)


def test_steps_energy_and_cost_of_a_worker(a_machine):
    figures = WorkerFigures({A: a_machine(), B: a_machine()})
    figures.steps(A, 0.0, 2.0, PROMPT, 1)
    figures.steps(A, 2.0, 3.0, MIXED, 1)
    figures.steps(B, 0.0, 4.0, DECODE, 10)
    document = figures.document(duration_s=10.0, output_tokens=2000)
    worker = document["workers"][A]
    assert worker["steps"] == {"prefill": 1, "mixed": 1, "decode": 0}
    assert worker["busy_s"] == {"prefill": 2.0, "mixed": 1.0, "decode": 0.0}
    assert worker["utilisation"] == 0.3
    assert worker["prompt_tokens"] == 150
    assert document["workers"][B]["decoded_tokens"] == 40
    assert document["steps"]["all"] == 12
    assert document["utilisation"] == 0.35
    energy = document["energy"]
    assert energy["prompt_j"] == 3 * 400
    assert energy["decode_j"] == 4 * 200
    assert energy["idle_j"] == (7 + 6) * 100
    assert energy["total_j"] == 3300
    assert energy["mean_w"] == 330
    assert energy["j_per_1k_output_tokens"] == 1650
    assert document["cost"] == {
        "price_per_hour": 72.0,
        "total": pytest.approx(0.2),
        "per_1k_output_tokens": pytest.approx(0.1),
    }


def test_transfers_moves_and_losses(a_machine):
    figures = WorkerFigures({A: a_machine(), B: a_machine()})
    figures.sent(A, B, 1000, 1.0, 1.5)
    figures.sent(A, B, 500, 2.0, 2.1)
    figures.role_changed(3.0, B, Role.MIXED)
    figures.worker_lost(4.0, B)
    document = figures.document(5.0, 0)
    assert document["transfers"]["num"] == 2
    assert document["transfers"]["bytes"] == 1500
    assert document["transfers"]["time_s"]["max"] == 0.5
    assert document["workers"][A]["sent_bytes"] == document["workers"][B]["received_bytes"] == 1500
    assert document["role_changes"] == {
        "num": 1, "first": [{"at_s": 3.0, "worker": B, "role": "mixed"}]
    }  # fmt: skip
    assert document["workers_lost"]["num"] == 1
    assert document["cost"]["per_1k_output_tokens"] is None, "there is no price of no tokens"


steps = st.lists(
    st.tuples(
        st.sampled_from([A, B]),
        st.sampled_from([PROMPT, MIXED, DECODE]),
        st.floats(1e-4, 3.0),
        st.integers(1, 50),
    ),
    max_size=40,
)


@given(done=steps)
def test_joules_and_tokens_add_up(done, a_machine):
    figures = WorkerFigures({A: a_machine(), B: a_machine()})
    now = {A: 0.0, B: 0.0}
    for worker, shape, elapsed_s, count in done:
        count = count if shape is DECODE else 1
        figures.steps(worker, now[worker], now[worker] + elapsed_s, shape, count)
        now[worker] += elapsed_s
    duration_s = max(now.values()) + 1.0
    document = figures.document(duration_s, 1)
    workers = document["workers"].values()
    energy = document["energy"]
    parts = energy["idle_j"] + energy["prompt_j"] + energy["decode_j"]
    assert energy["total_j"] == pytest.approx(parts)
    assert energy["total_j"] == pytest.approx(sum(worker["energy_j"] for worker in workers))
    least, most = 2 * 100 * duration_s, 2 * 400 * duration_s
    assert least * (1 - 1e-9) <= energy["total_j"] <= most * (1 + 1e-9)
    busy_s = sum(sum(worker["busy_s"].values()) for worker in workers)
    assert busy_s == pytest.approx(sum(now.values()))
    assert document["steps"]["all"] == sum(sum(worker["steps"].values()) for worker in workers)
    assert sum(worker["prompt_tokens"] for worker in workers) == sum(
        shape.prompt_tokens for _, shape, _, _ in done
    )


@given(
    num_decoding=st.integers(1, 12),
    context=st.integers(12, 3000),
    count=st.integers(1, 60),
)
def test_of_steps_in_one_go_those_outside_are_counted_as_one_by_one(num_decoding, context, count):
    """Before the last step each sequence had a token less for every step that was to come."""
    measured = StepRange(prompt_tokens=2048, num_decoding=8, context_tokens=1000)
    shapes = [
        StepShape(num_decoding=num_decoding, context_tokens=context + num_decoding * step)
        for step in range(count)
    ]
    outside = sum(not measured.holds(shape) for shape in shapes)
    last = shapes[-1]
    assert (0 if measured.holds(last) else num_outside(measured, last, count)) == outside


def test_without_a_measurement_there_is_no_share_outside_of_it(a_machine):
    assert WorkerFigures({A: a_machine(measured=None)}).outside_share() is None
    figures = WorkerFigures({A: a_machine()})
    figures.steps(A, 0.0, 1.0, StepShape(prompt_tokens=4096), 1)
    figures.steps(A, 1.0, 2.0, PROMPT, 1)
    assert figures.outside_share() == 0.5
