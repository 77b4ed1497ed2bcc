"""A server as a user starts it: real processes, a real port, the real client."""

from __future__ import annotations

import contextlib
import json
import os
import select
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import openai
import pytest

from pdserve.weights.random_model import write_random_model

PAUSE = threading.Event()


class ServerProcess:
    """``pdserve serve`` on a free port. ``stderr`` is the file that its log goes to."""

    def __init__(self, arguments: list[str], log_file: Path) -> None:
        self.log_file = log_file
        with log_file.open("wb") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "pdserve", "serve", "--port", "0", *arguments],
                stdout=subprocess.PIPE,
                stderr=log,
                env={**os.environ, "PDSERVE_LOG_FORMAT": "json"},
            )
        assert self.process.stdout is not None
        try:
            line = self.process.stdout.readline()  # empty if the process ends before it is ready
        except BaseException:
            self.kill()
            raise
        if not line:
            self.kill()
            pytest.fail(f"the server did not get ready:\n{self.log}")
        self.url: str = json.loads(line)["url"]

    @property
    def log(self) -> str:
        return self.log_file.read_text(errors="replace")

    def client(self, **options: Any) -> openai.OpenAI:
        """The openai package, which must be closed."""
        return openai.OpenAI(
            base_url=f"{self.url}/v1", api_key="none", max_retries=0, timeout=300, **options
        )

    def get(self, path: str) -> Any:
        """The JSON document at ``path``."""
        with urllib.request.urlopen(f"{self.url}{path}", timeout=120) as response:
            return json.load(response)

    def workers(self) -> dict[str, dict[str, Any]]:
        """``/cluster``'s workers by id."""
        return {worker["id"]: worker for worker in self.get("/cluster")["workers"]}

    def until(self, holds: Callable[[dict[str, dict[str, Any]]], bool]) -> dict[str, Any]:
        """Look at the workers now and then until it holds; what they are then."""
        give_up_s = time.monotonic() + 60
        while not holds(workers := self.workers()):
            if time.monotonic() > give_up_s:
                pytest.fail(f"it did not happen:\n{workers}\n{self.log[-3000:]}")
            PAUSE.wait(0.05)
        return workers

    def pids(self) -> list[int]:
        """The server's and its workers' processes."""
        pids = [worker["pid"] for worker in self.workers().values()]
        return [self.process.pid, *(pid for pid in pids if pid is not None)]

    def signal(self, number: signal.Signals) -> None:
        self.process.send_signal(number)

    def wait(self, timeout_s: float = 60) -> int:
        """Exit status."""
        return self.process.wait(timeout_s)

    def close(self) -> None:
        """End it in good order."""
        if self.process.poll() is None:
            self.process.terminate()
            with contextlib.suppress(subprocess.TimeoutExpired):
                self.process.wait(30)
        self.kill()

    def kill(self) -> None:
        """End it whatever it does; its workers die with it."""
        if self.process.poll() is None:
            self.process.kill()
            self.process.wait()
        if self.process.stdout is not None:
            self.process.stdout.close()


StartServer = Callable[..., ServerProcess]


@pytest.fixture(scope="session")
def paced() -> tuple[str, ...]:
    """Flags of workers that keep a pace: their tokens prove the KV that they come from, and they
    start in a third of the time of those that compute."""
    return (
        *("--engine", "modelled", "--kv-blocks", "512"),
        *("--step-times", "start=2ms,prompt=20us,decode=5ms,sequence=100us,transfer=5us"),
    )


@pytest.fixture
def start_server(tmp_path: Path) -> Iterator[StartServer]:
    """``start_server("--prefill", "1", ...)``; whatever was started is killed after the test: what
    an end in good order leaves behind, tests ask of servers that they end themselves."""
    started: list[ServerProcess] = []

    def start(*arguments: str) -> ServerProcess:
        log_file = tmp_path / f"server-{len(started)}.log"
        started.append(ServerProcess(list(arguments), log_file))
        return started[-1]

    yield start
    for server in started:
        server.kill()


@pytest.fixture
def wait_for_exit() -> Callable[[list[int]], None]:
    """``wait_for_exit(pids)`` fails if one of the processes does not end in time."""

    def wait(pids: list[int]) -> None:
        for pid in pids:
            try:
                descriptor = os.pidfd_open(pid)
            except ProcessLookupError:
                continue
            ended, _, _ = select.select([descriptor], [], [], 20)
            os.close(descriptor)
            assert ended, f"process {pid} is left"

    return wait


@pytest.fixture(scope="session")
def other_tiny_model_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """As ``tiny_model_path``, with other weights."""
    path = tmp_path_factory.mktemp("models") / "other"
    write_random_model(path, seed=1)
    return path


@pytest.fixture
def free_port() -> int:
    """A port of the loopback that was free a moment ago."""
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port: int = probe.getsockname()[1]
    return port
