"""The transfers of one worker to one peer, and the thread that writes them.

Each peer has a lane, because a write waits for its receiver: one that stalls holds up nobody else.
What is told to a lane is done in the order in which it was told, and its thread alone touches the
state of its transfers and alone writes. That is the fence: a `TransferStopped` comes after the last
write of that attempt, whatever other threads do. If a write failed of which bytes may still be on
their way to another host, it comes when they can no more land (`RemotePool.settle`), and nothing
else waits for that.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from queue import SimpleQueue
from typing import Protocol

from pdserve.core.effects import Input, TransferFailed, TransferSent, TransferStopped
from pdserve.core.ids import BlockId, WorkerId
from pdserve.core.step import StepRow
from pdserve.transport.base import RemotePool
from pdserve.transport.link_faults import Throttle
from pdserve.transport.progress import LayersWritten
from pdserve.transport.transfer import Destination, Transfer


class KvRunner(Protocol):
    """What a push needs of ``engine.base.ModelRunner``: `read_kv` on the thread of each lane,
    `write_kv` on the one that checks what arrives."""

    def read_kv(self, layer: int, block_ids: Sequence[BlockId]) -> None: ...

    def write_kv(self, block_ids: Sequence[BlockId]) -> None: ...


class Calls:
    """A thread that does what it is told, in order."""

    def __init__(self, name: str) -> None:
        self._queue: SimpleQueue[Callable[[], None] | None] = SimpleQueue()
        self._closing = False
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)
        self._thread.start()

    def put(self, call: Callable[[], None]) -> None:
        """From any thread. ``call`` does not raise."""
        self._queue.put(call)

    @property
    def is_closing(self) -> bool:
        return self._closing

    def end(self) -> None:
        """Begin nothing more."""
        self._closing = True
        self._queue.put(None)

    def join(self) -> None:
        """Wait for what was under way."""
        self._thread.join()

    def _run(self) -> None:
        while (call := self._queue.get()) is not None:
            if not self._closing:
                call()


@dataclass(slots=True, eq=False)
class Push:
    """One attempt, from `OpenTransfer` until it is sent, failed or stopped (not ``is_live``).
    ``is_stopping`` only makes a stop take effect early; ``failed_at`` is where a write failed."""

    transfer: Transfer
    lane: Lane
    is_live: bool = True
    is_stopping: bool = False
    failed_at: RemotePool | None = None


@dataclass(frozen=True, slots=True)
class Surroundings:
    """What all lanes of a worker share; called on their threads. ``over``: nothing more will be
    written or posted of this push."""

    runner: KvRunner
    post: Callable[[Input], None]
    announce: Callable[[WorkerId, LayersWritten], None]
    throttle: Throttle
    over: Callable[[Push], None]


class Lane:
    """Its methods may be called from any thread; none waits. ``calls`` is its owner's to end."""

    def __init__(self, around: Surroundings) -> None:
        self._around = around
        self._step: Sequence[Push] = ()
        self.calls = Calls("kv-transfer")

    def bind(self, push: Push, destination: Destination) -> None:
        self.calls.put(partial(self._bind, push, destination))

    def stop(self, push: Push) -> None:
        """At most the write that is under way is still finished."""
        push.is_stopping = True
        self.calls.put(partial(self._stop, push))

    def begin_step(self, rows: Sequence[tuple[Push, StepRow]]) -> None:
        """A step begins that computes these rows."""
        self.calls.put(partial(self._begin_step, rows))

    def layer_done(self, layer: int) -> None:
        self.calls.put(partial(self._layer_done, layer))

    def end_step(self, ok: bool) -> None:
        self.calls.put(partial(self._end_step, ok))

    # --- the lane's thread ---------------------------------------------------------------------

    def _bind(self, push: Push, destination: Destination) -> None:
        if push.is_live and not push.transfer.is_bound:
            push.transfer.bind(destination)
            self._advance(push)

    def _stop(self, push: Push) -> None:
        push.is_live = False
        attempt = push.transfer.attempt
        if push.failed_at is None:
            self._around.post(TransferStopped(attempt))
        else:
            settled = partial(self._around.post, TransferStopped(attempt))
            push.failed_at.settle(partial(self.calls.put, settled))

    def _begin_step(self, rows: Sequence[tuple[Push, StepRow]]) -> None:
        live = [(push, row) for push, row in rows if push.is_live]
        for push, row in live:
            push.transfer.begin_row(row)
        self._step = [push for push, _ in live]

    def _layer_done(self, layer: int) -> None:
        for push in self._step:
            push.transfer.layer_done(layer)
            self._advance(push)

    def _end_step(self, ok: bool) -> None:
        for push in self._step:
            if ok:
                push.transfer.end_row()
                self._advance(push)
            elif push.is_live:
                # The machine stops it or not: either way there is nothing left to say.
                push.is_live = False
                self._around.over(push)
        self._step = ()

    def _advance(self, push: Push) -> None:
        """Write all that may go now, and tell when that was everything."""
        if not push.is_live:
            return  # It failed or was stopped in the middle of a step.
        transfer = push.transfer
        try:
            self._write(push)
        except Exception as error:  # Whatever broke the write: the attempt is tried again.
            push.is_live = False
            push.failed_at = transfer.remote
            detail = f"{type(error).__name__}: {error}"
            self._around.post(TransferFailed(attempt=transfer.attempt, detail=detail))
            return
        if transfer.is_written and self._may_write(push):
            push.is_live = False
            chunks, num_bytes = transfer.digests(), transfer.num_bytes
            sent = TransferSent(attempt=transfer.attempt, chunks=chunks, num_bytes=num_bytes)
            self._around.post(sent)
            self._around.over(
                push
            )  # Only now: whoever stops what is forgotten is answered at once.

    def _write(self, push: Push) -> None:
        transfer, throttle = push.transfer, self._around.throttle
        while self._may_write(push):
            begun_s = throttle.begin()
            if (chunk := transfer.write_next(self._around.runner.read_kv)) is None:
                break
            throttle.end(transfer.peer, begun_s)
            if (news := transfer.news_of(chunk)) is not None:
                self._around.announce(transfer.peer, news)

    def _may_write(self, push: Push) -> bool:
        return not self.calls.is_closing and not push.is_stopping
