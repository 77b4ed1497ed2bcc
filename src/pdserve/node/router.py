"""The router: who serves a request, and what happens when that fails.

A request waits until the route policy finds room, is sent to a prefill worker as a `Job`, and is
followed through its tokens. What the router has *taken* (the current epoch's next index) is the
truth. Whenever an attempt ends early - a worker died, a hand-off failed, a decode worker ran out of
blocks - the router raises the epoch and starts the next one from prompt + taken tokens. There is no
other recovery.

One worker owns an attempt at any time, so an abort has one address: the owner, who frees both
sides of a hand-off.
"""

from __future__ import annotations

from pdserve.core.commands import ChangeRole, DrainOne, UndrainOne
from pdserve.core.effects import (
    BeginDrain,
    CancelTimer,
    ClientGone,
    Deliver,
    Effect,
    Fail,
    Input,
    Log,
    Received,
    Refusal,
    Started,
    Submit,
    TimerFired,
    WorkerLost,
    WorkerUp,
)
from pdserve.core.events import LifeName
from pdserve.core.ids import GATEWAY, AttemptId, Epoch, RequestId, WorkerId
from pdserve.core.messages import (
    AbortAttempt,
    Accepted,
    AttemptFailed,
    FailureKind,
    LoadReport,
    Message,
    MoveFailed,
    TicketGranted,
    TokenDelta,
    Tokens,
    WorkerGone,
)
from pdserve.core.messages import Life as LifeMessage
from pdserve.core.request import FinishReason, Request
from pdserve.node.books import ClusterBooks, WorkerBook
from pdserve.node.dispatch import Dispatch
from pdserve.node.gate import Gate
from pdserve.node.lives import Life
from pdserve.node.moves import Moves
from pdserve.node.outbox import Outbox
from pdserve.node.pools import ROLES_TIMER, Pools
from pdserve.node.settings import RouterSettings
from pdserve.node.watch import WATCH_TIMER, Watch
from pdserve.policy.cluster import RoutePolicy
from pdserve.policy.shortest_queue import ShortestQueue

NO_WORKER_TIMER = "no worker"
MAX_ENGINE_FAILURES = 2
_MAKE_NO_ROOM = (Tokens, LifeMessage)


class RouterNode:
    """`handle(input, now) -> effects`. Knows no clock, no client, no socket."""

    def __init__(self, settings: RouterSettings, policy: RoutePolicy | None = None) -> None:
        self.settings = settings
        self.books = ClusterBooks(settings.costs)
        self.pools = Pools(self.books, settings.roles, return_rule=settings.return_rule)
        self.dispatch = Dispatch(
            self.books, self.pools, policy or ShortestQueue(), settings.patience_s
        )
        self.gate = Gate(settings, self.books, self.dispatch)
        self.moves = Moves(self.books, self.dispatch)
        self.watch = Watch(self.books, settings)
        self._expects_workers = False

    @property
    def num_requests(self) -> int:
        """Requests that are not over."""
        return len(self.dispatch.lives)

    @property
    def num_queued(self) -> int:
        """Requests that wait for a route."""
        return self.dispatch.num_queued

    def handle(self, event: Input, now: float) -> list[Effect]:
        out = Outbox(GATEWAY, now, logs=self.settings.logs_life)
        makes_room = True
        match event:
            case Received():  # the usual ones first
                message = event.message
                book = self.books.workers.get(event.sender)
                if book is not None and book.up.epoch == event.sender_epoch:
                    self._received(book, message, out)
                makes_room = not isinstance(message, _MAKE_NO_ROOM)
            case Submit(request):
                self._submit(request, out)
            case TimerFired(timer):
                self._timer_fired(timer, out)
            case Started():
                self.gate.start(now)
                self.watch.start(out)
                self.pools.start(out)
            case ClientGone(request_id, choices):
                self._client_gone(request_id, choices, out)
            case WorkerUp():
                self._worker_up(event, out)
            case WorkerLost(worker, epoch, detail):
                self._worker_lost(worker, epoch, detail, out)
            case BeginDrain():
                self.gate.draining = True
            case ChangeRole():
                self.pools.change(event, out)
            case DrainOne():
                self.pools.drain(event, out)
            case UndrainOne():
                self.pools.undrain(event, out)
            case _:
                raise TypeError(f"the router does not take {type(event).__name__}")
        self.pools.send_home(out)
        if makes_room:
            self.dispatch.stir()
        self.dispatch.route_waiting(out)
        return out.effects

    # --- clients ------------------------------------------------------------------------------

    def _submit(self, request: Request, out: Outbox) -> None:
        life = Life.of(request, out.now)
        verdict = self.gate.judge(life, out.now)
        self.dispatch.lives[request.request_id] = life
        if out.logs:
            submitted = life.submission(verdict.detail)
            out.log(LifeName.SUBMITTED, life.attempt_id(Epoch(0)), **submitted)
        if verdict.refused is not None:
            self._fail(life, verdict.refused, verdict.detail, out, verdict.retry_after_s)
        else:
            self.dispatch.wait(life, out.now)
            out.set_timer(_queue_timer(request.request_id), self.settings.queue_timeout_s)
            if request.max_tokens_total > self.books.longest_tokens:
                self._expect_workers(out)

    def _client_gone(
        self, request_id: RequestId, choices: tuple[int, ...] | None, out: Outbox
    ) -> None:
        life = self.dispatch.lives.get(request_id)
        if life is None:
            return
        reason = FinishReason.ABORT if choices is None else FinishReason.STOP
        dropped: dict[Epoch, list[int]] = {}
        for choice in life.choices:
            if choice.finish is None and (choices is None or choice.index in choices):
                choice.finish = reason
                if choice.epoch is not None:
                    dropped.setdefault(choice.epoch, []).append(choice.index)
        for epoch, indexes in dropped.items():
            left = life.live_choices(epoch)
            self.dispatch.abort(life, epoch, out, tuple(indexes) if left else None)
        self._finish_if_done(life, out)

    # --- workers ------------------------------------------------------------------------------

    def _worker_up(self, up: WorkerUp, out: Outbox) -> None:
        old = self.books.workers.get(up.worker)
        if old is not None:
            if old.up.epoch >= up.epoch:
                return
            self._worker_lost(up.worker, old.up.epoch, "replaced", out)
        self.pools.worker_up(self.books.add(up, out.now), out)
        if not self._stranded():
            self._expects_workers = False
            out.add(CancelTimer(NO_WORKER_TIMER))

    def _worker_lost(self, worker: WorkerId, epoch: Epoch, detail: str, out: Outbox) -> None:
        book = self.books.workers.get(worker)
        if book is None or book.up.epoch != epoch:
            return
        self.books.remove(worker)
        self.pools.worker_lost(worker, out)
        self.moves.worker_lost(worker)
        for other in sorted(self.books.workers):
            out.send(other, WorkerGone(worker, epoch))
        for life in list(self.dispatch.lives.values()):
            for attempt_epoch, attempt in list(life.attempts.items()):
                still_open = attempt_epoch in life.attempts
                undecided = attempt.is_undecided_without(worker) or life.has_gap(attempt_epoch)
                if still_open and (attempt.owner == worker or undecided):
                    life.count_failure(attempt_epoch, None, None)
                    if attempt.owner != worker:
                        out.send(attempt.owner, AbortAttempt(attempt.job.attempt))
                    self._resume(life, attempt_epoch, None, f"{worker} is gone: {detail}", out)
        self.dispatch.worker_lost(worker, out)
        self._expect_workers(out)

    def _received(self, book: WorkerBook, message: Message, out: Outbox) -> None:
        match message:
            case Tokens(deltas):
                self._take(deltas, out)
            case LoadReport():
                self.dispatch.prefixes.changed(book.up.worker, message.stored, message.evicted)
                self.books.take_report(book, message, out.now)
                self.pools.drained(book, out)
                if self.settings.moves:
                    self.moves.consider(book, out)
            case MoveFailed():
                self.moves.failed(message, book, out)
            case LifeMessage(events):
                for event in events:
                    out.add(Log(event))
                    if event.name is LifeName.PREFILL_STARTED:
                        self._prefill_started(AttemptId(event.request_id, event.epoch), book)
            case TicketGranted(attempt=attempt, num_blocks=num_blocks):
                book.grant(attempt, num_blocks)
            case Accepted(attempt, tokens):
                self._take(tokens, out)
                self._accepted(attempt, book, out)
            case AttemptFailed():
                self._attempt_failed(message, book.up.worker, out)
            case _:
                self.dispatch.heard(message, book, out)

    def _take(self, deltas: tuple[TokenDelta, ...], out: Outbox) -> None:
        taken: dict[RequestId, list[TokenDelta]] = {}
        for delta in deltas:
            life = self.dispatch.lives.get(delta.request_id)
            if life is not None and (now_taken := life.take(delta)):
                taken.setdefault(delta.request_id, []).extend(now_taken)
        for request_id, mine in taken.items():
            life = self.dispatch.lives[request_id]
            if life.first_token_at_s is None:
                life.first_token_at_s = out.now
                out.add(CancelTimer(_queue_timer(request_id)))
                if out.logs:
                    out.log(LifeName.FIRST_TOKEN, life.attempt_id(mine[0].epoch))
                service = life.request.service
                self.pools.demand.first_token(out.now, out.now - life.submitted_at_s, service)
            out.add(Deliver(request_id, tuple(mine)))
            for epoch in dict.fromkeys([delta.epoch for delta in mine]):
                self.dispatch.assigned.prefilled(life.attempt_id(epoch))
                if not life.live_choices(epoch):
                    self.dispatch.end(life, epoch)
            self._finish_if_done(life, out)

    def _prefill_started(self, attempt_id: AttemptId, book: WorkerBook) -> None:
        life = self.dispatch.lives.get(attempt_id.request_id)
        attempt = None if life is None else life.attempts.get(attempt_id.epoch)
        if attempt is not None:
            attempt.started = True
            if attempt.job.is_local:
                book.grant(attempt_id)

    def _accepted(self, attempt_id: AttemptId, book: WorkerBook, out: Outbox) -> None:
        life = self.dispatch.lives.get(attempt_id.request_id)
        attempt = None if life is None else life.attempts.get(attempt_id.epoch)
        worker = book.up.worker
        if life is None or attempt is None:
            out.send(worker, AbortAttempt(attempt_id))
            return
        moved = self.moves.accepted(life, attempt, worker)
        if not moved and attempt.job.decode_worker != worker:
            out.send(worker, AbortAttempt(attempt_id))
            return
        attempt.owner = worker
        attempt.accepted = True
        self.dispatch.assigned.accepted(attempt_id, book)
        live = life.live_choices(attempt_id.epoch)
        gone = tuple(index for index in attempt.job.choices if index not in live)
        if gone:
            out.send(worker, AbortAttempt(attempt_id, gone))

    def _attempt_failed(self, failed: AttemptFailed, sender: WorkerId, out: Outbox) -> None:
        life = self.dispatch.lives.get(failed.attempt.request_id)
        attempt = None if life is None else life.attempts.get(failed.attempt.epoch)
        if life is None or attempt is None or attempt.is_not_for(sender):
            return
        if failed.kind is FailureKind.INVALID:
            kind = Refusal.INTERNAL if life.has_tokens else Refusal.TOO_LONG
            self._fail(life, kind, failed.detail, out)
            return
        if failed.kind in (FailureKind.REFUSED, FailureKind.HANDOFF):
            life.avoid.append(attempt.job.decode_worker)
        life.count_failure(failed.attempt.epoch, failed.choices, failed.kind)
        waited_s = out.now - life.submitted_at_s
        if life.most_engine_failures >= MAX_ENGINE_FAILURES:
            self._fail(life, Refusal.INTERNAL, failed.detail, out)
        elif (
            failed.kind is FailureKind.REFUSED
            and not life.has_tokens
            and waited_s >= self.settings.queue_timeout_s
        ):
            self._overloaded(life, "no decode worker had room", out)
        else:
            if sender != attempt.owner:
                out.send(attempt.owner, AbortAttempt(failed.attempt))
            detail = f"{failed.kind}: {failed.detail}"
            self._resume(life, failed.attempt.epoch, failed.choices, detail, out)

    # --- ends and new beginnings --------------------------------------------------------------

    def _resume(
        self, life: Life, epoch: Epoch, choices: tuple[int, ...] | None, reason: str, out: Outbox
    ) -> None:
        """These choices of the attempt need another one."""
        for index in life.live_choices(epoch):
            if choices is None or index in choices:
                life.wait_again(index)
        if not life.live_choices(epoch):
            self.dispatch.end(life, epoch)
        if life.most_failures > self.settings.max_attempts:
            self._fail(life, Refusal.INTERNAL, f"gave up after {life.most_failures} failures", out)
        elif life.unrouted():
            attempt, taken_tokens = life.attempt_id(epoch), life.num_output_tokens
            out.log(LifeName.RESUMED, attempt, reason=reason, taken_tokens=taken_tokens)
            self.dispatch.wait_again(life)

    def _finish_if_done(self, life: Life, out: Outbox) -> None:
        if not life.is_done:
            return
        self.gate.finished(out.now)
        self.dispatch.answers.learn(life)
        tpot_s = life.tpot_s(out.now)
        if tpot_s is not None:
            self.pools.demand.finished(out.now, tpot_s, life.request.service)
        if out.logs:
            out.log(
                LifeName.FINISHED,
                life.attempt_id(Epoch(life.next_epoch - 1)),
                reason=str(life.choices[0].finish),
                output_tokens=life.num_output_tokens,
                choices=len(life.choices),
                **life.outcome(out.now),
            )
        self._close(life, out)

    def _overloaded(self, life: Life, detail: str, out: Outbox) -> None:
        self._fail(life, Refusal.OVERLOADED, detail, out, self.gate.retry_after_s)

    def _fail(
        self, life: Life, kind: str, detail: str, out: Outbox, retry_after_s: float | None = None
    ) -> None:
        for epoch in list(life.attempts):
            self.dispatch.abort(life, epoch, out)
        request_id = life.request.request_id
        attempt = life.attempt_id(Epoch(life.next_epoch - 1))
        out.log(LifeName.FAILED, attempt, kind=kind, detail=detail)
        out.add(Fail(request_id=request_id, kind=kind, detail=detail, retry_after_s=retry_after_s))
        self._close(life, out)

    def _close(self, life: Life, out: Outbox) -> None:
        out.add(CancelTimer(_queue_timer(life.request.request_id)))
        self.dispatch.forget(life)

    # --- time ---------------------------------------------------------------------------------

    def _timer_fired(self, timer: str, out: Outbox) -> None:
        if timer == WATCH_TIMER:
            self.watch.look(out)
        elif timer == ROLES_TIMER:
            self.pools.timer_fired(out)
        elif timer == NO_WORKER_TIMER:
            self._expects_workers = False
            for life in self._stranded():
                self._fail(life, Refusal.UNAVAILABLE, "no worker is left that can hold it", out)
        elif not self.dispatch.timer_fired(timer, out):
            self._queue_time_up(RequestId(timer.removeprefix("queue ")), out)

    def _queue_time_up(self, request_id: RequestId, out: Outbox) -> None:
        """Too long without a token: refuse, unless a worker is at it."""
        life = self.dispatch.lives.get(request_id)
        if life is None or life.has_tokens:
            return
        if life.has_started:
            out.set_timer(_queue_timer(request_id), self.settings.queue_timeout_s)
        else:
            self._overloaded(life, f"not begun within {self.settings.queue_timeout_s:g} s", out)

    def _stranded(self) -> list[Life]:
        """Requests for which every worker is too small: all of them, with nobody left."""
        limit = self.books.longest_tokens
        lives = self.dispatch.lives.values()
        return [life for life in lives if life.request.max_tokens_total > limit]

    def _expect_workers(self, out: Outbox) -> None:
        """With nobody left to serve them, clients wait for a restart, but not for ever."""
        if not self._expects_workers and self._stranded():
            self._expects_workers = True
            out.set_timer(NO_WORKER_TIMER, self.settings.no_worker_timeout_s)


def _queue_timer(request_id: RequestId) -> str:
    return f"queue {request_id}"
