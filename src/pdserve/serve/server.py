"""``pdserve serve``: everything from a resolved config to exit status 0.

The order of a life: bind the port (so that a taken one is told at once), start the gateway and the
worker processes, answer HTTP, and say so when every worker is ready. On SIGTERM or SIGINT: refuse
new requests, let running ones finish for as long as ``--drain-timeout``, end what is left with an
error, stop HTTP, close the links, see every worker process end. A second signal skips the waiting.
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
import json
import logging
import os
import secrets
import signal
import socket
import sys
from collections.abc import Callable
from typing import TYPE_CHECKING

from pdserve.config import ServeConfig
from pdserve.core.commands import DrainOne
from pdserve.core.effects import Refusal
from pdserve.core.errors import ConfigError
from pdserve.core.ids import GATEWAY, Epoch, WorkerId
from pdserve.node.router import RouterNode
from pdserve.node.settings import RoleControl, RouterSettings
from pdserve.obs import logs
from pdserve.policy.registry import make_policy
from pdserve.serve.cluster_secret import require_secret
from pdserve.serve.deployment import Deployment
from pdserve.serve.fits import FitFiles, known_costs
from pdserve.serve.gateway import LiveGateway
from pdserve.serve.greetings import Identity
from pdserve.serve.guests import GuestEvents, Guests, Supervisors
from pdserve.serve.launcher import Launcher
from pdserve.serve.links import new_address
from pdserve.serve.recorder import recorder_of
from pdserve.serve.roster import Outside
from pdserve.transport.tls import load_tls
from pdserve.weights.identity import served_digest

if TYPE_CHECKING:
    from pdserve.serve.edge_files import EdgeFiles
    from pdserve.serve.http import HttpServer

log = logging.getLogger(__name__)

WORKER_GRACE_S = 3.0
PATIENCE = 3
"""A request lets others pass for this part of the time that it may wait at all."""

GC_THRESHOLD = 10_000
"""Objects that may come into being before the collector looks at the young ones."""


def bind(host: str, port: int) -> socket.socket:
    """A listening TCP socket. Raises `ConfigError` if the address cannot be had."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        bound = socket.socket(family, kind, protocol)
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            bound.bind(address)
            bound.listen(2048)
        except OSError:
            bound.close()
            raise
    except OSError as error:
        raise ConfigError(
            f"cannot listen on {host}:{port}: {error.strerror or error}; choose another --host or "
            "--port (0 takes a free one)"
        ) from error
    return bound


def spare_the_collector() -> None:
    """Have Python's cycle collector look less often, and not at what is loaded now, which stays.

    A look at everything stops all streams for tens of ms. Requests leave few cycles behind.
    """
    gc.collect()
    gc.freeze()
    gc.set_threshold(GC_THRESHOLD)


def cluster_secret(config: ServeConfig) -> bytes:
    """What all processes of the cluster prove to each other. Raises `ConfigError` if hosts are to
    share one that is not given."""
    if config.listen_workers is None:
        return secrets.token_bytes(32)
    return require_secret(config.cluster_secret_file, os.environ, "--listen-workers")


class Server:
    """One server process: gateway, HTTP and the launcher of its workers."""

    def __init__(
        self, deployment: Deployment, ready: Callable[[str], None], files: EdgeFiles
    ) -> None:
        """``ready`` is called with the base URL once every worker can serve."""
        self._deployment = deployment
        self._files = files
        self._config: ServeConfig = deployment.config
        self._ready = ready
        self._stop = asyncio.Event()
        self._at_once = asyncio.Event()
        self._http: HttpServer | None = None
        self._failure: str | None = None
        self._user_error: str | None = None
        secret = cluster_secret(self._config)
        gateway_address = new_address()
        self._launcher = Launcher(
            list(deployment.roles),
            lambda worker, epoch, address: deployment.worker_start(
                worker, epoch, secret=secret, gateway_address=gateway_address, address=address
            ).encode(),
            exited=lambda worker, epoch, detail: self._gateway.worker_ended(worker, epoch, detail),
            unusable=self._unusable,
            said=self._worker_said,
        )
        self._guests = self._make_guests()
        self._fits = FitFiles()
        settings = RouterSettings(
            queue_timeout_s=self._config.queue_timeout,
            patience_s=self._config.queue_timeout / PATIENCE,
            admission=self._config.admission_policy,
            roles=RoleControl(self._config.roles),
            costs=known_costs(deployment, self._fits),
        )
        self._router = RouterNode(settings, make_policy(self._config.policy))
        self._gateway = LiveGateway(
            card=deployment.card,
            machine=self._router,
            address=gateway_address,
            identity=Identity(worker=GATEWAY, epoch=Epoch(0), role=None, secret=secret),
            roles=deployment.roles,
            supervisor=Supervisors(self._launcher, self._guests),
            recorder=recorder_of(self._config.record, self._config.policy, router=settings),
            crashed=self._fail,
            allow_faults=self._config.allow_faults,
            books=self._router.books,
            policy=self._config.policy,
            outside=self._outside(),
        )

    def _make_guests(self) -> Guests:
        events = GuestEvents(
            digest=lambda: asyncio.to_thread(served_digest, self._deployment.model_path),
            start=self._deployment.guest_start,
            came=lambda worker, role, host: self._gateway.admit(worker, role, host),
            ended=lambda worker, epoch, detail: self._gateway.worker_ended(worker, epoch, detail),
            left=lambda worker: self._gateway.dismiss(worker),
            drain=lambda worker: self._gateway.command(DrainOne(command=0, worker=worker)),
        )
        return Guests(list(self._deployment.roles), events)

    def _outside(self) -> Outside:
        """Workers of other hosts come in if the config says where."""
        if self._config.listen_workers is None:
            return Outside()
        return Outside(
            listen=self._config.listen_workers,
            tls=load_tls(self._config.cluster_tls),
            joining=self._guests.joining,
        )

    async def run(self, bound: socket.socket) -> int:
        """Serve until a signal or a failure. Gives the exit status; raises `ConfigError`."""
        loop = asyncio.get_running_loop()
        for number in (signal.SIGINT, signal.SIGTERM):
            loop.add_signal_handler(number, self._on_signal, number)
        if self._files.can_change:  # else a terminal that is closed ends the server
            loop.add_signal_handler(signal.SIGHUP, self._files.reload)
        learned = self._router.books.learned
        saving = asyncio.ensure_future(self._fits.keep_saving(learned.saved))
        try:
            self._launcher.start()
            await self._serve_http(bound)
        finally:
            saving.cancel()
            self._fits.save(learned.saved())
            self._gateway.close()
            self._guests.close()
            await self._launcher.stop(0.0 if self._at_once.is_set() else WORKER_GRACE_S)
        if self._user_error is not None:
            raise ConfigError(self._user_error)
        return 0 if self._failure is None else 1

    async def _serve_http(self, bound: socket.socket) -> None:
        """From the first request to the last response."""
        # Loaded while the workers load their models: it takes a second, and they are not idle.
        from pdserve.serve.http import http_server

        http = http_server(self._gateway, self._deployment.model_path, self._files)
        serving = asyncio.ensure_future(http.serve(sockets=[bound]))
        serving.add_done_callback(lambda _: self._stop.set())
        announcing = asyncio.ensure_future(self._announce(bound))
        self._http = http
        try:
            await self._stop.wait()
            announcing.cancel()
            await self._drain()
        finally:
            http.should_exit = True
            http.force_exit = self._at_once.is_set()
            await asyncio.wait((serving,))
        serving.result()

    async def _announce(self, bound: socket.socket) -> None:
        await self._gateway.until_ready()
        spare_the_collector()
        host, port = bound.getsockname()[:2]
        scheme = "http" if self._files.ssl is None else "https"
        with contextlib.suppress(OSError):  # nobody reads what is printed
            self._ready(
                f"{scheme}://[{host}]:{port}" if ":" in host else f"{scheme}://{host}:{port}"
            )

    async def _drain(self) -> None:
        if self._failure is None and self._user_error is None:
            log.info("draining for up to %g s; a second signal stops at once", self._timeout_s)
            waits = [
                asyncio.ensure_future(self._gateway.drain()),
                asyncio.ensure_future(self._at_once.wait()),
            ]
            await asyncio.wait(waits, timeout=self._timeout_s, return_when=asyncio.FIRST_COMPLETED)
            for wait in waits:
                wait.cancel()
        self._gateway.fail_all(Refusal.DRAINING, "the server is shutting down")

    @property
    def _timeout_s(self) -> float:
        return self._config.drain_timeout

    def _on_signal(self, number: int) -> None:
        if self._stop.is_set():
            self._at_once.set()
            if self._http is not None:
                self._http.force_exit = self._http.should_exit
        log.info("%s received", signal.Signals(number).name)
        self._stop.set()

    def _fail(self, reason: str) -> None:
        self._failure = reason
        self._stop.set()

    def _unusable(self, worker: WorkerId, detail: str) -> None:
        self._user_error = f"{worker} cannot start: {detail}"
        self._stop.set()

    def _worker_said(self, worker: WorkerId, line: str) -> None:
        """A line of a worker's output: its log lines stay what they are, and name it."""
        if self._config.log_format == "json":
            try:
                document = json.loads(line)
                line = json.dumps({**document, "worker": worker})
            except (ValueError, TypeError):
                log.warning("%s: %s", worker, line)
                return
        else:
            line = f"{worker}: {line}"
        with contextlib.suppress(OSError):
            sys.stderr.write(line + "\n")
            sys.stderr.flush()


def serve(deployment: Deployment, ready: Callable[[str], None]) -> int:
    """Run the server in this process. Gives the exit status; raises `ConfigError`."""
    logs.setup(deployment.config.log_format)
    for handler in logging.getLogger(logs.LOGGER_NAME).handlers:
        logging.getLogger("uvicorn").addHandler(handler)
    logging.getLogger("uvicorn").setLevel(logging.WARNING)
    from pdserve.serve.edge_files import EdgeFiles

    files = EdgeFiles(deployment.config)
    bound = bind(deployment.config.host, deployment.config.port)
    files.warn(bound.getsockname()[0])

    async def run() -> int:
        return await Server(deployment, ready, files).run(bound)

    with bound:
        return asyncio.run(run())
