"""What the machines themselves cost: a router and its workers under a load without cost models.

Requests come at random, are routed, prefilled, handed over and decoded, all by the live machines in
virtual time; steps, messages and transfers take fixed times, so that next to nothing but machines
is measured. Beside it stands a bare loop that pops as many events off a heap and pushes as many:
what the same number of events costs where nothing happens in them. Policies take turns; figures are
of the fastest of several runs, in CPU time.

    taskset -c 1 python benchmarks/machines.py [--requests 4000] [--prefill 25] [--decode 15]
        [--prompt 1020] [--answer 211] [--running 35] [--policies splitwise,predicted] [--runs 3]
"""

from __future__ import annotations

import argparse
import heapq
import random
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from pdserve.core.effects import (
    BindTransfer,
    CancelTimer,
    Input,
    Log,
    Received,
    RunStep,
    Send,
    SetTimer,
    Started,
    StepsDone,
    StopTransfer,
    Submit,
    TimerFired,
    TransferSent,
    TransferStopped,
    TransferVerified,
    VerifyTransfer,
    WorkerUp,
)
from pdserve.core.events import LifeName
from pdserve.core.ids import GATEWAY, Epoch, RequestId, WorkerId
from pdserve.core.layout import KvLayout
from pdserve.core.messages import ChunkDigest, Life
from pdserve.core.request import Request, Role, SamplingParams
from pdserve.core.token_ids import NamedTokens
from pdserve.node.router import RouterNode
from pdserve.node.settings import RouterSettings, WorkerSettings
from pdserve.node.worker import WorkerNode
from pdserve.policy.registry import make_batching, make_policy

LAYOUT = KvLayout(
    num_layers=4, num_kv_heads=1, head_dim=4, block_size=16, dtype="bf16",
    numerics="class", weights_digest="weights",
)  # fmt: skip
NUM_BLOCKS = 20_000
MESSAGE_S = 1e-4
DECODE_STEP_S = 0.03
PROMPT_STEP_S = 0.05
TRANSFER_S = 0.01


@dataclass
class Clock:
    now: float = 0.0
    num_events: int = 0
    heap: list[tuple[float, int, Callable[..., None], Any]] = field(default_factory=list)

    def at(self, at_s: float, call: Callable[..., None], argument: object) -> None:
        self.num_events += 1
        heapq.heappush(self.heap, (at_s, self.num_events, call, argument))

    def run(self) -> None:
        while self.heap:
            self.now, _, call, argument = heapq.heappop(self.heap)
            call(argument)


class Node:
    """A machine with its timers, and messages that arrive after a moment."""

    def __init__(self, machine: Any, clock: Clock, nodes: dict[WorkerId, Node]) -> None:
        self.machine = machine
        self.clock = clock
        self.nodes = nodes
        self.heard: Counter[str] = Counter()
        self._timers: dict[str, float] = {}
        self._do: dict[type, Callable[[Any], None]] = {
            Send: self._send, SetTimer: self._set_timer, CancelTimer: self._cancel_timer,
        }  # fmt: skip

    def hear(self, event: Input) -> None:
        self.feed(event, self.clock.now)

    def feed(self, event: Input, now: float) -> None:
        self.heard[type(event).__name__] += 1
        do = self._do
        for effect in self.machine.handle(event, now):
            perform = do.get(type(effect))
            if perform is not None:
                perform(effect)

    def _send(self, effect: Send) -> None:
        me = getattr(self, "worker", GATEWAY)
        received = Received(me, Epoch(0 if me == GATEWAY else 1), effect.message)
        self.clock.at(self.clock.now + MESSAGE_S, self.nodes[effect.to].hear, received)

    def _set_timer(self, effect: SetTimer) -> None:
        self._timers[effect.timer] = effect.at_s
        self.clock.at(effect.at_s, self._ring, effect)

    def _cancel_timer(self, effect: CancelTimer) -> None:
        self._timers.pop(effect.timer, None)

    def _ring(self, effect: SetTimer) -> None:
        if self._timers.get(effect.timer) == effect.at_s:
            del self._timers[effect.timer]
            if self.nodes:  # the run is not over
                self.hear(TimerFired(effect.timer))


class WorkerProcess(Node):
    """Answers steps, many at a time where the machine allows it, and transfers."""

    def __init__(
        self, settings: WorkerSettings, batching: str, clock: Clock, nodes: dict[WorkerId, Node]
    ) -> None:
        super().__init__(WorkerNode(settings, make_batching(batching)), clock, nodes)
        self.worker = settings.worker
        self._step: RunStep | None = None
        self._begun_s = self._step_s = 0.0
        self._do |= {
            RunStep: self._run, Log: self._log, BindTransfer: self._bind,
            StopTransfer: self._stop, VerifyTransfer: self._verify,
        }  # fmt: skip

    def hear(self, event: Input) -> None:
        """First the steps that have ended by now."""
        if self._step is not None:
            count = int((self.clock.now - self._begun_s) / self._step_s + 1e-9)
            if count:
                self._end(count)
        super().hear(event)
        if self._step is not None:
            self._expect(self._step)

    def _run(self, effect: RunStep) -> None:
        self._step = effect
        prompts = effect.plan.shape.prompt_tokens
        self._step_s = PROMPT_STEP_S if prompts else DECODE_STEP_S
        self._begun_s = max(self._begun_s, self.clock.now)
        self._expect(effect)

    def _expect(self, effect: RunStep) -> None:
        self._count = count = self.machine.steady_steps()
        self.clock.at(self._begun_s + count * self._step_s, self._due, (effect, count))

    def _due(self, expected: tuple[RunStep, int]) -> None:
        if expected == (self._step, self._count) and self.nodes:
            self._end(self._count)

    def _end(self, count: int) -> None:
        self._step = None
        self._begun_s += count * self._step_s
        self.feed(StepsDone(count, count * self._step_s), self._begun_s)

    def _log(self, effect: Log) -> None:
        if effect.event.name is LifeName.PREFILL_STARTED:
            self._send(Send(GATEWAY, Life((effect.event,))))

    def _bind(self, effect: BindTransfer) -> None:
        ticket = effect.ticket
        number = len(ticket.block_ids)
        chunk = ChunkDigest(first_block=ticket.first_block, num_blocks=number, layers=(b"",) * 4)
        chunks = (chunk,) if number else ()
        sent = TransferSent(attempt=ticket.attempt, chunks=chunks, num_bytes=number)
        self.clock.at(self.clock.now + TRANSFER_S, self.hear, sent)

    def _stop(self, effect: StopTransfer) -> None:
        self.clock.at(self.clock.now, self.hear, TransferStopped(effect.attempt))

    def _verify(self, effect: VerifyTransfer) -> None:
        verified = TransferVerified(attempt=effect.attempt, detail=None)
        self.clock.at(self.clock.now, self.hear, verified)


class RouterProcess(Node):
    def __init__(self, policy: str, clock: Clock, nodes: dict[WorkerId, Node]) -> None:
        settings = RouterSettings(logs_life=False, silent_after_s=1e9, report_timeout_s=1e9)
        super().__init__(RouterNode(settings, make_policy(policy)), clock, nodes)


@dataclass(frozen=True)
class Load:
    requests: int
    prefill: int
    decode: int
    prompt: int
    answer: int
    running: int
    prefix_cache: bool

    @property
    def rate(self) -> float:
        """Requests per second that keep so many running on each decode worker."""
        return self.decode * self.running / (self.answer * DECODE_STEP_S)


def run(policy: str, load: Load) -> tuple[float, int, int]:
    """CPU seconds of one run, its inputs, and its events."""
    rng = random.Random(0)
    clock, nodes = Clock(), {}  # type: tuple[Clock, dict[WorkerId, Node]]
    router = nodes[GATEWAY] = RouterProcess(policy, clock, nodes)
    router.hear(Started())
    batching = "splitwise" if policy == "splitwise" else "fcfs"
    slots = [(Role.PREFILL, number) for number in range(load.prefill)]
    slots += [(Role.DECODE, number) for number in range(load.decode)]
    for role, number in slots:
        worker = WorkerId(f"{role}-{number}")
        settings = WorkerSettings(
            worker=worker, epoch=Epoch(1), role=role, layout=LAYOUT, num_blocks=NUM_BLOCKS,
            max_model_tokens=200_000, heartbeat_s=5.0, prefix_cache=load.prefix_cache,
            bare_plans=True, report_samples=False, logs_life=False, lease_s=1e6,
        )  # fmt: skip
        nodes[worker] = WorkerProcess(settings, batching, clock, nodes)
        up = WorkerUp(
            worker=worker, epoch=Epoch(1), role=role, layout=LAYOUT, num_blocks=NUM_BLOCKS,
            max_model_tokens=200_000, pid=0, device="none", engine="none",
        )  # fmt: skip
        router.hear(up)
        nodes[worker].hear(Started())
    at_s = 1.0
    for number in range(load.requests):
        at_s += rng.expovariate(load.rate)
        prompt = max(1, round(rng.expovariate(1 / load.prompt)))
        answer = max(1, round(rng.expovariate(1 / load.answer)))
        request = Request(
            request_id=RequestId(f"r{number}"),
            prompt_token_ids=NamedTokens.of([(f"own {number}", prompt)]),
            params=SamplingParams(max_tokens=answer, seed=0),
        )
        clock.at(at_s, router.hear, Submit(request))

    def look(_: None) -> None:
        """The run is over when nothing is left of the requests: the last timers ring for nobody."""
        if router.machine.num_requests:
            clock.at(clock.now + 5.0, look, None)
        else:
            nodes.clear()

    clock.at(at_s + 5.0, look, None)
    everybody = list(nodes.values())
    begun_s = time.process_time()
    clock.run()
    cpu_s = time.process_time() - begun_s
    return cpu_s, sum(node.heard.total() for node in everybody), clock.num_events


def bare_s(num_events: int) -> float:
    """CPU seconds of a loop of as many events in which nothing happens."""
    heap = [(float(number), number) for number in range(100)]
    begun_s = time.process_time()
    for number in range(num_events):
        at_s, _ = heapq.heappop(heap)
        heapq.heappush(heap, (at_s + 1 + number % 7, number))
    return time.process_time() - begun_s


def main() -> None:
    parser = argparse.ArgumentParser(description="what the machines cost")
    for name, default in (
        ("requests", 4000), ("prefill", 25), ("decode", 15), ("prompt", 1020), ("answer", 211),
        ("running", 35), ("runs", 3),
    ):  # fmt: skip
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--policies", default="shortest_queue,splitwise,prefix_aware,predicted")
    parser.add_argument("--prefix-cache", action="store_true")
    asked = parser.parse_args()
    load = Load(
        asked.requests, asked.prefill, asked.decode, asked.prompt, asked.answer, asked.running,
        asked.prefix_cache,
    )  # fmt: skip
    policies = asked.policies.split(",")
    best = {policy: (float("inf"), 0, 0) for policy in policies}
    bare = dict.fromkeys(policies, float("inf"))
    for _ in range(asked.runs):
        for policy in policies:
            best[policy] = min(best[policy], run(policy, load))
            bare[policy] = min(bare[policy], bare_s(best[policy][2]))
    print(f"{load}, {load.rate:.1f} requests/s")
    for policy in policies:
        cpu_s, num_inputs, num_events = best[policy]
        print(
            f"{policy:16} {cpu_s / load.requests * 1e3:6.3f} ms a request, "
            f"{num_inputs / load.requests:5.1f} inputs of {cpu_s / num_inputs * 1e6:5.1f} us, "
            f"{cpu_s / bare[policy]:5.1f} x a bare loop of {num_events / load.requests:.0f} events"
        )


if __name__ == "__main__":
    main()
