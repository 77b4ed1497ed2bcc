"""Sending a load: each request at its time, no more at once than allowed, nothing lost.

The bytes of the first requests, as many as fit into `AHEAD_BYTES`, are made before the clock
starts. Later ones are each made before their turn, which for a long prompt delays what is read at
that moment by some milliseconds. What the client itself costs, its CPU time and how late it sent,
is part of the result: figures of a client that is too busy are not figures of the server.
"""

from __future__ import annotations

import asyncio
import itertools
import time
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Protocol

from pdserve.bench.plan import Load
from pdserve.workload.outcome import Outcome
from pdserve.workload.request import TraceRequest

WARMUP_CONCURRENCY = 8
AHEAD_BYTES = 64 << 20
AHEAD_REQUESTS = 10_000


class Sender(Protocol):
    """What is needed of a `target.Target`."""

    def prepare(self, request: TraceRequest) -> bytes: ...

    async def send(
        self, request: TraceRequest, prepared: bytes, start_s: float, due_s: float | None = None
    ) -> Outcome: ...


class Watcher(Protocol):
    """Told of every measured request."""

    def sent(self) -> None: ...

    def ended(self, outcome: Outcome) -> None: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Result:
    """``outcomes`` by index. ``cpu_s`` is the CPU time of this process during ``duration_s``."""

    outcomes: list[Outcome] = field(repr=False)
    warmup: list[Outcome] = field(repr=False)
    duration_s: float
    cpu_s: float
    max_in_flight: int

    @property
    def cpu_us_per_token(self) -> float:
        """CPU time of the client for each token of any request, preparing and all included."""
        num_tokens = sum(outcome.output_tokens for outcome in self.outcomes)
        return self.cpu_s / num_tokens * 1e6 if num_tokens else 0.0


def _nothing(start_s: float) -> None:
    """Nothing else begins with the load."""


async def run_load(
    load: Load,
    sender: Sender,
    watcher: Watcher,
    begin: Callable[[float], None] = _nothing,
) -> Result:
    """Send the warm-up, then everything, and wait for the last end.

    ``begin`` is called when the clock starts, with that moment (`time.perf_counter`).
    """
    warmup = await _warm_up(load, sender)
    run = _Run(load, sender, watcher)
    run.make_ahead()
    cpu_s = time.process_time()
    run.start_s = time.perf_counter()
    begin(run.start_s)
    await run.send_all()
    return Result(
        outcomes=sorted(run.outcomes, key=lambda outcome: outcome.index),
        warmup=warmup,
        duration_s=time.perf_counter() - run.start_s,
        cpu_s=time.process_time() - cpu_s,
        max_in_flight=run.max_in_flight,
    )


async def _warm_up(load: Load, sender: Sender) -> list[Outcome]:
    places = asyncio.Semaphore(min(load.concurrency or WARMUP_CONCURRENCY, WARMUP_CONCURRENCY))
    start_s = time.perf_counter()

    async def one(request: TraceRequest) -> Outcome:
        async with places:
            return await sender.send(request, sender.prepare(request), start_s)

    return list(await asyncio.gather(*map(one, load.warmup)))


class _Run:
    """The state of one run: what is in flight, what has ended."""

    def __init__(self, load: Load, sender: Sender, watcher: Watcher) -> None:
        self.outcomes: list[Outcome] = []
        self.start_s = 0.0
        self.max_in_flight = 0
        self._load = load
        self._sender = sender
        self._watcher = watcher
        self._in_flight = 0
        self._place_free = asyncio.Event()
        self._requests = iter(load.requests)
        self._made: deque[tuple[TraceRequest, bytes]] = deque()

    def make_ahead(self) -> None:
        num_bytes = 0
        for request in itertools.islice(self._requests, AHEAD_REQUESTS):
            self._made.append((request, self._sender.prepare(request)))
            num_bytes += len(self._made[-1][1])
            if num_bytes >= AHEAD_BYTES:
                break

    def _prepared(self) -> Iterator[tuple[TraceRequest, bytes]]:
        while self._made:
            yield self._made.popleft()
        for request in self._requests:
            yield request, self._sender.prepare(request)

    async def send_all(self) -> None:
        async with asyncio.TaskGroup() as group:
            for request, prepared in self._prepared():
                await self._free_place()
                if self._load.is_paced:
                    await self._until(request.at_s)
                elif self._is_over():
                    break
                self._in_flight += 1
                self.max_in_flight = max(self.max_in_flight, self._in_flight)
                self._watcher.sent()
                group.create_task(self._one(request, prepared))

    async def _one(self, request: TraceRequest, prepared: bytes) -> None:
        due_s = request.at_s if self._load.is_paced else None
        outcome = await self._sender.send(request, prepared, self.start_s, due_s)
        self._in_flight -= 1
        self._place_free.set()
        self.outcomes.append(outcome)
        self._watcher.ended(outcome)

    async def _free_place(self) -> None:
        most = self._load.concurrency
        while most is not None and self._in_flight >= most:
            self._place_free.clear()
            await self._place_free.wait()

    async def _until(self, at_s: float) -> None:
        wait_s = at_s - (time.perf_counter() - self.start_s)
        if wait_s > 0:
            await asyncio.sleep(wait_s)

    def _is_over(self) -> bool:
        duration_s = self._load.duration_s
        return duration_s is not None and time.perf_counter() - self.start_s >= duration_s
