"""The node machine of a native worker: batch machine and both halves of the hand-off.

Inputs come one at a time: messages from the router and from peers, the ends of steps, transfers and
checks, and timers. After each of them the machine grants tickets as far as blocks go, plans the
next step if none is under way, and reports its load if that has changed.
"""

from __future__ import annotations

from pdserve.core.effects import (
    Effect,
    Input,
    PeerLost,
    PeerUp,
    Received,
    RunStep,
    Started,
    StepDone,
    TimerFired,
    TransferFailed,
    TransferSent,
    TransferStopped,
    TransferVerified,
)
from pdserve.core.events import LifeName
from pdserve.core.ids import GATEWAY, AttemptId, Epoch, WorkerId
from pdserve.core.messages import (
    AbortAttempt,
    Accepted,
    AttemptFailed,
    DrainWorker,
    FailureKind,
    HandoffAbort,
    HandoffRejected,
    Header,
    LeaseRenew,
    Message,
    Revoke,
    RevokeAck,
    StartJob,
    Ticket,
    TicketRefused,
    Tokens,
    Trailer,
    WorkerGone,
)
from pdserve.core.request import Job
from pdserve.node.batch import BatchMachine, Planned, StepOutcome
from pdserve.node.cargo import BlockCargo
from pdserve.node.inbound import InboundHandoffs
from pdserve.node.outbound import OutboundHandoffs
from pdserve.node.outbox import Outbox
from pdserve.node.report import BatchLoad, LoadReporter
from pdserve.node.settings import WorkerSettings
from pdserve.policy.batch import BatchPolicy, FcfsBatching


class WorkerNode:
    """`handle(input, now) -> effects`. Knows no clock, no engine, no socket."""

    def __init__(self, settings: WorkerSettings, policy: BatchPolicy | None = None) -> None:
        self.settings = settings
        self.batch = BatchMachine(settings, policy or FcfsBatching())
        self.outbound = OutboundHandoffs(settings)
        self.inbound = InboundHandoffs(settings, self.batch)
        self._reporter = LoadReporter(settings, BatchLoad(self.batch, self.inbound))
        self._jobs: dict[AttemptId, Job] = {}
        self._gone: dict[WorkerId, Epoch] = {}

    @property
    def is_empty(self) -> bool:
        """True if no request, lease, transfer or quarantine is left."""
        return self.batch.is_empty and self.inbound.is_empty and not len(self.outbound)

    @property
    def draining(self) -> bool:
        """True once the router has asked to take no new work."""
        return self._reporter.draining

    def handle(self, event: Input, now: float) -> list[Effect]:
        out = Outbox(self.settings.worker, now)
        match event:
            case Started():
                self._reporter.beat(out)
            case Received(sender, epoch, message):
                if epoch > self._gone.get(sender, -1):
                    self._received(sender, epoch, message, out)
            case TimerFired(timer):
                self._timer_fired(timer, out)
            case StepDone(result, elapsed_s):
                self._reporter.step_done(elapsed_s)
                self._step_done(self.batch.step_done(result), result.error, out)
            case TransferSent():
                self._reporter.transfer_bytes += event.num_bytes
                self.outbound.sent(event, out)
            case TransferFailed(attempt=attempt, detail=detail):
                self.outbound.fail(attempt, FailureKind.HANDOFF, detail, out)
            case TransferStopped(attempt):
                self.outbound.stopped(attempt, out)
            case TransferVerified():
                self.inbound.verified(event, out)
            case PeerLost(worker, epoch):
                if epoch > self._gone.get(worker, -1):  # else its successor may be in use already
                    self.outbound.peer_lost(worker, f"lost the link to {worker}", out)
                    self.inbound.peer_lost(worker, epoch, out)
            case PeerUp(worker, epoch):
                self.inbound.peer_up(worker, epoch, out)
            case _:
                raise TypeError(f"a worker does not take {type(event).__name__}")
        self._advance(out)
        return out.effects

    # --- inputs -------------------------------------------------------------------------------

    def _received(self, sender: WorkerId, epoch: Epoch, message: Message, out: Outbox) -> None:
        if sender == GATEWAY:
            self._from_router(message, out)
        else:
            self._from_peer(sender, epoch, message, out)

    def _from_router(self, message: Message, out: Outbox) -> None:
        match message:
            case StartJob(job):
                self._start(job, out)
            case AbortAttempt(attempt, choices):
                self._abort(attempt, choices, out)
            case WorkerGone(worker, epoch):
                self._gone[worker] = max(epoch, self._gone.get(worker, epoch))
                self.outbound.peer_lost(worker, f"{worker} is gone", out)
                self.inbound.peer_gone(worker, epoch, out)
            case DrainWorker():
                self._reporter.draining = True
                self._reporter.beat(out)  # at once: until it is heard, jobs come only to be refused
            case _:
                pass  # a router of a newer version; what it asks is not for us

    def _from_peer(self, peer: WorkerId, epoch: Epoch, message: Message, out: Outbox) -> None:
        match message:
            case Header():
                self.inbound.opened(message, peer, epoch, self.draining, out)
            case Ticket():
                self.outbound.granted(message, peer, epoch, out)
            case TicketRefused(attempt=attempt, detail=detail):
                self.outbound.fail(
                    attempt, FailureKind.REFUSED, detail, out, peer=peer, tells_peer=False
                )
            case LeaseRenew(attempt):
                self.inbound.renewed(attempt, peer, epoch, out)
            case Trailer():
                self.inbound.trailer(message, peer, epoch, out)
            case Accepted(attempt):
                self.outbound.accepted(attempt, peer, out)
            case HandoffRejected(attempt=attempt, detail=detail):
                self.outbound.fail(
                    attempt, FailureKind.HANDOFF, detail, out, peer=peer, tells_peer=False
                )
            case HandoffAbort(attempt=attempt):
                if not self.inbound.writer_done(attempt, peer, epoch, out):
                    self.batch.drop(attempt)
            case Revoke(attempt):
                self.outbound.revoked(attempt, peer, out)
            case RevokeAck(attempt):
                self.inbound.writer_done(attempt, peer, epoch, out)
            case _:
                pass

    def _start(self, job: Job, out: Outbox) -> None:
        self._reporter.last_route_seq = max(self._reporter.last_route_seq, job.route_seq)
        self._reporter.changed = True
        why_not = self.settings.misfit(job)
        if self.draining:
            why_not = f"{self.settings.worker} is draining"
        if why_not is not None:
            kind = FailureKind.DRAINING if self.draining else FailureKind.INVALID
            out.tell_router(AttemptFailed(attempt=job.attempt, kind=kind, detail=why_not))
            return
        remaining_tokens = job.params.max_tokens - job.next_index
        sequence = self.batch.submit(job, hands_off=not job.is_local and remaining_tokens > 1)
        if sequence.hands_off:
            self._jobs[job.attempt] = job
        out.log(LifeName.PREFILL_QUEUED, job.attempt)

    def _abort(self, attempt: AttemptId, choices: tuple[int, ...] | None, out: Outbox) -> None:
        self._reporter.changed = True
        if self.outbound.abort(attempt, choices, out):
            return
        if choices is None and self.inbound.abort(attempt, out):
            return
        self.batch.drop(attempt, choices)
        self._forget_jobs()

    def _step_done(self, outcome: StepOutcome, error: str | None, out: Outbox) -> None:
        if outcome.deltas:
            out.tell_router(Tokens(tuple(outcome.deltas)))
        for sequence in outcome.prefilled:
            cached_tokens = sequence.num_cached_blocks * self.settings.layout.block_size
            num_tokens = sequence.num_computed - cached_tokens
            out.log(LifeName.PREFILL_ENDED, sequence.attempt, tokens=num_tokens)
        for sequence, deltas in outcome.held:
            self.outbound.prefilled(sequence.attempt, deltas, out)
        for attempt in dict.fromkeys(sequence.attempt for sequence in outcome.decoding):
            out.log(LifeName.DECODE_QUEUED, attempt)
        for sequence in outcome.suspects:
            if sequence.hands_off:
                self.outbound.keep(sequence, f"the step broke: {error}", out)
        for sequence in outcome.failed:
            detail = f"the engine failed: {error}"
            if sequence.hands_off:
                self.outbound.fail(sequence.attempt, FailureKind.ENGINE, detail, out)
                continue
            self.batch.let_go(sequence)
            out.tell_router(
                AttemptFailed(
                    attempt=sequence.attempt,
                    kind=FailureKind.ENGINE,
                    detail=detail,
                    choices=sequence.choices,
                )
            )

    def _timer_fired(self, timer: str, out: Outbox) -> None:
        """Each timer belongs to one of the three; one that has just been cancelled to none."""
        if not self._reporter.timer_fired(timer, out) and not self.outbound.timer_fired(timer, out):
            self.inbound.timer_fired(timer, out)

    # --- after each input ---------------------------------------------------------------------

    def _advance(self, out: Outbox) -> None:
        self.inbound.grant_waiting(out)
        planned = self.batch.plan()
        self._begin(planned, out)
        if planned.plan is not None:
            self._reporter.step_started(planned.plan.num_tokens, out.now)
            out.add(RunStep(planned.plan))
        self._reporter.report_if_changed(out)

    def _begin(self, planned: Planned, out: Outbox) -> None:
        """Say what the plan means for the life of each sequence; open hand-offs before the step."""
        for sequence in planned.handed_back:
            out.log(LifeName.PREEMPTED, sequence.attempt, choice=sequence.choices[0])
            out.tell_router(
                AttemptFailed(
                    attempt=sequence.attempt,
                    kind=FailureKind.OUT_OF_BLOCKS,
                    detail=f"{self.settings.worker} has no free KV block",
                    choices=sequence.choices,
                )
            )
        for sequence in planned.preempted:
            out.log(LifeName.PREEMPTED, sequence.attempt, choice=sequence.choices[0])
        for sequence in planned.admitted:
            cached_tokens = sequence.num_computed
            out.log(LifeName.PREFILL_STARTED, sequence.attempt, cached_tokens=cached_tokens)
            job = self._jobs.pop(sequence.attempt, None)
            if job is not None:
                cargo = BlockCargo(self.settings, self.batch, job, sequence)
                self.outbound.open(job, cargo, out)
        started = dict.fromkeys(sequence.attempt for sequence in planned.started_decoding)
        for attempt in started:
            out.log(LifeName.DECODE_STARTED, attempt)

    def _forget_jobs(self) -> None:
        """Jobs of sequences that were dropped before they ran."""
        if self._jobs:
            alive = {sequence.attempt for sequence in self.batch.sequences()}
            self._jobs = {a: job for a, job in self._jobs.items() if a in alive}
