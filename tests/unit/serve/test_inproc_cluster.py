"""A whole cluster in one process: answers, ends, failures, and recordings that replay the same."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest

from pdserve.cli import main
from pdserve.core.commands import ChangeRole, DrainOne
from pdserve.core.errors import (
    ConfigError,
    ConflictError,
    ContextLengthError,
    NotFoundError,
    UnavailableError,
)
from pdserve.core.ids import RequestId, WorkerId
from pdserve.core.request import Request, Role, SamplingParams
from pdserve.node.settings import RouterSettings
from pdserve.serve.inproc import InprocCluster
from pdserve.serve.recorder import SUFFIX, FileRecorder, read
from pdserve.serve.replay import replay, replay_file
from pdserve.transport.records import decode_record

PREFILL, DECODE, MIXED = WorkerId("prefill-0"), WorkerId("decode-0"), WorkerId("mixed-0")
SPLIT = ((PREFILL, Role.PREFILL), (DECODE, Role.DECODE))
ALONE = ((MIXED, Role.MIXED),)
NUM_BLOCKS = 96

MakeCluster = Callable[..., InprocCluster]


def request(name: str, *, num_tokens: int = 20, prompt_tokens: int = 70, seed: int = 1) -> Request:
    return Request(
        request_id=RequestId(name),
        prompt_token_ids=tuple(3 + (seed * 7 + i * i) % 256 for i in range(prompt_tokens)),
        params=SamplingParams(max_tokens=num_tokens, seed=seed, temperature=1.0),
    )


async def answer(running: InprocCluster, asked: Request) -> list[int]:
    return [delta.token_id async for delta in running.gateway.submit(asked)]


async def until_idle(running: InprocCluster, *workers: WorkerId) -> None:
    """Until these workers' machines hold nothing: one look per turn of the loop."""
    while not all(
        machine is not None and machine.is_empty
        for machine in (running.worker(worker).machine for worker in workers)
    ):
        await one_turn()


async def one_turn() -> None:
    """Let everybody else go on."""
    await asyncio.to_thread(lambda: None)


def run(work: Callable[[], Awaitable[None]]) -> None:
    async def bounded() -> None:
        await asyncio.wait_for(work(), 60)

    asyncio.run(bounded())


@pytest.fixture(scope="module")
def expected(make_cluster: MakeCluster) -> dict[int, list[int]]:
    """The answers of a single mixed worker, by seed."""
    answers: dict[int, list[int]] = {}

    async def work() -> None:
        async with make_cluster(ALONE) as running:
            for seed in range(1, 6):
                answers[seed] = await answer(running, request(f"alone-{seed}", seed=seed))

    run(work)
    assert all(len(tokens) >= 1 for tokens in answers.values())
    return answers


def test_split_answers_are_those_of_one_worker_and_every_block_comes_back(
    make_cluster: MakeCluster, expected: dict[int, list[int]]
) -> None:
    async def work() -> None:
        async with make_cluster(SPLIT) as running:
            asked = [request(f"r{seed}", seed=seed) for seed in range(1, 6)]
            answers = await asyncio.gather(*(answer(running, one) for one in asked))
            assert dict(zip(range(1, 6), answers, strict=True)) == expected
            await until_idle(running, PREFILL, DECODE)
            for worker in (PREFILL, DECODE):
                machine = running.worker(worker).machine
                assert machine is not None
                assert machine.batch.tables.pool.num_free == NUM_BLOCKS
            events = running.gateway.timeline(RequestId("r1"))
            assert events is not None
            assert [event.name.value for event in events][-1] == "finished"
            assert b"vllm:generation_tokens_total" in running.gateway.metrics_text()

    run(work)


def test_a_reader_that_leaves_frees_both_sides(make_cluster: MakeCluster) -> None:
    async def work() -> None:
        async with make_cluster(SPLIT) as running:
            stream = running.gateway.submit(request("leaves", num_tokens=900))
            await anext(stream)
            await stream.aclose()
            await until_idle(running, PREFILL, DECODE)
            assert running.gateway.cluster()["open_requests"] == 0

    run(work)


def test_a_killed_worker_costs_no_token_and_its_next_process_serves(
    make_cluster: MakeCluster, expected: dict[int, list[int]]
) -> None:
    async def work() -> None:
        async with make_cluster(SPLIT) as running:
            for victim in (DECODE, PREFILL):
                stream = running.gateway.submit(request(f"kill-{victim}", seed=1))
                tokens = [(await anext(stream)).token_id, (await anext(stream)).token_id]
                running.kill(victim)
                tokens += [delta.token_id async for delta in stream]
                assert tokens == expected[1]
                assert await answer(running, request(f"after-{victim}", seed=2)) == expected[2]
                running.restart(victim)
                await running.gateway.until_ready()
            states = {one["id"]: one["epoch"] for one in running.gateway.cluster()["workers"]}
            assert states == {"prefill-0": 2, "decode-0": 2}
            assert await answer(running, request("again", seed=3)) == expected[3]

    run(work)


def test_with_nobody_left_the_answer_ends_with_an_error(make_cluster: MakeCluster) -> None:
    async def work() -> None:
        router = RouterSettings(no_worker_timeout_s=0.01)
        async with make_cluster(ALONE, router=router) as running:
            running.kill(MIXED)
            while running.gateway.is_ready():  # it may still be in a step
                await one_turn()
            with pytest.raises(UnavailableError, match="no worker"):
                await answer(running, request("nobody"))

    run(work)


def test_what_can_never_fit_is_refused_at_once(make_cluster: MakeCluster) -> None:
    async def work() -> None:
        async with make_cluster(ALONE) as running:
            with pytest.raises(ContextLengthError, match="1025 tokens"):
                await answer(running, request("long", prompt_tokens=1000, num_tokens=25))

    run(work)


def test_draining_lets_running_answers_end_and_refuses_new_ones(
    make_cluster: MakeCluster, expected: dict[int, list[int]]
) -> None:
    async def work() -> None:
        async with make_cluster(SPLIT) as running:
            stream = running.gateway.submit(request("running", seed=1))
            first = await anext(stream)
            draining = asyncio.ensure_future(running.gateway.drain())
            await asyncio.wait((draining,), timeout=0)
            with pytest.raises(UnavailableError, match="shutting down"):
                await answer(running, request("late"))
            assert [first.token_id] + [one.token_id async for one in stream] == expected[1]
            await draining

    run(work)


def test_a_worker_that_cannot_load_ends_the_start(
    make_cluster: MakeCluster, tmp_path: Path
) -> None:
    async def work() -> None:
        async with make_cluster(ALONE, model=tmp_path / "nothing"):
            pytest.fail("there is no model")

    with pytest.raises(Exception, match="nothing"):
        run(work)


def test_a_recording_replays_byte_by_byte_and_a_change_is_found(
    make_cluster: MakeCluster, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "recording"

    async def work() -> None:
        async with make_cluster(SPLIT, record=folder) as running:
            for seed in range(1, 4):
                await answer(running, request(f"r{seed}", seed=seed))
            running.kill(DECODE)
            await answer(running, request("alone", seed=4))

    run(work)
    names = {file.name for file in folder.iterdir()}
    assert names == {f"router{SUFFIX}", f"prefill-0.1{SUFFIX}", f"decode-0.1{SUFFIX}"}
    assert main(["replay", str(folder)]) == 0
    outcomes = replay(folder)
    assert all(outcome.num_inputs > 10 for outcome in outcomes)

    # Cut off in the middle of a record, as by kill -9: all before it still replays.
    router = folder / f"router{SUFFIX}"
    whole = router.read_bytes()
    router.write_bytes(whole[:-3])
    assert replay_file(router).difference is None
    _, inputs = read(router)
    assert list(inputs)[-1].effects is None

    # One bit of one input: from there on the machine says something else, or nothing is whole.
    position = whole.index(b"r2")
    router.write_bytes(whole[:position] + b"x" + whole[position + 1 :])
    assert replay_file(router).num_inputs < outcomes[-1].num_inputs
    # One effect less than the machine gives: the first difference is shown.
    router.write_bytes(whole)
    changed = tmp_path / "changed"
    birth, inputs = read(router)
    recorder = FileRecorder(changed / router.name, birth)
    for number, heard in enumerate(inputs):
        effects = [decode_record(effect) for effect in heard.effects or ()]
        recorder.write_input(heard.event, heard.now)
        recorder.write_effects(effects[:-1] if number == 5 else effects)  # type: ignore[arg-type]
    recorder.close()
    capsys.readouterr()
    assert main(["replay", str(changed), "--json"]) == 1
    document = json.loads(capsys.readouterr().out)
    assert document["equal"] is False
    assert document["files"][0]["difference"].startswith("input 6 at ")
    assert main(["replay", str(changed)]) == 1
    assert "DIFFERS" in capsys.readouterr().out


def test_a_recording_is_never_written_over(make_cluster: MakeCluster, tmp_path: Path) -> None:
    (tmp_path / f"router{SUFFIX}").touch()

    async def work() -> None:
        async with make_cluster(ALONE, record=tmp_path):
            pytest.fail("it would overwrite a recording")

    with pytest.raises(ConfigError, match="give an empty folder"):
        run(work)


def test_roles_and_drains_go_through_the_gateway(
    make_cluster: MakeCluster, expected: dict[int, list[int]]
) -> None:
    """A rolling restart and a change of roles in the middle of answers change no token."""

    async def work() -> None:
        async with make_cluster(SPLIT) as running:
            stream = running.gateway.submit(request("old", seed=1))
            tokens = [(await anext(stream)).token_id]
            change = ChangeRole(command=0, worker=PREFILL, role=Role.DECODE, expected_epoch=0)
            assert await running.gateway.command(change) == "role epoch 1"
            with pytest.raises(ConflictError, match="role epoch of prefill-0 is 1"):
                await running.gateway.command(change)
            with pytest.raises(NotFoundError, match="nobody"):
                await running.gateway.command(DrainOne(command=0, worker=WorkerId("nobody")))
            described = {one["id"]: one for one in running.gateway.cluster()["workers"]}
            assert described[PREFILL]["role"] == "decode"
            assert described[PREFILL]["home_role"] == "prefill"
            drain = asyncio.ensure_future(
                running.gateway.command(DrainOne(command=0, worker=DECODE, restart=True))
            )
            tokens += [delta.token_id async for delta in stream]
            assert tokens == expected[1]
            assert await drain == "decode-0 holds nothing"
            while running.gateway.num_ready == 2:
                await one_turn()
            running.restart(DECODE)
            await running.gateway.until_ready()
            assert await answer(running, request("new", seed=2)) == expected[2]

    run(work)
