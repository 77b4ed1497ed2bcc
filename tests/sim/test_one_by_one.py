"""Decode steps that pass in one go are the steps that would have come one by one.

Whole simulations of random clusters and loads, with failures and clients that leave, are run twice:
as ever, and with workers that let no two steps pass together.
"""

from __future__ import annotations

from collections import Counter
from typing import Any
from unittest import mock

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pdserve.cost.machine import ClusterTimes
from pdserve.node.worker import WorkerNode
from pdserve.workload.request import Segment, TraceRequest, own_segment
from pdserve.workload.scenario import Event, Kind

CLUSTERS = ("1xm:mixed", "2xm:mixed", "1xm:prefill,1xm:decode", "2xm:prefill,2xm:decode,1xm:mixed")
POLICIES = ("predicted", "shortest_queue", "splitwise")
AS_IT_IS = WorkerNode.steady_steps


def one_at_a_time(node: WorkerNode) -> int:
    return min(1, AS_IT_IS(node))


@st.composite
def loads(draw: st.DrawFn) -> list[TraceRequest]:
    """Up to two dozen requests within a few seconds. Some begin alike; some clients leave."""
    rows = draw(
        st.lists(
            st.tuples(
                st.floats(0, 2.0), st.integers(1, 600), st.integers(1, 90),
                st.sampled_from([None, None, None, 0, 1, 5]), st.booleans(),
            ),
            min_size=1,
            max_size=24,
        )
    )  # fmt: skip
    requests = []
    for index, (at_s, prompt, output, leaves, alike) in enumerate(sorted(rows, key=lambda r: r[0])):
        segments = (own_segment(index, prompt),)
        if alike:
            segments = (Segment("system", 96), *segments)
        requests.append(
            TraceRequest(
                index=index, at_s=at_s, segments=segments, output_tokens=output,
                cancel_after_tokens=leaves,
            )
        )  # fmt: skip
    return requests


@pytest.mark.interpreted
@settings(
    max_examples=40,
    derandomize=True,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture],
)
@given(
    cluster=st.sampled_from(CLUSTERS),
    policy=st.sampled_from(POLICIES),
    load=loads(),
    num_blocks=st.sampled_from([64, 200, 4096]),
    max_running=st.sampled_from([2, 64]),
    step_gap_s=st.sampled_from([0.0, 0.0003]),
    failure=st.sampled_from([None, None, ("kill", 0.7), ("hang", 0.5), ("kill", 1.3)]),
)
def test_in_one_go_is_as_one_by_one(
    lab: Any,
    cluster: str,
    policy: str,
    load: list[TraceRequest],
    num_blocks: int,
    max_running: int,
    step_gap_s: float,
    failure: tuple[str, float] | None,
) -> None:
    made = lab.settings(
        cluster,
        lab.machine(num_blocks=num_blocks, max_model_tokens=800),
        policy=policy,
        prefix_cache=True,
        max_running=max_running,
        max_step_tokens=256,
        mixed_chunk_tokens=64,
        declared_tokens=128,
        heartbeat_s=0.5,
        load_s=0.4,
        times=ClusterTimes(message_s=1e-4, step_gap_s=step_gap_s),
    )

    events = []
    if failure is not None:
        kind, at_s = failure
        events = [Event(at_s=at_s, kind=Kind(kind), targets=("random",), for_s=0.3)]
    in_one_go = lab.run(made, load, events)
    with mock.patch.object(WorkerNode, "steady_steps", one_at_a_time):
        one_by_one = lab.run(made, load, events)
    assert in_one_go.in_order == one_by_one.in_order
    assert in_one_go.done_s == one_by_one.done_s
    assert in_one_go.transfers == one_by_one.transfers
    totals = [Counter(), Counter()]
    for run, total in zip((in_one_go, one_by_one), totals, strict=True):
        for step in run.all_steps:
            total[step.worker, "steps"] += step.count
            total[step.worker, "prompt"] += step.shape.prompt_tokens
            total[step.worker, "decoded"] += step.shape.num_decoding * step.count
        for gap_s, count in run.all_gaps:
            total[round(gap_s, 9)] += count
    assert totals[0] == totals[1]
    assert all(step.count == 1 for step in one_by_one.all_steps)
