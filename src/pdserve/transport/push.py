"""The live half of a push: writes finished KV into the decode worker's pool while layers compute.

A worker has one `Pusher`. Three threads meet in it::

    node thread      open, bind, stop, close             performs the machine's effects
                     expect, written, verify             on the side that receives
    engine thread    begin_step, layer_done, end_step    tells what is finished
    transfer thread  owned by the pusher                 every write, in the order of the queue

The first two only put a call on the queue. The transfer thread alone holds the state of transfers
and alone writes, and this is the fence: a `TransferStopped` that it posts comes after the last
write of that attempt, whatever the other threads do. If a write failed of which bytes may still be
on their way to another host, it comes when they can no more land (`RemotePool.settle`), and nothing
else waits for that. An attempt that is sent, failed or stopped is forgotten, and what is said of it
later is ignored.

A transfer is sent when its last layer is written, while the step still draws the first tokens: so
the trailer can leave with the end of the step. Should the step break after that, the machine stops
the hand-off, as it does for any that waits for its tokens.

While it writes it announces what it has written. The receiver's transfer thread hashes that at once
(``transport.verify``), so that the check after the trailer has hardly anything left to read.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from functools import partial
from queue import SimpleQueue
from typing import Protocol

from pdserve.core.effects import (
    BindTransfer,
    Input,
    OpenTransfer,
    TransferFailed,
    TransferSent,
    TransferStopped,
    TransferVerified,
    VerifyTransfer,
)
from pdserve.core.ids import AttemptId, BlockId, StepId, WorkerId
from pdserve.core.layout import KvLayout
from pdserve.core.messages import Ticket
from pdserve.core.step import StepPlan, StepRow
from pdserve.transport.base import RemotePool
from pdserve.transport.link_faults import Throttle
from pdserve.transport.progress import LayersWritten
from pdserve.transport.transfer import Destination, PoolView, Transfer
from pdserve.transport.verify import Arrivals


class KvRunner(Protocol):
    """What a push needs of ``engine.base.ModelRunner``. Both are called on the transfer thread."""

    def read_kv(self, layer: int, block_ids: Sequence[BlockId]) -> None: ...

    def write_kv(self, block_ids: Sequence[BlockId]) -> None: ...


def _well(peer: WorkerId) -> float:
    """For a writer whose links are as they are."""
    return 1.0


def _tell_nobody(peer: WorkerId, news: LayersWritten) -> None:
    """For a writer whose receivers hash everything at the end."""


class Pusher:
    """Sends and verifies the transfers of one worker. Implements ``engine.base.LayerSink``.

    ``pool_memory`` is the worker's pool: ``layout.pool_bytes(num_blocks)`` bytes, as given to
    `ModelRunner.attach_pool`. ``post`` gets `TransferSent`, `TransferFailed`, `TransferStopped` and
    `TransferVerified` on the transfer thread, and ``announce`` what to tell a peer, before the
    `TransferSent` that it leads to; they must neither block nor raise. ``slowness`` is asked on the
    transfer thread how many times slower the link to a peer is to be than it is.
    """

    def __init__(
        self,
        *,
        runner: KvRunner,
        pool_memory: memoryview,
        layout: KvLayout,
        num_blocks: int,
        post: Callable[[Input], None],
        announce: Callable[[WorkerId, LayersWritten], None] = _tell_nobody,
        slowness: Callable[[WorkerId], float] = _well,
    ) -> None:
        self._runner = runner
        self._pool = PoolView(pool_memory, layout, num_blocks)
        self._post = post
        self._announce = announce
        self._throttle = Throttle(slowness)
        # Of the engine thread: the step under way, if it has rows to push.
        self._announced: StepId | None = None
        # Of the transfer thread.
        self._transfers: dict[AttemptId, Transfer] = {}
        self._failed: dict[AttemptId, RemotePool] = {}
        self._arrivals = Arrivals(self._pool)
        self._step: list[Transfer] = []
        # Shared. The queue orders everything; the other two only make a stop take effect early.
        self._queue: SimpleQueue[Callable[[], None] | None] = SimpleQueue()
        self._stopping: set[AttemptId] = set()
        self._closing = False
        self._thread = threading.Thread(target=self._run, name="kv-transfer", daemon=True)
        self._thread.start()

    # --- node thread ---------------------------------------------------------------------------

    def open(self, effect: OpenTransfer) -> None:
        """Perform `OpenTransfer`; before the step that it is for is given to the engine thread."""
        self._queue.put(partial(self._open, effect))

    def bind(self, effect: BindTransfer, remote: RemotePool, remote_num_blocks: int) -> None:
        """Perform `BindTransfer` with the peer's pool, which holds ``remote_num_blocks`` blocks."""
        destination = Destination(remote, remote_num_blocks, effect.ticket)
        self._queue.put(partial(self._bind, effect.ticket.attempt, destination))

    def stop(self, attempt: AttemptId) -> None:
        """Perform `StopTransfer`. At most the write that is under way is still finished."""
        self._stopping.add(attempt)
        self._queue.put(partial(self._stop, attempt))

    def expect(self, ticket: Ticket) -> None:
        """This worker grants the ticket: called before it is sent."""
        self._queue.put(partial(self._arrivals.expect, ticket))

    def written(self, news: LayersWritten) -> None:
        """A peer says that it has written this."""
        self._queue.put(partial(self._arrivals.written, news))

    def verify(self, effect: VerifyTransfer) -> None:
        """Perform `VerifyTransfer`; what matches is handed to the runner before it is reported."""
        self._queue.put(partial(self._verify, effect))

    def close(self) -> None:
        """Write no more and end the thread. Nothing is posted once this returns."""
        self._closing = True
        self._throttle.close()
        self._queue.put(None)
        self._thread.join()

    # --- engine thread -------------------------------------------------------------------------

    def begin_step(self, plan: StepPlan) -> None:
        """A step is about to run. Costs nothing more if no row of it is pushed."""
        rows = tuple(row for row in plan.rows if row.pushes)
        self._announced = plan.step_id if rows else None
        if rows:
            self._queue.put(partial(self._begin_step, rows))

    def layer_done(self, step_id: StepId, layer: int) -> None:
        """All KV of ``layer`` is finished for the rows of the step. Layers come in order."""
        if step_id == self._announced:
            self._queue.put(partial(self._layer_done, layer))

    def end_step(self, step_id: StepId, ok: bool) -> None:
        """The step has ended. If it failed, nothing more is written for its rows."""
        if step_id == self._announced:
            self._announced = None
            self._queue.put(partial(self._end_step, ok))

    # --- transfer thread -----------------------------------------------------------------------

    def _run(self) -> None:
        while (call := self._queue.get()) is not None:
            if not self._closing:
                call()

    def _open(self, effect: OpenTransfer) -> None:
        self._transfers[effect.attempt] = Transfer(effect, self._pool)

    def _bind(self, attempt: AttemptId, destination: Destination) -> None:
        transfer = self._transfers.get(attempt)
        if transfer is not None and not transfer.is_bound:
            transfer.bind(destination)
            self._advance(transfer)

    def _stop(self, attempt: AttemptId) -> None:
        self._transfers.pop(attempt, None)
        self._stopping.discard(attempt)
        remote = self._failed.pop(attempt, None)
        if remote is None:
            self._post(TransferStopped(attempt))
        else:
            remote.settle(lambda: self._queue.put(partial(self._settled, attempt)))

    def _settled(self, attempt: AttemptId) -> None:
        self._post(TransferStopped(attempt))

    def _begin_step(self, rows: Sequence[StepRow]) -> None:
        self._step = []
        for row in rows:
            transfer = self._transfers.get(row.attempt)
            if transfer is not None:
                transfer.begin_row(row)
                self._step.append(transfer)

    def _layer_done(self, layer: int) -> None:
        for transfer in self._step:
            transfer.layer_done(layer)
            self._advance(transfer)

    def _end_step(self, ok: bool) -> None:
        for transfer in self._step:
            if ok:
                transfer.end_row()
                self._advance(transfer)
            else:
                # The machine stops it or not: either way there is nothing left to say.
                self._transfers.pop(transfer.attempt, None)
        self._step = []

    def _advance(self, transfer: Transfer) -> None:
        """Write all that may go now, and tell when that was everything."""
        attempt = transfer.attempt
        if self._transfers.get(attempt) is not transfer:
            return  # It failed or was stopped in the middle of a step.
        try:
            while self._may_write(attempt):
                begun_s = self._throttle.begin()
                if (chunk := transfer.write_next(self._runner.read_kv)) is None:
                    break
                self._throttle.end(transfer.peer, begun_s)
                if (news := transfer.news_of(chunk)) is not None:
                    self._announce(transfer.peer, news)
        except Exception as error:  # Whatever broke the write: the attempt is tried again.
            del self._transfers[attempt]
            if transfer.remote is not None:
                self._failed[attempt] = transfer.remote
            self._post(TransferFailed(attempt=attempt, detail=f"{type(error).__name__}: {error}"))
            return
        if transfer.is_written and self._may_write(attempt):
            del self._transfers[attempt]
            chunks, num_bytes = transfer.digests(), transfer.num_bytes
            self._post(TransferSent(attempt=attempt, chunks=chunks, num_bytes=num_bytes))

    def _may_write(self, attempt: AttemptId) -> bool:
        return not self._closing and attempt not in self._stopping

    def _verify(self, effect: VerifyTransfer) -> None:
        try:
            detail = self._arrivals.verify(effect)
            if detail is None:
                self._runner.write_kv(effect.block_ids)
        except Exception as error:  # Not usable, for whatever reason: the attempt is tried again.
            detail = f"{type(error).__name__}: {error}"
        self._post(TransferVerified(attempt=effect.attempt, detail=detail))
