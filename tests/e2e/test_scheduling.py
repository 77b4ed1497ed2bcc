"""Workers that change roles, die and are replaced under load: no answer is another one for it.

Most workers here have the modelled engine: its tokens prove the KV that they come from, and it
costs so little that a cluster of eight fits into a test.
"""

from __future__ import annotations

import asyncio
import random
import threading
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import openai
import pytest

from pdserve.api.gateway import ModelCard
from pdserve.cli import main
from pdserve.core.commands import ChangeRole
from pdserve.core.events import LifeEvent, LifeName
from pdserve.core.ids import Epoch, RequestId, WorkerId
from pdserve.core.request import Request, Role, SamplingParams
from pdserve.cost.step_times import StepTimes, parse_step_times
from pdserve.engine.base import ModelRunner
from pdserve.node.settings import RoleControl, RouterSettings
from pdserve.serve.inproc import InprocCluster
from pdserve.serve.runners import build_runner
from pdserve.serve.start import WorkerStart

FAST = parse_step_times("start=1ms,prompt=10us,decode=2ms,sequence=50us,transfer=5us")
ROLES = (Role.PREFILL, Role.DECODE, Role.MIXED)
UNLIKE = {Role.PREFILL: 2.0, Role.DECODE: 1.0, Role.MIXED: 0.5}
"""Speeds of modelled workers by home role: unlike machines, as in Splitwise-HA."""


def cluster(
    model: Path,
    *,
    prefill: int = 0,
    decode: int = 0,
    mixed: int = 0,
    engine: str = "modelled",
    policy: str = "predicted",
    times: StepTimes = FAST,
    speeds: Mapping[Role, float] | None = None,
    roles: RoleControl = RoleControl.FIXED,
) -> InprocCluster:
    """All workers in this process, with pools that hold a few of the requests of this file."""
    workers = [
        (WorkerId(f"{role.value}-{number}"), role)
        for role, count in zip(ROLES, (prefill, decode, mixed), strict=True)
        for number in range(count)
    ]
    template = WorkerStart(
        worker=WorkerId(""),
        epoch=Epoch(0),
        role=Role.MIXED,
        secret=b"",
        gateway_address="",
        address="",
        launcher_pid=0,
        model_path=str(model),
        engine=engine,
        device="cpu",
        dtype="fp32",
        numerics="exact",
        threads=1,
        transport="inproc",
        block_size=16,
        num_blocks=160,
        max_model_tokens=1024,
        max_step_tokens=512,
        mixed_chunk_tokens=64,
        one_shot_tokens=64,
        record=None,
        log_format="text",
        step_times=times if engine == "modelled" else None,
    )
    card = ModelCard(
        name="tiny", max_model_tokens=1024, vocab_size=384, eos_token_ids=(2,), created=0
    )

    def build(start: WorkerStart) -> ModelRunner:
        if start.step_times is not None:
            speed = (speeds or {}).get(start.role, 1.0)
            start = replace(start, step_times=start.step_times.at_speed(speed))
        return build_runner(start)

    settings = RouterSettings(roles=roles)
    return InprocCluster(card, workers, template, build, policy=policy, router=settings)


def requests(number: int, longest_prompt: int, longest_answer: int) -> list[Request]:
    """Of mixed lengths, some with a prefix in common, some with two choices."""
    made = []
    for index in range(number):
        rng = random.Random(index)
        shared = tuple(3 + i * (index % 3 + 2) % 250 for i in range(rng.choice([0, 0, 48])))
        own = tuple(rng.randrange(3, 380) for _ in range(rng.randint(1, longest_prompt)))
        params = SamplingParams(
            max_tokens=rng.randint(1, longest_answer),
            seed=index,
            temperature=rng.choice([0.0, 1.0]),
            ignore_eos=True,
        )
        made.append(
            Request(
                request_id=RequestId(f"r{index}"),
                prompt_token_ids=shared + own,
                params=params,
                num_choices=rng.choice([1, 1, 1, 2]),
            )
        )
    return made


Answers = dict[RequestId, dict[int, list[int]]]


async def answers_of(
    running: InprocCluster,
    asked: list[Request],
    concurrency: int,
    heard: Callable[[], Awaitable[None]] | None = None,
) -> Answers:
    """Tokens of every choice. ``heard`` is waited for after each token of anybody."""
    gate = asyncio.Semaphore(concurrency)

    async def one(request: Request) -> dict[int, list[int]]:
        tokens: dict[int, list[int]] = {}
        async with gate:
            async for delta in running.gateway.submit(request):
                tokens.setdefault(delta.choice, []).append(delta.token_id)
                if heard is not None:
                    await heard()
        return tokens

    answers = await asyncio.gather(*map(one, asked))
    return {request.request_id: answer for request, answer in zip(asked, answers, strict=True)}


def run(work: Callable[[], Awaitable[None]]) -> None:
    async def bounded() -> None:
        await asyncio.wait_for(work(), 120)

    asyncio.run(bounded())


@dataclass
class Changes:
    """Moves a worker to another pool every so many tokens, and kills some right after it."""

    cluster: InprocCluster
    every_tokens: int
    kills: tuple[int, ...]
    seed: int = 0
    made: int = 0
    killed: list[WorkerId] = field(default_factory=list)
    _tokens: int = 0

    def __post_init__(self) -> None:
        self._rng = random.Random(self.seed)

    async def token_heard(self) -> None:
        self._tokens += 1
        self._revive()
        if self._tokens % self.every_tokens:
            return
        described = self.cluster.gateway.cluster()["workers"]
        ready = [worker for worker in described if worker["state"] == "ready"]
        chosen = self._rng.choice(ready)
        worker = WorkerId(chosen["id"])
        role = self._rng.choice([role for role in ROLES if role.value != chosen["role"]])
        number, self.made = self.made, self.made + 1
        await self.cluster.gateway.command(
            ChangeRole(command=0, worker=worker, role=role, expected_epoch=chosen["role_epoch"])
        )
        if number in self.kills and len(ready) > 1:
            self.killed.append(worker)
            self.cluster.kill(worker)

    def _revive(self) -> None:
        for worker, _, pid in self.cluster.slots():
            if pid is None:
                self.cluster.restart(worker)


def test_sixty_role_changes_and_kills_change_no_token(tiny_model_path: Path) -> None:
    asked = requests(100, longest_prompt=300, longest_answer=60)
    expected: Answers = {}
    num_tokens = 0

    async def unswitched() -> None:
        async with cluster(tiny_model_path, prefill=3, decode=3, mixed=2) as running:
            expected.update(await answers_of(running, asked, 24))

    async def switched() -> None:
        async with cluster(tiny_model_path, prefill=3, decode=3, mixed=2, speeds=UNLIKE) as running:
            changes = Changes(running, num_tokens // 60, kills=(9, 24, 25, 41))
            assert await answers_of(running, asked, 24, changes.token_heard) == expected
            assert changes.made >= 60
            assert len(changes.killed) == 4
            await until_all_is_free(running)
            events = [event.name for one in asked for event in events_of(running, one)]
            # A worker may be killed that has nothing to do.
            assert events.count(LifeName.RESUMED) > 0
            assert events.count(LifeName.HANDOFF_CLOSED) >= 10

    run(unswitched)
    num_tokens = sum(len(tokens) for answer in expected.values() for tokens in answer.values())
    assert all(
        len(expected[one.request_id]) == one.num_choices
        and all(len(t) == one.params.max_tokens for t in expected[one.request_id].values())
        for one in asked
    )
    run(switched)


def events_of(running: InprocCluster, request: Request) -> Sequence[LifeEvent]:
    return running.gateway.timeline(request.request_id) or ()


async def until_all_is_free(running: InprocCluster) -> None:
    """Every worker is up again and holds nothing, and the router's books say so."""
    while running.gateway.num_ready < len(running.slots()):
        for worker, _, pid in running.slots():
            if pid is None:
                running.restart(worker)
        await asyncio.to_thread(lambda: None)
    machines = [running.worker(worker).machine for worker, _, _ in running.slots()]
    while not all(machine is not None and machine.is_empty for machine in machines):
        await asyncio.to_thread(lambda: None)
    assert running.gateway.cluster()["open_requests"] == 0
    assert running.router.num_requests == 0


def test_role_changes_change_no_token_of_a_real_model(tiny_model_path: Path) -> None:
    """Exact numerics: batches, chunks and hand-offs that came out otherwise are the same bits."""
    asked = requests(14, longest_prompt=120, longest_answer=40)
    expected: Answers = {}

    async def alone() -> None:
        async with cluster(tiny_model_path, mixed=1, engine="torch") as running:
            expected.update(await answers_of(running, asked, 1))

    async def switched() -> None:
        async with cluster(tiny_model_path, prefill=1, decode=1, engine="torch") as running:
            changes = Changes(running, 12, kills=(7,), seed=2)
            assert await answers_of(running, asked, 6, changes.token_heard) == expected
            assert changes.made >= 20
            assert len(changes.killed) == 1
            await until_all_is_free(running)

    run(alone)
    run(switched)


SLOW = parse_step_times("start=5ms,prompt=1ms,decode=20ms,sequence=8ms,transfer=5us")


def test_auto_moves_workers_to_the_busy_phase_and_back(tiny_model_path: Path) -> None:
    """Long prompts until the prefill pool has grown, then long answers until it is smaller than it
    was at first."""
    numbers = iter(range(1 << 20))

    def request(prompt_tokens: int, answer_tokens: int) -> Request:
        rng = random.Random(number := next(numbers))
        params = SamplingParams(max_tokens=answer_tokens, seed=number, ignore_eos=True)
        return Request(
            request_id=RequestId(f"a{number}"),
            prompt_token_ids=tuple(rng.randrange(3, 380) for _ in range(prompt_tokens)),
            params=params,
        )

    async def work() -> None:
        async with cluster(
            tiny_model_path, prefill=2, decode=2, times=SLOW, roles=RoleControl.AUTO
        ) as running:

            def num_prefill() -> int:
                workers = running.gateway.cluster()["workers"]
                return sum(worker["role"] == "prefill" for worker in workers)

            async def load(prompt_tokens: int, answer_tokens: int, wanted: int, most: int) -> None:
                """Closed loops until so many workers prefill."""

                async def client() -> None:
                    while num_prefill() != wanted:
                        async for _ in running.gateway.submit(
                            request(prompt_tokens, answer_tokens)
                        ):
                            pass

                await asyncio.gather(*(client() for _ in range(most)))

            assert num_prefill() == 2
            await load(400, 2, wanted=3, most=12)
            await load(8, 30, wanted=1, most=16)

    run(work)


# --- real processes ------------------------------------------------------------------------------


@pytest.fixture
def modelled_server(start_server: Callable[..., Any], tiny_model_path: Path) -> Any:
    return start_server(
        "--model", str(tiny_model_path), "--engine", "modelled", "--kv-blocks", "256",
        "--step-times", "start=2ms,prompt=20us,decode=8ms,sequence=100us,transfer=5us",
        "--policy", "predicted", "--prefill", "1", "--decode", "1",
    )  # fmt: skip


def test_a_rolling_restart_under_load_loses_nothing(
    modelled_server: Any, tiny_model_path: Path
) -> None:
    """``pdserve restart`` replaces every process while clients go on asking."""
    model = tiny_model_path.name
    before = modelled_server.workers()
    restarted = threading.Event()
    status: list[int] = []

    def restart() -> None:
        try:
            status.append(main(["restart", "--url", modelled_server.url]))
        finally:
            restarted.set()

    def asked(number: int) -> dict[str, Any]:
        rng = random.Random(number)
        return {
            "model": model,
            "prompt": [rng.randrange(3, 380) for _ in range(rng.randint(5, 400))],
            "max_tokens": rng.randint(1, 120),
            "temperature": 1.0,
            "seed": number,
            "extra_body": {"ignore_eos": True, "return_token_ids": True},
        }

    async def clients(most: int) -> dict[int, list[int]]:
        answers: dict[int, list[int]] = {}
        numbers = iter(range(1 << 20))
        async with openai.AsyncOpenAI(
            base_url=f"{modelled_server.url}/v1", api_key="none", max_retries=0, timeout=300
        ) as client:

            async def loop() -> None:
                while not restarted.is_set():
                    number = next(numbers)
                    tokens = answers[number] = []
                    async for chunk in await client.completions.create(
                        **asked(number), stream=True
                    ):
                        for choice in chunk.choices:
                            tokens.extend(choice.model_extra["token_ids"])

            await asyncio.gather(*(loop() for _ in range(most)))
        return answers

    thread = threading.Thread(target=restart)
    thread.start()
    try:
        answers = asyncio.run(clients(8))
    finally:
        thread.join()
    assert status == [0]
    after = modelled_server.workers()
    assert all(after[name]["pid"] != before[name]["pid"] for name in before)
    assert all(len(tokens) == asked(n)["max_tokens"] for n, tokens in answers.items())
    with modelled_server.client() as client:  # the same questions to a cluster at rest
        for number in random.Random(0).sample(sorted(answers), min(24, len(answers))):
            (choice,) = client.completions.create(**asked(number)).choices
            assert choice.model_extra["token_ids"] == answers[number], number
