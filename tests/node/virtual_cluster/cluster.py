"""A router and its workers in virtual time. See the package's docstring."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from typing import NamedTuple

from pdserve.core.commands import (
    Answer,
    ChangeRole,
    DrainOne,
    RoleChanged,
    RolesJudged,
    UndrainOne,
)
from pdserve.core.effects import (
    BeginDrain,
    BindTransfer,
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
from pdserve.core.ids import BlockId, Epoch, RequestId, WorkerId
from pdserve.core.messages import Message, StartJob
from pdserve.node.router import RouterNode
from pdserve.policy.registry import make_policy
from virtual_cluster.checks import check_one_owner, check_router, check_worker, check_write
from virtual_cluster.client import Client
from virtual_cluster.links import PairLink
from virtual_cluster.oracle import Ask
from virtual_cluster.process import Peers, Process
from virtual_cluster.spec import ClusterSpec

EVENT_S = 0.0005
"""Virtual time that each event takes."""
BACKGROUND_TIMERS = ("heartbeat", "report", "watch", "roles")
MAX_EVENTS = 60_000


class Event(NamedTuple):
    """Something that can happen next. ``kind`` is one of

    ``to_gateway, to_worker, life, posted, step, transfer, timer`` (of ``process``; ``timer`` also
    of the router, then it is None), ``exit, restart`` (of a dead one), ``connect, see, notice,
    deliver`` (of ``link``, for the side ``process``).
    """

    kind: str
    process: Process | None = None
    link: PairLink | None = None


Condition = Callable[[Event], bool]


def _never(event: Event) -> bool:
    return False


def _all(number: int) -> int:
    return number - 1


class VirtualCluster:
    """``members``: processes that the gateway counts as up. ``current``: the latest process of each
    slot. ``unreaped``: dead ones of which the launcher has not heard."""

    def __init__(self, spec: ClusterSpec) -> None:
        self.spec = spec
        self.now = 0.0
        self.router = RouterNode(spec.router, make_policy(spec.policy))
        self.router_timers: dict[str, float] = {}
        self.client = Client()
        self.asks: dict[RequestId, Ask] = {}
        self.life: list[LifeEvent] = []
        self.killed: list[KillWorker] = []
        self.said: list[Answer | RoleChanged | RolesJudged] = []
        self.processes: list[Process] = []
        self.current: dict[WorkerId, Process] = {}
        self.members: dict[WorkerId, Process] = {}
        self.unreaped: list[Process] = []
        self.late_peer_lost = False
        self.restarts = True
        self.below: Callable[[int], int] = _all
        self._tell_router(Started())
        for worker, _ in spec.slots:
            self.start(worker)

    # --- what a test or a schedule does ---------------------------------------------------------

    def submit(self, ask: Ask) -> None:
        self.asks[ask.request_id] = ask
        self.client.asks(ask)
        self._tell_router(Submit(ask.request))

    def leave(self, request_id: RequestId, choices: tuple[int, ...] | None = None) -> None:
        """The client goes away, or a stop string ends choices."""
        self.client.goes(request_id, choices)
        self._tell_router(ClientGone(request_id, choices))

    def drain(self) -> None:
        self._tell_router(BeginDrain())

    def command(self, asked: ChangeRole | DrainOne | UndrainOne) -> None:
        """An operator says something."""
        self._tell_router(asked)

    def answer(self, command: int) -> Answer | None:
        """What the router said to it, once."""
        found = [a for a in self.said if isinstance(a, Answer) and a.command == command]
        assert len(found) <= 1, f"{command} was answered twice"
        return found[0] if found else None

    def start(self, worker: WorkerId) -> Process:
        """A new process of the slot; it says that it is up."""
        old = self.current.get(worker)
        epoch = Epoch(1 if old is None else old.epoch + 1)
        settings = self.spec.settings(worker, epoch)
        process = Process(settings, self.spec.batching, self.asks, self._write, self._send_peer)
        for other in self.processes:
            if other.alive and other.worker != worker:
                link = PairLink(process, other, self.hear)
                process.links[other.worker, other.epoch] = link
                other.links[worker, epoch] = link
        self.current[worker] = process
        self.processes.append(process)
        process.to_gateway.append(process.up())
        self.hear(process, Started())
        return process

    def kill(self, process: Process) -> None:
        """SIGKILL. Of what it has sent, a part may still be read."""
        assert process.alive
        process.alive = process.stopped = False
        process.engine = None
        process.posted.clear()
        process.timers.clear()
        process.life.clear()
        process.to_worker.clear()
        keep = self.below(len(process.to_gateway) + 1)
        while len(process.to_gateway) > keep:
            process.to_gateway.pop()
        for link in process.links.values():
            link.break_off(self.below)
        self.unreaped.append(process)

    def cut(self, link: PairLink, *, for_good: bool = False) -> None:
        """The link breaks; ``for_good``: until it is healed."""
        link.break_off(self.below)
        link.cut = for_good

    def ghost(self, process: Process, to: WorkerId, message: Message) -> None:
        """A message of a dead process arrives once more, late."""
        received = Received(process.worker, process.epoch, message)
        if to in self.current:
            self.hear(self.current[to], received)
        else:
            self._tell_router(received)

    def links(self) -> list[PairLink]:
        """Every pair of processes of which one is alive or has something to say."""
        found = {id(link): link for p in self.processes for link in p.links.values()}
        return list(found.values())

    # --- what can happen ------------------------------------------------------------------------

    def events(self) -> list[Event]:
        """Everything that could happen now, in a fixed order."""
        found = [event for process in self.processes for event in self._events_of(process)]
        for link in self.links():
            if link.can_connect:
                found.append(Event("connect", None, link))
            for side in link.sides:
                if side.runs:
                    found += self._events_of_side(link, side)
        due = min(self.router_timers.values(), default=self.now + 1)
        if due <= self.now:
            found.append(Event("timer"))
        return found

    def _events_of(self, process: Process) -> list[Event]:
        kinds = []
        if process.to_gateway:
            kinds.append("to_gateway")
        if process.runs:
            timer = process.next_timer()
            possible = {
                "life": process.life,
                "to_worker": process.to_worker,
                "posted": process.posted,
                "step": process.engine,
                "transfer": process.pusher.has_work,
                "timer": timer is not None and timer[0] <= self.now,
            }
            kinds += [kind for kind, is_so in possible.items() if is_so]
        elif process in self.unreaped:
            kinds.append("exit")
        elif not process.alive and self.current[process.worker] is process and self.restarts:
            kinds.append("restart")
        return [Event(kind, process) for kind in kinds]

    def _events_of_side(self, link: PairLink, side: Process) -> list[Event]:
        kinds = []
        if link.can_see(side):
            kinds.append("see")
        if link.can_notice(side):
            kinds.append("notice")
        if link.can_deliver(side):
            kinds.append("deliver")
        return [Event(kind, side, link) for kind in kinds]

    def do(self, event: Event) -> None:
        """Let it happen, and check what it has touched."""
        self.now += EVENT_S
        kind, process, link = event
        if link is not None:
            self._do_link(kind, process, link)
        elif process is None:
            timer = min(self.router_timers, key=lambda name: (self.router_timers[name], name))
            del self.router_timers[timer]
            self._tell_router(TimerFired(timer))
        else:
            self._do_process(kind, process)

    def _do_link(self, kind: str, side: Process | None, link: PairLink) -> None:
        if side is None:
            link.connect()
            return
        if kind == "see":
            other = link.other(side)
            self._learn(side, other.worker, other.epoch)
        getattr(link, kind)(side)

    def _do_process(self, kind: str, process: Process) -> None:
        match kind:
            case "to_gateway":
                self._hear_worker(process)
            case "to_worker":
                message = process.to_worker.popleft()
                if isinstance(message, Peers):
                    self._hear_peers(process, message)
                else:
                    self.hear(process, Received(WorkerId("gateway"), Epoch(0), message))
            case "life":
                process.flush_life()
            case "posted":
                self.hear(process, process.posted.popleft())
            case "step":
                process.compute(self.now)
            case "transfer":
                process.pusher.advance()
            case "timer":
                timer = process.next_timer()
                assert timer is not None
                del process.timers[timer[1]]
                self.hear(process, TimerFired(timer[1]))
            case "exit":
                self._exit(process)
            case "restart":
                self.start(process.worker)
            case _:
                raise ValueError(kind)

    def next_timer_s(self) -> float | None:
        """When the next timer of anybody who can move is due."""
        times = list(self.router_timers.values())
        times += [at_s for p in self.processes if p.runs for at_s in p.timers.values()]
        return min(times, default=None)

    # --- running on -----------------------------------------------------------------------------

    def run(self, hold: Condition = _never, until: Callable[[], bool] | None = None) -> None:
        """Let happen in turn whatever can without time passing, except what is held; or until it
        is so, which must happen."""
        last = -1
        for _ in range(MAX_EVENTS):
            if until is not None and until():
                return
            events = [event for event in self.events() if not hold(event)]
            if not events:
                assert until is None, "the cluster is at rest, and it is not so"
                return
            last = (last + 1) % len(events)
            self.do(events[last])
        raise AssertionError("the cluster does not come to rest")

    def run_for(self, seconds: float, hold: Condition = _never) -> None:
        """The same, with time passing from timer to timer."""
        end_s = self.now + seconds
        self.run(hold)
        while (at_s := self.next_timer_s()) is not None and at_s <= end_s:
            self.now = max(self.now, at_s)
            self.run(hold)
        self.now = max(self.now, end_s)

    def messages(self, sender: Process, receiver: Process) -> deque[Message]:
        """What the receiver will hear next from the sender."""
        return receiver.links[sender.worker, sender.epoch].queue(receiver)

    # --- inside ---------------------------------------------------------------------------------

    def hear(self, process: Process, event: Input) -> None:
        """A worker's machine hears something."""
        process.handle(event, self.now)
        check_worker(process)
        check_one_owner(self.current.values())

    def _tell_router(self, event: Input) -> None:
        for effect in self.router.handle(event, self.now):
            self._perform(effect)
        check_router(self.router)

    def _perform(self, effect: Effect) -> None:
        match effect:
            case Send(to, message):
                if isinstance(message, StartJob):
                    self.client.started(message)
                member = self.members.get(to)
                if member is not None and member.alive:
                    member.to_worker.append(message)
            case Deliver():
                self.client.hears(effect)
            case Fail():
                self.client.fails(effect)
            case SetTimer(timer, at_s):
                self.router_timers[timer] = at_s
            case CancelTimer(timer):
                self.router_timers.pop(timer, None)
            case Log(event):
                self.life.append(event)
            case KillWorker(worker, epoch):
                self.killed.append(effect)
                process = self.current[worker]
                if process.epoch == epoch and process.alive:
                    self.kill(process)
            case Answer() | RoleChanged() | RolesJudged():
                self.said.append(effect)
            case _:
                raise TypeError(f"the router does not ask for {effect}")

    def _hear_worker(self, process: Process) -> None:
        """The gateway reads the process's next message."""
        message = process.to_gateway.popleft()
        if not isinstance(message, WorkerUp):
            self._tell_router(Received(process.worker, process.epoch, message))
        elif process.alive or process in self.unreaped:
            self.members[process.worker] = process
            self._tell_peers()
            self._tell_router(message)

    def _tell_peers(self) -> None:
        peers = Peers({member.worker: member.epoch for member in self.members.values()})
        for member in self.members.values():
            if member.alive:
                member.to_worker.append(peers)

    def _exit(self, process: Process) -> None:
        """The launcher sees that the process has ended."""
        self.unreaped.remove(process)
        if self.members.get(process.worker) is process:
            del self.members[process.worker]
            self._tell_peers()
        self._tell_router(WorkerLost(process.worker, process.epoch, "killed"))

    def _hear_peers(self, process: Process, peers: Peers) -> None:
        """A peer that came by itself, of which the gateway's word is still on its way, stays."""
        for worker, epoch in list(process.known.items()):
            if worker not in peers.epochs and worker in process.named:
                self._unlearn(process, worker, epoch)
        for worker, epoch in peers.epochs.items():
            if worker != process.worker and epoch >= process.known.get(worker, epoch):
                self._learn(process, worker, epoch)
                process.named.add(worker)

    def _learn(self, process: Process, worker: WorkerId, epoch: Epoch) -> None:
        """This process of the peer counts from now on, no older one."""
        old = process.known.get(worker)
        if old is not None and old < epoch:
            self._unlearn(process, worker, old)
        process.known[worker] = epoch

    def _unlearn(self, process: Process, worker: WorkerId, epoch: Epoch) -> None:
        """Let go of this process of the peer, and of the link to it."""
        del process.known[worker]
        process.named.discard(worker)
        link = process.links.get((worker, epoch))
        if link is not None:
            link.waiting[process].clear()
            link.break_off(self.below)
            if link.can_notice(process) and not self.late_peer_lost:
                link.notice(process)

    def _send_peer(self, process: Process, to: WorkerId, message: Message) -> None:
        epoch = process.known.get(to)
        link = None if epoch is None else process.links.get((to, epoch))
        if link is not None:
            link.send(process, message)

    def _write(
        self, writer: Process, bind: BindTransfer, layer: int, block: BlockId, content: list[int]
    ) -> None:
        """A one-sided write. Into the memory of a dead process it changes nothing."""
        target = self.current[bind.peer]
        if target.epoch == bind.peer_epoch and target.alive:
            check_write(target, bind.ticket.attempt, writer, block)
            target.memory.layers[layer][block] = content
