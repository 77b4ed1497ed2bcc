"""Worker processes: started, watched, restarted, and never outliving the gateway.

One `Launcher` owns the processes of all worker slots. A slot is started with epoch 1; when its
process ends, whatever the reason, the gateway hears so (`exited`), and the slot is started again
with the next epoch, after a pause by the rule of ``core.restarts``.

A process is started by exec, never forked into running code, and gets its `WorkerStart` on standard
input: the cluster secret is in it, so it is in no argument list. Its standard output and standard
error come back through one pipe, line by line. It leads a process group of its own, so that Ctrl-C
in a terminal reaches the gateway alone, which then decides. Its end is seen through a pidfd,
without a signal handler or a thread.

A worker dies with its launcher: it asks the kernel for that (`PR_SET_PDEATHSIG`) as its first act,
and it also ends when its link to the gateway closes.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import math
import os
import signal
import subprocess
import sys
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from pdserve.core.ids import Epoch, WorkerId
from pdserve.core.restarts import Restarts
from pdserve.serve.links import new_address

log = logging.getLogger(__name__)

USER_ERROR_STATUS = 2
"""Exit status by which a worker says that its options, not its luck, are at fault."""

WORKER_ENVIRONMENT = {"OMP_WAIT_POLICY": "PASSIVE"}
"""What workers inherit unless the user says otherwise: OpenMP threads that sleep between products
instead of spinning on the cores of other workers."""

_KEPT_LINES = 40


def worker_command() -> tuple[str, ...]:
    """Command line of a worker process; what it is to be comes on its standard input."""
    return (sys.executable, "-m", "pdserve", "worker")


class Child:
    """One process of a worker slot, from exec to exit."""

    def __init__(
        self,
        command: Sequence[str],
        start_document: bytes,
        *,
        said: Callable[[str], None],
        ended: Callable[[Child], None],
    ) -> None:
        self.lines: deque[str] = deque(maxlen=_KEPT_LINES)
        self._said = said
        self._ended = ended
        self._partial = b""
        self._process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            process_group=0,
            env={**WORKER_ENVIRONMENT, **os.environ},
        )
        self.pid = self._process.pid
        self._pidfd = os.pidfd_open(self.pid)
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        with contextlib.suppress(BrokenPipeError):  # it died at once; the pidfd tells
            self._process.stdin.write(start_document)
            self._process.stdin.flush()
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.close()
        self._output = self._process.stdout.fileno()
        os.set_blocking(self._output, False)
        loop = asyncio.get_running_loop()
        loop.add_reader(self._output, self._read_output)
        loop.add_reader(self._pidfd, self._on_exit)

    @property
    def detail(self) -> str:
        """How the process ended, with the last thing it said."""
        status = self._process.returncode
        if status is None:
            return "running"
        how = f"killed by {signal.Signals(-status).name}" if status < 0 else f"exit status {status}"
        return f"{how}: {self.lines[-1]}" if status > 0 and self.lines else how

    @property
    def status(self) -> int | None:
        """Exit status; negative for a signal, None while it runs."""
        return self._process.returncode

    def kill(self) -> None:
        """SIGKILL. The exit is heard of as any other."""
        if self._process.returncode is None:
            self._process.kill()

    def _read_output(self) -> None:
        try:
            data = os.read(self._output, 65536)
        except BlockingIOError:
            return
        if not data:
            asyncio.get_running_loop().remove_reader(self._output)
            return
        *lines, self._partial = (self._partial + data).split(b"\n")
        for line in lines:
            self._take_line(line)

    def _take_line(self, line: bytes) -> None:
        text = line.decode(errors="replace").rstrip()
        if text:
            self.lines.append(text)
            self._said(text)

    def _on_exit(self) -> None:
        loop = asyncio.get_running_loop()
        loop.remove_reader(self._pidfd)
        loop.remove_reader(self._output)
        os.close(self._pidfd)
        self._process.wait()  # returns at once: the pidfd is readable
        assert self._process.stdout is not None
        with contextlib.suppress(BlockingIOError):  # a grandchild may hold the pipe open
            while data := os.read(self._output, 65536):
                self._partial += data
        for line in self._partial.split(b"\n"):
            self._take_line(line)
        self._process.stdout.close()
        self._ended(self)


@dataclass(slots=True)
class _Slot:
    """A place for one worker: at most one process at a time, epochs that only grow."""

    worker: WorkerId
    epoch: Epoch
    child: Child | None = None
    restart: asyncio.TimerHandle | None = None
    restarts: Restarts = field(default_factory=Restarts)
    waits: bool = False
    ready_since_s: float | None = None
    was_ever_ready: bool = False


class Launcher:
    """Keeps one process per slot alive until `stop`. Used on the event loop's thread only.

    ``start_document(worker, epoch, address)`` gives the bytes for its standard input; the address,
    new for each process, is where it takes links of other workers. ``exited`` hears of every end of
    a process while the launcher is not stopping. ``unusable`` hears of a slot whose process says
    that it can never work: exit status 2 before it was ever ready; it is not started again.
    ``said`` gets each line that a process writes.
    """

    def __init__(
        self,
        workers: Sequence[WorkerId],
        start_document: Callable[[WorkerId, Epoch, str], bytes],
        *,
        exited: Callable[[WorkerId, Epoch, str], None],
        unusable: Callable[[WorkerId, str], None],
        said: Callable[[WorkerId, str], None],
        command: Sequence[str] | None = None,
    ) -> None:
        self._slots = {worker: _Slot(worker, Epoch(0)) for worker in workers}
        self._start_document = start_document
        self._exited = exited
        self._unusable = unusable
        self._said = said
        self._command = worker_command() if command is None else tuple(command)
        self._stopping = False
        self._all_gone: asyncio.Future[None] | None = None

    def start(self) -> None:
        """Start every slot's first process; they load their models side by side."""
        for slot in self._slots.values():
            self._start(slot)

    def expects(self, worker: WorkerId, epoch: Epoch) -> bool:
        """Does this very process of the slot run?"""
        slot = self._slots.get(worker)
        return slot is not None and slot.child is not None and slot.epoch == epoch

    def slots(self) -> tuple[tuple[WorkerId, Epoch, int | None], ...]:
        """(worker, latest epoch, process id or None) of every slot."""
        return tuple(
            (slot.worker, slot.epoch, slot.child.pid if slot.child else None)
            for slot in self._slots.values()
        )

    def ready(self, worker: WorkerId, epoch: Epoch) -> None:
        """The process said hello: from now on its health counts."""
        slot = self._slots[worker]
        if slot.epoch == epoch:
            slot.was_ever_ready = True
            slot.ready_since_s = time.monotonic()

    def kill(self, worker: WorkerId, epoch: Epoch) -> None:
        """SIGKILL this process of the slot, if it still runs; a later one is left alone."""
        slot = self._slots.get(worker)
        if slot is not None and slot.epoch == epoch and slot.child is not None:
            slot.child.kill()

    def hold(self, worker: WorkerId, for_s: float | None) -> None:
        """Start the slot's next process so long after its present one has ended; None: not before
        `release`. It holds for one end."""
        self._slots[worker].restarts.hold(for_s)

    def release(self) -> None:
        """Hold no slot any more: whoever waits is started."""
        for slot in self._slots.values():
            slot.restarts.release()
            if slot.waits and not self._stopping:
                if slot.restart is not None:
                    slot.restart.cancel()
                self._start(slot)

    async def stop(self, grace_s: float) -> None:
        """Wait for every process to end by itself, kill what is left after ``grace_s``.

        The caller has closed the links already, which is what tells a worker to end.
        """
        self._stopping = True
        self._all_gone = asyncio.get_running_loop().create_future()
        for slot in self._slots.values():
            if slot.restart is not None:
                slot.restart.cancel()
        self._check_all_gone()
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(asyncio.shield(self._all_gone), grace_s)
        for slot in self._slots.values():
            if slot.child is not None:
                slot.child.kill()
        await self._all_gone

    def _start(self, slot: _Slot) -> None:
        slot.restart = None
        slot.waits = False
        slot.epoch = Epoch(slot.epoch + 1)
        slot.ready_since_s = None
        epoch = slot.epoch
        document = self._start_document(slot.worker, epoch, new_address())
        try:
            slot.child = Child(
                self._command,
                document,
                said=lambda line: self._said(slot.worker, line),
                ended=lambda child: self._on_end(slot, epoch, child),
            )
        except OSError as error:  # no memory or no process id left: later there may be
            log.error("cannot start a process for %s: %s", slot.worker, error)
            self._start_later(slot)
            return
        log.info("worker started: worker=%s epoch=%d pid=%d", slot.worker, epoch, slot.child.pid)

    def _on_end(self, slot: _Slot, epoch: Epoch, child: Child) -> None:
        slot.child = None
        if self._stopping:
            self._check_all_gone()
            return
        log.warning("worker ended: worker=%s epoch=%d (%s)", slot.worker, epoch, child.detail)
        if child.status == USER_ERROR_STATUS and not slot.was_ever_ready:
            self._unusable(slot.worker, child.lines[-1] if child.lines else child.detail)
            return
        self._start_later(slot)
        self._exited(slot.worker, epoch, child.detail)

    def _start_later(self, slot: _Slot) -> None:
        ready_s = None if slot.ready_since_s is None else time.monotonic() - slot.ready_since_s
        pause_s = slot.restarts.pause_s(ready_s)
        slot.waits = True
        if math.isfinite(pause_s):
            slot.restart = asyncio.get_running_loop().call_later(pause_s, self._start, slot)

    def _check_all_gone(self) -> None:
        gone = self._all_gone
        if gone is not None and not gone.done() and not any(s.child for s in self._slots.values()):
            gone.set_result(None)
