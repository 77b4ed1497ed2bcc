"""A recording names its policies, and a replay uses the same ones."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from pdserve.core.effects import Input, Received, StepDone, Submit, WorkerUp
from pdserve.core.errors import ConfigError
from pdserve.core.ids import GATEWAY, Epoch, RequestId, WorkerId
from pdserve.core.layout import KvLayout
from pdserve.core.messages import StartJob
from pdserve.core.request import Job, Request, Role, SamplingParams
from pdserve.core.step import SampledToken, StepResult
from pdserve.node.router import RouterNode
from pdserve.node.settings import RouterSettings, WorkerSettings
from pdserve.node.worker import WorkerNode
from pdserve.policy.registry import ROUTE_POLICIES, make_batching, make_policy
from pdserve.serve.driver import Machine
from pdserve.serve.recorder import FileRecorder, read, recorder_of
from pdserve.serve.replay import Outcome, replay_file

LAYOUT = KvLayout(
    num_layers=1,
    num_kv_heads=1,
    head_dim=4,
    block_size=4,
    dtype="fp32",
    numerics="class a",
    weights_digest="w",
)
UP = WorkerUp(
    worker=WorkerId(""),
    epoch=Epoch(1),
    role=Role.MIXED,
    layout=LAYOUT,
    num_blocks=64,
    max_model_tokens=256,
    pid=1,
    device="cpu",
    engine="fake",
)
WORKERS = [
    replace(UP, worker=WorkerId(f"{role.value}-{number}"), role=role)
    for role in Role
    for number in range(2)
]
REQUESTS = [
    Submit(
        Request(
            request_id=RequestId(f"r{number}"),
            prompt_token_ids=tuple(range(20)),
            params=SamplingParams(max_tokens=4, seed=0),
        )
    )
    for number in range(12)
]


def recorded(recorder: FileRecorder | None, machine: Machine, events: list[Input]) -> None:
    assert recorder is not None
    for event in events:
        recorder.write_input(event, 1.0)
        recorder.write_effects(machine.handle(event, 1.0))
    recorder.close()


def replayed(folder: Path, made_with: str, named: str) -> Outcome:
    """Replay of a router that routed by one policy, and recorded the name of another."""
    settings = RouterSettings()
    recorder = recorder_of(str(folder), named, router=settings)
    recorded(recorder, RouterNode(settings, make_policy(made_with)), [*WORKERS, *REQUESTS])
    return replay_file(folder / "router.rec")


@pytest.mark.parametrize("policy", [*sorted(ROUTE_POLICIES), "splitwise:queue_threshold_tokens=30"])
def test_a_router_replays_with_the_policy_that_it_had(policy: str, tmp_path: Path) -> None:
    outcome = replayed(tmp_path, policy, policy)
    assert (outcome.difference, outcome.num_inputs) == (None, 18)
    birth, _ = read(tmp_path / "router.rec")
    assert birth.policy == policy


@pytest.mark.parametrize(
    ("made_with", "named"),
    [
        ("aggregated", "splitwise"),
        ("round_robin", "random"),
        ("splitwise:queue_threshold_tokens=30", "splitwise"),
    ],
)
def test_another_policy_or_setting_would_be_noticed(
    made_with: str, named: str, tmp_path: Path
) -> None:
    assert replayed(tmp_path, made_with, named).difference is not None


def test_a_policy_that_this_build_does_not_have_is_told(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"recorded with policy jsq.*there is no routing policy"):
        replayed(tmp_path, "random", "jsq")


@pytest.mark.parametrize(("named", "equal"), [("splitwise", True), ("fcfs", False)])
def test_a_worker_replays_with_the_batching_that_it_had(
    named: str, equal: bool, tmp_path: Path
) -> None:
    """The second prompt finds no blocks: only one of the two policies preempts for it."""
    worker = WorkerId("mixed-0")
    settings = WorkerSettings(
        worker=worker,
        epoch=Epoch(1),
        role=Role.MIXED,
        layout=LAYOUT,
        num_blocks=8,
        max_model_tokens=256,
    )
    jobs = [
        Job(
            request_id=RequestId(f"r{number}"),
            epoch=Epoch(1),
            choices=(0,),
            token_ids=tuple(range(20)),
            num_prompt_tokens=20,
            params=SamplingParams(max_tokens=4, seed=number),
            prefill_worker=worker,
            decode_worker=worker,
            cache_salt=str(number),
        )
        for number in range(2)
    ]
    told = [Received(GATEWAY, Epoch(0), StartJob(job)) for job in jobs]
    done = StepDone(StepResult(step_id=1, tokens=((SampledToken(7),),)), 0.01)  # type: ignore[arg-type]
    recorder = recorder_of(str(tmp_path), named, worker=settings)
    recorded(recorder, WorkerNode(settings, make_batching("splitwise")), [*told, done])
    outcome = replay_file(tmp_path / "mixed-0.1.rec")
    assert (outcome.difference is None) == equal
