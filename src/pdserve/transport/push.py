"""The live half of a push: writes finished KV into decode workers' pools while layers compute.

A worker has one `Pusher`. Four kinds of threads meet in it::

    node thread      open, bind, stop, close             performs the machine's effects
                     expect, written, verify             on the side that receives
    engine thread    begin_step, layer_done, end_step    tells what is finished
    transfer threads one for each peer (`lane.Lane`)     every write to it, in order
    arrivals thread                                      hashes and checks what others wrote

The first two only pass on what they are told, each attempt's to the lane of its peer. An attempt
that is sent or stopped, or whose step failed, is forgotten: what is said of it later is ignored.

A transfer is sent when its last layer is written, while the step still draws the first tokens: so
the trailer can leave with the end of the step. Should the step break after that, the machine stops
the hand-off, as it does for any that waits for its tokens.

While it writes it announces what it has written. The receiver hashes that at once
(``transport.verify``), so that the check after the trailer has hardly anything left to read.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from functools import partial

from pdserve.core.effects import (
    BindTransfer,
    Input,
    OpenTransfer,
    TransferStopped,
    TransferVerified,
    VerifyTransfer,
)
from pdserve.core.ids import AttemptId, StepId, WorkerId
from pdserve.core.layout import KvLayout
from pdserve.core.messages import Ticket
from pdserve.core.step import StepPlan, StepRow
from pdserve.transport.base import RemotePool
from pdserve.transport.lane import Calls, KvRunner, Lane, Push, Surroundings
from pdserve.transport.link_faults import Throttle
from pdserve.transport.progress import LayersWritten
from pdserve.transport.transfer import Destination, PoolView, Transfer
from pdserve.transport.verify import Arrivals


def _well(peer: WorkerId) -> float:
    """For a writer whose links are as they are."""
    return 1.0


def _tell_nobody(peer: WorkerId, news: LayersWritten) -> None:
    """For a writer whose receivers hash everything at the end."""


class Pusher:
    """Sends and verifies the transfers of one worker. Implements ``engine.base.LayerSink``.

    ``pool_memory`` is the worker's pool: ``layout.pool_bytes(num_blocks)`` bytes, as given to
    `ModelRunner.attach_pool`. ``post`` gets `TransferSent`, `TransferFailed` and `TransferStopped`
    on the thread of their peer's lane, `TransferVerified` on the arrivals thread, and ``announce``
    what to tell a peer, before the `TransferSent` that it leads to; they must neither block nor
    raise. ``slowness`` is asked on a lane's thread how many times slower the link to its peer is to
    be than it is.
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
        self._throttle = Throttle(slowness)
        self._around = Surroundings(runner, post, announce, self._throttle, self._over)
        # Of the node thread.
        self._lanes: dict[WorkerId, Lane] = {}
        self._is_closed = False
        # Of the engine thread: the step under way, and the lanes that have rows of it to push.
        self._announced: StepId | None = None
        self._step: tuple[Lane, ...] = ()
        # Of the arrivals thread.
        self._arrivals = Arrivals(self._pool)
        self._arriving = Calls("kv-arrivals")
        # Shared.
        self._lock = threading.Lock()
        self._pushes: dict[AttemptId, Push] = {}

    # --- node thread ---------------------------------------------------------------------------

    def open(self, effect: OpenTransfer) -> None:
        """Perform `OpenTransfer`; before the step that it is for is given to the engine thread."""
        if self._is_closed:
            return
        lane = self._lanes.get(effect.peer)
        if lane is None:
            lane = self._lanes[effect.peer] = Lane(self._around)
        with self._lock:
            self._pushes[effect.attempt] = Push(Transfer(effect, self._pool), lane)

    def bind(self, effect: BindTransfer, remote: RemotePool, remote_num_blocks: int) -> None:
        """Perform `BindTransfer` with the peer's pool, which holds ``remote_num_blocks`` blocks."""
        with self._lock:
            push = self._pushes.get(effect.ticket.attempt)
        if push is not None:
            push.lane.bind(push, Destination(remote, remote_num_blocks, effect.ticket))

    def stop(self, attempt: AttemptId) -> None:
        """Perform `StopTransfer`. At most the write that is under way is still finished."""
        with self._lock:
            push = self._pushes.pop(attempt, None)
        if push is not None:
            push.lane.stop(push)
        else:  # Its lane has forgotten it, so it writes nothing more of it.
            self._arriving.put(partial(self._post, TransferStopped(attempt)))

    def expect(self, ticket: Ticket) -> None:
        """This worker grants the ticket: called before it is sent."""
        self._arriving.put(partial(self._arrivals.expect, ticket))

    def written(self, news: LayersWritten) -> None:
        """A peer says that it has written this."""
        self._arriving.put(partial(self._arrivals.written, news))

    def verify(self, effect: VerifyTransfer) -> None:
        """Perform `VerifyTransfer`; what matches is handed to the runner before it is reported."""
        self._arriving.put(partial(self._verify, effect))

    def close(self) -> None:
        """Write no more and end the threads. Nothing is posted once this returns."""
        self._is_closed = True
        ending = [self._arriving, *(lane.calls for lane in self._lanes.values())]
        for calls in ending:
            calls.end()
        self._throttle.close()
        for calls in ending:
            calls.join()

    # --- engine thread -------------------------------------------------------------------------

    def begin_step(self, plan: StepPlan) -> None:
        """A step is about to run. Costs nothing more if no row of it is pushed."""
        rows = [row for row in plan.rows if row.pushes]
        self._announced = plan.step_id if rows else None
        if not rows:
            return
        by_lane: dict[Lane, list[tuple[Push, StepRow]]] = {}
        with self._lock:
            for row in rows:
                if (push := self._pushes.get(row.attempt)) is not None:
                    by_lane.setdefault(push.lane, []).append((push, row))
        self._step = tuple(by_lane)
        for lane, its_rows in by_lane.items():
            lane.begin_step(its_rows)

    def layer_done(self, step_id: StepId, layer: int) -> None:
        """All KV of ``layer`` is finished for the rows of the step. Layers come in order."""
        if step_id == self._announced:
            for lane in self._step:
                lane.layer_done(layer)

    def end_step(self, step_id: StepId, ok: bool) -> None:
        """The step has ended. If it failed, nothing more is written for its rows."""
        if step_id == self._announced:
            self._announced = None
            for lane in self._step:
                lane.end_step(ok)

    # --- threads of lanes ----------------------------------------------------------------------

    def _over(self, push: Push) -> None:
        with self._lock:
            if self._pushes.get(push.transfer.attempt) is push:
                del self._pushes[push.transfer.attempt]

    # --- arrivals thread -----------------------------------------------------------------------

    def _verify(self, effect: VerifyTransfer) -> None:
        try:
            detail = self._arrivals.verify(effect)
            if detail is None:
                self._runner.write_kv(effect.block_ids)
        except Exception as error:  # Not usable, for whatever reason: the attempt is tried again.
            detail = f"{type(error).__name__}: {error}"
        self._post(TransferVerified(attempt=effect.attempt, detail=detail))
