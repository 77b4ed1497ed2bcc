"""What a recording says happened: which steps ran and how long, when messages and KV arrived.

The machines of one host share a monotonic clock, so the recordings of a run (``serve.recorder``)
fit together: a message that one machine sends is the next one of its kind that the other one
receives, and a step lies between the `RunStep` that asked for it and its `StepDone`. `read_run`
reads the folder of a ``--record`` once and keeps times and sizes, no tokens but the prompts'.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from pdserve.core.effects import (
    BindTransfer,
    Deliver,
    Effect,
    Fail,
    Input,
    Log,
    OpenTransfer,
    Received,
    RunStep,
    Send,
    Started,
    StepDone,
    Submit,
    TransferSent,
    TransferVerified,
    VerifyTransfer,
    WorkerUp,
)
from pdserve.core.engine_work import EngineStepped
from pdserve.core.errors import ConfigError
from pdserve.core.events import LifeEvent, LifeName
from pdserve.core.ids import AttemptId, Epoch, RequestId, StepId, WorkerId
from pdserve.core.messages import Life, Message, StartJob
from pdserve.core.request import Job, Request
from pdserve.core.step import StepPlan, StepShape
from pdserve.node.settings import RouterSettings, WorkerSettings
from pdserve.serve.recorder import SUFFIX, Birth, Heard, read
from pdserve.transport.records import decode_record


@dataclass(frozen=True, slots=True, kw_only=True)
class RanStep:
    """``asked_s``: when the machine wanted it; ``done_s``: when it heard of its end; in between the
    engine computed for ``elapsed_s``. ``failed``: it gave nothing."""

    worker: WorkerId
    epoch: Epoch
    step_id: StepId
    shape: StepShape
    asked_s: float
    done_s: float
    elapsed_s: float
    failed: bool = False

    @property
    def begun_s(self) -> float:
        """When the engine began, as far as the machine's word for the end says."""
        return self.done_s - self.elapsed_s

    @property
    def gap_s(self) -> float:
        """What passed beside the engine's time."""
        return self.done_s - self.asked_s - self.elapsed_s


@dataclass(frozen=True, slots=True)
class Mail:
    """A message from one machine to another. ``kind``: its class. ``about``: the request that it is
    about, if it is about one."""

    sender: WorkerId
    receiver: WorkerId
    kind: str
    about: RequestId | None
    sent_s: float
    received_s: float

    @property
    def delay_s(self) -> float:
        return self.received_s - self.sent_s


@dataclass(slots=True, kw_only=True)
class RanTransfer:
    """A hand-off's bytes, as both ends saw them; None: it never came to that. ``computed_s``: when
    the last step ended that computed what is sent, None if nothing had to be."""

    attempt: AttemptId
    sender: WorkerId
    receiver: WorkerId
    one_shot: bool
    opened_s: float
    bound_s: float | None = None
    computed_s: float | None = None
    sent_s: float | None = None
    num_bytes: int = 0
    verify_asked_s: float | None = None
    verified_s: float | None = None


@dataclass(slots=True, kw_only=True)
class RanRequest:
    """A request as the router knew it. ``jobs``: its attempts, with when each was sent out;
    ``routed``: what the router said of each. ``delivered_s``: when tokens were delivered, by
    delivery; ``num_tokens`` in all, of all choices."""

    request: Request
    submitted_s: float
    jobs: list[tuple[float, Job]] = field(default_factory=list)
    routed: list[LifeEvent] = field(default_factory=list)
    delivered_s: list[float] = field(default_factory=list)
    num_tokens: int = 0
    failure: str | None = None


@dataclass(slots=True, kw_only=True)
class RecordedRun:
    """A whole recording. ``births``: of every worker process, in order of their epochs;
    ``started_s``: when the machine of each node's first process heard that it lives."""

    router: RouterSettings
    policy: str
    births: dict[WorkerId, list[Birth]] = field(default_factory=dict)
    started_s: dict[WorkerId, float] = field(default_factory=dict)
    workers: dict[WorkerId, WorkerUp] = field(default_factory=dict)
    steps: list[RanStep] = field(default_factory=list)
    mail: list[Mail] = field(default_factory=list)
    transfers: dict[AttemptId, RanTransfer] = field(default_factory=dict)
    requests: dict[RequestId, RanRequest] = field(default_factory=dict)
    foreign: bool = False

    def settings(self, worker: WorkerId) -> WorkerSettings:
        """Of the worker's latest process."""
        settings = self.births[worker][-1].worker
        assert settings is not None
        return settings


def read_run(folder: Path) -> RecordedRun:
    """Raises `ConfigError` if there is no recording of a router in the folder."""
    readers = [_Reader(*read(file)) for file in sorted(folder.glob(f"*{SUFFIX}"))]
    routers = [reader.birth for reader in readers if reader.birth.router is not None]
    if not routers:
        raise ConfigError(
            f"{folder} holds no recording of a router (router{SUFFIX}); make one with --record"
        )
    router = routers[0].router
    assert router is not None
    run = RecordedRun(router=router, policy=routers[0].policy)
    posts = _Posts()
    for reader in readers:
        reader.read_into(run, posts)
    run.mail = sorted(posts.mail(), key=lambda mail: mail.sent_s)
    run.steps.sort(key=lambda step: step.asked_s)
    return run


_Posted = tuple[float, str, "RequestId | None"]


class _Posts:
    """What was sent and what was received, by link; each is in order."""

    def __init__(self) -> None:
        self.sent: dict[tuple[WorkerId, WorkerId], list[_Posted]] = defaultdict(list)
        self.received: dict[tuple[WorkerId, WorkerId], list[_Posted]] = defaultdict(list)

    def mail(self) -> Iterator[Mail]:
        """Both ends of each message, up to where a link's two ends differ (a process died)."""
        for (sender, receiver), sent in self.sent.items():
            received = self.received[sender, receiver]
            for (sent_s, kind, about), (received_s, same, _) in zip(sent, received, strict=False):
                if kind != same or received_s < sent_s:
                    break
                yield Mail(sender, receiver, kind, about, sent_s, received_s)


class _Reader:
    """One machine's recording."""

    def __init__(self, birth: Birth, heard: Iterator[Heard]) -> None:
        self.birth = birth
        self._heard = heard
        self._asked: dict[StepId, tuple[float, StepPlan]] = {}

    def read_into(self, run: RecordedRun, posts: _Posts) -> None:
        node = WorkerId(self.birth.node)
        if self.birth.worker is not None:
            run.births.setdefault(node, []).append(self.birth)
            run.births[node].sort(key=lambda birth: birth.worker.epoch if birth.worker else 0)
        for heard in self._heard:
            self._input(run, posts, node, heard.event, heard.now)
            for effect in heard.effects or ():
                said: Effect = decode_record(effect)  # type: ignore[assignment]
                self._effect(run, posts, node, said, heard.now)

    def _input(
        self, run: RecordedRun, posts: _Posts, node: WorkerId, event: Input, now: float
    ) -> None:
        match event:
            case Received(sender=sender, message=message):
                if not isinstance(message, Life):  # drivers send these, not machines
                    posted = (now, type(message).__name__, about(message))
                    posts.received[sender, node].append(posted)
            case Started():
                run.started_s[node] = min(now, run.started_s.get(node, now))
            case StepDone():
                self._step_done(run, node, event, now)
            case TransferSent(attempt=attempt, num_bytes=num_bytes):
                if (transfer := run.transfers.get(attempt)) is not None:
                    transfer.sent_s, transfer.num_bytes = now, num_bytes
            case TransferVerified(attempt=attempt):
                _transfer(run, attempt, node).verified_s = now
            case Submit(request):
                run.requests[request.request_id] = RanRequest(request=request, submitted_s=now)
            case WorkerUp(worker=worker):
                run.workers[worker] = event
            case EngineStepped():
                run.foreign = True
            case _:
                pass

    def _effect(
        self, run: RecordedRun, posts: _Posts, node: WorkerId, effect: Effect, now: float
    ) -> None:
        match effect:
            case Send(to, message):
                if isinstance(message, StartJob):
                    run.requests[message.job.request_id].jobs.append((now, message.job))
                posts.sent[node, to].append((now, type(message).__name__, about(message)))
            case RunStep(plan):
                self._asked[plan.step_id] = (now, plan)
            case OpenTransfer(attempt=attempt, peer=peer, one_shot=one_shot):
                transfer = _transfer(run, attempt, peer)
                transfer.sender, transfer.one_shot, transfer.opened_s = node, one_shot, now
            case BindTransfer(ticket=ticket):
                _transfer(run, ticket.attempt, effect.peer).bound_s = now
            case VerifyTransfer(attempt=attempt):
                _transfer(run, attempt, node).verify_asked_s = now
            case Deliver(request_id, deltas):
                request = run.requests[request_id]
                request.delivered_s.append(now)
                request.num_tokens += len(deltas)
            case Log(event) if event.name is LifeName.ROUTED:
                if event.request_id in run.requests:
                    run.requests[event.request_id].routed.append(event)
            case Fail(request_id=request_id, kind=kind):
                if request_id in run.requests:
                    run.requests[request_id].failure = kind
            case _:
                pass

    def _step_done(self, run: RecordedRun, node: WorkerId, done: StepDone, now: float) -> None:
        assert self.birth.worker is not None
        asked_s, plan = self._asked.pop(done.result.step_id)
        run.steps.append(
            RanStep(
                worker=node,
                epoch=self.birth.worker.epoch,
                step_id=plan.step_id,
                shape=plan.shape,
                asked_s=asked_s,
                done_s=now,
                elapsed_s=done.elapsed_s,
                failed=done.result.error is not None,
            )
        )
        for row in plan.rows:
            transfer = run.transfers.get(row.attempt) if row.pushes else None
            if transfer is not None:
                transfer.computed_s = now


def _transfer(run: RecordedRun, attempt: AttemptId, receiver: WorkerId) -> RanTransfer:
    """The receiver's recording may be read before the sender's."""
    known = run.transfers.get(attempt)
    if known is None:
        known = run.transfers[attempt] = RanTransfer(
            attempt=attempt, sender=receiver, receiver=receiver, one_shot=False, opened_s=0.0
        )
    return known


def about(message: Message) -> RequestId | None:
    """The request that a message is about, if it is about one."""
    if isinstance(message, StartJob):
        return message.job.request_id
    attempt = getattr(message, "attempt", None)
    return attempt.request_id if isinstance(attempt, AttemptId) else None
