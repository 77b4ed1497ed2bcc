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
    RunStep,
    Send,
    SetTimer,
    Started,
    StepDone,
    StopTransfer,
    TimerFired,
    TransferVerified,
    VerifyTransfer,
    WorkerUp,
)
from pdserve.core.events import LifeEvent, LifeName
from pdserve.core.ids import GATEWAY, AttemptId, WorkerId
from pdserve.core.messages import Life, Message
from pdserve.core.step import SampledToken, SampleSpec, StepPlan, StepResult, StepShape
from pdserve.cost.machine import ClusterTimes, MachineModel
from pdserve.node.settings import WorkerSettings
from pdserve.node.worker import WorkerNode
from pdserve.policy.batch import BatchPolicy
from pdserve.sim.clients import ENDING
from pdserve.sim.clock import Clock
from pdserve.sim.network import End, Network
from pdserve.sim.transfers import Transfers

_ORDINARY = SampledToken(0)
_ENDING = SampledToken(ENDING)


class World(Protocol):
    """What is around a worker."""

    clock: Clock
    network: Network
    times: ClusterTimes

    def deliver(self, sender: VirtualWorker, to: WorkerId, message: Message) -> None:
        """A message leaves a worker."""

    def end_of(self, worker: WorkerId) -> End | None:
        """The living worker's end of the network."""

    def is_last(self, attempt: AttemptId, index: int) -> bool:
        """Whether the answer ends with this token."""

    def drawn(self, attempt: AttemptId, index: int, at_s: float) -> None:
        """A worker has drawn the token."""

    def life(self, event: LifeEvent) -> None: ...

    def stepped(
        self, worker: WorkerId, begun_s: float, ended_s: float, shape: StepShape, count: int
    ) -> None: ...

    def sent(
        self, sender: WorkerId, receiver: WorkerId, num_bytes: int, begun_s: float, ended_s: float
    ) -> None: ...


class VirtualWorker:
    """One process of a worker slot. Dead ones hear and do nothing."""

    def __init__(
        self, world: World, settings: WorkerSettings, machine: MachineModel, policy: BatchPolicy
    ) -> None:
        self.worker = settings.worker
        self.epoch = settings.epoch
        self.settings = settings
        self.machine = machine
        self.node = WorkerNode(settings, policy)
        self.alive = True
        self.end = world.network.end(settings.worker, machine.link)
        self._world = world
        self._clock = world.clock
        self._transfers = Transfers(
            world.clock, world.network, self.end, machine, world.end_of, self.hear, self._sent
        )
        self._timers: dict[str, int] = {}
        self._num_timers = 0
        self._steps = machine.steps
        self._perform: dict[type, Callable[..., None]] = {
            Send: self._send,
            Log: self._log,
            SetTimer: self._set_timer,
            CancelTimer: self._cancel_timer,
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
        self.alive = False
        self._transfers.stop_all()

    def hear(self, event: Input) -> None:
        """The machine handles an input now, and what it wants is done."""
        if not self.alive:
            return
        perform = self._perform
        for effect in self.node.handle(event, self._clock.now):
            perform[type(effect)](effect)

    # --- effects ------------------------------------------------------------------------------

    def _send(self, effect: Send) -> None:
        self._world.deliver(self, effect.to, effect.message)

    def _log(self, effect: Log) -> None:
        event = effect.event
        self._world.life(event)
        if event.name is LifeName.PREFILL_STARTED:  # the only one that the router acts upon
            self._world.deliver(self, GATEWAY, Life((event,)))

    def _set_timer(self, effect: SetTimer) -> None:
        self._num_timers += 1
        self._timers[effect.timer] = self._num_timers
        self._clock.at(effect.at_s, self._timer_due, effect.timer, self._num_timers)

    def _cancel_timer(self, effect: CancelTimer) -> None:
        self._timers.pop(effect.timer, None)

    def _timer_due(self, timer: str, number: int) -> None:
        if self._timers.get(timer) == number:
            del self._timers[timer]
            self.hear(TimerFired(timer))

    def _stop_transfer(self, effect: StopTransfer) -> None:
        self._transfers.stop(effect.attempt)

    def _verify(self, effect: VerifyTransfer) -> None:
        tokens = len(effect.block_ids) * self.machine.block_size
        seconds = tokens * self.machine.token_kv_bytes * self._world.times.verify_byte_s
        self._clock.after(seconds, self.hear, TransferVerified(attempt=effect.attempt, detail=None))

    def _sent(self, receiver: WorkerId, num_bytes: int, begun_s: float) -> None:
        self._world.sent(self.worker, receiver, num_bytes, begun_s, self._clock.now)

    # --- steps --------------------------------------------------------------------------------

    def _run_step(self, effect: RunStep) -> None:
        plan = effect.plan
        shape = plan.shape
        begun_s = self._clock.now + self._world.times.step_gap_s
        ended_s = begun_s + self._steps.step_s(shape)
        if shape.prompt_tokens:
            for row in plan.rows:
                if row.pushes:
                    last = row.sample is not None
                    self._transfers.computes(row.attempt, row.end, begun_s, ended_s, last=last)
        self._clock.at(ended_s, self._step_done, plan, shape, begun_s)

    def _step_done(self, plan: StepPlan, shape: StepShape, begun_s: float) -> None:
        if not self.alive:
            return
        now = self._clock.now
        self._world.stepped(self.worker, begun_s, now, shape, 1)
        tokens = tuple(self._draw(row.attempt, row.sample, now) for row in plan.rows)
        result = StepResult(step_id=plan.step_id, tokens=tokens)
        self.hear(StepDone(result, now - begun_s))

    def _draw(
        self, attempt: AttemptId, spec: SampleSpec | None, now: float
    ) -> tuple[SampledToken, ...]:
        if spec is None:
            return ()
        self._world.drawn(attempt, spec.index, now)
        token = _ENDING if self._world.is_last(attempt, spec.index) else _ORDINARY
        return (token,) * len(spec.choices)
