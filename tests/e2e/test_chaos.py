"""Many clients while workers die and hang: right answers, nothing lost, nothing leaked."""

from __future__ import annotations

import asyncio
import os
import random
import signal
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import openai

NUM_REQUESTS = 24
CONCURRENCY = 8
SETTLE_S = 180.0


def asked(number: int, model: str) -> dict[str, Any]:
    """Request ``number``: mixed lengths, shared prefixes, greedy and sampled, some with choices."""
    rng = random.Random(number)
    return {
        "model": model,
        "prompt": "the cat sat on the mat " * rng.choice([1, 5, 30]) + str(number % 6),
        "max_tokens": rng.choice([1, 30, 120, 250]),
        "temperature": rng.choice([0.0, 1.0]),
        "seed": number,
        "n": rng.choice([1, 1, 3]),
        "extra_body": {"ignore_eos": True, "return_token_ids": True},
    }


class Faults:
    """Does something bad to a worker every so many chunks that clients have received."""

    def __init__(self, server: Any, seed: int) -> None:
        self._server = server
        self._rng = random.Random(seed)
        self._chunks_left = 60
        self._stopped: list[int] = []
        self.num_kills = 0
        self.num_stops = 0

    def chunk_received(self) -> None:
        self._chunks_left -= 1
        if self._chunks_left > 0 or self.num_kills + self.num_stops >= 6:
            return
        self._chunks_left = self._rng.randrange(150, 300)
        self.resume()
        workers = self._server.workers().values()
        ready = [worker for worker in workers if worker["state"] == "ready"]
        if len(ready) < 2:
            return
        pid = self._rng.choice(ready)["pid"]
        with suppress(ProcessLookupError):
            if self._rng.random() < 0.6:
                os.kill(pid, signal.SIGKILL)
                self.num_kills += 1
            else:
                os.kill(pid, signal.SIGSTOP)
                self._stopped.append(pid)
                self.num_stops += 1

    def resume(self) -> None:
        """Whoever was stopped may go on, if it has not been killed for it."""
        for pid in self._stopped:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGCONT)
        self._stopped.clear()


async def token_ids(
    client: openai.AsyncOpenAI, request: dict[str, Any], faults: Faults, leaves: bool
) -> dict[int, list[int]] | None:
    """Tokens of each choice, or None if this client went away half way."""
    tokens: dict[int, list[int]] = {}
    stream = await client.completions.create(**request, stream=True)
    async for chunk in stream:
        for choice in chunk.choices:
            tokens.setdefault(choice.index, []).extend(choice.model_extra["token_ids"])
        faults.chunk_received()
        if leaves and sum(map(len, tokens.values())) > 10:
            await stream.close()
            return None
    return tokens


async def storm(server: Any, model: str, faults: Faults) -> list[dict[int, list[int]] | None]:
    gate = asyncio.Semaphore(CONCURRENCY)
    async with openai.AsyncOpenAI(
        base_url=f"{server.url}/v1", api_key="none", max_retries=0, timeout=300
    ) as client:

        async def one(number: int) -> dict[int, list[int]] | None:
            async with gate:
                leaves = number % 7 == 3
                return await token_ids(client, asked(number, model), faults, leaves)

        return await asyncio.gather(*(one(number) for number in range(NUM_REQUESTS)))


def wait_until_settled(server: Any) -> None:
    """Every worker is back, and every block free or cached."""
    deadline = time.monotonic() + SETTLE_S
    while True:
        cluster = server.get("/cluster")
        workers = cluster["workers"]
        if cluster["open_requests"] == 0 and all(
            worker["state"] == "ready"
            and worker["blocks"]["free"] == worker["blocks"]["total"]
            and worker["blocks"]["quarantined"] == 0
            and worker["load"]["open_leases"] == 0
            for worker in workers
        ):
            return
        assert time.monotonic() < deadline, cluster


def test_kills_and_stops_cost_time_and_nothing_else(
    start_server: Callable[..., Any], tiny_model_path: Path, paced: tuple[str, ...]
) -> None:
    server = start_server(
        *("--model", str(tiny_model_path), *paced),
        *("--prefill", "1", "--decode", "2", "--mixed", "1"),
    )
    model = tiny_model_path.name
    faults = Faults(server, seed=1)
    answers = asyncio.run(storm(server, model, faults))
    faults.resume()
    assert faults.num_kills >= 1
    wait_until_settled(server)
    with server.client() as client:
        for number, answer in enumerate(answers):
            if answer is None:
                continue
            expected = client.completions.create(**asked(number, model))
            for choice in expected.choices:
                assert answer[choice.index] == choice.model_extra["token_ids"], number
    wait_until_settled(server)


def test_overload_is_refused_before_the_first_token_and_never_after_it(
    start_server: Callable[..., Any], tiny_model_path: Path, paced: tuple[str, ...]
) -> None:
    server = start_server(
        "--model", str(tiny_model_path), *paced, "--kv-blocks", "40",
        "--max-model-len", "512", "--queue-timeout", "0.5", "--prefill", "1", "--decode", "1",
    )  # fmt: skip
    request = {**asked(0, tiny_model_path.name), "prompt": "x" * 200, "max_tokens": 300, "n": 1}

    async def one(client: openai.AsyncOpenAI) -> int | float:
        try:
            stream = await client.completions.create(**request, stream=True)
        except openai.RateLimitError as error:
            return float(error.response.headers["retry-after"])
        return sum([len(c.choices[0].model_extra["token_ids"]) async for c in stream if c.choices])

    async def many() -> list[int | float]:
        async with openai.AsyncOpenAI(
            base_url=f"{server.url}/v1", api_key="none", max_retries=0, timeout=300
        ) as client:
            return await asyncio.gather(*(one(client) for _ in range(40)))

    outcomes = asyncio.run(many())
    refused = [outcome for outcome in outcomes if isinstance(outcome, float)]
    served = [outcome for outcome in outcomes if isinstance(outcome, int)]
    assert refused
    assert min(refused) >= 1
    assert served
    assert set(served) == {300}
    wait_until_settled(server)
