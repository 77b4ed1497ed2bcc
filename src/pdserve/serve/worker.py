"""The live driver of one worker: a `WorkerNode` with a real engine, transport, links and clock.

Three threads. The event loop's thread is the node thread: it runs the machine, sockets and timers,
and nothing on it takes long. The engine thread builds the runner and runs one step at a time. The
transfer thread, owned by the `Pusher`, writes KV into peers' pools and verifies what arrived. The
other two only post inputs to the node thread; idle, all three sleep.

The life of a worker: it says hello to the gateway, builds its runner and its KV pool, says
`WorkerUp`, lets the machine hear `Started`, and from then on performs its effects until the link to
the gateway closes. Then it is over, whatever is still running: the gateway has nobody left to give
the answers to.
"""

from __future__ import annotations

import asyncio
import logging
import os
from collections.abc import Callable

from pdserve.core.effects import (
    BindTransfer,
    Effect,
    Input,
    Log,
    OpenTransfer,
    PeerLost,
    PeerUp,
    Received,
    RunStep,
    Send,
    Started,
    StopTransfer,
    TransferFailed,
    VerifyTransfer,
    WorkerUp,
)
from pdserve.core.events import LifeEvent
from pdserve.core.ids import GATEWAY, Epoch, WorkerId
from pdserve.core.messages import Life, Message
from pdserve.engine.base import ModelRunner
from pdserve.node.settings import WorkerSettings
from pdserve.node.worker import WorkerNode
from pdserve.policy.batch import FcfsBatching
from pdserve.serve.driver import Driver
from pdserve.serve.engine_thread import EngineThread, JobThread, post_to_loop
from pdserve.serve.links import Identity, Link, Listener, connect, greet
from pdserve.serve.mesh import Mesh, MeshEvents
from pdserve.serve.recorder import recorder_of
from pdserve.serve.start import WorkerStart
from pdserve.transport.base import Pool, Transport
from pdserve.transport.peers import Peers
from pdserve.transport.push import Pusher
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
        build_runner: Callable[[], ModelRunner],
        transport: Transport,
        *,
        ended: Callable[[str], None],
    ) -> None:
        self._start = start
        self._build_runner = build_runner
        self._transport = transport
        self._ended = ended
        self._loop = asyncio.get_running_loop()
        self._engine_jobs = JobThread(f"engine {start.worker}")
        self._identity = Identity(
            worker=start.worker, epoch=start.epoch, role=start.role, secret=start.secret
        )
        self._life: list[LifeEvent] = []
        self._life_timer: asyncio.TimerHandle | None = None
        self._gateway: Link | None = None
        self._listener: Listener | None = None
        self._runner: ModelRunner | None = None
        self._pool: Pool | None = None
        self._pusher: Pusher | None = None
        self._engine: EngineThread | None = None
        self._mesh: Mesh | None = None
        self._driver: Driver | None = None
        self.is_broken = False
        """True once the machine has raised: a bug, and the process is not to be trusted."""
        self.machine: WorkerNode | None = None
        """For tests that look inside; nobody else may touch it."""

    async def run(self) -> None:
        """Become ready. Returns when the machine has started; raises what keeps it from that."""
        gateway = await connect(self._start.gateway_address)
        self._gateway = gateway
        await greet(gateway, self._identity, None)
        gateway.open(self._on_gateway_message, self._on_gateway_end)
        runner, pool, num_blocks = await self._engine_jobs.call(self._load)
        if gateway.is_closed:
            return
        self._runner, self._pool = runner, pool
        settings = self._settings(runner, num_blocks)
        self._pusher = Pusher(
            runner=runner,
            pool_memory=pool.memory,
            layout=settings.layout,
            num_blocks=num_blocks,
            post=self._post,
        )
        self._engine = EngineThread(self._engine_jobs, runner, self._pusher, self._feed)
        events = MeshEvents(received=self._received, up=self._peer_up, lost=self._peer_lost)
        self._mesh = Mesh(self._identity, self._transport, pool, events)
        self._listener = Listener(self._start.address, self._mesh.accepted)
        self._begin(gateway, runner, settings)

    def _load(self) -> tuple[ModelRunner, Pool, int]:
        """On the engine thread: weights, pool memory, runner."""
        runner = self._build_runner()
        num_blocks = self._start.num_blocks
        pool = self._transport.allocate(runner.info.layout.pool_bytes(num_blocks))
        runner.attach_pool(pool.memory, num_blocks)
        return runner, pool, num_blocks

    def _settings(self, runner: ModelRunner, num_blocks: int) -> WorkerSettings:
        return WorkerSettings(
            worker=self._start.worker,
            epoch=self._start.epoch,
            role=self._start.role,
            layout=runner.info.layout,
            num_blocks=num_blocks,
            max_model_tokens=min(self._start.max_model_tokens, runner.info.max_model_tokens),
            max_step_tokens=self._start.max_step_tokens,
            mixed_chunk_tokens=self._start.mixed_chunk_tokens,
            one_shot_tokens=self._start.one_shot_tokens,
        )

    def _begin(self, gateway: Link, runner: ModelRunner, settings: WorkerSettings) -> None:
        policy = FcfsBatching()
        self.machine = WorkerNode(settings, policy)
        recorder = recorder_of(self._start.record, policy, worker=settings)
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
                device=runner.info.device,
                engine=runner.info.engine,
            )
        )
        self._driver.feed(Started())

    # --- inputs -------------------------------------------------------------------------------

    def _feed(self, event: Input) -> None:
        if self._driver is not None:
            self._driver.feed(event)

    def _post(self, event: Input) -> None:
        """From another thread."""
        post_to_loop(self._loop, lambda: self._feed(event))

    def _on_gateway_message(self, message: WireMessage) -> None:
        if isinstance(message, Peers) and self._mesh is not None:
            self._mesh.set_peers(message)
        elif isinstance(message, Message) and self._driver is not None:
            self._feed(Received(GATEWAY, Epoch(0), message))
        elif self._gateway is not None:
            self._gateway.close(f"the gateway sent a {type(message).__name__} out of turn")

    def _on_gateway_end(self, reason: str) -> None:
        self._ended(f"link to the gateway: {reason}")

    def _crashed(self, error: BaseException) -> None:
        self.is_broken = True
        log.error("the machine of %s is broken", self._start.worker, exc_info=error)
        self._ended(f"broken: {error!r}")

    def _received(self, worker: WorkerId, epoch: Epoch, message: Message) -> None:
        self._feed(Received(worker, epoch, message))

    def _peer_up(self, worker: WorkerId, epoch: Epoch) -> None:
        self._feed(PeerUp(worker, epoch))

    def _peer_lost(self, worker: WorkerId, epoch: Epoch) -> None:
        self._feed(PeerLost(worker, epoch))

    # --- effects ------------------------------------------------------------------------------

    def _perform(self, effect: Effect) -> None:
        assert self._engine is not None
        assert self._pusher is not None
        match effect:
            case Send(to, message):
                self._send(to, message)
            case Log(event):
                self._remember(event)
            case RunStep(plan):
                self._engine.run_step(plan)
            case OpenTransfer():
                self._pusher.open(effect)
            case BindTransfer():
                self._bind(effect)
            case StopTransfer(attempt):
                self._pusher.stop(attempt)
            case VerifyTransfer():
                self._pusher.verify(effect)
            case _:
                raise TypeError(f"a worker does not perform {type(effect).__name__}")

    def _send(self, to: WorkerId, message: Message) -> None:
        assert self._mesh is not None
        assert self._gateway is not None
        self._send_life()  # what a message makes others do must not be known before its cause
        if to == GATEWAY:
            self._gateway.send(message)
        else:
            self._mesh.send(to, message)

    def _bind(self, effect: BindTransfer) -> None:
        assert self._mesh is not None
        assert self._pusher is not None
        found = self._mesh.remote(effect.peer, effect.peer_epoch)
        if found is None or self._runner is None:
            detail = f"the KV pool of {effect.peer} (process {effect.peer_epoch}) is not attached"
            self._feed(TransferFailed(attempt=effect.ticket.attempt, detail=detail))
            return
        remote, num_bytes = found
        self._pusher.bind(effect, remote, num_bytes // self._runner.info.layout.pool_bytes(1))

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
        if self._pusher is not None:
            await asyncio.to_thread(self._pusher.close)
        runner = self._runner
        if runner is not None:
            self._engine_jobs.post(runner.close)
        joined = await asyncio.to_thread(self._engine_jobs.close, STOP_TIMEOUT_S)
        if joined and self._pool is not None:
            self._pool.close()
        return joined
