"""Running requests that move from one decode worker to another, KV and all.

After each report of a worker that is short of blocks the rebalance policy is asked; one request at
a time leaves a worker. The worker that has it stays its owner until the other one says `Accepted`,
so an abort still has one address. If it does not work out, the request goes on where it is. Should
the receiver die while it is not known whether it had accepted, the request is resumed, like after
any death.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

from pdserve.core.events import LifeName
from pdserve.core.ids import AttemptId, WorkerId
from pdserve.core.messages import MoveAttempt, MoveFailed
from pdserve.core.request import Role
from pdserve.node.books import ClusterBooks, WorkerBook
from pdserve.node.dispatch import Dispatch
from pdserve.node.lives import Attempt, Life
from pdserve.node.outbox import Outbox
from pdserve.policy.rebalance import Movable, MoveWhenCheaper, RebalancePolicy

PAUSE_S = 1.0
"""After a move that failed its worker is left alone for so long."""


class Moves:
    """Moves under way, by the worker that is left. Owned by the router."""

    def __init__(
        self, books: ClusterBooks, dispatch: Dispatch, policy: RebalancePolicy | None = None
    ) -> None:
        self._books = books
        self._dispatch = dispatch
        self._policy = policy or MoveWhenCheaper()
        self._leaving: dict[WorkerId, AttemptId] = {}
        self._paused_until_s: dict[WorkerId, float] = {}

    def consider(self, book: WorkerBook, out: Outbox) -> None:
        """The worker has just reported."""
        worker = book.up.worker
        if not self._may_leave(book, out.now):
            return
        attempts = self._dispatch.flights.workers().get(worker, {})
        if not self._policy.may_be_crowded(book, len(attempts)):
            return
        movable = self._movable(worker, attempts)
        if not movable:
            return
        longest = max(self._longest_tokens(each) for each in movable)
        view = self._books.view(out.now, longest)
        move = self._policy.propose(view, book.view(), movable)
        if move is not None:
            life, attempt = self._find(move.attempt)
            assert life is not None
            assert attempt is not None
            attempt.moving_to = move.to
            self._leaving[worker] = move.attempt
            target = self._books.workers[move.to]
            taken = max(len(life.choices[i].taken) for i in life.live_choices(move.attempt.epoch))
            num_tokens = len(life.request.prompt_token_ids) + taken
            target.promise(move.attempt, self._books.blocks_for(num_tokens, 1))
            out.log(LifeName.MOVING, move.attempt, to=move.to, reason=move.reason)
            request = life.request
            out.send(
                worker,
                MoveAttempt(
                    attempt=move.attempt,
                    to=move.to,
                    cache_salt=request.cache_salt,
                    trace_context=request.trace_context,
                ),
            )

    def accepted(self, life: Life, attempt: Attempt, worker: WorkerId) -> bool:
        """The receiver has it. False if nothing was to move there."""
        if attempt.moving_to != worker:
            return False
        self._leaving.pop(attempt.owner, None)
        self._dispatch.flights.move(worker, attempt.job)
        attempt.job = replace(attempt.job, decode_worker=worker)
        attempt.moving_to = None
        return True

    def failed(self, message: MoveFailed, book: WorkerBook, out: Outbox) -> None:
        """It stays where it is."""
        self._leaving.pop(book.up.worker, None)
        self._paused_until_s[book.up.worker] = out.now + PAUSE_S
        _, attempt = self._find(message.attempt)
        if attempt is not None and attempt.moving_to is not None:
            self._books.forget(message.attempt, attempt.moving_to)
            attempt.moving_to = None
            out.log(LifeName.MOVE_FAILED, message.attempt, detail=message.detail)

    def worker_lost(self, worker: WorkerId) -> None:
        self._leaving.pop(worker, None)
        self._paused_until_s.pop(worker, None)

    def _may_leave(self, book: WorkerBook, now: float) -> bool:
        worker = book.up.worker
        under_way = self._leaving.get(worker)
        if under_way is not None and self._find(under_way)[1] is None:
            del self._leaving[worker]  # the request ended meanwhile
            under_way = None
        return (
            under_way is None
            and book.role is not Role.PREFILL
            and book.mixes
            and now >= self._paused_until_s.get(worker, now)
        )

    def _movable(self, worker: WorkerId, attempts: Iterable[AttemptId]) -> tuple[Movable, ...]:
        """What decodes there and has one choice left, oldest first."""
        found = []
        for attempt_id in attempts:
            life, attempt = self._find(attempt_id)
            if life is None or attempt is None or not attempt.decodes_on(worker):
                continue
            live = life.live_choices(attempt_id.epoch)
            if len(live) != 1 or not life.choices[live[0]].taken:
                continue
            choice = life.choices[live[0]]
            found.append(
                Movable(
                    attempt=attempt_id,
                    context_tokens=len(life.request.prompt_token_ids) + len(choice.taken),
                    tokens_left=self._dispatch.answers.expect_more(life.request, choice),
                )
            )
        return tuple(found)

    def _longest_tokens(self, each: Movable) -> int:
        """What its request may grow to: not every worker can hold that."""
        return self._dispatch.lives[each.attempt.request_id].request.max_tokens_total

    def _find(self, attempt: AttemptId) -> tuple[Life | None, Attempt | None]:
        life = self._dispatch.lives.get(attempt.request_id)
        return life, None if life is None else life.attempts.get(attempt.epoch)
