"""A live cluster in this process, asked from outside, whose answers are compared bit by bit.

The cluster's event loop has a thread of its own, so that its clocks run on while a test computes
references. What a test wants of the cluster is a coroutine given to `Lab.run`. Nothing is waited
for by time: every input of every machine, every token and every held runner is news, and `until`
looks again whenever there is some.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator, Callable, Coroutine, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, TypeVar

from bitwise.asks import EOS, Ask
from bitwise.held import Gate, HeldRunner
from bitwise.reference import Reference, Token
from bitwise.shapes import Shape
from pdserve.api.gateway import ModelCard
from pdserve.core.effects import Input, PeerLost
from pdserve.core.events import LifeEvent, LifeName, Scalar
from pdserve.core.ids import Epoch, RequestId, WorkerId
from pdserve.core.messages import TokenDelta
from pdserve.core.request import Request
from pdserve.core.step import StepPlan
from pdserve.engine.base import ModelRunner
from pdserve.node.settings import RouterSettings
from pdserve.node.worker import WorkerNode
from pdserve.serve.inproc import InprocCluster
from pdserve.serve.runners import build_runner
from pdserve.serve.start import WorkerStart

Answer = TypeVar("Answer")
TIMEOUT_S = 120.0
PATIENT = RouterSettings(queue_timeout_s=TIMEOUT_S, report_timeout_s=TIMEOUT_S)


@dataclass
class Heard:
    """What the client has of one request."""

    request_id: RequestId
    tokens: list[list[Token]]

    @property
    def fewest(self) -> int:
        """Tokens of the choice that has fewest."""
        return min(len(tokens) for tokens in self.tokens)

    @property
    def most(self) -> int:
        """Tokens of the choice that has most."""
        return max(len(tokens) for tokens in self.tokens)


@dataclass
class Gates:
    """Where a worker can be held, whichever process it is."""

    steps: Gate[StepPlan]
    pushes: Gate[int]
    lost: set[tuple[WorkerId, Epoch]] = field(default_factory=set)
    """Processes of peers whose link its machine has seen closed."""


class Lab:
    """Made, used and closed by one test thread. ``build`` makes the runner of a worker."""

    def __init__(
        self,
        shape: Shape,
        template: WorkerStart,
        reference: Reference,
        build: Callable[[WorkerStart], ModelRunner] = build_runner,
    ) -> None:
        self.shape = shape
        self.reference = reference
        self._build = build
        self._num_asked = 0
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="lab", daemon=True)
        self._thread.start()
        self._news = asyncio.Event()
        self.gates = {
            worker: Gates(Gate(self._tell), Gate(self._tell)) for worker, _ in shape.workers
        }
        self.cluster: InprocCluster
        self.run(self._open(template))

    def run(self, work: Coroutine[Any, Any, Answer]) -> Answer:
        """Do this on the cluster's loop, and wait for it."""
        bounded = asyncio.wait_for(work, TIMEOUT_S)
        return asyncio.run_coroutine_threadsafe(bounded, self._loop).result()

    def close(self) -> None:
        """End the cluster. Raises if one of its machines broke."""
        try:
            self.run(self.cluster.__aexit__(None, None, None))
        finally:
            self._loop.call_soon_threadsafe(self._loop.stop)
            self._thread.join()
            self._loop.close()

    # --- for tests: on the test's thread --------------------------------------------------------

    def answer_all(self, asks: Sequence[Ask], *, waves: int = 1) -> list[Heard]:
        """Ask all of these, a later wave while the one before it is being answered; compare."""
        self.prepare(asks)
        heard = self.run(self._ask_in_waves(asks, waves))
        self.compare(asks, heard)
        return heard

    def answer_each(self, asks: Iterable[Ask]) -> list[Heard]:
        """Ask one after the other; compare."""
        return [self.answer_all([ask])[0] for ask in asks]

    def prepare(self, asks: Sequence[Ask]) -> None:
        """Have the reference answers before the cluster is asked: one thread computes at a time."""
        for ask in asks:
            for choice in range(ask.num_choices):
                self.reference.answer(ask.prompt, ask.params, choice)

    def warm(self, asks: Sequence[Ask]) -> None:
        """Ask all of these at once, for what they leave in the prefix caches."""
        self.run(self._ask_in_waves(asks, 1))
        self.assert_clean()

    def forget_prefixes(self, worker: str) -> None:
        """Empty a prefix cache, as eviction would."""

        async def clear() -> None:
            self.machine(worker).batch.tables.pool.clear_cache()

        self.run(clear())

    def compare(self, asks: Sequence[Ask], heard: Sequence[Heard]) -> None:
        """Every token and every bit of every log-probability."""
        found = [self._difference(ask, one) for ask, one in zip(asks, heard, strict=True)]
        different = [text for text in found if text is not None]
        assert not different, f"{len(different)} of {len(asks)} differ:\n" + "\n".join(different)

    def assert_clean(self) -> None:
        """No request, lease, transfer, quarantine or block is held by anybody."""
        self.run(self._assert_clean())

    def details(self, heard: Heard, name: LifeName) -> list[dict[str, Scalar]]:
        """What the request's events of this name say, oldest first."""
        return [dict(event.detail) for event in self.events(heard) if event.name is name]

    def events(self, heard: Heard) -> tuple[LifeEvent, ...]:
        events = self.cluster.gateway.timeline(heard.request_id)
        assert events is not None
        return events

    def machine(self, worker: str) -> WorkerNode:
        """The machine of a worker that runs."""
        machine = self.cluster.worker(WorkerId(worker)).machine
        assert machine is not None
        return machine

    # --- for tests: on the loop ---------------------------------------------------------------

    async def until(self, is_so: Callable[[], bool]) -> None:
        while not is_so():
            self._news.clear()
            await self._news.wait()

    def ask(self, ask: Ask) -> tuple[Heard, asyncio.Task[None]]:
        """Send a request; the task reads its answer to the end."""
        self._num_asked += 1
        request = Request(
            request_id=RequestId(f"{self._num_asked}-{ask.name}"),
            prompt_token_ids=ask.prompt,
            params=ask.params,
            num_choices=ask.num_choices,
            cache_salt=ask.salt,
            route=ask.route or self.shape.route,
        )
        heard = Heard(request.request_id, [[] for _ in range(ask.num_choices)])
        stream = self.cluster.gateway.submit(request)
        return heard, asyncio.ensure_future(self._read(stream, heard))

    def kill(self, worker: str) -> None:
        """``kill -9``."""
        self.cluster.kill(WorkerId(worker))

    async def until_lost(self, worker: str, peer: str) -> None:
        """Until a worker's machine knows that its link to a killed peer is closed."""
        process = next((name, epoch) for name, epoch, _ in self.cluster.slots() if name == peer)
        await self.until(lambda: process in self.gates[WorkerId(worker)].lost)

    async def restart(self, *workers: str) -> None:
        """Start the slots' next processes, once the last ones have ended; wait until they serve."""
        for worker in workers:
            await self.until(lambda worker=worker: self._has_ended(worker))  # type: ignore[misc]
            self.cluster.restart(WorkerId(worker))
        await self.cluster.gateway.until_ready()
        for worker in workers:
            self._watch(WorkerId(worker))

    # --- inside -------------------------------------------------------------------------------

    async def _open(self, template: WorkerStart) -> None:
        card = ModelCard(
            name="model",
            max_model_tokens=template.max_model_tokens,
            vocab_size=384,
            eos_token_ids=(EOS,),
            created=0,
        )
        # No prediction decides: the shape of the cluster says what is split.
        self.cluster = InprocCluster(
            card,
            self.shape.workers,
            template,
            self._build_held,
            policy="shortest_queue",
            router=PATIENT,
        )
        await self.cluster.__aenter__()
        self._hear(self.cluster.router, lambda event: None)
        for worker, _ in self.shape.workers:
            self._watch(worker)

    def _has_ended(self, worker: str) -> bool:
        """True once the router knows that the slot's process is dead."""
        return worker not in self.cluster.router.books.workers

    def _build_held(self, start: WorkerStart) -> ModelRunner:
        gates = self.gates[start.worker]
        return HeldRunner(self._build(start), gates.steps, gates.pushes)

    def _watch(self, worker: WorkerId) -> None:
        gates = self.gates[worker]

        def note(event: Input) -> None:
            if isinstance(event, PeerLost):
                gates.lost.add((event.worker, event.epoch))

        self._hear(self.machine(worker), note)

    def _hear(self, machine: Any, note: Callable[[Input], None]) -> None:
        """Every input of the machine is news from now on."""
        handle = machine.handle

        def heard(event: Input, now: float) -> Any:
            effects = handle(event, now)
            note(event)
            self._news.set()
            return effects

        machine.handle = heard

    def _tell(self) -> None:
        """From any thread."""
        self._loop.call_soon_threadsafe(self._news.set)

    async def _read(self, stream: AsyncIterator[TokenDelta], heard: Heard) -> None:
        async for delta in stream:
            tokens = heard.tokens[delta.choice]
            assert delta.index == len(tokens)
            tokens.append(Token.of(delta.token_id, delta.logprobs, delta.finish))
            self._news.set()

    async def _ask_in_waves(self, asks: Sequence[Ask], waves: int) -> list[Heard]:
        size = -(-len(asks) // waves)
        asked: list[tuple[Heard, asyncio.Task[None]]] = []
        for start in range(0, len(asks), size):
            if asked:
                last = asked[-1][0]
                await self.until(lambda last=last: last.fewest > 0)  # type: ignore[misc]
            asked += [self.ask(ask) for ask in asks[start : start + size]]
        await asyncio.gather(*(task for _, task in asked))
        return [heard for heard, _ in asked]

    def _difference(self, ask: Ask, heard: Heard) -> str | None:
        for choice, tokens in enumerate(heard.tokens):
            expected = self.reference.answer(ask.prompt, ask.params, choice)
            if tuple(tokens) == expected:
                continue
            for index, (got, wanted) in enumerate(zip(tokens, expected, strict=False)):
                if got != wanted:
                    return (
                        f"{ask.name}, choice {choice}, token {index}:\n  {got}\n  alone: {wanted}"
                    )
            return f"{ask.name}, choice {choice}: {len(tokens)} tokens, alone {len(expected)}"
        return None

    async def _assert_clean(self) -> None:
        machines = [self.machine(worker) for worker, _ in self.shape.workers]
        await self.until(
            lambda: not self.cluster.router.num_requests and all(m.is_empty for m in machines)
        )
        for machine in machines:
            pool = machine.batch.tables.pool
            pool.check()
            assert pool.num_referenced == 0
            assert pool.num_quarantined == 0
            assert pool.num_free == self.shape.num_blocks
        books = self.cluster.router.books.workers.values()
        assert not any(book.promised for book in books)


@contextmanager
def lab_of(shape: Shape, start: WorkerStart) -> Iterator[Lab]:
    """A lab with a reference of its own, which is clean in the end."""
    reference = Reference(build_runner(start))
    lab = Lab(shape, start, reference)
    try:
        yield lab
        lab.assert_clean()
    finally:
        lab.close()
        reference.close()
