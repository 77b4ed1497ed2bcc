"""A router and its workers in virtual time. See the package's docstring."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial

from foreign_cluster.answers import VOCAB_SIZE, WEIGHTS, Answer
from foreign_cluster.links import Link
from foreign_cluster.process import Backend, ForeignBackend, NativeBackend, Process
from pdserve.core.effects import (
    CancelTimer,
    ClientGone,
    Deliver,
    Effect,
    Fail,
    Input,
    KillWorker,
    Log,
    Received,
    Send,
    SetTimer,
    Started,
    Submit,
    TimerFired,
    WorkerLost,
    WorkerUp,
)
from pdserve.core.events import LifeEvent
from pdserve.core.ids import GATEWAY, Epoch, RequestId, WorkerId
from pdserve.core.layout import KvLayout
from pdserve.core.messages import DrainWorker, Life, Message, OpaquePayload
from pdserve.core.request import Request, Role
from pdserve.engine.fake_foreign import FakeForeignEngine
from pdserve.engine.foreign import Engine
from pdserve.node.foreign import ForeignWorkerNode
from pdserve.node.router import RouterNode
from pdserve.node.settings import ForeignSettings, RouterSettings, WorkerSettings
from pdserve.node.worker import WorkerNode

BACKGROUND_TIMERS = {"heartbeat", "report", "watch", "no worker"}
EVENT_S = 0.0005
NATIVE = "native"

Happening = Callable[[], None]


@dataclass(frozen=True, kw_only=True)
class Spec:
    """``kinds``: engine by worker, a name of `engines` or ``native``; the others are ``plain``."""

    workers: tuple[int, int, int] = (1, 1, 0)
    kinds: dict[str, str] = field(default_factory=dict)
    num_blocks: int = 24
    block_size: int = 4
    max_model_tokens: int = 64
    engine_step_tokens: int = 16
    lease_s: float = 1.0
    ticket_timeout_s: float = 1.0
    slice_bytes: int = 64
    window_bytes: int = 128
    max_exports: int = 2
    max_payload_bytes: int = 1 << 20
    router: RouterSettings = field(default_factory=lambda: RouterSettings(max_attempts=10_000))
    engines: dict[str, dict[str, int | bool]] = field(
        default_factory=lambda: {
            "plain": {},
            "redraws": {"recomputes_first_token": True},
            "drifts": {"recomputes_first_token": True, "first_token_drift": 5},
        }
    )

    @property
    def slots(self) -> list[tuple[WorkerId, Role]]:
        return [
            (WorkerId(f"{role}-{number}"), role)
            for role, count in zip(Role, self.workers, strict=True)
            for number in range(count)
        ]

    def engine(self, kind: str) -> Engine:
        return FakeForeignEngine(
            capacity_tokens=self.num_blocks * self.block_size,
            max_model_tokens=self.max_model_tokens,
            block_tokens=3,
            max_step_tokens=self.engine_step_tokens,
            vocab_size=VOCAB_SIZE,
            weights_digest=WEIGHTS,
            **self.engines[kind],
        )

    def process(self, worker: WorkerId, epoch: Epoch) -> Process:
        """A process of the slot with everything in it."""
        kind = self.kinds.get(worker, "plain")
        if kind == NATIVE:
            settings = self._settings(worker, epoch, None, self.num_blocks)
            return Process(settings, WorkerNode(settings), NativeBackend(self.block_size))
        engine = self.engine(kind)
        capabilities = engine.info.capabilities
        foreign = ForeignSettings(
            payload_format=capabilities.payload_format,
            recomputes_first_token=capabilities.recomputes_first_token,
            max_payload_bytes=self.max_payload_bytes,
            payload_slice_bytes=self.slice_bytes,
            payload_window_bytes=self.window_bytes,
            max_exports=self.max_exports,
        )
        num_blocks = engine.info.capacity_tokens // self.block_size
        settings = self._settings(worker, epoch, foreign, num_blocks)
        backend: Backend = ForeignBackend(engine)
        return Process(settings, ForeignWorkerNode(settings), backend)

    def _settings(
        self, worker: WorkerId, epoch: Epoch, foreign: ForeignSettings | None, num_blocks: int
    ) -> WorkerSettings:
        layout = KvLayout(
            num_layers=0 if foreign else 2,
            num_kv_heads=0 if foreign else 1,
            head_dim=0 if foreign else 4,
            block_size=self.block_size,
            dtype="opaque" if foreign else "fp32",
            numerics="foreign" if foreign else "native",
            weights_digest=WEIGHTS,
        )
        return WorkerSettings(
            worker=worker,
            epoch=epoch,
            role=dict(self.slots)[worker],
            layout=layout,
            num_blocks=num_blocks,
            max_model_tokens=self.max_model_tokens,
            max_step_tokens=16,
            lease_s=self.lease_s,
            ticket_timeout_s=self.ticket_timeout_s,
            foreign=foreign,
        )


class Cluster:
    """``current``: the latest process of each slot. ``unreaped``: dead ones of which the router has
    not heard. ``in_flight_bytes``: payload bytes by receiver, and ``most_in_flight`` of them."""

    def __init__(self, spec: Spec) -> None:
        self.spec = spec
        self.now = 0.0
        self.router = RouterNode(spec.router)
        self.router_timers: dict[str, float] = {}
        self.answers: dict[RequestId, Answer] = {}
        self.life: list[LifeEvent] = []
        self.sent: Counter[str] = Counter()
        self.most_in_flight_bytes = 0
        self.current: dict[WorkerId, Process] = {}
        self.unreaped: list[Process] = []
        self.links: list[Link] = []
        self._tell_router(Started())
        for worker, _ in spec.slots:
            self._start(worker, Epoch(1))

    # --- what a test does -----------------------------------------------------------------------

    def submit(self, request: Request) -> Answer:
        answer = Answer.of(request, self.spec.max_model_tokens)
        self.answers[request.request_id] = answer
        self._tell_router(Submit(request))
        return answer

    def leave(self, request_id: RequestId, choices: tuple[int, ...] | None = None) -> None:
        answer = self.answers[request_id]
        answer.wanted -= set(answer.expected if choices is None else choices)
        self._tell_router(ClientGone(request_id, choices))

    def kill(self, process: Process, keep: int = 0) -> None:
        """``kill -9``: of what it said last, only ``keep`` messages can still be read."""
        if not process.alive:
            return
        process.alive = False
        while len(process.to_gateway) > keep:
            process.to_gateway.pop()
        self.unreaped.append(process)
        for link in self.links:
            if process in link.sides:
                link.cut(keep)

    def cut(self, one: str, other: str, keep: int = 0) -> None:
        """The link breaks; each side can still read ``keep`` messages."""
        self._link(self.process(one), self.process(other)).cut(keep)

    def drain(self, worker: str) -> None:
        self.process(worker).to_worker.append(DrainWorker())

    def run(self, until: Callable[[], bool] | None = None) -> None:
        """Everything in turn, time passing when nothing else can, until nothing is left to do (or
        as long as ``until`` is not true)."""
        for turn in range(200_000):
            if until is not None and until():
                return
            if events := self.events():
                events[turn % len(events)]()
            elif until is None and self.is_at_rest:
                return
            else:
                self.advance()
        raise AssertionError(f"the cluster does not come to rest: {self._left()}")

    def events(self) -> list[Happening]:
        """All that can happen at this time."""
        found: list[Happening] = []
        for process in self.current.values():
            if process.to_gateway and (process.alive or process in self.unreaped):
                found.append(partial(self._deliver_to_router, process))
            if process.runs:
                found += self._events_of(process)
        found += [partial(self._reap, p) for p in self.unreaped if not p.to_gateway]
        for link in self.links:
            hearing = [side for side in link.sides if side.runs and link.queues[side]]
            found += [partial(self._deliver, link, side) for side in hearing]
        due = [name for name, at_s in self.router_timers.items() if at_s <= self.now]
        return found + [partial(self._fire_router, name) for name in due]

    def advance(self) -> None:
        """Time passes up to the next timer."""
        times = [*self.router_timers.values()]
        for process in self.current.values():
            if process.runs:
                times += process.timers.values()
        self.now = max(self.now, min(times))

    # --- what must be true ----------------------------------------------------------------------

    @property
    def is_at_rest(self) -> bool:
        return self.router.num_requests == 0 and all(
            p.runs and p.node.is_empty and not p.posted for p in self.current.values()
        )

    def check_end(self) -> None:
        """Nothing is left anywhere, and every answer is whole or has a reason."""
        self.settle()
        for answer in self.answers.values():
            assert answer.is_over, answer
        for process in self.current.values():
            left = process.timers.keys() - BACKGROUND_TIMERS
            assert not left, f"{process}: {left}"
            if isinstance(process.backend, ForeignBackend):
                engine = process.backend.engine
                assert engine.load().free_tokens == engine.info.capacity_tokens, process
                assert engine.step() is None
        assert not self.router_timers.keys() - BACKGROUND_TIMERS, self.router_timers
        for book in self.router.books.workers.values():
            assert not book.promised, book
            assert book.free_blocks == book.up.num_blocks, book
            assert (book.pending_tokens, book.num_decoding) == (0, 0), book

    def process(self, worker: str) -> Process:
        return self.current[WorkerId(worker)]

    def engine(self, worker: str) -> Engine:
        backend = self.process(worker).backend
        assert isinstance(backend, ForeignBackend)
        return backend.engine

    def names(self, request_id: str) -> list[str]:
        """Life events of the request, in order of time."""
        events = [event for event in self.life if event.request_id == request_id]
        return [event.name.value for event in sorted(events, key=lambda event: event.at_s)]

    def settle(self) -> None:
        """Let two heartbeats pass, so that the router's books follow."""
        end_s = self.now + 1.2
        while self.now < end_s:
            while events := self.events():
                events[0]()
            self.advance()

    def _left(self) -> str:
        nodes = {p: (p.node.is_empty, p.timers) for p in self.current.values()}
        return f"{list(self.router.dispatch.lives.values())} {nodes}"

    # --- processes ------------------------------------------------------------------------------

    def _start(self, worker: WorkerId, epoch: Epoch) -> None:
        process = self.spec.process(worker, epoch)
        self.links = [link for link in self.links if worker not in {p.worker for p in link.sides}]
        self.links += [Link(process, p) for p in self.current.values() if p.worker != worker]
        self.current[worker] = process
        settings = process.settings
        self._tell_router(
            WorkerUp(
                worker=worker,
                epoch=epoch,
                role=settings.role,
                layout=settings.layout,
                num_blocks=settings.num_blocks,
                max_model_tokens=settings.max_model_tokens,
                pid=1,
                device="cpu",
                engine="fake",
            )
        )
        self._tell(process, Started())

    def _reap(self, process: Process) -> None:
        """The launcher sees the end, tells the router, and starts the next process."""
        self.unreaped.remove(process)
        self._tell_router(WorkerLost(process.worker, process.epoch, "killed"))
        self._start(process.worker, Epoch(process.epoch + 1))

    # --- happenings -----------------------------------------------------------------------------

    def _events_of(self, process: Process) -> list[Happening]:
        found: list[Happening] = []
        if process.to_worker:
            found.append(partial(self._deliver_to_worker, process))
        if process.posted:
            found.append(partial(self._hear_engine, process))
        if process.backend.can_act:
            found.append(partial(self._act, process))
        due = [name for name, at_s in process.timers.items() if at_s <= self.now]
        return found + [partial(self._fire, process, name) for name in due]

    def _deliver_to_router(self, process: Process) -> None:
        message = process.to_gateway.popleft()
        self._tell_router(Received(process.worker, process.epoch, message))

    def _deliver_to_worker(self, process: Process) -> None:
        self._tell(process, Received(GATEWAY, Epoch(0), process.to_worker.popleft()))

    def _deliver(self, link: Link, side: Process) -> None:
        self._tell(side, link.deliver(side))

    def _hear_engine(self, process: Process) -> None:
        self._tell(process, process.posted.popleft())

    def _act(self, process: Process) -> None:
        answer = process.backend.act()
        if answer is not None:
            process.posted.append(answer)

    def _fire(self, process: Process, timer: str) -> None:
        del process.timers[timer]
        self._tell(process, TimerFired(timer))

    def _fire_router(self, timer: str) -> None:
        del self.router_timers[timer]
        self._tell_router(TimerFired(timer))

    # --- inputs and effects ---------------------------------------------------------------------

    def _tell(self, process: Process, event: Input) -> None:
        self.now += EVENT_S
        for effect in process.node.handle(event, self.now):
            self._perform(process, effect)

    def _perform(self, process: Process, effect: Effect) -> None:
        match effect:
            case Send(to, message) if to == GATEWAY:
                process.to_gateway.append(message)
            case Send(to, message):
                self._send(process, to, message)
            case SetTimer(timer, at_s):
                process.timers[timer] = at_s
            case CancelTimer(timer):
                process.timers.pop(timer, None)
            case Log(event):
                process.to_gateway.append(Life((event,)))
            case _:
                process.backend.perform(effect)

    def _send(self, process: Process, to: WorkerId, message: Message) -> None:
        self.sent[type(message).__name__] += 1
        link = self._link(process, self.current[to])
        link.send(process, message)
        under_way = [
            len(event.message.data)
            for event in link.queues[link.other(process)]
            if isinstance(event, Received) and isinstance(event.message, OpaquePayload)
        ]
        self.most_in_flight_bytes = max(self.most_in_flight_bytes, sum(under_way))

    def _link(self, one: Process, other: Process) -> Link:
        return next(link for link in self.links if set(link.sides) == {one, other})

    def _tell_router(self, event: Input) -> None:
        self.now += EVENT_S
        for effect in self.router.handle(event, self.now):
            match effect:
                case Send(to, message):
                    process = self.current[to]
                    if process.alive:
                        process.to_worker.append(message)
                case SetTimer(timer, at_s):
                    self.router_timers[timer] = at_s
                case CancelTimer(timer):
                    self.router_timers.pop(timer, None)
                case Deliver(request_id):
                    self.answers[request_id].hears(effect)
                case Fail(request_id=request_id):
                    self.answers[request_id].failure = effect
                case Log(event=life):
                    self.life.append(life)
                case KillWorker(worker, epoch, _):
                    process = self.current[worker]
                    if process.epoch == epoch:
                        self.kill(process)
                case _:
                    raise AssertionError(effect)
