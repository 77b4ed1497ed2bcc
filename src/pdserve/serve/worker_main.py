"""The process of one worker, from its first line to its last.

First it asks the kernel to be killed with its launcher, then it reads from standard input who it
is. It ignores SIGINT and SIGTERM: a stop is the gateway's business, which drains first and then
closes the links. A mistake of the user (a device that is not there, a model that does not fit) ends
it with one line and status 2, by which the launcher knows that starting it again would not help.
"""

from __future__ import annotations

import asyncio
import ctypes
import logging
import os
import signal
import sys

from pdserve.core.errors import PdserveError, ProtocolError
from pdserve.obs import logs
from pdserve.serve.launcher import USER_ERROR_STATUS
from pdserve.serve.runners import load_backend
from pdserve.serve.start import WorkerStart
from pdserve.serve.worker import Worker
from pdserve.transport.base import Transport
from pdserve.transport.registry import create_transport, is_foreign
from pdserve.transport.tcp import SocketOptions
from pdserve.transport.tls import load_tls

log = logging.getLogger(__name__)

_PR_SET_PDEATHSIG = 1
_CRASH_STATUS = 1


def die_with_launcher() -> None:
    """Ask for SIGKILL when the thread that started this process ends (Linux, prctl(2))."""
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0) != 0:
        raise OSError(ctypes.get_errno(), "prctl(PR_SET_PDEATHSIG)")


def main() -> int:
    """Be the worker that standard input describes. Gives the exit status; may not return."""
    die_with_launcher()
    for ignored in (signal.SIGINT, signal.SIGTERM):
        signal.signal(ignored, signal.SIG_IGN)
    try:
        start = WorkerStart.decode(sys.stdin.buffer.read())
        if os.getppid() != start.launcher_pid:
            return _CRASH_STATUS  # it died before the kernel was asked
        logs.setup(start.log_format)
        # Read by the OpenMP runtime when torch is imported, which has not happened yet.
        os.environ["OMP_NUM_THREADS"] = str(start.threads)
        status, joined = asyncio.run(_run(start))
    except PdserveError as error:
        sys.stderr.write(f"{error}\n")
        # A gateway that was busy, or is gone: another start may find it.
        return _CRASH_STATUS if isinstance(error, ProtocolError) else USER_ERROR_STATUS
    if not joined:
        # A step still runs on its thread, and nobody waits for it.
        sys.stderr.flush()
        os._exit(status)
    return status


def make_transport(start: WorkerStart) -> Transport:
    """How its KV moves: within the host as was asked, and to others over sockets."""
    # Committing a GiB of pool, and of each peer's view of it, takes longer than a small model.
    # Touched bit by bit, its pages cost a step next to nothing.
    prefault = {"prefault": False}
    listen = start.listen
    if listen is not None and listen[1]:
        listen = (listen[0], listen[1] + 1)
    sockets = {
        "options": SocketOptions(secret=start.secret, listen=listen, tls=load_tls(start.tls))
    }
    if start.transport == "tcp":
        return create_transport("tcp", **sockets)
    if is_foreign(start.transport):
        return create_transport(start.transport)
    if start.listen is None:
        return create_transport(start.transport, **prefault)
    return create_transport("hosts", **prefault, **sockets)


async def _run(start: WorkerStart) -> tuple[int, bool]:
    """(exit status, whether every thread has ended)."""
    over: asyncio.Future[str] = asyncio.get_running_loop().create_future()

    def ended(reason: str) -> None:
        if not over.done():
            over.set_result(reason)

    transport = make_transport(start)
    worker = Worker(start, lambda: load_backend(start, transport), transport, ended=ended)
    starting = asyncio.ensure_future(worker.run())
    await asyncio.wait((starting, over), return_when=asyncio.FIRST_COMPLETED)
    if starting.done() and not starting.cancelled() and starting.exception() is not None:
        await worker.close()
        starting.result()
    if start.family and not over.done():
        log.info("%s is ready", start.worker)  # on its own host nobody else says so
    reason = await over
    starting.cancel()
    log.info("%s ends: %s", start.worker, reason)
    joined = await worker.close()
    return (_CRASH_STATUS if worker.is_broken else 0), joined
