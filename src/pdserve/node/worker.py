"""The node machine of a native worker: batch machine and both halves of the hand-off.

What it hears from the router and from peers is `WorkerMachine`'s business; here are the ends of
steps, transfers and checks. After each input the machine grants tickets as far as blocks go, plans
the next step if none is under way, and reports its load if that has changed.
"""

from __future__ import annotations

from collections.abc import Sequence

from pdserve.core.effects import (
    Input,
    RunStep,
    StepDone,
    StepsDone,
    TransferFailed,
    TransferSent,
    TransferStopped,
    TransferVerified,
)
from pdserve.core.events import LifeName
from pdserve.core.ids import AttemptId, Epoch, WorkerId
from pdserve.core.messages import (
    AttemptFailed,
    FailureKind,
    Message,
    MoveAttempt,
    SendPrefix,
    Tokens,
)
from pdserve.core.request import Job
from pdserve.node.batch import BatchMachine
from pdserve.node.cargo import BlockCargo
from pdserve.node.departures import Departures
from pdserve.node.inbound import InboundHandoffs
from pdserve.node.machine import WorkerMachine
from pdserve.node.outbox import Outbox
from pdserve.node.planned import Planned, StepOutcome
from pdserve.node.report import BatchLoad
from pdserve.node.sequence import Sequence as Rider
from pdserve.node.sequence import untold
from pdserve.node.settings import WorkerSettings
from pdserve.policy.batch import BatchPolicy
from pdserve.policy.registry import make_batching


class WorkerNode(WorkerMachine):
    """`handle(input, now) -> effects`. Knows no clock, no engine, no socket."""

    def __init__(self, settings: WorkerSettings, policy: BatchPolicy | None = None) -> None:
        self.batch = BatchMachine(settings, policy or make_batching())
        self.inbound = InboundHandoffs(settings, self.batch)
        self.load = BatchLoad(self.batch, self.inbound)
        super().__init__(settings, self.inbound, self.load, self.batch.standing)
        self._departures = Departures(self.batch, self.outbound)
        self._jobs: dict[AttemptId, Job] = {}

    @property
    def is_empty(self) -> bool:
        """True if no request, lease, transfer or quarantine is left."""
        return self.batch.is_empty and self.inbound.is_empty and not len(self.outbound)

    # --- drivers that compute nothing ---------------------------------------------------------

    def steady_steps(self) -> int:
        """How many steps, from the running one on, `StepsDone` may answer in one go, if none of the
        riders ends before the last one.

        0: none; the step must be answered by a `StepDone`, since a row draws for several choices
        (or there is none). 1: only the running one; it computes prompts, or the next one may have
        other riders. More: until it is certain that nothing else happens by itself, as far as free
        blocks and the riders' own limits allow for sure.
        """
        steps = self.batch.steady_steps()
        if steps <= 1:
            return steps
        if not (self._departures.are_none and self.inbound.is_settled):
            return 1
        quiet = self._reporter.quiet_blocks()
        ride = self.batch.ride
        if quiet is None or ride is None:
            return steps
        return ride.steps_within(quiet, self.settings.layout.block_size, steps)

    @property
    def riders(self) -> Sequence[Rider]:
        """Who rides in the running step, in the order of its rows; the same list as before if they
        are certain to be the same. Only to be read, and only until the next input."""
        return () if self.batch.ride is None else self.batch.ride.riders

    def reaches(self, rider: Rider) -> int:
        """Tokens of a rider that will be computed when the running step is done: it draws a token
        if these are all ``num_tokens``, and else computes a chunk of a prompt."""
        assert self.batch.ride is not None, "no step is running"
        return self.batch.ride.reaches(rider)

    def draws(self, rider: Rider) -> bool:
        """True if the rider draws a token in the running step."""
        return self.reaches(rider) == rider.num_tokens

    # --- jobs ---------------------------------------------------------------------------------

    def _begin_job(self, job: Job, out: Outbox, *, hands_off: bool) -> None:
        sequence = self.batch.submit(job, hands_off=hands_off)
        if sequence.hands_off:
            self._jobs[job.attempt] = job

    def _drop(self, attempt: AttemptId, choices: tuple[int, ...] | None, out: Outbox) -> None:
        self.batch.drop(attempt, choices)
        self._forget_jobs()

    def _depart(self, asked: MoveAttempt | SendPrefix, out: Outbox) -> None:
        if isinstance(asked, MoveAttempt):
            self._departures.move(asked, out)
        else:
            self._departures.share(asked, out)

    def _peer_says(self, peer: WorkerId, message: Message, epoch: Epoch, out: Outbox) -> None:
        """Blocks are written, not sent: payloads are not for this kind of worker."""

    def _link_ended(self, peer: WorkerId) -> None:
        """Writes do not go over the link."""

    # --- steps and transfers ------------------------------------------------------------------

    def _engine_says(self, event: Input, out: Outbox) -> None:
        match event:
            case StepsDone():
                num_steps = event.num_steps
                self._reporter.steps_done(num_steps, event.elapsed_s)
                self._step_done(self.batch.steps_done(num_steps, event.ended), None, out)
                if not self._departures.are_none:
                    self._departures.step_done(out)
            case StepDone(result, elapsed_s):
                if result.error is None:
                    self._reporter.step_done(elapsed_s)
                else:
                    self._reporter.step_failed()
                error = result.error or "; ".join(why for _, why in result.failures) or None
                self._step_done(self.batch.step_done(result), error, out)
                self._departures.step_done(out)
            case TransferSent():
                self._reporter.transfer_bytes += event.num_bytes
                self.outbound.sent(event, out)
            case TransferFailed(attempt=attempt, detail=detail):
                self.outbound.fail(attempt, FailureKind.HANDOFF, detail, out)
            case TransferStopped(attempt):
                self.outbound.stopped(attempt, out)
            case TransferVerified():
                self.inbound.verified(event, out)
            case _:
                raise TypeError(f"a worker does not take {type(event).__name__}")

    def _step_done(self, outcome: StepOutcome, error: str | None, out: Outbox) -> None:
        if outcome.deltas:
            out.tell_router(Tokens(tuple(outcome.deltas)))
        for sequence in outcome.prefilled if out.logs else ():
            cached_tokens = sequence.num_cached_blocks * self.settings.layout.block_size
            num_tokens = sequence.num_computed - cached_tokens
            out.log(LifeName.PREFILL_ENDED, sequence.attempt, tokens=num_tokens)
        for sequence, deltas in outcome.held:
            if sequence.attempt not in self._jobs:
                self.outbound.prefilled(sequence.attempt, deltas, out)
            else:
                job = self._jobs.pop(sequence.attempt)
                self._departures.hand_off_late(job, sequence, deltas, out)
        if out.logs:
            for attempt in dict.fromkeys([sequence.attempt for sequence in outcome.decoding]):
                out.log(LifeName.DECODE_QUEUED, attempt)
        for sequence in outcome.suspects:
            why = f"the step broke: {error}"
            if sequence.hands_off and self.outbound.gives_up(sequence, why, out):
                self.batch.queues.keep(sequence)
        for sequence in outcome.failed:
            self._tell(sequence, out)
            detail = f"the engine failed: {error}"
            if sequence.hands_off and sequence.attempt not in self._jobs:
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

    # --- after each input ---------------------------------------------------------------------

    def _advance(self, out: Outbox) -> None:
        batch = self.batch
        if self.inbound.num_queued:
            self.inbound.grant_waiting(out)
        if not batch.is_riding:
            planned = batch.plan()
            ride = batch.ride
            if ride is not None or planned.handed_back or planned.preempted:
                self._begin(planned, out)
            if ride is not None:
                self._reporter.step_started(ride.shape, out.now)
                out.effects.append(RunStep(ride.plan))
        self._reporter.report_if_changed(out)

    def _begin(self, planned: Planned, out: Outbox) -> None:
        """Say what the plan means for the life of each sequence; open hand-offs before the step."""
        for sequence in planned.handed_back:
            self._tell(sequence, out)
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
            if job is not None and self.settings.late_handoffs:
                self._jobs[sequence.attempt] = job
            elif job is not None:
                cargo = BlockCargo(self.settings, self.batch, job, sequence)
                self.outbound.open(job, cargo, out)
        if out.logs:
            for attempt in dict.fromkeys([s.attempt for s in planned.started_decoding]):
                out.log(LifeName.DECODE_STARTED, attempt)

    def _tell_silent(self, out: Outbox) -> None:
        silent = self.batch.untold()
        if silent:
            out.tell_router(Tokens(tuple(silent)))

    def _tell(self, sequence: Rider, out: Outbox) -> None:
        """Before the router is to do something about it: what it has drawn."""
        silent = untold(sequence)
        if silent is not None:
            out.tell_router(Tokens((silent,)))

    def _forget_jobs(self) -> None:
        """Jobs of sequences that were dropped before they ran."""
        if self._jobs:
            queues = self.batch.queues
            known = [*queues.waiting.values(), *queues.admitted.values()]
            alive = {sequence.attempt for sequence in known}
            self._jobs = {a: job for a, job in self._jobs.items() if a in alive}
