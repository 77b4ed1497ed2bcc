"""The node machine of a worker whose engine batches for itself.

To the router and to its peers it is a worker like any other: the same jobs, hand-offs, reports and
failures. It differs from `WorkerNode` in what lies below. There is no batch policy and no block:
attempts are given to the engine (`EngineTasks`), which says what it has done with them. A hand-off
carries a payload that only an engine of the same kind reads; a worker of another kind refuses it
when it sees the header, and the router tries elsewhere or decodes in place.
"""

from __future__ import annotations

from pdserve.core.effects import Input
from pdserve.core.engine_work import (
    EngineAborted,
    EngineAdopted,
    EngineExported,
    EngineFailed,
    EngineLoad,
    EngineStepped,
)
from pdserve.core.events import LifeName
from pdserve.core.ids import AttemptId, Epoch, WorkerId
from pdserve.core.messages import (
    AttemptFailed,
    FailureKind,
    Message,
    MoveAttempt,
    MoveFailed,
    OpaquePayload,
    PayloadTaken,
    PrefixSent,
    SendPrefix,
    Tokens,
)
from pdserve.core.request import Job
from pdserve.core.step import StepSample, StepShape
from pdserve.node.engine_tasks import EngineOutcome, EngineTask, EngineTasks, TaskState
from pdserve.node.machine import WorkerMachine
from pdserve.node.outbox import Outbox
from pdserve.node.payload_inbound import PayloadArrivals
from pdserve.node.payload_outbound import PayloadCargo, PayloadSender
from pdserve.node.report import Glance, Hashes, LoadFigures
from pdserve.node.settings import WorkerSettings
from pdserve.node.standing import Standing


class EngineLoadSource:
    """What a foreign engine's worker holds, for its reports."""

    def __init__(self, tasks: EngineTasks, inbound: PayloadArrivals, block_size: int) -> None:
        self._tasks = tasks
        self._inbound = inbound
        self._block_size = block_size

    def glance(self) -> Glance:
        figures = self.figures()
        return Glance(
            figures.pending_prefill_tokens,
            figures.num_decoding + figures.open_leases,
            figures.quarantined_blocks,
            figures.free_blocks,
        )

    def figures(self) -> LoadFigures:
        load = self._tasks.load
        return LoadFigures(
            pending_prefill_tokens=self._tasks.pending_prefill_tokens,
            num_waiting=self._tasks.num_waiting + self._inbound.num_queued,
            num_running=self._tasks.num_running,
            num_decoding=self._tasks.num_staying,
            num_left_out=self._tasks.num_waiting,
            free_blocks=self._inbound.free_blocks,
            cached_blocks=self._tasks.load.cached_tokens // self._block_size,
            quarantined_blocks=0,
            open_leases=self._inbound.num_leases,
            num_preemptions=load.num_preemptions,
            num_steps=load.num_steps,
            prefix_queries_tokens=load.prefix_queries_tokens,
            prefix_hits_tokens=load.prefix_hits_tokens,
            context_tokens=self._tasks.context_tokens,
        )

    def pressure(self) -> tuple[bool, bool]:
        presses = self._tasks.num_waiting > 0
        return presses, presses or self._tasks.num_running > 0

    def tell_cache(self, out: Outbox) -> tuple[Hashes, Hashes]:
        """What its cache holds only the engine knows."""
        return (), ()


class ForeignWorkerNode(WorkerMachine):
    """`handle(input, now) -> effects`. Knows no clock, no engine, no socket."""

    def __init__(self, settings: WorkerSettings) -> None:
        self.tasks = EngineTasks(settings)
        self.sender = PayloadSender(settings)
        self.inbound = PayloadArrivals(settings, self.tasks)
        load = EngineLoadSource(self.tasks, self.inbound, settings.layout.block_size)
        super().__init__(settings, self.inbound, load, Standing(settings.role))
        self._engine_spoke = False
        self._engine_owes = False

    @property
    def is_empty(self) -> bool:
        """True if no request, lease or payload is left, here or in the engine."""
        handoffs_over = not len(self.outbound) and self.inbound.is_empty
        return handoffs_over and self.tasks.is_empty and self.sender.is_empty

    def _begin_job(self, job: Job, out: Outbox, *, hands_off: bool) -> None:
        self.tasks.submit(job, hands_off=hands_off, out=out)

    def _depart(self, asked: MoveAttempt | SendPrefix, out: Outbox) -> None:
        """An engine that batches for itself gives a request away at its first token, or not."""
        if isinstance(asked, MoveAttempt):
            detail = "its engine batches for itself"
            out.tell_router(MoveFailed(attempt=asked.attempt, detail=detail))
        else:
            out.tell_router(PrefixSent(attempt=asked.attempt, num_blocks=0))

    def _drop(self, attempt: AttemptId, choices: tuple[int, ...] | None, out: Outbox) -> None:
        self.tasks.end(attempt, out, choices)

    def _tell_silent(self, out: Outbox) -> None:
        """An engine's tokens are told as they come."""

    def _peer_says(self, peer: WorkerId, message: Message, epoch: Epoch, out: Outbox) -> None:
        match message:
            case OpaquePayload():
                self.inbound.slice(message, peer, epoch, out)
            case PayloadTaken(_, num_bytes):
                self.sender.taken(peer, num_bytes)
            case _:
                pass

    def _link_ended(self, peer: WorkerId) -> None:
        self.sender.peer_lost(peer)

    # --- the engine ---------------------------------------------------------------------------

    def _engine_says(self, event: Input, out: Outbox) -> None:
        self._engine_spoke = True
        match event:
            case EngineStepped(output, load, elapsed_s):
                self._set_load(load)
                self._reporter.step_done(elapsed_s)
                shape = self.tasks.shape_of(output)
                if shape != StepShape():
                    self._reporter.step_measured(StepSample(shape, elapsed_s))
                self._stepped(self.tasks.stepped(output, out), out)
            case EngineExported(load=load):
                self._set_load(load)
                why_not = self.sender.exported(event)
                if why_not is not None:
                    self.outbound.fail(event.attempt, FailureKind.HANDOFF, why_not, out)
            case EngineAdopted(load=load):
                self._set_load(load)
                self.inbound.adopted(event, out)
            case EngineAborted(attempt, choices, load):
                self._set_load(load)
                if choices is None:
                    self.tasks.forget(attempt)
                    self.outbound.stopped(attempt, out)
            case EngineFailed(attempt, detail, load):
                self._set_load(load)
                self._engine_failed(attempt, detail, out)
            case _:
                raise TypeError(f"a worker does not take {type(event).__name__}")

    def _set_load(self, load: EngineLoad) -> None:
        self.tasks.load = load

    def _stepped(self, outcome: EngineOutcome, out: Outbox) -> None:
        for task in outcome.started:
            out.log(LifeName.PREFILL_STARTED, task.attempt, cached_tokens=task.cached_tokens)
            self._open(task, out)
        if outcome.deltas:
            out.tell_router(Tokens(tuple(outcome.deltas)))
        for task in outcome.prefilled:
            num_tokens = task.num_tokens - task.cached_tokens
            out.log(LifeName.PREFILL_ENDED, task.attempt, tokens=num_tokens)
        for task in outcome.held:
            self.outbound.prefilled(task.attempt, tuple(task.first_tokens.values()), out)
        for task in outcome.decoding:
            out.log(LifeName.DECODE_QUEUED, task.attempt)
        for task in outcome.decode_started:
            out.log(LifeName.DECODE_STARTED, task.attempt)
        for failed in outcome.failed:
            self._fail(failed.task.attempt, failed.kind, failed.detail, failed.choices, out)

    def _engine_failed(self, attempt: AttemptId, detail: str, out: Outbox) -> None:
        """It refused to begin, or to give what it has."""
        task = self.tasks.get(attempt)
        if task is None:
            return
        kinds = {TaskState.QUEUED: FailureKind.INVALID, TaskState.HELD: FailureKind.HANDOFF}
        kind = kinds.get(task.state, FailureKind.ENGINE)
        self._fail(attempt, kind, detail, None, out)

    def _fail(
        self,
        attempt: AttemptId,
        kind: FailureKind,
        detail: str,
        choices: tuple[int, ...] | None,
        out: Outbox,
    ) -> None:
        if attempt in self.outbound:
            self.outbound.fail(attempt, kind, detail, out)
            return
        self.tasks.end(attempt, out, choices)
        out.tell_router(AttemptFailed(attempt=attempt, kind=kind, detail=detail, choices=choices))

    # --- after each input ---------------------------------------------------------------------

    def _advance(self, out: Outbox) -> None:
        self.inbound.grant_waiting(out)
        next_to_run = self.tasks.next_to_run()
        if next_to_run is not None:
            self._open(next_to_run, out)
        for sent in self.sender.advance(out):
            self._reporter.transfer_bytes += sent.num_bytes
            self.outbound.sent(sent, out)
        self._watch_engine(out)
        self._reporter.report_if_changed(out)

    def _open(self, task: EngineTask, out: Outbox) -> None:
        """Open the task's hand-off, if it is to have one."""
        if task.job is not None and task.attempt not in self.outbound:
            cargo = PayloadCargo(self.settings, self.tasks, self.sender, task.job, task)
            self.outbound.open(task.job, cargo, out)

    def _watch_engine(self, out: Outbox) -> None:
        """The age of the running step: since when the engine has owed a sign and given none."""
        owes = self.tasks.owes_a_sign or self.sender.is_exporting
        if owes and (self._engine_spoke or not self._engine_owes):
            self._reporter.step_started(StepShape(), out.now)
        elif self._engine_owes and not owes:
            self._reporter.step_done(0.0)
        self._engine_owes = owes
        self._engine_spoke = False
