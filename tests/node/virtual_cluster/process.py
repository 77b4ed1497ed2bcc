"""One worker process: its machine, and what a real process would hold around it."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from pdserve.core.effects import (
    BindTransfer,
    CancelTimer,
    Effect,
    Input,
    Log,
    OpenTransfer,
    RunStep,
    Send,
    SetTimer,
    StepDone,
    StopTransfer,
    TransferFailed,
    VerifyTransfer,
    WorkerUp,
)
from pdserve.core.events import LifeEvent
from pdserve.core.ids import GATEWAY, BlockId, Epoch, RequestId, WorkerId
from pdserve.core.messages import Life, LoadReport, Message
from pdserve.node.settings import WorkerSettings
from pdserve.node.worker import WorkerNode
from pdserve.policy.registry import make_batching
from virtual_cluster.engine import StepRun
from virtual_cluster.memory import Memory
from virtual_cluster.oracle import Ask
from virtual_cluster.pusher import Pusher

if TYPE_CHECKING:
    from virtual_cluster.links import PairLink

NUM_KEPT = 30


@dataclass(frozen=True)
class Peers:
    """The gateway's word to a worker on which process of each worker is up."""

    epochs: Mapping[WorkerId, Epoch]


ToGateway = Message | WorkerUp
ToWorker = Message | Peers


class Process:
    """``to_gateway`` and ``to_worker``: its link to the gateway. ``posted``: what its other threads
    have posted to the node thread. ``known``: which process of each peer counts as up; ``named``:
    those of which the gateway has told. ``said``: the last messages that it sent, reports
    apart."""

    def __init__(
        self,
        settings: WorkerSettings,
        batching: str,
        asks: Mapping[RequestId, Ask],
        write: Callable[[Process, BindTransfer, int, BlockId, list[int]], None],
        send: Callable[[Process, WorkerId, Message], None],
    ) -> None:
        self.worker = settings.worker
        self.epoch = settings.epoch
        self.settings = settings
        self.node = WorkerNode(settings, make_batching(batching))
        self.alive = True
        self.stopped = False
        self.timers: dict[str, float] = {}
        self.posted: deque[Input] = deque()
        self.to_gateway: deque[ToGateway] = deque()
        self.to_worker: deque[ToWorker] = deque()
        self.links: dict[tuple[WorkerId, Epoch], PairLink] = {}
        self.known: dict[WorkerId, Epoch] = {}
        self.named: set[WorkerId] = set()
        self.life: list[LifeEvent] = []
        self.said: deque[tuple[WorkerId, Message]] = deque(maxlen=NUM_KEPT)
        self.engine: StepRun | None = None
        self.step_begun_s = 0.0
        layout = settings.layout
        self.memory = Memory(layout.num_layers, settings.num_blocks, layout.block_size)
        self.pusher = Pusher(
            self.memory,
            layout.block_size,
            self.posted.append,
            lambda bind, layer, block, content: write(self, bind, layer, block, content),
        )
        self._asks = asks
        self._send = send

    def __repr__(self) -> str:
        return f"{self.worker}.{self.epoch}"

    @property
    def runs(self) -> bool:
        """True if anything of it can move."""
        return self.alive and not self.stopped

    def up(self) -> WorkerUp:
        """What it says to the gateway once it can serve."""
        return WorkerUp(
            worker=self.worker,
            epoch=self.epoch,
            role=self.settings.role,
            layout=self.settings.layout,
            num_blocks=self.settings.num_blocks,
            max_model_tokens=self.settings.max_model_tokens,
            pid=1,
            device="virtual",
            engine="virtual",
        )

    def handle(self, event: Input, now: float) -> None:
        """Let the machine hear the input, and perform what it asks, until nothing follows."""
        inputs = deque([event])
        while inputs:
            for effect in self.node.handle(inputs.popleft(), now):
                answer = self._perform(effect, now)
                if answer is not None:
                    inputs.append(answer)

    def _perform(self, effect: Effect, now: float) -> Input | None:
        match effect:
            case Send(to, message):
                self.flush_life()
                if not isinstance(message, LoadReport):
                    self.said.append((to, message))
                if to == GATEWAY:
                    self.to_gateway.append(message)
                else:
                    self._send(self, to, message)
            case Log(event):
                self.life.append(event)
            case SetTimer(timer, at_s):
                self.timers[timer] = at_s
            case CancelTimer(timer):
                self.timers.pop(timer, None)
            case RunStep(plan):
                assert self.engine is None, "two steps at once"
                self.engine = StepRun(plan, self.memory, self._asks, self.pusher)
                self.step_begun_s = now
            case OpenTransfer():
                self.pusher.open(effect)
            case BindTransfer(ticket, peer, peer_epoch):
                if self.known.get(peer) != peer_epoch:
                    return TransferFailed(attempt=ticket.attempt, detail="no such pool")
                self.pusher.bind(effect)
            case StopTransfer(attempt):
                self.pusher.stop(attempt)
            case VerifyTransfer():
                self.pusher.verify(effect)
            case _:
                raise TypeError(f"a worker does not ask for {effect}")
        return None

    def flush_life(self) -> None:
        """Life events travel before anything else that is said."""
        if self.life:
            events, self.life = tuple(self.life), []
            self.to_gateway.append(Life(events))

    def compute(self, now: float) -> None:
        """The engine thread does one more layer, or ends the step."""
        assert self.engine is not None
        result = self.engine.advance()
        if result is not None:
            self.engine = None
            self.posted.append(StepDone(result, now - self.step_begun_s))

    def next_timer(self) -> tuple[float, str] | None:
        """The timer that is due first."""
        return min(((at_s, name) for name, at_s in self.timers.items()), default=None)
