"""KV that is finished, over real links: requests that move, and prefixes that are fetched.

The numerics contract shows any mistake: tokens are those of a worker that had no part in it.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable

from pdserve.core.events import LifeEvent
from pdserve.core.ids import RequestId, WorkerId
from pdserve.core.request import Request, Role, SamplingParams
from pdserve.policy.cluster import ClusterView, Route, RouteAsk, WorkerView
from pdserve.policy.rebalance import Movable, Move
from pdserve.serve.inproc import InprocCluster

A, B = WorkerId("mixed-0"), WorkerId("mixed-1")
PAIR = ((A, Role.MIXED), (B, Role.MIXED))
MakeCluster = Callable[..., InprocCluster]


def request(name: str, *, num_tokens: int) -> Request:
    return Request(
        request_id=RequestId(name),
        prompt_token_ids=tuple(3 + (11 * i + i * i) % 250 for i in range(120)),
        params=SamplingParams(
            max_tokens=num_tokens, seed=5, temperature=1.0, ignore_eos=True, eos_token_ids=(2,)
        ),
    )


async def answer(running: InprocCluster, asked: Request) -> list[int]:
    return [delta.token_id async for delta in running.gateway.submit(asked)]


def events_of(running: InprocCluster, name: str) -> tuple[LifeEvent, ...]:
    events = running.gateway.timeline(RequestId(name))
    assert events is not None
    return events


async def until_empty(running: InprocCluster) -> None:
    """Until nothing is left on either worker: one look per turn of the loop."""
    machines = [running.worker(worker).machine for worker in (A, B)]
    while not all(machine is not None and machine.is_empty for machine in machines):
        await asyncio.to_thread(lambda: None)


def run(work: Callable[[], Awaitable[None]]) -> None:
    async def bounded() -> None:
        await asyncio.wait_for(work(), 60)

    asyncio.run(bounded())


class Restless:
    """Moves whatever decodes to the other worker, again and again."""

    def may_be_crowded(self, worker: WorkerView, num_sequences: int) -> bool:
        return num_sequences > 0

    def propose(
        self, view: ClusterView, crowded: WorkerView, movable: tuple[Movable, ...]
    ) -> Move | None:
        there = B if crowded.worker == A else A
        return Move(
            attempt=movable[0].attempt, to=there, pause_s=0.0, saves_s=1.0, reason="restless"
        )


class Fetching:
    """The first request on one worker, all others on the other one, with the first one's prefix."""

    def choose(self, view: ClusterView, ask: RouteAsk) -> Route | None:
        if ask.number == 1:
            return Route(A, A, "first")
        return Route(B, B, "later", fetch_from=A)


def test_a_request_that_moves_to_and_fro_keeps_its_tokens(make_cluster: MakeCluster) -> None:
    async def work() -> None:
        async with make_cluster(PAIR) as running:
            still = await answer(running, request("still", num_tokens=300))
            running.router.moves._policy = Restless()
            assert await answer(running, request("moving", num_tokens=300)) == still
            await until_empty(running)
            events = events_of(running, "moving")
            names = [event.name.value for event in events]
            assert names.count("moving") >= 2
            assert "resumed" not in names
            started = {event.node for event in events if event.name.value == "decode_started"}
            assert started == {A, B}

    run(work)


def test_a_fetched_prefix_is_as_good_as_a_computed_one(make_cluster: MakeCluster) -> None:
    async def work() -> None:
        async with make_cluster(PAIR) as running:
            running.router.dispatch._policy = Fetching()
            first = await answer(running, request("first", num_tokens=20))
            while not len(running.router.dispatch.prefixes._index):
                await asyncio.to_thread(lambda: None)
            assert await answer(running, request("second", num_tokens=20)) == first
            await until_empty(running)
            details = {e.name.value: dict(e.detail) for e in events_of(running, "second")}
            assert details["prefix_fetched"]["outcome"] == "sent"
            assert details["prefix_fetched"]["source"] == A
            assert details["prefill_started"]["cached_tokens"] == 112

    run(work)
