"""What every worker's machine does with what it hears, whatever computes below it.

Inputs come one at a time. Messages of the router and of peers, the coming and going of links, and
timers mean the same to every worker, and the protocol of a hand-off does too: that is here. What
the engine says, how an attempt is begun and let go of, and what follows an input is the business of
`WorkerNode` (our batching over a model runner) and `ForeignWorkerNode` (an engine that batches for
itself).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Protocol

from pdserve.core.effects import (
    Effect,
    Input,
    PeerLost,
    PeerUp,
    Received,
    Started,
    StepDone,
    StepsDone,
    TimerFired,
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
    MoveAttempt,
    Revoke,
    RevokeAck,
    SendPrefix,
    SetRole,
    StartJob,
    Ticket,
    TicketRefused,
    Trailer,
    UndrainWorker,
    WorkerGone,
)
from pdserve.core.request import Job
from pdserve.node.outbound import OutboundHandoffs
from pdserve.node.outbox import Outbox
from pdserve.node.report import LoadReporter, LoadSource
from pdserve.node.settings import WorkerSettings
from pdserve.node.standing import Standing


class Arrivals(Protocol):
    """The receiving half of hand-offs: `InboundHandoffs` or `PayloadArrivals`."""

    @property
    def is_empty(self) -> bool: ...

    def opened(
        self, header: Header, peer: WorkerId, peer_epoch: Epoch, draining: bool, out: Outbox
    ) -> None: ...

    def renewed(self, attempt: AttemptId, peer: WorkerId, epoch: Epoch, out: Outbox) -> None: ...

    def trailer(self, trailer: Trailer, peer: WorkerId, epoch: Epoch, out: Outbox) -> None: ...

    def abort(self, attempt: AttemptId, out: Outbox) -> bool: ...

    def writer_done(
        self, attempt: AttemptId, peer: WorkerId, epoch: Epoch, out: Outbox
    ) -> bool: ...

    def peer_gone(self, peer: WorkerId, epoch: Epoch, out: Outbox) -> None: ...

    def peer_lost(self, peer: WorkerId, epoch: Epoch, out: Outbox) -> None: ...

    def peer_up(self, peer: WorkerId, epoch: Epoch, out: Outbox) -> None: ...

    def timer_fired(self, timer: str, out: Outbox) -> bool: ...


class WorkerMachine(ABC):
    """`handle(input, now) -> effects`. Knows no clock, no engine, no socket."""

    def __init__(
        self, settings: WorkerSettings, arrivals: Arrivals, load: LoadSource, standing: Standing
    ) -> None:
        self.settings = settings
        self.standing = standing
        self.outbound = OutboundHandoffs(settings)
        self._arrivals = arrivals
        self._reporter = LoadReporter(
            settings, load, standing, lambda: self.is_empty, self._tell_silent
        )
        self._gone: dict[WorkerId, Epoch] = {}

    @property
    def draining(self) -> bool:
        """True once the router has asked to take no new work."""
        return self.standing.draining

    def handle(self, event: Input, now: float) -> list[Effect]:
        out = Outbox(self.settings.worker, now, logs=self.settings.logs_life)
        match event:
            case StepsDone() | StepDone():  # the usual ones first
                self._engine_says(event, out)
            case Received():
                sender, epoch = event.sender, event.sender_epoch
                if not self._gone or epoch > self._gone.get(sender, -1):
                    if sender == GATEWAY:
                        self._from_router(event.message, out)
                    else:
                        self._from_peer(sender, epoch, event.message, out)
            case TimerFired(timer):
                self._timer_fired(timer, out)
            case Started():
                self._reporter.beat(out)
            case PeerLost(worker, epoch):
                if epoch > self._gone.get(worker, -1):  # else its successor may be in use already
                    self._link_ended(worker)
                    self.outbound.peer_lost(worker, f"lost the link to {worker}", out)
                    self._arrivals.peer_lost(worker, epoch, out)
            case PeerUp(worker, epoch):
                self._arrivals.peer_up(worker, epoch, out)
            case _:
                self._engine_says(event, out)
        self._advance(out)
        return out.effects

    # --- what is below ------------------------------------------------------------------------

    @property
    @abstractmethod
    def is_empty(self) -> bool:
        """True if no request, lease or unsent KV is left."""

    @abstractmethod
    def _begin_job(self, job: Job, out: Outbox, *, hands_off: bool) -> None:
        """Compute the attempt; ``hands_off``: up to its first tokens."""

    @abstractmethod
    def _drop(self, attempt: AttemptId, choices: tuple[int, ...] | None, out: Outbox) -> None:
        """Forget what is computed here of these choices (None: of the attempt)."""

    @abstractmethod
    def _depart(self, asked: MoveAttempt | SendPrefix, out: Outbox) -> None:
        """Hand over KV that is finished."""

    @abstractmethod
    def _engine_says(self, event: Input, out: Outbox) -> None:
        """An input of the engine or of a transfer. Raises `TypeError` if it is neither."""

    @abstractmethod
    def _advance(self, out: Outbox) -> None:
        """After each input: do what has become possible, and report the load if it has changed."""

    @abstractmethod
    def _peer_says(self, peer: WorkerId, message: Message, epoch: Epoch, out: Outbox) -> None:
        """A message of a kind of hand-off that not every worker knows, or of a newer version."""

    @abstractmethod
    def _link_ended(self, peer: WorkerId) -> None:
        """What was under way to the peer is lost. Its hand-offs hear of it themselves."""

    @abstractmethod
    def _tell_silent(self, out: Outbox) -> None:
        """The router hears of all tokens that it has not been told of yet."""

    # --- the router ---------------------------------------------------------------------------

    def _from_router(self, message: Message, out: Outbox) -> None:
        match message:
            case StartJob(job):
                self._start(job, out)
            case AbortAttempt(attempt, choices):
                self._abort(attempt, choices, out)
            case WorkerGone(worker, epoch):
                self._gone[worker] = max(epoch, self._gone.get(worker, epoch))
                self._link_ended(worker)
                self.outbound.peer_lost(worker, f"{worker} is gone", out)
                self._arrivals.peer_gone(worker, epoch, out)
            case DrainWorker():
                self.standing.draining = True
                self._reporter.beat(out)  # at once: until it is heard, jobs come only to be refused
            case UndrainWorker():
                self.standing.draining = False
                self._reporter.beat(out)
            case SetRole():
                if self.standing.take_role(message):
                    self._reporter.changed = True
            case MoveAttempt() | SendPrefix():
                self._depart(message, out)
            case _:
                pass  # a router of a newer version; what it asks is not for us

    def _start(self, job: Job, out: Outbox) -> None:
        self._reporter.last_route_seq = max(self._reporter.last_route_seq, job.route_seq)
        why_not = self.settings.misfit(job)
        if self.draining:
            why_not = f"{self.settings.worker} is draining"
        if why_not is not None:
            self._reporter.changed = True
            kind = FailureKind.DRAINING if self.draining else FailureKind.INVALID
            out.tell_router(AttemptFailed(attempt=job.attempt, kind=kind, detail=why_not))
            return
        remaining_tokens = job.params.max_tokens - job.next_index
        self._begin_job(job, out, hands_off=not job.is_local and remaining_tokens > 1)
        out.log(LifeName.PREFILL_QUEUED, job.attempt)

    def _abort(self, attempt: AttemptId, choices: tuple[int, ...] | None, out: Outbox) -> None:
        self._reporter.changed = True
        if self.outbound.abort(attempt, choices, out):
            return
        if choices is None and self._arrivals.abort(attempt, out):
            return
        self._drop(attempt, choices, out)

    # --- peers --------------------------------------------------------------------------------

    def _from_peer(self, peer: WorkerId, epoch: Epoch, message: Message, out: Outbox) -> None:
        match message:
            case Header():
                self._arrivals.opened(message, peer, epoch, self.draining, out)
            case Ticket():
                self.outbound.granted(message, peer, epoch, out)
            case Trailer():
                self._arrivals.trailer(message, peer, epoch, out)
            case Accepted(attempt):
                sample = self.outbound.accepted(attempt, peer, out)
                if sample is not None:
                    self._reporter.transfer_measured(sample)
            case TicketRefused(attempt=attempt, detail=detail):
                self._turned_down(attempt, FailureKind.REFUSED, detail, peer, out)
            case LeaseRenew(attempt):
                self._arrivals.renewed(attempt, peer, epoch, out)
            case HandoffRejected(attempt=attempt, detail=detail):
                self._turned_down(attempt, FailureKind.HANDOFF, detail, peer, out)
            case HandoffAbort(attempt=attempt):
                if not self._arrivals.writer_done(attempt, peer, epoch, out):
                    self._drop(attempt, None, out)
            case Revoke(attempt):
                self.outbound.revoked(attempt, peer, out)
            case RevokeAck(attempt):
                self._arrivals.writer_done(attempt, peer, epoch, out)
            case _:
                self._peer_says(peer, message, epoch, out)

    def _turned_down(
        self, attempt: AttemptId, kind: FailureKind, detail: str, peer: WorkerId, out: Outbox
    ) -> None:
        self.outbound.fail(attempt, kind, detail, out, peer=peer, tells_peer=False)

    # --- time ---------------------------------------------------------------------------------

    def _timer_fired(self, timer: str, out: Outbox) -> None:
        """Each timer belongs to one of the three; one that has just been cancelled to none."""
        if not self._reporter.timer_fired(timer, out) and not self.outbound.timer_fired(timer, out):
            self._arrivals.timer_fired(timer, out)
