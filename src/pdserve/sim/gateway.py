"""The simulated gateway: a real `RouterNode`, its timers, and its mail."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

from pdserve.core.commands import Answer, RoleChanged, RolesJudged
from pdserve.core.effects import (
    CancelTimer,
    Deliver,
    Effect,
    Fail,
    Input,
    KillWorker,
    Log,
    Send,
    SetTimer,
)
from pdserve.core.events import LifeEvent
from pdserve.core.ids import GATEWAY
from pdserve.node.router import RouterNode
from pdserve.sim.clock import Clock
from pdserve.sim.timers import VirtualTimers


class Edge(Protocol):
    """Who performs what the router asks for."""

    def post(self, effect: Send) -> None: ...

    def deliver_tokens(self, effect: Deliver) -> None: ...

    def fail(self, effect: Fail) -> None: ...

    def kill(self, effect: KillWorker) -> None: ...

    def life(self, event: LifeEvent) -> None: ...

    def role_changed(self, effect: RoleChanged) -> None: ...

    def answer(self, effect: Answer) -> None: ...


class VirtualGateway:
    """Feeds the router its inputs in virtual time."""

    def __init__(self, router: RouterNode, clock: Clock, edge: Edge) -> None:
        self.router = router
        self._clock = clock
        self._edge = edge
        self._timers = VirtualTimers(clock, self.hear)
        self._perform: dict[type[Effect], Callable[..., None]] = {
            Send: edge.post,
            Deliver: edge.deliver_tokens,
            Fail: edge.fail,
            KillWorker: edge.kill,
            RoleChanged: edge.role_changed,
            Answer: edge.answer,
            RolesJudged: lambda effect: None,
            Log: self._log,
            SetTimer: self._timers.set,
            CancelTimer: self._timers.cancel,
        }

    def hear(self, event: Input) -> None:
        perform = self._perform
        for effect in self.router.handle(event, self._clock.now):
            perform[type(effect)](effect)

    def _log(self, effect: Log) -> None:
        if effect.event.node == GATEWAY:  # workers' events are logged where they happen
            self._edge.life(effect.event)
