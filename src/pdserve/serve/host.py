"""``pdserve worker --join``: a host that brings a worker to a server's cluster.

The life of one: it names its weights, makes a link to the gateway, proves the cluster secret and
asks to join. It is told what to run, starts that as a process of its own, and starts the next one,
after a pause that grows, whenever one ends; each gets a newer epoch from the gateway. When the
gateway is gone, so is the use of the process: it ends, and the host asks again, with a pause that
grows, until somebody answers. SIGTERM or SIGINT: the gateway sends the worker nothing new, and says
when it holds nothing; then the process is ended and the host leaves. A second signal does not wait.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import signal
import ssl
import sys
import time
from dataclasses import dataclass, replace

from pdserve.core.errors import ConfigError, ProtocolError
from pdserve.core.ids import Epoch
from pdserve.core.layout import pool_dtype
from pdserve.core.restarts import Restarts
from pdserve.obs import logs
from pdserve.serve.deployment import block_bytes_of, num_cores, num_pool_blocks
from pdserve.serve.greetings import Identity, greet
from pdserve.serve.join_arguments import JoinConfig
from pdserve.serve.launcher import USER_ERROR_STATUS, Child, worker_command
from pdserve.serve.links import Link, connect, new_address
from pdserve.serve.roster import HOST_EPOCH
from pdserve.serve.start import WorkerStart
from pdserve.transport.joining import (
    EndProcess,
    Join,
    Joined,
    Leave,
    NotJoined,
    ProcessBegan,
    ProcessEnded,
)
from pdserve.transport.tls import Tls, load_tls
from pdserve.transport.wire import WireMessage
from pdserve.weights.config import ModelConfig
from pdserve.weights.identity import served_digest

log = logging.getLogger(__name__)

CLOSING = "closing"
ENDS_ALONE_S = 1.0
"""How long a process may take to end by itself once it has lost the gateway."""


@dataclass(slots=True, eq=False)
class _Running:
    """The process that runs now. ``is_over`` holds from its end on."""

    child: Child
    epoch: Epoch
    began_s: float
    is_over: asyncio.Event


class Host:
    """One worker slot of another server, on this host. Used on one event loop."""

    def __init__(self, config: JoinConfig, digest: str) -> None:
        """``digest`` names the weights that are here."""
        self._config = config
        self._digest = digest
        self._tls = load_tls(config.tls)
        self._restarts = Restarts()
        self._leaving = asyncio.Event()
        self._at_once = asyncio.Event()
        self._running: _Running | None = None
        self._heard: asyncio.Queue[WireMessage] = asyncio.Queue()
        self._link_ended = asyncio.Event()
        self._ran_s = 0.0

    def on_signal(self, number: int) -> None:
        """The first one: leave; the second one: at once."""
        log.info("%s received", signal.Signals(number).name)
        if self._leaving.is_set():
            self._at_once.set()
        self._leaving.set()

    async def run(self) -> int:
        """Take part until a signal. Gives the exit status; raises `ConfigError` for what no other
        attempt can mend."""
        retries = Restarts()
        try:
            while not self._leaving.is_set():
                began_s = time.monotonic()
                try:
                    link = await self._connect()
                except (OSError, ProtocolError) as error:
                    log.warning("%s: %s", self._config.gateway, reason_of(error, self._tls))
                else:
                    try:
                        await self._take_part(link)
                    finally:
                        link.close(CLOSING)
                        await self._end_process(ENDS_ALONE_S)
                if not self._leaving.is_set():
                    await self._pause(retries.pause_s(time.monotonic() - began_s))
        finally:
            await self._end_process(0.0)
        return 0

    async def _connect(self) -> Link:
        """A link to the gateway, on which both have proved themselves."""
        link = await connect(self._config.gateway, self._tls)
        identity = Identity(
            worker=self._config.worker,
            epoch=HOST_EPOCH,
            role=self._config.role,
            secret=self._config.secret,
            family=self._config.worker,
        )
        await greet(link, identity, None)
        self._heard = asyncio.Queue()
        self._link_ended = ended = asyncio.Event()

        def on_end(reason: str) -> None:
            if reason != CLOSING:
                log.warning("link to the gateway: %s", reason)
            ended.set()

        link.open(self._heard.put_nowait, on_end)
        return link

    async def _take_part(self, link: Link) -> None:
        """Until the link ends, or this host has left."""
        while not self._link_ended.is_set() and not self._leaving.is_set():
            joined = await self._join(link)
            if joined is None:
                continue
            await self._run_process(link, joined)
            if self._leaving.is_set() or self._link_ended.is_set():
                return
            await self._pause(self._restarts.pause_s(self._ran_s))

    async def _join(self, link: Link) -> Joined | None:
        """Ask once. None if the answer was to ask again later, or there was none."""
        config = self._config
        link.send(Join(worker=config.worker, role=config.role, weights_digest=self._digest))
        answer = await self._hear()
        if isinstance(answer, Joined):
            return answer
        if isinstance(answer, NotJoined):
            if answer.is_final:
                raise ConfigError(f"the server does not take {config.worker}: {answer.detail}")
            log.warning("not yet: %s", answer.detail)
            await self._pause(self._restarts.pause_s(None))
        return None

    async def _run_process(self, link: Link, joined: Joined) -> None:
        """From its start to its end, whoever wants that."""
        running = self._start(link, joined)
        self._running = running
        link.send(ProcessBegan(epoch=running.epoch, pid=running.child.pid))
        log.info("joined %s: process %d", self._config.gateway, running.epoch)
        print_joined(self._config, running)
        leave_sent = False
        while not running.is_over.is_set():
            if self._leaving.is_set() and not leave_sent:
                leave_sent = True
                link.send(Leave())
                asyncio.get_running_loop().call_later(
                    self._config.drain_timeout_s, running.child.kill
                )
            message = await self._hear(running.is_over, wakes_to_leave=not leave_sent)
            if isinstance(message, EndProcess) and message.epoch == running.epoch:
                # One that has given up by itself gets the time to say why.
                await self._end_process(ENDS_ALONE_S)
            if self._link_ended.is_set() or self._at_once.is_set():
                await self._end_process(0.0 if self._at_once.is_set() else ENDS_ALONE_S)
        log.info("process %d has ended: %s", running.epoch, running.child.detail)
        link.send(ProcessEnded(epoch=running.epoch, detail=running.child.detail))
        self._running = None
        self._ran_s = time.monotonic() - running.began_s
        if running.child.status == USER_ERROR_STATUS:
            link.send(Leave())
            raise ConfigError(f"the worker cannot run here: {running.child.detail}")

    def _start(self, link: Link, joined: Joined) -> _Running:
        over = asyncio.Event()
        start = self._start_of(link, WorkerStart.decode(joined.start))
        child = Child(worker_command(), start.encode(), said=_said, ended=lambda _: over.set())
        return _Running(child, joined.epoch, time.monotonic(), over)

    def _start_of(self, link: Link, told: WorkerStart) -> WorkerStart:
        """What the gateway said, and what only this host knows."""
        config = self._config
        model = ModelConfig.from_folder(config.model_path)
        dtype = pool_dtype(told.dtype, told.kv_dtype)
        block_bytes = block_bytes_of(model, told.block_size, dtype)
        return replace(
            told,
            secret=config.secret,
            gateway_address=config.gateway,
            address=new_address(),
            launcher_pid=os.getpid(),
            model_path=str(config.model_path),
            device=config.device,
            threads=config.threads or num_cores(),
            num_blocks=config.kv_blocks or num_pool_blocks(config.kv_memory, block_bytes, 1),
            listen=config.listen or (link.local_host, 0),
            family=config.worker,
            tls=config.tls,
            log_format=config.log_format,
        )

    async def _hear(
        self, also: asyncio.Event | None = None, *, wakes_to_leave: bool = True
    ) -> WireMessage | None:
        """The gateway's next word; None if something else has happened."""
        events = [self._link_ended, self._at_once]
        events += [self._leaving] if wakes_to_leave else []
        events += [] if also is None else [also]
        hearing = asyncio.ensure_future(self._heard.get())
        waits = [asyncio.ensure_future(event.wait()) for event in events]
        await asyncio.wait((hearing, *waits), return_when=asyncio.FIRST_COMPLETED)
        for wait in waits:
            wait.cancel()
        if hearing.done():
            return hearing.result()
        hearing.cancel()
        return None

    async def _pause(self, seconds: float) -> None:
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self._leaving.wait(), seconds)

    async def _end_process(self, grace_s: float) -> None:
        """It may end by itself for so long; then it is killed."""
        running = self._running
        if running is None:
            return
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(running.is_over.wait(), grace_s)
        running.child.kill()
        await running.is_over.wait()


def reason_of(error: OSError | ProtocolError, tls: Tls | None) -> str:
    """Why there is no link, and what to look at."""
    if isinstance(error, ssl.SSLError):
        return (
            f"TLS: {error}; the server needs --cluster-tls-cert, -key and -ca as this host does, "
            "and certificates of one authority"
        )
    if isinstance(error, ConnectionRefusedError):
        return "nobody takes links there; is the server up, with this as its --listen-workers?"
    if isinstance(error, OSError) or "run the same build" in str(error):
        return str(error)
    other = "has it no TLS, unlike this host?" if tls else "does it want TLS (--cluster-tls-cert)?"
    return (
        f"the server ended the greeting ({error}); is the cluster secret the same there, "
        f"and {other}"
    )


def print_joined(config: JoinConfig, running: _Running) -> None:
    """For people, and for scripts that wait for it."""
    with contextlib.suppress(OSError):
        print(
            f"{config.worker} joins {config.gateway} as a {config.role} worker "
            f"(process {running.epoch}, pid {running.child.pid})",
            flush=True,
        )


def _said(line: str) -> None:
    with contextlib.suppress(OSError):
        sys.stderr.write(line + "\n")
        sys.stderr.flush()


def bring_worker(config: JoinConfig) -> int:
    """Be the host of a worker until a signal. Gives the exit status; raises `ConfigError`."""
    logs.setup(config.log_format)
    digest = served_digest(config.model_path)

    async def run() -> int:
        host = Host(config, digest)
        loop = asyncio.get_running_loop()
        for number in (signal.SIGINT, signal.SIGTERM):
            loop.add_signal_handler(number, host.on_signal, number)
        return await host.run()

    return asyncio.run(run())
