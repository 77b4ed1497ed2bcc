"""Two pools, a pusher on the first, and a log of everything that it does, in order."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from queue import SimpleQueue
from typing import Any

import pytest

from pdserve.core.effects import BindTransfer, Input, OpenTransfer, TransferStopped
from pdserve.core.ids import AttemptId, BlockId, Epoch, RequestId, StepId, WorkerId
from pdserve.core.layout import KvLayout
from pdserve.core.messages import Ticket
from pdserve.core.request import SamplingParams
from pdserve.core.step import SampleSpec, StepPlan, StepRow
from pdserve.transport.base import Region, RemotePool, Transport
from pdserve.transport.inproc import InprocHub, InprocTransport
from pdserve.transport.push import Pusher
from pdserve.transport.transfer import PoolView

LAYOUT = KvLayout(
    num_layers=3,
    num_kv_heads=1,
    head_dim=2,
    block_size=4,
    dtype="fp32",
    numerics="test",
    weights_digest="w",
)
HERE_BLOCKS, THERE_BLOCKS = 40, 56
SAMPLE = SampleSpec(params=SamplingParams(max_tokens=8, seed=1), choices=(0,), index=0)
TIMEOUT_S = 30.0


class LoggedRemote(RemotePool):
    """Logs each write, after it is done, before it returns."""

    def __init__(self, inner: RemotePool, log: list[object]) -> None:
        self._inner = inner
        self._log = log

    def write(self, source: memoryview, regions: Sequence[Region]) -> None:
        self._inner.write(source, regions)
        self._log.append(tuple(regions))

    def settle(self, done: Callable[[], None]) -> None:
        self._inner.settle(done)

    def close(self) -> None:
        self._inner.close()


class LoggedRunner:
    """A CPU runner as far as a push sees it: both calls are no-ops, but noted."""

    def __init__(self) -> None:
        self.read: list[tuple[int, tuple[BlockId, ...]]] = []
        self.taken: list[tuple[BlockId, ...]] = []
        self.error: Exception | None = None

    def read_kv(self, layer: int, block_ids: Sequence[BlockId]) -> None:
        if self.error is not None:
            raise self.error
        self.read.append((layer, tuple(block_ids)))

    def write_kv(self, block_ids: Sequence[BlockId]) -> None:
        if self.error is not None:
            raise self.error
        self.taken.append(tuple(block_ids))


class Scene:
    """The pools of two workers. Every byte starts as a value that nothing may ever be sent as."""

    layout = LAYOUT
    timeout_s = TIMEOUT_S

    def __init__(self, here: Transport, there: Transport) -> None:
        here_pool = here.allocate(LAYOUT.pool_bytes(HERE_BLOCKS))
        there_pool = there.allocate(LAYOUT.pool_bytes(THERE_BLOCKS))
        self._pools = [here_pool, there_pool]
        self.here = PoolView(here_pool.memory, LAYOUT, HERE_BLOCKS)
        self.there = PoolView(there_pool.memory, LAYOUT, THERE_BLOCKS)
        self.here.memory[:] = b"\xee" * self.here.memory.nbytes
        self.log: list[object] = []
        self.posts: SimpleQueue[Input] = SimpleQueue()
        self.at_post: Callable[[Input], None] = lambda event: None
        self.remote = LoggedRemote(here.attach(there_pool.export()), self.log)
        self.runner = LoggedRunner()
        self.pusher = self.make_pusher(self.here)
        self._steps = 0

    def make_pusher(self, pool: PoolView) -> Pusher:
        return Pusher(
            runner=self.runner,
            pool_memory=pool.memory,
            layout=LAYOUT,
            num_blocks=pool.num_blocks,
            post=self._post,
            announce=lambda peer, news: self.log.append(news),
        )

    def close(self) -> None:
        self.pusher.close()
        self.remote.close()
        for pool in self._pools:
            pool.close()

    def _post(self, event: Any) -> None:
        if "barrier" not in event.attempt.request_id:
            self.at_post(event)
            self.log.append(event)
        self.posts.put(event)

    # --- what the machine asks for ------------------------------------------------------------

    def attempt(self, name: str = "r") -> AttemptId:
        return AttemptId(RequestId(name), Epoch(1))

    def open(
        self,
        blocks: Sequence[int],
        cached: int = 0,
        *,
        one_shot: bool = False,
        name: str = "r",
    ) -> None:
        effect = OpenTransfer(
            attempt=self.attempt(name),
            peer=WorkerId("there"),
            block_ids=tuple(map(BlockId, blocks)),
            cached_blocks=cached,
            one_shot=one_shot,
        )
        self.pusher.open(effect)

    def bind(self, first_block: int, blocks: Sequence[int], name: str = "r") -> None:
        ticket = Ticket(
            attempt=self.attempt(name),
            first_block=first_block,
            block_ids=tuple(map(BlockId, blocks)),
            lease_s=1.0,
        )
        effect = BindTransfer(ticket, WorkerId("there"), Epoch(1))
        self.pusher.bind(effect, self.remote, THERE_BLOCKS)

    def drain(self) -> list[Input]:
        """Wait until the pusher has done all that it was told; gives what it has posted."""
        self.open((), name="barrier")
        barriers = [self.attempt("barrier"), self.attempt("another barrier")]
        for barrier in barriers:  # the peer's lane, and what belongs to none
            self.pusher.stop(barrier)
        found: list[Input] = []
        waiting = [TransferStopped(barrier) for barrier in barriers]
        while waiting:
            event = self.posts.get(timeout=TIMEOUT_S)
            if event in waiting:
                waiting.remove(event)
            else:
                found.append(event)
        return found

    # --- what the engine does -----------------------------------------------------------------

    def row(
        self, blocks: Sequence[int], start: int, end: int, *, last: bool, name: str = "r"
    ) -> StepRow:
        return StepRow(
            attempt=self.attempt(name),
            token_ids=(7,) * (end - start),
            start=start,
            block_ids=tuple(map(BlockId, blocks)),
            sample=SAMPLE if last else None,
            pushes=True,
        )

    def plan(self, *rows: StepRow) -> StepPlan:
        self._steps += 1
        return StepPlan(step_id=StepId(self._steps), rows=rows)

    def fill(self, layer: int, blocks: Sequence[int]) -> None:
        """Compute: blocks of a layer get bytes that tell which they are."""
        for block in blocks:
            start = self.here.offset(layer, block)
            size = LAYOUT.block_bytes
            self.here.memory[start : start + size] = bytes([layer * 64 + block + 1]) * size

    def compute(self, plan: StepPlan, layer: int) -> None:
        for row in plan.rows:
            first = row.start // LAYOUT.block_size
            end = LAYOUT.num_blocks_for(row.end)
            self.fill(layer, row.block_ids[first:end])
        self.pusher.layer_done(plan.step_id, layer)

    def step(self, *rows: StepRow) -> None:
        plan = self.plan(*rows)
        self.pusher.begin_step(plan)
        for layer in range(LAYOUT.num_layers):
            self.compute(plan, layer)
        self.pusher.end_step(plan.step_id, True)

    # --- what must be true --------------------------------------------------------------------

    def block_there(self, layer: int, block: int) -> bytes:
        start = self.there.offset(layer, block)
        return bytes(self.there.memory[start : start + LAYOUT.block_bytes])

    def arrived(self, here: Sequence[int], there: Sequence[int]) -> list[int]:
        """Layers of which exactly these blocks have come through, all of them or none."""
        layers = []
        for layer in range(LAYOUT.num_layers):
            want = [bytes([layer * 64 + block + 1]) * LAYOUT.block_bytes for block in here]
            found = [self.block_there(layer, block) for block in there]
            if found == want:
                layers.append(layer)
            else:
                assert not any(map(any, found)), f"layer {layer} came through in part"
        return layers

    def num_bytes_there(self) -> int:
        """Bytes of the receiver's pool that were written at all."""
        return self.there.memory.nbytes - bytes(self.there.memory).count(0)

    def writes(self) -> list[Any]:
        return [entry for entry in self.log if isinstance(entry, tuple)]


@pytest.fixture
def scene() -> Iterator[Scene]:
    hub = InprocHub()
    before = threading.active_count()
    scene = Scene(InprocTransport(hub), InprocTransport(hub))
    yield scene
    scene.close()
    assert threading.active_count() == before


@pytest.fixture(scope="session")
def make_scene() -> Callable[[Transport, Transport], Scene]:
    """For tests that need many scenes, or a transport of their own."""
    return Scene
