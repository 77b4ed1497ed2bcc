"""What goes in comes out: tokens, bytes, gaps and joules of whole simulated runs."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pdserve.core.events import LifeEvent, LifeName
from pdserve.sim.observe import Observer
from pdserve.sim.report import Report
from pdserve.sim.simulation import Simulation
from pdserve.workload.request import Segment, TraceRequest, own_segment


class HandOffs(Observer):
    """What the workers themselves say that they sent."""

    def __init__(self) -> None:
        self.num_bytes = 0

    def life(self, event: LifeEvent) -> None:
        if event.name is LifeName.HANDOFF_CLOSED:
            self.num_bytes += int(dict(event.detail).get("bytes", 0))


SHARED = Segment("shared", 64)
asked = st.tuples(st.floats(0.0, 2.0), st.integers(1, 700), st.integers(1, 40), st.booleans())


def load(parts: list[tuple[float, int, int, bool]]) -> list[TraceRequest]:
    at_s, requests = 0.0, []
    for index, (gap_s, prompt, output, shares) in enumerate(parts):
        at_s += gap_s
        own = own_segment(index, prompt)
        segments = (SHARED, own) if shares else (own,)
        requests.append(
            TraceRequest(index=index, at_s=at_s, segments=segments, output_tokens=output)
        )
    return requests


@settings(max_examples=25)
@given(
    parts=st.lists(asked, min_size=1, max_size=15),
    cluster=st.sampled_from(
        ["1xm:mixed", "1xm:prefill,1xm:decode", "2xm:prefill,1xm:decode,1xm:mixed"]
    ),
    policy=st.sampled_from(["predicted", "splitwise", "random"]),
    prefix_cache=st.booleans(),
    max_step_tokens=st.sampled_from([2048, 64]),
)
def test_nothing_is_lost_and_nothing_is_made_up(
    parts, cluster, policy, prefix_cache, max_step_tokens, some_settings
):
    requests = load(parts)
    given_settings = some_settings(
        cluster,
        policy=policy,
        prefix_cache=prefix_cache,
        declared_tokens=None,
        max_step_tokens=max_step_tokens,
        mixed_chunk_tokens=32,
    )
    report, hand_offs = Report(given_settings), HandOffs()
    Simulation(given_settings, iter(requests), [*report.observers, hand_offs]).run()
    document = report.document(wall_s=1.0)

    assert document["requests"] == document["completed"] == len(requests)
    assert document["unfinished"] == 0
    tokens = document["tokens"]
    outputs = sum(request.output_tokens for request in requests)
    assert tokens["prompt"] == sum(request.prompt_tokens for request in requests)
    assert tokens["output"] == outputs
    assert document["itl_s"]["num"] == outputs - len(requests)
    assert prefix_cache or tokens["cached"] == 0
    assert document["attempts"]["all"] == len(requests)

    workers = document["workers"].values()
    computed = sum(worker["prompt_tokens"] + worker["decoded_tokens"] for worker in workers)
    assert computed == tokens["prompt"] - tokens["cached"] + outputs - len(requests)
    assert document["transfers"]["bytes"] == hand_offs.num_bytes
    assert sum(worker["sent_bytes"] for worker in workers) == hand_offs.num_bytes
    assert sum(worker["received_bytes"] for worker in workers) == hand_offs.num_bytes

    duration_s = document["duration_s"]
    joules = sum(worker["energy_j"] for worker in workers)
    assert document["energy"]["total_j"] == pytest.approx(joules)
    power_w = document["timeline"]["power_w"]
    shown_j = sum(power_w) * document["timeline"]["power_stretch_s"]
    shown_s = len(power_w) * document["timeline"]["power_stretch_s"]
    idle_j = 100.0 * len(workers) * (duration_s - shown_s)
    assert shown_j + idle_j == pytest.approx(joules, rel=1e-3)


@pytest.mark.parametrize("prompt", [2049, 4097])
def test_a_prompt_whose_last_chunk_is_one_token_is_handed_over(prompt, some_settings):
    """Its last step counts as one that decodes, since it costs the same."""
    given_settings = some_settings(policy="splitwise")
    report = Report(given_settings)
    Simulation(given_settings, iter(load([(0.0, prompt, 5, False)])), report.observers).run()
    document = report.document(wall_s=1.0)
    assert document["completed"] == document["transfers"]["num"] == 1
    assert document["duration_s"] < 2.0


def test_clients_that_leave_and_prompts_that_are_too_long_are_all_accounted_for(some_settings):
    requests = load([(0.01, 300, 30, False)] * 6)
    requests[1] = replace(requests[1], cancel_after_tokens=5)
    requests[2] = replace(requests[2], cancel_after_tokens=0)
    requests[3] = replace(requests[3], segments=(own_segment(3, 9000),))
    requests[4] = replace(requests[4], cancel_after_s=0.001)
    report = Report(some_settings())
    Simulation(some_settings(), iter(requests), report.observers).run()
    document = report.document(wall_s=1.0)
    assert (document["completed"], document["failed"], document["cancelled"]) == (2, 1, 3)
    assert document["failures"] == {"too_long": 1}
    assert document["ended"] == document["requests"] == 6
    assert document["attainment"] == pytest.approx(2 / 3)
    assert any("--max-input" in warning for warning in document["warnings"])
    assert document["tokens"]["output"] >= 2 * 30
