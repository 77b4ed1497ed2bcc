"""Nothing comes from nowhere and nothing is lost: requests, tokens, bytes, joules, blocks.

Random clusters and loads; in half of the runs things go wrong as well.
"""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pdserve.cost.machine import ClusterTimes, LinkSpec
from pdserve.sim.report import CLOCK_KEYS, Report
from pdserve.workload.request import Segment, TraceRequest, own_segment
from pdserve.workload.scenario import EVERYBODY_ELSE, Event, Kind

CLUSTERS = ("1xm:mixed", "3xm:mixed", "1xm:prefill,1xm:decode", "2xm:prefill,2xm:decode,1xm:mixed")
POLICIES = ("predicted", "shortest_queue", "splitwise")
ALIKE_TOKENS = 96
RANDOM = settings(
    max_examples=20,
    derandomize=True,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture],
)


@st.composite
def loads(draw: st.DrawFn, *, leave: bool) -> list[TraceRequest]:
    """Up to thirty requests within a few seconds. Some begin alike; some clients may leave."""
    leaves = st.sampled_from([None, None, None, 0, 1, 7]) if leave else st.none()
    rows = draw(
        st.lists(
            st.tuples(
                st.floats(0, 3.0), st.integers(1, 500), st.integers(1, 60), leaves, st.booleans()
            ),
            min_size=1,
            max_size=30,
        )
    )
    return [
        TraceRequest(
            index=index,
            at_s=at_s,
            segments=((Segment("system", ALIKE_TOKENS),) if alike else ())
            + (own_segment(index, prompt),),
            output_tokens=output,
            cancel_after_tokens=leaves,
        )
        for index, (at_s, prompt, output, leaves, alike) in enumerate(
            sorted(rows, key=lambda r: r[0])
        )
    ]


@st.composite
def failures(draw: st.DrawFn) -> list[Event]:
    """Up to four things that go wrong."""
    found = []
    for _ in range(draw(st.integers(0, 4))):
        kind = draw(st.sampled_from([Kind.KILL, Kind.HANG, Kind.PARTITION, Kind.SLOW_LINK]))
        targets = ("random", EVERYBODY_ELSE) if kind.is_of_links else ("random",)
        at_s, for_s = draw(st.floats(0.0, 3.0)), draw(st.sampled_from([0.1, 0.5, 2.5, 6.0]))
        found.append(Event(at_s=at_s, kind=kind, targets=targets, for_s=for_s, factor=50.0))
    return sorted(found, key=lambda event: event.at_s)


def made(lab: Any, cluster: str, policy: str, num_blocks: int, **changes: Any) -> Any:
    slow = LinkSpec(bytes_per_s=2e7, fixed_s=0.001)
    machine = lab.machine(num_blocks=num_blocks, max_model_tokens=1000, link=slow)
    fields = {"policy": policy, "prefix_cache": True, "max_running": 16, "max_step_tokens": 256}
    rest = {"mixed_chunk_tokens": 64, "declared_tokens": 100, "heartbeat_s": 0.5, "load_s": 0.4}
    times = ClusterTimes(message_s=1e-4, step_gap_s=2e-4)
    return lab.settings(cluster, machine, times=times, **{**fields, **rest, **changes})


def check_nothing_is_left(run: Any, num_requests: int) -> None:
    simulation = run.simulation
    assert run.arrivals == len(run.requests) == num_requests
    assert not simulation.clients.open
    assert simulation.router.num_requests == 0
    for worker in simulation.workers.values():
        assert worker.node.is_empty
        pool = worker.node.batch.tables.pool
        pool.check()
        assert pool.num_free == worker.settings.num_blocks
        assert (pool.num_referenced, pool.num_quarantined) == (0, 0)


@RANDOM
@given(
    cluster=st.sampled_from(CLUSTERS), policy=st.sampled_from(POLICIES), load=loads(leave=False),
    num_blocks=st.sampled_from([70, 400, 4096]),
)  # fmt: skip
def test_tokens_bytes_and_joules_add_up(
    lab: Any, cluster: str, policy: str, load: list[TraceRequest], num_blocks: int
) -> None:
    settings_ = made(lab, cluster, policy, num_blocks)
    run = lab.run(settings_, load)
    check_nothing_is_left(run, len(load))
    by_index = {request.index: request for request in load}
    assert all(request.failure is None for request in run.in_order)
    for request in run.in_order:
        asked = by_index[request.index]
        assert request.output_tokens == asked.output_tokens
        assert request.prompt_tokens == asked.prompt_tokens
        assert request.arrived_s == asked.at_s
        assert request.arrived_s <= request.first_s <= request.last_s
        assert (request.second_s is None) == (asked.output_tokens == 1)
    out = sum(request.output_tokens for request in load)
    gaps = sum(count for _, count in run.all_gaps)
    assert gaps == out - len(load)  # a first token has none before it
    assert sum(gap_s * count for gap_s, count in run.all_gaps) == pytest.approx(
        sum(request.last_s - request.first_s for request in run.in_order), abs=1e-6
    )
    # Each token but an answer's last is computed once, unless it was cached or is preempted (a
    # chunk of a single token is like a decode).
    decoded = sum(step.shape.num_decoding * step.count for step in run.all_steps)
    computed = sum(step.shape.prompt_tokens for step in run.all_steps)
    cached = sum(request.cached_tokens for request in run.in_order)
    given_in = sum(request.prompt_tokens for request in load)
    assert computed + cached + decoded >= given_in + out - len(load)
    if num_blocks == 4096:
        assert computed + cached + decoded == given_in + out - len(load)
    split = [r for r in run.in_order if r.prefill != r.decode and r.output_tokens > 1]
    assert len(run.transfers) >= len(split)


@RANDOM
@given(
    cluster=st.sampled_from(CLUSTERS), policy=st.sampled_from(POLICIES), load=loads(leave=True),
    num_blocks=st.sampled_from([70, 4096]), events=failures(), seed=st.integers(0, 3),
)  # fmt: skip
def test_whatever_fails_every_request_ends_once_and_every_block_comes_back(
    lab: Any,
    cluster: str,
    policy: str,
    load: list[TraceRequest],
    num_blocks: int,
    events: list[Event],
    seed: int,
) -> None:
    run = lab.run(made(lab, cluster, policy, num_blocks), load, events, seed)
    check_nothing_is_left(run, len(load))
    asked = {request.index: request.output_tokens for request in load}
    for request in run.in_order:
        if request.failure is None and not request.cancelled:
            assert request.output_tokens == asked[request.index]
        if request.failure is not None:
            assert request.first_s is None, "what was begun is finished"
    score = run.score
    assert score["settled"]
    assert (score["lost"], score["leaked_blocks"], score["quarantined_blocks"]) == (0, 0, 0)
    assert score["workers_down"] == []
    assert score["sent"] == len(load)


@pytest.mark.parametrize("cluster", CLUSTERS)
def test_all_bytes_of_a_split_request_are_sent_once(lab: Any, cluster: str) -> None:
    prompts = [1, 15, 16, 17, 300, 511, 512, 513, 900]
    rows = [(number * 2.0, prompt, 3) for number, prompt in enumerate(prompts)]
    for one_shot_tokens in (0, 512, 1 << 20):
        settings_ = made(
            lab, cluster, "shortest_queue", 4096, prefix_cache=False,
            one_shot_tokens=one_shot_tokens, max_step_tokens=1 << 20,
        )  # fmt: skip
        run = lab.run(settings_, lab.requests(*rows))
        split = [request for request in run.in_order if request.prefill != request.decode]
        assert [sent.num_bytes for sent in run.transfers] == [
            request.prompt_tokens * 1024 for request in split
        ]
        assert bool(split) == ("prefill" in cluster)


def test_energy_is_power_times_time(lab: Any) -> None:
    settings_ = made(lab, "1xm:prefill,1xm:decode", "shortest_queue", 4096)
    report = Report(settings_)
    load = lab.requests(*[(number * 0.1, 300, 40) for number in range(20)])
    run = lab.run(settings_, load, observers=report.observers)
    document = report.document(1.0)
    prompt_s = decode_s = 0.0
    for step in run.all_steps:
        if step.shape.prompt_tokens:
            prompt_s += step.ended_s - step.begun_s
        else:
            decode_s += step.ended_s - step.begun_s
    idle_s = 2 * run.done_s - prompt_s - decode_s
    expected_j = 400.0 * prompt_s + 300.0 * decode_s + 100.0 * idle_s
    assert sum(report.workers.energy_j(run.done_s).values()) == pytest.approx(expected_j)
    each = [worker["energy_j"] for worker in document["workers"].values()]
    assert sum(each) == pytest.approx(expected_j)


def test_same_seed_same_bytes_another_seed_others(lab: Any) -> None:
    load = lab.requests(*[(number * 0.05, 50 + 7 * number, 5 + number) for number in range(60)])
    events = [Event(at_s=0.5, kind=Kind.KILL, targets=("random",))]
    settings_ = made(lab, "2xm:prefill,2xm:decode,1xm:mixed", "predicted", 400)

    def written(seed: int) -> str:
        report = Report(settings_)
        run = lab.run(settings_, load, events, seed, observers=report.observers)
        document = {**report.document(1.0), "scenario": run.score}
        for key in CLOCK_KEYS:
            del document[key]
        return json.dumps([document, list(map(str, run.lives))])

    assert written(1) == written(1)
    assert written(1) != written(2)
