"""What happened when: nothing is lost when stretches of time are put together."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pdserve.core.ids import WorkerId
from pdserve.core.request import Role
from pdserve.core.step import StepShape
from pdserve.sim.observe import WorkerLoad
from pdserve.sim.timelines import MAX_STRETCHES, Activity, Pools
from pdserve.sim.worker_figures import Kind, WorkerFigures

A, B = WorkerId("prefill-0"), WorkerId("decode-0")
SHAPES = {
    Kind.PREFILL: StepShape(prompt_tokens=10, prompt_pairs=100),
    Kind.MIXED: StepShape(prompt_tokens=10, prompt_pairs=100, num_decoding=1, context_tokens=5),
    Kind.DECODE: StepShape(num_decoding=3, context_tokens=30),
}


def load(role: Role, waiting: int, used: int = 5) -> WorkerLoad:
    return WorkerLoad(
        role=role,
        num_waiting=waiting,
        num_decoding=2 * waiting,
        pending_prefill_tokens=100 * waiting,
        used_blocks=used,
        num_blocks=10,
    )


def test_samples_are_shown_as_they_are_while_there_are_few():
    pools = Pools()
    pools.sampled(0.0, {A: load(Role.PREFILL, 3), B: load(Role.DECODE, 1)}, 7)
    pools.sampled(1.0, {A: load(Role.PREFILL, 1), B: load(Role.PREFILL, 2, used=9)}, 0)
    document = pools.document()
    assert document["at_s"] == [0.0, 1.0]
    assert document["most_waiting"] == 11
    assert document["most_used_block_share"] == 0.9
    assert document["queued_in_router"] == [7, 0]
    prefill, decode = document["pools"]["prefill"], document["pools"]["decode"]
    assert prefill["workers"] == [1, 2]
    assert prefill["waiting"] == [3, 3]
    assert prefill["pending_prefill_tokens"] == [300, 300]
    assert prefill["used_block_share"] == [0.5, 0.7]
    assert decode["workers"] == [1, 0], "it has left the pool"
    assert decode["used_block_share"] == [0.5, 0.0]
    assert pools.waiting() == [11, 3]


@given(num=st.integers(1, 5 * MAX_STRETCHES))
def test_averages_of_many_samples_are_those_of_all(num):
    pools = Pools()
    for index in range(num):
        pools.sampled(float(index), {A: load(Role.PREFILL, index % 7)}, index)
    assert 0 < len(pools.times_s) <= MAX_STRETCHES
    assert num <= MAX_STRETCHES or len(pools.times_s) > MAX_STRETCHES // 2
    weighted = zip(pools.series(Role.PREFILL, "waiting"), pools.num_samples, strict=True)
    assert sum(mean * of for mean, of in weighted) == pytest.approx(sum(i % 7 for i in range(num)))
    assert sum(pools.queued_sums) == num * (num - 1) / 2
    assert sum(pools.num_samples) == num
    assert list(pools.times_s) == sorted(set(pools.times_s))


steps = st.lists(
    st.tuples(
        st.sampled_from([A, B]),
        st.sampled_from(list(Kind)),
        st.floats(0.0, 50.0),
        st.floats(0.0, 20.0),
    ),
    max_size=60,
)


@given(done=steps)
def test_every_busy_second_is_in_some_stretch(done, a_machine):
    activity = Activity([A, B])
    figures = WorkerFigures({A: a_machine(), B: a_machine()})
    now = {A: 0.0, B: 0.0}
    for worker, kind, idle_s, busy_s in done:
        begun_s = now[worker] + idle_s
        now[worker] = begun_s + busy_s
        for observer in (activity, figures):
            observer.steps(worker, begun_s, now[worker], SHAPES[kind], 1)
    assert activity.num_stretches <= MAX_STRETCHES
    for worker in (A, B):
        shares = activity.shares(worker)
        for kind in Kind:
            seconds = sum(shares[kind]) * activity.stretch_s
            assert seconds == pytest.approx(figures.work[worker].busy_s[kind], abs=1e-6)
            assert all(-1e-9 <= share <= 1 + 1e-9 for share in shares[kind])
        for parts in zip(*shares, strict=True):
            assert sum(parts) <= 1 + 1e-9, "a worker does one thing at a time"


def test_power_over_time_adds_up_to_the_energy(a_machine):
    activity, figures = Activity([A, B]), WorkerFigures({A: a_machine(), B: a_machine()})
    for observer in (activity, figures):
        observer.steps(A, 0.0, 0.3, SHAPES[Kind.PREFILL], 1)
        observer.steps(B, 0.2, 1.7, SHAPES[Kind.DECODE], 20)
    power_w = activity.power_w(figures.work)
    duration_s = len(power_w) * activity.stretch_s
    joules = sum(power_w) * activity.stretch_s
    assert joules == pytest.approx(sum(figures.energy_j(duration_s).values()))
    assert max(power_w) == pytest.approx(600.0), "one computes a prompt, one decodes"
