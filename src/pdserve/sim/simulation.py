"""One simulated run: a router, workers, clients, and the time between them.

The life of a request is the live one, since the machines are the live ones: its client sends it,
the router routes it, workers compute steps and hand over KV, tokens come back. What is modelled is
how long each of these takes, and nothing else.

A run ends when all requests are over; what is still under way then (reports, the ends of hand-offs)
is let happen for a moment, so that every block is free again.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

from pdserve.core.commands import Answer, RoleChanged
from pdserve.core.effects import (
    ClientGone,
    Deliver,
    Fail,
    Input,
    KillWorker,
    PeerLost,
    Received,
    Send,
    Started,
    Submit,
    WorkerLost,
)
from pdserve.core.events import LifeEvent, LifeName
from pdserve.core.ids import GATEWAY, Epoch, RequestId, WorkerId
from pdserve.core.messages import Message, StartJob
from pdserve.core.step import StepShape
from pdserve.node.router import RouterNode
from pdserve.policy.batch import BatchPolicy
from pdserve.policy.registry import default_batching, make_batching, make_policy
from pdserve.sim.clients import Client, Clients
from pdserve.sim.clock import Clock
from pdserve.sim.conditions import Conditions, Modelled
from pdserve.sim.garbage import sought_seldom
from pdserve.sim.gateway import VirtualGateway
from pdserve.sim.launcher import VirtualLauncher
from pdserve.sim.network import End, Network
from pdserve.sim.observe import Observer, Told, WorkerLoad
from pdserve.sim.peer_links import PeerLinks
from pdserve.sim.settings import SimSettings
from pdserve.sim.spec import Group
from pdserve.sim.worker import VirtualWorker
from pdserve.workload.request import TraceRequest

SETTLE_S = 30.0
"""For how long what is under way at the end may go on."""


class Simulation:
    """``workers``: the living process of each slot. ``links``: what is wrong between them.
    ``when_over``: called when all requests are over. ``on_answer``: hears what comes of an
    operator's command. Implements `sim.worker.World` and `sim.gateway.Edge`."""

    def __init__(
        self,
        settings: SimSettings,
        requests: Iterator[TraceRequest],
        observers: Sequence[Observer] = (),
        conditions: Conditions | None = None,
    ) -> None:
        """``conditions`` None: as the settings say."""
        self.settings = settings
        self.times = settings.times
        self.clock = Clock()
        self.network = Network(self.clock)
        self._told = Told(observers)
        logs_life = bool(self._told.life)
        self._conditions: Conditions = conditions or Modelled(settings, logs_life=logs_life)
        self._delay = self._conditions.delay
        self.exposed = self._conditions.exposed
        self.workers: dict[WorkerId, VirtualWorker] = {}
        self.slots: dict[WorkerId, Group] = dict(settings.cluster.slots())
        self._epochs: dict[WorkerId, Epoch] = {}
        self.links = PeerLinks(self)
        self.launcher = VirtualLauncher(self.clock, self.start, settings.load_s)
        self.when_over: list[Callable[[], None]] = []
        self.on_answer: Callable[[Answer], None] = lambda answer: None
        policy = settings.make_policy() if settings.make_policy else make_policy(settings.policy)
        self.router = RouterNode(self._conditions.router(), policy)
        self.gateway = VirtualGateway(self.router, self.clock, self)
        longest = max(m.num_blocks * m.block_size for m in settings.machines)
        self.clients = Clients(
            requests,
            declared_tokens=settings.declared_tokens,
            oracle=settings.oracle,
            longest_tokens=min(longest, max(m.max_model_tokens for m in settings.machines)),
            service_of=settings.service_of or (lambda asked: settings.service),
            request_of=settings.request_of,
        )
        self._exhausted = False

    # --- running ------------------------------------------------------------------------------

    def run(self) -> None:
        """From the first request to the end of the last one."""
        with sought_seldom():
            self._run()

    def _run(self) -> None:
        self.gateway.hear(Started())
        for worker in self.slots:
            starts_s = self._conditions.starts_s(worker)
            if starts_s > 0:
                self.clock.at(starts_s, self.start, worker)
            else:
                self.start(worker)
        self._await_next()
        if self._told.sampled:
            self._sample()
        if not self.is_over:
            self.clock.run()
        ended_s = self.clock.now
        for call in self.when_over:
            call()
        while not self.is_settled and self.clock.step(ended_s + SETTLE_S):
            pass
        for tell in self._told.done:
            tell(ended_s)

    @property
    def is_over(self) -> bool:
        """All requests have come and ended."""
        return self._exhausted and not self.clients.open

    def _stop_if_over(self) -> None:
        """A request has ended, or the last one has come."""
        if self.is_over:
            self.clock.stop()

    @property
    def is_settled(self) -> bool:
        """Nothing is left of them anywhere."""
        return (
            self.router.num_requests == 0
            and self.launcher.is_idle
            and all(worker.node.is_empty for worker in self.workers.values())
        )

    @property
    def now(self) -> float:
        return self.clock.now

    def at(self, at_s: float, call: Callable[..., object], *arguments: object) -> None:
        """Have something happen at that time."""
        self.clock.at(at_s, call, *arguments)

    # --- clients ------------------------------------------------------------------------------

    def _await_next(self) -> None:
        asked = self.clients.next_asked()
        if asked is None:
            self._exhausted = True
            self._stop_if_over()
        else:
            self.clock.at(asked.at_s, self._arrive, asked)

    def _arrive(self, asked: TraceRequest) -> None:
        request = self.clients.send(asked, self.clock.now)
        for tell in self._told.arrived:
            tell(self.clock.now, request.request_id, len(request.prompt_token_ids))
        self.clock.after(self.times.edge_in_s, self.gateway.hear, Submit(request))
        leaves_s = 0.0 if asked.cancel_after_tokens == 0 else asked.cancel_after_s
        if leaves_s is not None:
            self.clock.after(leaves_s + self.times.edge_in_s, self._leave, request.request_id)
        self._await_next()

    def _leave(self, request_id: RequestId) -> None:
        """The client gives up."""
        client = self.clients.open.pop(request_id, None)
        if client is not None:
            self.gateway.hear(ClientGone(request_id))
            for tell in self._told.ended:
                tell(self.clock.now, client.ended(cancelled=True))
            self._stop_if_over()

    def deliver_tokens(self, effect: Deliver) -> None:
        client = self.clients.open.get(effect.request_id)
        at_s = self.clock.now + self.times.edge_out_s
        if client is not None and client.takes(effect, at_s):
            del self.clients.open[effect.request_id]
            for tell in self._told.ended:
                tell(at_s, client.ended())
            self._stop_if_over()

    def fail(self, effect: Fail) -> None:
        client = self.clients.open.pop(effect.request_id, None)
        if client is not None:
            for tell in self._told.ended:
                tell(self.clock.now, client.ended(effect))
            self._stop_if_over()

    # --- the world of a worker ----------------------------------------------------------------

    @property
    def open_clients(self) -> dict[RequestId, Client]:
        return self.clients.open

    def drawn(self, client: Client, index: int, at_s: float) -> None:
        gap_s = client.drawn(index, at_s + self.times.message_s + self.times.edge_out_s)
        if gap_s is not None:
            self.drawn_on((gap_s,), 1)

    def drawn_on(self, gaps_s: Sequence[float], count: int) -> None:
        for tell in self._told.gaps:
            tell(gaps_s, count)

    def left_at(self, client: Client, at_s: float) -> None:
        arrives_s = at_s + self.times.message_s + self.times.edge_out_s
        leaves_s = arrives_s + self.times.edge_in_s
        self.clock.at(leaves_s, self._leave, client.request.request_id)

    def deliver(self, sender: VirtualWorker, to: WorkerId, message: Message, at_s: float) -> None:
        received = Received(sender.worker, sender.epoch, message)
        delay = self._delay
        takes_s = delay(sender.worker, to, message, at_s) if delay else self.times.message_s
        arrives_s = at_s + takes_s
        if to == GATEWAY:
            self.clock.at(arrives_s, self.gateway.hear, received)
            return
        receiver = self.workers.get(to)
        if receiver is None:
            return
        if self.links.cut:
            self.links.send(sender, receiver, received)
        else:
            self.clock.at(arrives_s, receiver.hear, received)

    def end_of(self, worker: WorkerId) -> End | None:
        found = self.workers.get(worker)
        return None if found is None else found.end

    def life(self, event: LifeEvent) -> None:
        if event.name is LifeName.PREFILL_STARTED:
            client = self.clients.open.get(event.request_id)
            if client is not None:
                client.cached_tokens = int(dict(event.detail)["cached_tokens"])
        for tell in self._told.life:
            tell(event)

    def stepped(
        self, worker: WorkerId, begun_s: float, ended_s: float, shape: StepShape, count: int
    ) -> None:
        for tell in self._told.steps:
            tell(worker, begun_s, ended_s, shape, count)

    def sent(
        self, sender: WorkerId, receiver: WorkerId, num_bytes: int, begun_s: float, ended_s: float
    ) -> None:
        for tell in self._told.sent:
            tell(sender, receiver, num_bytes, begun_s, ended_s)

    # --- the router's edge --------------------------------------------------------------------

    def post(self, effect: Send) -> None:
        message = effect.message
        if isinstance(message, StartJob):
            client = self.clients.open.get(message.job.request_id)
            if client is not None:
                client.starts(message.job)
        worker = self.workers.get(effect.to)
        if worker is not None:
            received = Received(GATEWAY, Epoch(0), message)
            delay, now = self._delay, self.clock.now
            takes_s = delay(GATEWAY, effect.to, message, now) if delay else self.times.message_s
            self.clock.at(now + takes_s, worker.hear, received)

    def kill(self, effect: KillWorker) -> None:
        worker = self.workers.get(effect.worker)
        if worker is not None and worker.epoch == effect.epoch:
            self.kill_worker(effect.worker, effect.detail)

    def role_changed(self, effect: RoleChanged) -> None:
        for tell in self._told.role_changed:
            tell(self.clock.now, effect.worker, effect.role)

    def answer(self, effect: Answer) -> None:
        """To an operator's command."""
        self.on_answer(effect)

    # --- processes ----------------------------------------------------------------------------

    def start(self, worker: WorkerId) -> None:
        """A process of the slot is ready: the first one, or one that replaces a dead one."""
        epoch = Epoch(self._epochs.get(worker, 0) + 1)
        self._epochs[worker] = epoch
        group = self.slots[worker]
        machine = self.settings.machine(group)
        settings = self._conditions.worker(worker, epoch, group.role, machine)
        process = VirtualWorker(
            self,
            settings,
            machine,
            self._batching(),
            stretches=self.settings.stretches,
            pacer=self._conditions.pacer(self.clock, worker, machine),
        )
        self.workers[worker] = process
        self.gateway.hear(self._conditions.up(process.up()))
        process.start()
        self.launcher.ready(worker)
        for tell in self._told.worker_up:
            tell(self.clock.now, worker, group.role, machine.name)

    def kill_worker(self, worker: WorkerId, detail: str = "killed") -> None:
        """The process dies at once; its launcher and its peers hear of it a message later."""
        process = self.workers.pop(worker, None)
        if process is None:
            return
        process.die()
        self.launcher.ended(worker)
        lost: list[tuple[Callable[[Input], None], Input]] = [
            (self.gateway.hear, WorkerLost(worker, process.epoch, detail))
        ]
        peers = self.workers.values()
        lost += [(peer.hear, PeerLost(worker, process.epoch)) for peer in peers]
        for hear, event in lost:
            self.clock.after(self.times.message_s, hear, event)
        for tell in self._told.worker_lost:
            tell(self.clock.now, worker)

    # --- inside -------------------------------------------------------------------------------

    def _batching(self) -> BatchPolicy:
        if self.settings.make_batching is not None:
            return self.settings.make_batching()
        name = self.settings.batching or default_batching(self.settings.policy)
        return make_batching(name)

    def _sample(self) -> None:
        loads = {worker: self._load(process) for worker, process in sorted(self.workers.items())}
        for tell in self._told.sampled:
            tell(self.clock.now, loads, self.router.num_queued)
        self.clock.after(self.settings.sample_interval_s, self._sample)

    def _load(self, process: VirtualWorker) -> WorkerLoad:
        node = process.node
        queues, pool = node.batch.queues, node.batch.tables.pool
        slot = self.router.pools.slots.get(process.worker)
        return WorkerLoad(
            role=process.settings.role if slot is None else slot.role,
            num_waiting=node.batch.num_waiting + node.inbound.num_queued,
            num_decoding=queues.num_staying,
            pending_prefill_tokens=queues.pending_tokens,
            used_blocks=pool.num_blocks - node.batch.growth_headroom,
            num_blocks=pool.num_blocks,
        )
