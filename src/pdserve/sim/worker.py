"""A simulated worker process: a real `WorkerNode`, and time in place of an engine and a network.

A step takes what the machine model says, and its rows draw what the clients' answers need: an
ordinary token, or the one that ends the answer where the trace says so. What the machine sends
arrives at the other machine after the time of a message.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

from pdserve.core.effects import (
    BindTransfer,
    CancelTimer,
    Input,
    Log,
    OpenTransfer,
    Received,
    RunStep,
    Send,
    SetTimer,
    Started,
    StopTransfer,
    TimerFired,
    TransferVerified,
    VerifyTransfer,
    WorkerUp,
)
from pdserve.core.events import LifeEvent, LifeName
from pdserve.core.ids import GATEWAY, WorkerId
from pdserve.core.messages import Life, Message
from pdserve.cost.machine import ClusterTimes, MachineModel
from pdserve.node.report import HEARTBEAT_TIMER
from pdserve.node.settings import WorkerSettings
from pdserve.node.worker import WorkerNode
from pdserve.policy.batch import BatchPolicy
from pdserve.sim.clock import Clock
from pdserve.sim.conditions import Exposed, Pacer
from pdserve.sim.engine import Audience, VirtualEngine
from pdserve.sim.network import End, Network
from pdserve.sim.timers import VirtualTimers
from pdserve.sim.transfers import Transfers


class World(Audience, Protocol):
    """What is around a worker."""

    clock: Clock
    network: Network
    times: ClusterTimes
    exposed: Exposed | None

    def deliver(self, sender: VirtualWorker, to: WorkerId, message: Message, at_s: float) -> None:
        """A message leaves a worker at this time, which may be past: the end of a step of which
        nobody had to know till now."""

    def end_of(self, worker: WorkerId) -> End | None:
        """The living worker's end of the network."""

    def life(self, event: LifeEvent) -> None: ...

    def sent(
        self, sender: WorkerId, receiver: WorkerId, num_bytes: int, begun_s: float, ended_s: float
    ) -> None: ...


class VirtualWorker:
    """One process of a worker slot. Dead ones hear and do nothing. One that sleeps (it hangs) does
    all of it when it wakes; only what its links carry goes on."""

    def __init__(
        self,
        world: World,
        settings: WorkerSettings,
        machine: MachineModel,
        policy: BatchPolicy,
        *,
        stretches: bool = True,
        pacer: Pacer | None = None,
    ) -> None:
        self.worker = settings.worker
        self.epoch = settings.epoch
        self.settings = settings
        self.machine = machine
        self.node = WorkerNode(settings, policy)
        self.alive = True
        self._awake = True
        self._missed: list[Input] = []
        self._asleep_since_s = 0.0
        self.end = world.network.end(settings.worker, machine.link)
        self._world = world
        self._clock = world.clock
        self._transfers = Transfers(
            world.clock,
            world.network,
            self.end,
            machine,
            world.end_of,
            self.hear,
            self._sent,
            world.exposed,
            ends_move=pacer is not None,
        )
        self._timers = VirtualTimers(world.clock, self.hear)
        self._now = 0.0
        self._pacer = pacer
        self._engine = VirtualEngine(
            world.clock,
            world,
            machine,
            self.node,
            self._feed,
            world.times.step_gap_s,
            stretches=stretches,
            pacer=pacer,
            moved=self._transfers.moved,
        )
        self._perform = self._performers()

    def _performers(self) -> dict[type, Callable[..., None]]:
        return {
            Send: self._send,
            Log: self._log,
            SetTimer: self._timers.set,
            CancelTimer: self._timers.cancel,
            RunStep: self._run_step,
            OpenTransfer: self._transfers.open,
            BindTransfer: self._transfers.bind,
            StopTransfer: self._stop_transfer,
            VerifyTransfer: self._verify,
        }

    def start(self) -> None:
        self.hear(Started())

    def up(self) -> WorkerUp:
        """How the process introduces itself to the router."""
        settings = self.settings
        return WorkerUp(
            worker=self.worker,
            epoch=self.epoch,
            role=settings.role,
            layout=settings.layout,
            num_blocks=settings.num_blocks,
            max_model_tokens=settings.max_model_tokens,
            pid=0,
            device=self.machine.name,
            engine="simulated",
        )

    def die(self) -> None:
        """It does nothing more, and what it was sending stops."""
        self._tell_all()
        self.alive = self._awake = False
        self._missed.clear()
        self._engine.stop()
        self._transfers.stop_all()

    def hear(self, event: Input) -> None:
        """The machine handles an input now, and what it wants is done."""
        if not self._awake:
            if self.alive:
                self._missed.append(event)
            return
        now = self._clock.now
        engine = self._engine
        engine.begin_to_hear(now)
        if self._pacer is not None and type(event) is Received:
            self._pacer.heard()
        self._feed(event, now)
        engine.look_again()

    def _tell_all(self) -> None:
        """Have the machine tell the tokens that it has kept to itself: a live one tells each as it
        is drawn, so they are known whatever happens next."""
        if self._awake:
            self._engine.catch_up(self._clock.now)
            self._feed(TimerFired(HEARTBEAT_TIMER), self._clock.now)

    def _feed(self, event: Input, at_s: float) -> None:
        self._now = at_s
        perform = self._perform
        for effect in self.node.handle(event, at_s):
            perform[type(effect)](effect)

    # --- hanging ------------------------------------------------------------------------------

    @property
    def sleeps(self) -> bool:
        return self.alive and not self._awake

    def fall_asleep(self) -> None:
        """It does nothing from now on, as a process that was stopped."""
        if self._awake:
            self._tell_all()
            self._engine.pause()
            self._awake = False
            self._asleep_since_s = self._clock.now

    def wake(self) -> None:
        """It goes on: its step ends later by as long as it slept, and it hears what it missed."""
        if not self.sleeps:
            return
        self._awake = True
        self._engine.resume(self._clock.now - self._asleep_since_s)
        missed, self._missed = self._missed, []
        for event in missed:
            self.hear(event)

    # --- effects ------------------------------------------------------------------------------

    def _send(self, effect: Send) -> None:
        self._world.deliver(self, effect.to, effect.message, self._now)

    def _log(self, effect: Log) -> None:
        event = effect.event
        self._world.life(event)
        if event.name is LifeName.PREFILL_STARTED:  # the only one that the router acts upon
            self._world.deliver(self, GATEWAY, Life((event,)), self._now)

    def _stop_transfer(self, effect: StopTransfer) -> None:
        self._transfers.stop(effect.attempt)

    def _verify(self, effect: VerifyTransfer) -> None:
        tokens = len(effect.block_ids) * self.machine.block_size
        times = self._world.times
        seconds = times.verify_s + tokens * self.machine.token_kv_bytes * times.verify_byte_s
        self._clock.after(seconds, self.hear, TransferVerified(attempt=effect.attempt, detail=None))

    def _sent(self, receiver: WorkerId, num_bytes: int, begun_s: float) -> None:
        self._world.sent(self.worker, receiver, num_bytes, begun_s, self._clock.now)

    # --- steps --------------------------------------------------------------------------------

    def _run_step(self, effect: RunStep) -> None:
        self._engine.run(effect, self._now)
        if not self._transfers:
            return
        node, (begun_s, ended_s) = self.node, self._engine.span
        for rider in node.riders:
            if rider.hands_off:
                end = node.reaches(rider)
                is_last = end == rider.num_tokens
                self._transfers.computes(rider.attempt, end, begun_s, ended_s, last=is_last)
