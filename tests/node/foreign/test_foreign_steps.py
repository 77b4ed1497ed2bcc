"""What can be told of an iteration of an engine that batches for itself."""

from __future__ import annotations

from pdserve.core.effects import Received, Send, Started, TimerFired
from pdserve.core.engine_work import EngineLoad, EngineOutput, EngineStart, EngineStepped
from pdserve.core.ids import GATEWAY, AttemptId, Epoch, RequestId, WorkerId
from pdserve.core.layout import KvLayout
from pdserve.core.messages import LoadReport, StartJob, TokenDelta
from pdserve.core.request import Job, Role, SamplingParams
from pdserve.core.step import StepSample, StepShape
from pdserve.node.foreign import ForeignWorkerNode
from pdserve.node.report import HEARTBEAT_TIMER
from pdserve.node.settings import ForeignSettings, WorkerSettings

ME = WorkerId("me")
A, B = (AttemptId(RequestId(name), Epoch(1)) for name in "ab")


def node() -> ForeignWorkerNode:
    layout = KvLayout(
        num_layers=0,
        num_kv_heads=0,
        head_dim=0,
        block_size=4,
        dtype="opaque",
        numerics="n",
        weights_digest="w",
    )
    settings = WorkerSettings(
        worker=ME,
        epoch=Epoch(1),
        role=Role.MIXED,
        layout=layout,
        num_blocks=64,
        max_model_tokens=128,
        report_interval_s=10.0,
        foreign=ForeignSettings(payload_format="f"),
    )
    machine = ForeignWorkerNode(settings)
    machine.handle(Started(), 0.0)
    return machine


def submit(machine: ForeignWorkerNode, attempt: AttemptId, num_tokens: int) -> None:
    job = Job(
        request_id=attempt.request_id,
        epoch=attempt.epoch,
        choices=(0,),
        token_ids=tuple(range(num_tokens)),
        num_prompt_tokens=num_tokens,
        params=SamplingParams(max_tokens=8, seed=1),
        prefill_worker=ME,
        decode_worker=ME,
    )
    machine.handle(Received(GATEWAY, Epoch(0), StartJob(job)), 0.0)


def step(
    machine: ForeignWorkerNode,
    *drew: tuple[AttemptId, int],
    started: tuple[EngineStart, ...] = (),
    elapsed_s: float = 0.5,
) -> None:
    deltas = tuple(
        TokenDelta(
            request_id=attempt.request_id, epoch=attempt.epoch, choice=0, index=index, token_id=1
        )
        for attempt, index in drew
    )
    output = EngineOutput(started=started, deltas=deltas)
    machine.handle(EngineStepped(output, EngineLoad(free_tokens=64), elapsed_s), 1.0)


def told(machine: ForeignWorkerNode) -> LoadReport:
    """The next heartbeat's report."""
    effects = machine.handle(TimerFired(HEARTBEAT_TIMER), 2.0)
    sent = [effect.message for effect in effects if isinstance(effect, Send)]
    (report,) = [message for message in sent if isinstance(message, LoadReport)]
    return report


def test_iterations_of_whole_prompts_and_of_decodes_are_reported_with_their_shape() -> None:
    machine = node()
    submit(machine, A, 10)
    step(machine, (A, 0), started=(EngineStart(A, cached_tokens=4),))
    submit(machine, B, 6)
    step(machine, (A, 1), (B, 0), started=(EngineStart(B),), elapsed_s=0.7)
    step(machine, (A, 2), (B, 1), elapsed_s=0.1)
    report = told(machine)
    assert report.steps == (
        StepSample(StepShape(6, 100 - 16, 0, 0), 0.5),
        StepSample(StepShape(6, 36, 1, 11), 0.7),
        StepSample(StepShape(0, 0, 2, 12 + 7), 0.1),
    )
    assert (report.num_decoding, report.context_tokens) == (2, 13 + 8)


def test_an_iteration_with_a_part_of_a_prompt_says_nothing() -> None:
    """How much of it was computed, only the engine knows."""
    machine = node()
    submit(machine, A, 10)
    step(machine, started=(EngineStart(A),))
    step(machine, (A, 0))
    submit(machine, B, 6)
    step(machine, (A, 1), (B, 0))
    step(machine)
    step(machine, (B, 1))
    assert [sample.shape for sample in told(machine).steps] == [StepShape(0, 0, 1, 7)]
