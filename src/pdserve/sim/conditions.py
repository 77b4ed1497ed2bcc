"""What a simulation is told of its machines and of time: from models, or from a recording.

`Modelled` is what ``pdserve sim`` uses: machines are told what follows from the settings, messages
take the time that the cluster's times say. Who knows better of one live run (`calibrate.parity`)
gives other ones.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

from pdserve.core.effects import WorkerUp
from pdserve.core.ids import AttemptId, Epoch, WorkerId
from pdserve.core.messages import Message
from pdserve.core.request import Role
from pdserve.core.step import StepShape
from pdserve.cost.machine import MachineModel
from pdserve.node.settings import RouterSettings, WorkerSettings
from pdserve.sim.births import router_settings, worker_settings
from pdserve.sim.clock import Clock
from pdserve.sim.settings import SimSettings
from pdserve.sim.tempo import Hosts

Delay = Callable[[WorkerId, WorkerId, Message, float], float]
"""Seconds that a message takes from the one to the other that is sent at this time."""
Exposed = Callable[[AttemptId], float | None]
"""Seconds from when a transfer is computed, and bound, until it is sent, if that is known."""


class Pacer(Protocol):
    """When the steps of one worker begin and end, if no step model alone says it. ``moved`` is told
    when the running step will end at another time than was said."""

    moved: Callable[[float], None]

    def begin(self, shape: StepShape, asked_s: float) -> tuple[float, float]:
        """The machine asks for a step: when it begins and ends, as far as is known."""
        ...

    def heard(self) -> None:
        """The process has a message to work on."""
        ...

    def end(self) -> None:
        """The step is over, and the next one may follow at once."""
        ...

    def rest(self) -> None:
        """No step followed."""
        ...


class Conditions(Protocol):
    """Of one simulation."""

    delay: Delay | None
    """None: the time that the cluster's times say."""

    exposed: Exposed | None
    """None: transfers take what their links say."""

    def router(self) -> RouterSettings: ...

    def worker(
        self, worker: WorkerId, epoch: Epoch, role: Role, machine: MachineModel
    ) -> WorkerSettings: ...

    def starts_s(self, worker: WorkerId) -> float:
        """When the first process of the slot is ready."""
        ...

    def up(self, up: WorkerUp) -> WorkerUp:
        """How a process introduces itself, given how it would by its settings."""
        ...

    def pacer(self, clock: Clock, worker: WorkerId, machine: MachineModel) -> Pacer | None:
        """None: its steps take what its machine's timer says."""
        ...


class Modelled:
    """As the settings and the machines' models say."""

    delay: Delay | None = None
    exposed: Exposed | None = None

    def __init__(self, settings: SimSettings, *, logs_life: bool = True) -> None:
        """``logs_life``: somebody wants to know of all life events."""
        self._settings = settings
        self._logs_life = logs_life
        self._hosts = Hosts(settings.seed, settings.times.step_gap_s)

    def router(self) -> RouterSettings:
        return router_settings(self._settings, logs_life=self._logs_life)

    def worker(
        self, worker: WorkerId, epoch: Epoch, role: Role, machine: MachineModel
    ) -> WorkerSettings:
        logs_life = self._logs_life
        return worker_settings(self._settings, worker, epoch, role, machine, logs_life=logs_life)

    def starts_s(self, worker: WorkerId) -> float:
        return 0.0

    def up(self, up: WorkerUp) -> WorkerUp:
        return up

    def pacer(self, clock: Clock, worker: WorkerId, machine: MachineModel) -> Pacer | None:
        return self._hosts.tempo(clock, worker, machine)
