"""Collects the effects of one input, in order."""

from __future__ import annotations

from pdserve.core.effects import Effect, Log, Send, SetTimer
from pdserve.core.events import LifeEvent, LifeName, Scalar, detail
from pdserve.core.ids import GATEWAY, AttemptId, WorkerId
from pdserve.core.messages import Message


class Outbox:
    """Effects of the input that is being handled at ``now``. ``logs``: somebody wants to know of
    all life events; if not, there are only those that the router acts upon."""

    __slots__ = ("_node", "effects", "logs", "now")

    def __init__(self, node: WorkerId, now: float, *, logs: bool = True) -> None:
        self.now = now
        self.logs = logs
        self.effects: list[Effect] = []
        self._node = node

    def add(self, effect: Effect) -> None:
        self.effects.append(effect)

    def send(self, to: WorkerId, message: Message) -> None:
        self.effects.append(Send(to, message))

    def tell_router(self, message: Message) -> None:
        self.effects.append(Send(GATEWAY, message))

    def set_timer(self, timer: str, after_s: float) -> None:
        self.effects.append(SetTimer(timer, self.now + after_s))

    def log(self, name: LifeName, attempt: AttemptId, **values: Scalar) -> None:
        """A life event of the attempt, at this moment on this node."""
        if not self.logs and name is not LifeName.PREFILL_STARTED:
            return
        event = LifeEvent(
            name=name,
            request_id=attempt.request_id,
            epoch=attempt.epoch,
            at_s=self.now,
            node=self._node,
            detail=detail(**values),
        )
        self.effects.append(Log(event))
