"""Every kind of engine behind the same gateway: equal answers, nothing left, recordings replay."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path

import pytest

from pdserve.core.engine_work import EngineOutput
from pdserve.core.ids import RequestId, WorkerId
from pdserve.core.request import Request, Role, SamplingParams
from pdserve.engine.fake_foreign import FakeForeignEngine
from pdserve.serve.inproc import InprocCluster
from pdserve.serve.replay import replay
from pdserve.serve.runners import ENGINES

SPLIT = ((WorkerId("prefill-0"), Role.PREFILL), (WorkerId("decode-0"), Role.DECODE))
ALONE = ((WorkerId("mixed-0"), Role.MIXED),)

MakeCluster = Callable[..., InprocCluster]


def request(name: str, seed: int) -> Request:
    return Request(
        request_id=RequestId(name),
        prompt_token_ids=tuple(3 + (seed * 5 + i * i) % 250 for i in range(40 + 31 * seed)),
        params=SamplingParams(max_tokens=12, seed=seed, temperature=1.0),
        num_choices=1 + seed % 2,
    )


async def answer(running: InprocCluster, asked: Request) -> dict[int, list[int]]:
    tokens: dict[int, list[int]] = {choice: [] for choice in range(asked.num_choices)}
    async for delta in running.gateway.submit(asked):
        tokens[delta.choice].append(delta.token_id)
    return tokens


def run(work: Callable[[], Awaitable[None]]) -> None:
    async def bounded() -> None:
        await asyncio.wait_for(work(), 60)

    asyncio.run(bounded())


@pytest.mark.parametrize("engine", sorted(set(ENGINES) - {"torch"}))
def test_an_engine_answers_alike_alone_and_split_and_its_recording_replays(
    make_cluster: MakeCluster, tmp_path: Path, engine: str
) -> None:
    answers: list[list[dict[int, list[int]]]] = []

    async def work(workers: Sequence[tuple[WorkerId, Role]], record: Path) -> None:
        async with make_cluster(workers, engine=engine, record=record) as running:
            asked = [request(f"r{seed}", seed) for seed in range(6)]
            answers.append(await asyncio.gather(*(answer(running, one) for one in asked)))
            document = running.gateway.cluster()
            assert {worker["engine"] for worker in document["workers"]} == {engine}

    run(lambda: work(ALONE, tmp_path / "alone"))
    run(lambda: work(SPLIT, tmp_path / "split"))
    assert answers[0] == answers[1]
    assert all(len(tokens) == 12 for one in answers[0] for tokens in one.values())
    for folder in ("alone", "split"):
        assert [outcome.difference for outcome in replay(tmp_path / folder) if outcome] == [
            None for _ in replay(tmp_path / folder)
        ]


def test_a_broken_engine_ends_its_worker_and_its_requests_go_elsewhere(
    make_cluster: MakeCluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Only the decode worker's engine breaks; the prefill worker takes over."""
    healthy = FakeForeignEngine.step
    engines: list[FakeForeignEngine] = []

    def step(self: FakeForeignEngine) -> EngineOutput | None:
        if self not in engines:
            engines.append(self)
        if len(engines) == 2 and self is engines[1]:
            raise MemoryError("the device fell off")
        return healthy(self)

    monkeypatch.setattr(FakeForeignEngine, "step", step)

    async def work() -> None:
        running = make_cluster(SPLIT, engine="fake-foreign")
        async with running:
            tokens = await answer(running, request("r", 2))
            assert len(tokens[0]) == 12
            states = {one["id"]: one["state"] for one in running.gateway.cluster()["workers"]}
            assert states == {"prefill-0": "ready", "decode-0": "down"}

    with pytest.raises(RuntimeError, match="the device fell off"):
        run(work)
