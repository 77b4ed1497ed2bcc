"""What operators and the router do to workers under load is replayed byte by byte as well."""

from __future__ import annotations

import asyncio
import signal
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import openai

from pdserve.calibrate.parity import compare, described
from pdserve.cli import main
from pdserve.core.effects import Send
from pdserve.serve.recorded import read_run
from pdserve.serve.recorder import read
from pdserve.serve.replay import replay
from pdserve.transport.records import decode_record


def sent_by_the_router(file: Path) -> Iterator[str]:
    """The kinds of its messages."""
    _, inputs = read(file)
    for heard in inputs:
        for record in heard.effects or ():
            effect = decode_record(record)
            if isinstance(effect, Send):
                yield type(effect.message).__name__


def test_moves_role_changes_drains_and_restarts_are_replayed(
    start_server: Callable[..., Any], tiny_model_path: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "recording"
    server = start_server(
        "--model", str(tiny_model_path), "--engine", "modelled", "--kv-blocks", "96",
        "--step-times", "start=2ms,prompt=300us,decode=2ms,sequence=500us,transfer=5us",
        "--prefill", "1", "--decode", "2", "--record", str(folder),
    )  # fmt: skip
    over = threading.Event()

    def operate() -> None:
        try:
            for words in (
                ["role", "decode-1", "mixed"],
                ["drain", "decode-0"],
                ["undrain", "decode-0"],
                ["role", "decode-1", "decode"],
                ["restart", "decode-1"],
                ["role", "prefill-0", "mixed"],
            ):
                assert main([*words, "--url", server.url]) == 0
        finally:
            over.set()

    async def clients() -> int:
        """Streams, until the operator is done; how many there were."""
        numbers = iter(range(1 << 20))
        async with openai.AsyncOpenAI(
            base_url=f"{server.url}/v1", api_key="none", max_retries=0, timeout=300
        ) as client:

            async def loop() -> int:
                num_streams = 0
                while not over.is_set():
                    number = next(numbers)
                    shared = [3 + i % 200 for i in range(96 if number % 2 else 0)]
                    finished = None
                    async for chunk in await client.completions.create(
                        model=tiny_model_path.name,
                        prompt=[*shared, *(3 + (number * i) % 300 for i in range(1, 120))],
                        max_tokens=240,
                        stream=True,
                        extra_body={"ignore_eos": True},
                    ):
                        for choice in chunk.choices:
                            finished = choice.finish_reason or finished
                    assert finished == "length"
                    num_streams += 1
                return num_streams

            return sum(await asyncio.gather(*(loop() for _ in range(6))))

    operator = threading.Thread(target=operate)
    operator.start()
    try:
        assert asyncio.run(clients()) >= 6
    finally:
        operator.join()
    server.signal(signal.SIGTERM)
    assert server.wait() == 0, server.log

    outcomes = replay(folder)
    parity = compare(read_run(folder))
    assert "simulation: decode-1;" in described(parity)
    files = ("router", "prefill-0.1", "decode-0.1", "decode-1.1", "decode-1.2")
    differences = {outcome.file: outcome.difference for outcome in outcomes}
    assert differences == dict.fromkeys(f"{file}.rec" for file in files)
    kinds = Counter(sent_by_the_router(folder / "router.rec"))
    assert kinds["SetRole"] >= 3
    assert kinds["DrainWorker"] >= 2
    assert kinds["MoveAttempt"] >= 1
