"""The live driver of one worker: a machine with a real engine, transport, links and clock.

The event loop's thread is the node thread: it runs the machine, sockets and timers, and nothing on
it takes long. The engine thread loads the model and runs one step at a time. The threads of a
native worker's pusher (``transport.push``) write KV into peers' pools, one thread for each peer,
and verify what arrived. The others only post inputs to the node thread; idle, all of them sleep.

The life of a worker: it says hello to the gateway, loads its `Backend`, says `WorkerUp`, lets the
machine hear `Started`, and from then on performs its effects until the link to the gateway closes.
Then it is over, whatever is still running: the gateway has nobody left to give the answers to.
"""

from __future__ import annotations

import asyncio
import logging
import os
from collections.abc import Callable

from pdserve.core.effects import (
    Effect,
    Input,
    Log,
    PeerLost,
    PeerUp,
    Received,
    Send,
    Started,
    WorkerUp,
)
from pdserve.core.events import LifeEvent
from pdserve.core.ids import GATEWAY, Epoch, WorkerId
from pdserve.core.messages import Life, Message, Ticket
from pdserve.serve.backend import Backend, Surroundings
from pdserve.serve.driver import Driver, Machine
from pdserve.serve.engine_thread import JobThread
from pdserve.serve.greetings import Identity, greet
from pdserve.serve.links import Link, Listener, connect
from pdserve.serve.mesh import Mesh, MeshEvents
from pdserve.serve.recorder import recorder_of
from pdserve.serve.start import WorkerStart
from pdserve.transport.base import Transport
from pdserve.transport.link_faults import LinkFaults
from pdserve.transport.peers import Peers, Reachable
from pdserve.transport.tls import load_tls
from pdserve.transport.wire import WireMessage

log = logging.getLogger(__name__)

LIFE_DELAY_S = 0.003
"""Life events wait this long for company; any message that is sent takes them along first."""
STOP_TIMEOUT_S = 1.0


class Worker:
    """One worker. Made, started and closed on one event loop; ``ended`` hears why it is over."""

    def __init__(
        self,
        start: WorkerStart,
        load: Callable[[], Backend],
        transport: Transport,
        *,
        ended: Callable[[str], None],
    ) -> None:
        """``load`` is called on the engine thread and may take as long as it takes."""
        self._start = start
        self._load = load
        self._transport = transport
        self._ended = ended
        self._loop = asyncio.get_running_loop()
        self._jobs = JobThread(f"engine {start.worker}")
        self._identity = Identity(
            worker=start.worker,
            epoch=start.epoch,
            role=start.role,
            secret=start.secret,
            family=start.family,
        )
        self._tls = load_tls(start.tls)
        self._life: list[LifeEvent] = []
        self._life_timer: asyncio.TimerHandle | None = None
        self._gateway: Link | None = None
        self._listener: Listener | None = None
        self._backend: Backend | None = None
        self._mesh: Mesh | None = None
        self._driver: Driver | None = None
        self.is_broken = False
        """True once machine or engine has raised: a bug, and the process is not to be trusted."""
        self.machine: Machine | None = None
        """For tests that look inside; nobody else may touch it."""

    async def run(self) -> None:
        """Become ready. Returns when the machine has started; raises what keeps it from that."""
        gateway = await connect(self._start.gateway_address, self._tls)
        self._gateway = gateway
        await greet(gateway, self._identity, None)
        gateway.open(self._on_gateway_message, self._on_gateway_end)
        self._backend = backend = await self._jobs.call(self._load)
        if gateway.is_closed:
            return
        events = MeshEvents(
            received=self._received,
            written=backend.written,
            up=self._peer_up,
            lost=self._peer_lost,
        )
        self._mesh = mesh = Mesh(self._identity, self._transport, backend.pool, events, self._tls)
        self._listener = Listener(
            self._start.address, mesh.accepted, listen=self._start.listen, tls=self._tls
        )
        gateway.send(Reachable(self._listener.addresses))
        self.machine = backend.begin(
            Surroundings(
                jobs=self._jobs,
                feed=self._feed,
                broken=self._crashed,
                remote=mesh.remote,
                tell=mesh.tell,
                slowness=mesh.slowness,
            )
        )
        settings = backend.settings
        recorder = recorder_of(self._start.record, backend.policy, worker=settings)
        self._driver = Driver(self.machine, self._perform, crashed=self._crashed, recorder=recorder)
        gateway.send(
            WorkerUp(
                worker=settings.worker,
                epoch=settings.epoch,
                role=settings.role,
                layout=settings.layout,
                num_blocks=settings.num_blocks,
                max_model_tokens=settings.max_model_tokens,
                pid=os.getpid(),
                device=backend.device,
                engine=backend.engine,
            )
        )
        self._driver.feed(Started())

    # --- inputs -------------------------------------------------------------------------------

    def _feed(self, event: Input) -> None:
        if self._driver is not None:
            self._driver.feed(event)

    def _on_gateway_message(self, message: WireMessage) -> None:
        if isinstance(message, Peers) and self._mesh is not None:
            self._mesh.set_peers(message)
        elif isinstance(message, LinkFaults) and self._mesh is not None:
            self._mesh.set_faults(message)
        elif isinstance(message, Message) and self._driver is not None:
            self._feed(Received(GATEWAY, Epoch(0), message))
        elif self._gateway is not None:
            self._gateway.close(f"the gateway sent a {type(message).__name__} out of turn")

    def _on_gateway_end(self, reason: str) -> None:
        self._ended(f"link to the gateway: {reason}")

    def _crashed(self, error: BaseException) -> None:
        self.is_broken = True
        log.error("%s is broken", self._start.worker, exc_info=error)
        if self._driver is not None:
            self._driver.close()
        self._ended(f"broken: {error!r}")

    def _received(self, worker: WorkerId, epoch: Epoch, message: Message) -> None:
        self._feed(Received(worker, epoch, message))

    def _peer_up(self, worker: WorkerId, epoch: Epoch) -> None:
        self._feed(PeerUp(worker, epoch))

    def _peer_lost(self, worker: WorkerId, epoch: Epoch) -> None:
        self._feed(PeerLost(worker, epoch))

    # --- effects ------------------------------------------------------------------------------

    def _perform(self, effect: Effect) -> None:
        assert self._backend is not None
        match effect:
            case Send(to, message):
                self._send(to, message)
            case Log(event):
                self._remember(event)
            case _:
                self._backend.perform(effect)

    def _send(self, to: WorkerId, message: Message) -> None:
        assert self._mesh is not None
        assert self._gateway is not None
        if isinstance(message, Ticket) and self._backend is not None:
            self._backend.granting(message)
        self._send_life()  # what a message makes others do must not be known before its cause
        if to == GATEWAY:
            self._gateway.send(message)
        else:
            self._mesh.send(to, message)

    def _remember(self, event: LifeEvent) -> None:
        self._life.append(event)
        if self._life_timer is None:
            self._life_timer = self._loop.call_later(LIFE_DELAY_S, self._send_life)

    def _send_life(self) -> None:
        if self._life_timer is not None:
            self._life_timer.cancel()
            self._life_timer = None
        if self._life and self._gateway is not None:
            events, self._life = tuple(self._life), []
            self._gateway.send(Life(events))

    # --- the end ------------------------------------------------------------------------------

    async def close(self) -> bool:
        """End at once. False if a step still runs, so that its thread could not be joined."""
        if self._life_timer is not None:
            self._life_timer.cancel()
        if self._driver is not None:
            self._driver.close()
        if self._listener is not None:
            self._listener.close()
        if self._mesh is not None:
            self._mesh.close()
        if self._gateway is not None:
            self._gateway.close("closing")
        if self._backend is not None:
            await asyncio.to_thread(self._backend.close)
        return await asyncio.to_thread(self._jobs.close, STOP_TIMEOUT_S)
