"""The live driver of the router, and the server as the HTTP edge sees it (``api.gateway``).

One event loop holds the HTTP server, the control links and the `RouterNode`. A submitted request
becomes an input of the router, what the router delivers goes into the request's `TokenStream`, and
whatever ends a worker comes back as `WorkerLost`. Metrics, timelines and log lines derive from the
life events that the router logs; load reports are remembered for ``/cluster`` on their way in.

If the router machine breaks, every open answer ends with an error and the server stops: a router
that is wrong about one request may be wrong about all.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Protocol

from pdserve.api.gateway import FaultHooks, ModelCard
from pdserve.core.commands import Answer, Command, RoleChanged, RolesJudged
from pdserve.core.effects import (
    BeginDrain,
    ClientGone,
    Deliver,
    Effect,
    Fail,
    KillWorker,
    Log,
    Received,
    Refusal,
    Send,
    Started,
    Submit,
    WorkerLost,
    WorkerUp,
)
from pdserve.core.errors import RequestError
from pdserve.core.events import LifeEvent
from pdserve.core.ids import Epoch, RequestId, WorkerId
from pdserve.core.messages import LoadReport, Message
from pdserve.core.request import Request, Role
from pdserve.node.books import ClusterBooks
from pdserve.obs.life import LifeLog
from pdserve.obs.logs import log_life_event
from pdserve.obs.metrics import Metrics
from pdserve.serve.commands import Commands
from pdserve.serve.driver import Driver, Machine, Recorder
from pdserve.serve.faults import LiveFaults
from pdserve.serve.greetings import Identity
from pdserve.serve.roster import Outside, Roster, RosterEvents
from pdserve.serve.streams import TokenStream
from pdserve.serve.traffic import traffic_document

log = logging.getLogger(__name__)

UNLINKED_GRACE_S = 1.0
"""How long a worker without a link to the gateway may take to end by itself ..."""
NEVER_UP_GRACE_S = 10.0
"""... and one that was never up: it has no requests, and its exit status says what is wrong."""


class Supervisor(Protocol):
    """Who keeps the worker processes: the launcher, or a cluster within one process."""

    def expects(self, worker: WorkerId, epoch: Epoch) -> bool:
        """Does this process of the slot run?"""
        ...

    def ready(self, worker: WorkerId, epoch: Epoch) -> None:
        """The process can serve."""
        ...

    def kill(self, worker: WorkerId, epoch: Epoch) -> None:
        """End this process at once. `LiveGateway.worker_ended` follows, as for any end."""
        ...

    def slots(self) -> Sequence[tuple[WorkerId, Epoch, int | None]]:
        """(worker, latest epoch, process id or None) of every slot."""
        ...

    def hold(self, worker: WorkerId, for_s: float | None) -> None:
        """Start no other process of the slot for so long (None: until `release`)."""
        ...

    def release(self) -> None:
        """Hold no slot."""
        ...


@dataclass(slots=True)
class _Known:
    """What the gateway knows of a worker that is up."""

    up: WorkerUp
    report: LoadReport | None = None


class LiveGateway:
    """Implements ``api.gateway.Gateway``. Made and used on one event loop's thread."""

    def __init__(
        self,
        *,
        card: ModelCard,
        machine: Machine,
        address: str,
        identity: Identity,
        roles: Mapping[WorkerId, Role],
        supervisor: Supervisor,
        recorder: Recorder | None = None,
        crashed: Callable[[str], None] = lambda reason: None,
        allow_faults: bool = False,
        books: ClusterBooks | None = None,
        policy: str = "",
        outside: Outside | None = None,
    ) -> None:
        """``books`` of the router that ``machine`` is, and its ``policy``, are for `traffic`.
        ``roles`` of the workers without which it is not ready."""
        self.card = card
        self._awaited = frozenset(roles)
        self._roles = dict(roles)
        self._hosts: dict[WorkerId, str] = {}
        self._supervisor = supervisor
        self._on_crash = crashed
        self._books = books or ClusterBooks()
        self._policy = policy
        self._began_s = time.monotonic()
        self._streams: dict[RequestId, TokenStream] = {}
        self._workers: dict[WorkerId, _Known] = {}
        self._standing = {worker: (role, 0) for worker, role in roles.items()}
        self._judgement: str | None = None
        self._num_requests = 0
        self._num_tokens = 0
        self._draining = False
        self._changed = asyncio.Event()
        self._life = LifeLog()
        self._metrics = Metrics(card.name, card.max_model_tokens)
        self._life.subscribe(self._metrics.on_event)
        self._life.subscribe(log_life_event)
        self._driver = Driver(machine, self._perform, crashed=self._crashed, recorder=recorder)
        self._roster = self._make_roster(address, identity, outside or Outside())
        self._commands = Commands(self._driver.feed)
        faults = LiveFaults(self._roles, self._roster.set_faults, supervisor)
        self.faults: FaultHooks | None = faults if allow_faults else None
        self._driver.feed(Started())

    def _make_roster(self, address: str, identity: Identity, outside: Outside) -> Roster:
        events = RosterEvents(
            expects=self._supervisor.expects,
            up=self._worker_up,
            received=self._received,
            unlinked=self._unlinked,
        )
        return Roster(address, identity, events, outside)

    # --- the edge -----------------------------------------------------------------------------

    def submit(self, request: Request) -> TokenStream:
        """Start the request at once; its tokens come through the stream."""
        request_id = request.request_id
        if request_id in self._streams:
            raise RequestError(f"a request with id {request_id} is running already", "request_id")
        stream = TokenStream(request, lambda: self._client_gone(request_id, None))
        self._streams[request_id] = stream
        self._num_requests += 1
        self._driver.feed(Submit(request))
        return stream

    def stop_choice(self, request_id: RequestId, choice: int) -> None:
        """A stop string ended this choice."""
        stream = self._streams.get(request_id)
        if stream is not None:
            stream.stop(choice)
            self._client_gone(request_id, (choice,))

    async def command(self, asked: Command) -> str:
        return await self._commands.ask(asked)

    @property
    def num_ready(self) -> int:
        """Workers that can serve."""
        return len(self._workers)

    def is_ready(self) -> bool:
        return bool(self._workers) and not self._draining

    def timeline(self, request_id: RequestId) -> tuple[LifeEvent, ...] | None:
        return self._life.timeline(request_id)

    def metrics_text(self) -> bytes:
        return self._metrics.exposition()

    def cluster(self) -> Mapping[str, Any]:
        return {
            "model": self.card.name,
            "max_model_tokens": self.card.max_model_tokens,
            "uptime_s": round(time.monotonic() - self._began_s, 3),
            "draining": self._draining,
            "open_requests": len(self._streams),
            "requests": self._num_requests,
            "output_tokens": self._num_tokens,
            "roles": self._judgement,
            "faults": None if self.faults is None else self.faults.shown(),
            "workers": [
                self._describe(worker, epoch, pid)
                for worker, epoch, pid in self._supervisor.slots()
            ],
        }

    def traffic(self) -> Mapping[str, Any]:
        ups = [known.up for _, known in sorted(self._workers.items())]
        return traffic_document(self.card, self._life, ups, self._books, self._policy)

    def _describe(self, worker: WorkerId, epoch: Epoch, pid: int | None) -> dict[str, Any]:
        role, role_epoch = self._standing[worker]
        known = self._workers.get(worker)
        document: dict[str, Any] = {
            "id": worker,
            "role": role.value,
            "home_role": self._roles[worker].value,
            "role_epoch": role_epoch,
            "pid": pid,
            "epoch": epoch,
            "host": self._hosts.get(worker),
            "state": "down" if pid is None else "starting",
            "device": None,
            "engine": None,
            "numerics": None,
            "load": None,
            "blocks": None,
        }
        if known is None:
            return document
        layout, report = known.up.layout, known.report
        document |= {
            "state": "draining" if report is not None and report.draining else "ready",
            "device": known.up.device,
            "engine": known.up.engine,
            "numerics": None if layout is None else layout.numerics,
        }
        if report is not None:
            blocks = {
                "total": report.total_blocks,
                "free": report.free_blocks,
                "cached": report.cached_blocks,
                "quarantined": report.quarantined_blocks,
                "size_tokens": None if layout is None else layout.block_size,
            }
            skipped = (
                *("total_blocks", "free_blocks", "cached_blocks", "quarantined_blocks"),
                *("role", "role_epoch", "steps", "transfers"),
            )
            load = {name: value for name, value in asdict(report).items() if name not in skipped}
            document |= {"load": load, "blocks": blocks}
        return document

    # --- workers ------------------------------------------------------------------------------

    @property
    def addresses(self) -> tuple[str, ...]:
        """Where workers find it."""
        return self._roster.addresses

    def admit(self, worker: WorkerId, role: Role, host: str) -> None:
        """A slot whose worker another host brings, at this address."""
        if self._roles.get(worker) is not role:
            self._roles[worker] = role
            self._standing[worker] = (role, 0)
        self._hosts[worker] = host

    def dismiss(self, worker: WorkerId) -> None:
        """Its host has left, after the end of the worker."""
        for known in (self._roles, self._standing, self._hosts):
            known.pop(worker, None)

    def worker_ended(self, worker: WorkerId, epoch: Epoch, detail: str) -> None:
        """The supervisor saw the process end. It will neither write nor speak again."""
        known = self._workers.get(worker)
        if known is not None and known.up.epoch == epoch:
            del self._workers[worker]
            self._metrics.on_worker(worker, self._standing[worker][0], False)
        self._roster.remove(worker, epoch)
        self._driver.feed(WorkerLost(worker, epoch, detail))
        self._tell()

    def _worker_up(self, up: WorkerUp) -> None:
        log.info(
            "worker ready: worker=%s epoch=%d pid=%d device=%s engine=%s blocks=%d",
            *(up.worker, up.epoch, up.pid, up.device, up.engine, up.num_blocks),
        )
        self._workers[up.worker] = _Known(up)
        self._metrics.on_worker(up.worker, self._standing[up.worker][0], True)
        self._supervisor.ready(up.worker, up.epoch)
        self._driver.feed(up)
        self._tell()

    def _received(self, worker: WorkerId, epoch: Epoch, message: Message) -> None:
        known = self._workers.get(worker)
        if known is not None and isinstance(message, LoadReport):
            known.report = message
            self._metrics.on_report(worker, self._standing[worker][0], message)
        self._driver.feed(Received(worker, epoch, message))

    def _unlinked(self, worker: WorkerId, epoch: Epoch, reason: str) -> None:
        log.warning("link to %s (process %d) closed: %s", worker, epoch, reason)
        # Most often it is ending, and its exit status says why; a kill would hide that.
        known = self._workers.get(worker)
        was_up = known is not None and known.up.epoch == epoch
        grace_s = UNLINKED_GRACE_S if was_up else NEVER_UP_GRACE_S
        asyncio.get_running_loop().call_later(grace_s, self._supervisor.kill, worker, epoch)

    # --- effects ------------------------------------------------------------------------------

    def _perform(self, effect: Effect) -> None:
        match effect:
            case Send(to, message):
                self._roster.send(to, message)
            case Log(event):
                self._life.append(event)
            case Deliver(request_id, deltas):
                stream = self._streams.get(request_id)
                if stream is not None:
                    self._metrics.on_tokens(request_id, len(deltas), time.monotonic())
                    self._num_tokens += len(deltas)
                    stream.put(deltas)
                    self._forget_if_over(request_id)
            case Fail():
                stream = self._streams.get(effect.request_id)
                if stream is not None:
                    stream.refuse(effect)
                    self._forget_if_over(effect.request_id)
            case Answer():
                self._commands.answered(effect)
            case RoleChanged(worker=worker, role=role, role_epoch=role_epoch, reason=reason):
                log.info("%s is of role %s now: %s", worker, role, reason)
                self._standing[worker] = (role, role_epoch)
                self._metrics.on_role(worker, role, worker in self._workers)
            case RolesJudged(reason=reason):
                self._judgement = reason
            case KillWorker(worker, epoch, detail):
                log.warning("killing %s (process %d): %s", worker, epoch, detail)
                self._supervisor.kill(worker, epoch)
            case _:
                raise TypeError(f"the gateway does not perform {type(effect).__name__}")

    def _client_gone(self, request_id: RequestId, choices: tuple[int, ...] | None) -> None:
        self._forget_if_over(request_id)
        self._driver.feed(ClientGone(request_id, choices))

    def _forget_if_over(self, request_id: RequestId) -> None:
        stream = self._streams.get(request_id)
        if stream is not None and stream.is_over:
            del self._streams[request_id]
            self._tell()

    def _crashed(self, error: BaseException) -> None:
        log.error("the router is broken; the server stops", exc_info=error)
        self.fail_all(Refusal.INTERNAL, "the router is broken")
        self._on_crash(f"the router is broken: {error!r}")

    # --- the end ------------------------------------------------------------------------------

    async def until_ready(self) -> None:
        """Wait until every awaited slot has a process that can serve, and there is one at all."""
        await self._until(lambda: bool(self._workers) and self._awaited <= self._workers.keys())

    async def drain(self) -> None:
        """Refuse new requests, and wait until those that run are over."""
        self._draining = True
        self._driver.feed(BeginDrain())
        await self._until(lambda: not self._streams)

    def fail_all(self, kind: str, detail: str) -> None:
        """End every open answer with an error of this kind (`Refusal`), and every command."""
        self._commands.fail_all(detail)
        for request_id, stream in list(self._streams.items()):
            stream.refuse(Fail(request_id=request_id, kind=kind, detail=detail))
            self._client_gone(request_id, None)

    def close(self) -> None:
        """Close the links, which ends the workers. Feeds the machine nothing more."""
        self._driver.close()
        self._roster.close()

    async def _until(self, is_so: Callable[[], bool]) -> None:
        while not is_so():
            self._changed.clear()
            await self._changed.wait()

    def _tell(self) -> None:
        self._changed.set()
