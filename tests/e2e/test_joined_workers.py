"""A worker of another process tree joins over TCP: the same tokens, and it may come and go."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

SECRET = "0123456789abcdef0123456789abcdef"
FLAGS = ("--policy", "shortest_queue")
ASKED: dict[str, Any] = {
    "prompt": "the cat sat on the mat " * 20,
    "max_tokens": 40,
    "temperature": 1.0,
    "seed": 7,
    "extra_body": {"ignore_eos": True},
}
PAUSE = threading.Event()
ELSEWHERE = "192.0.2.1:7100"  # no host has it (RFC 5737)


def tls_flags() -> tuple[str, ...]:
    pki = Path(__file__).parents[1] / "pki"
    return (
        *("--cluster-tls-cert", str(pki / "cluster.pem")),
        *("--cluster-tls-key", str(pki / "cluster.key")),
        *("--cluster-tls-ca", str(pki / "cluster-ca.pem")),
    )


class HostProcess:
    """``pdserve worker --join``, as a process tree of its own."""

    def __init__(self, log_file: Path, arguments: list[str], secret: str) -> None:
        self.log_file = log_file
        with log_file.open("wb") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "pdserve", "worker", *arguments],
                stdout=log,
                stderr=log,
                env={**os.environ, "PDSERVE_CLUSTER_SECRET": secret},
            )

    @property
    def log(self) -> str:
        return self.log_file.read_text(errors="replace")

    def wait(self, timeout_s: float = 60) -> int:
        return self.process.wait(timeout_s)

    def close(self) -> None:
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait()


StartHost = Callable[..., HostProcess]


@pytest.fixture
def start_host(tmp_path: Path) -> Iterator[StartHost]:
    started: list[HostProcess] = []

    def start(*arguments: str, secret: str = SECRET) -> HostProcess:
        log_file = tmp_path / f"host-{len(started)}.log"
        started.append(HostProcess(log_file, list(arguments), secret))
        return started[-1]

    yield start
    for host in started:
        host.close()


@pytest.fixture
def cluster_flags(tmp_path: Path, free_port: int) -> tuple[str, ...]:
    secret = tmp_path / "secret"
    secret.write_text(SECRET + "\n")
    secret.chmod(0o600)
    return (
        *("--listen-workers", f"127.0.0.1:{free_port}"),
        *("--cluster-secret-file", str(secret)),
    )


def is_ready(worker: str, epoch: int = 1) -> Callable[[dict[str, Any]], bool]:
    return lambda workers: (
        worker in workers
        and (workers[worker]["state"], workers[worker]["epoch"]) == ("ready", epoch)
    )


def last_attempt(server: Any, answer_id: str) -> dict[str, Any]:
    attempt: dict[str, Any] = server.get(f"/v1/requests/{answer_id}/timeline")["attempts"][-1]
    return attempt


def test_a_joined_worker_decodes_the_same_tokens_and_comes_back_with_a_newer_epoch(
    start_server: Callable[..., Any],
    start_host: StartHost,
    cluster_flags: tuple[str, ...],
    free_port: int,
    tiny_model_path: Path,
    paced: tuple[str, ...],
    wait_for_exit: Callable[[list[int]], None],
) -> None:
    model = str(tiny_model_path)
    server = start_server(
        "--model", model, *paced, *FLAGS, *cluster_flags, "--prefill", "1", "--decode", "0"
    )
    asked = {"model": tiny_model_path.name, **ASKED}
    joining = (
        *("--join", f"127.0.0.1:{free_port}", "--id", "far", "--role", "decode"),
        *("--kv-blocks", "256", "--threads", "1"),
    )
    with server.client() as client:
        expected = client.completions.create(**asked).choices[0].text
        host = start_host("--model", model, *joining)
        far = server.until(is_ready("far"))["far"]
        assert (far["role"], far["host"], far["pid"]) != (None, None, None)
        answer = client.completions.create(**asked)
        assert answer.choices[0].text == expected
        attempt = last_attempt(server, answer.id)
        assert (attempt["prefill_worker"], attempt["decode_worker"]) == ("prefill-0", "far")

        # Its process is killed in mid-answer: a pause, the same text, and the next process.
        text = ""
        for number, chunk in enumerate(client.completions.create(**asked, stream=True)):
            text += chunk.choices[0].text
            if number == 5:
                os.kill(far["pid"], signal.SIGKILL)
        assert text == expected
        far = server.until(is_ready("far", 2))["far"]
        answer = client.completions.create(**asked)
        assert answer.choices[0].text == expected
        assert last_attempt(server, answer.id)["decode_worker"] == "far"

        # The whole host dies and comes back under the same id.
        host.process.kill()
        wait_for_exit([far["pid"]])
        server.until(lambda workers: workers["far"]["state"] == "down")
        assert client.completions.create(**asked).choices[0].text == expected
        host = start_host("--model", model, *joining)
        server.until(is_ready("far", 3))
        assert client.completions.create(**asked).choices[0].text == expected

        # It leaves: the worker holds nothing, the slot is gone, nobody was disturbed.
        host.process.send_signal(signal.SIGTERM)
        assert host.wait() == 0
        assert set(server.workers()) == {"prefill-0"}
        assert client.completions.create(**asked).choices[0].text == expected


def test_who_may_not_join_is_told_why(
    start_server: Callable[..., Any],
    start_host: StartHost,
    cluster_flags: tuple[str, ...],
    free_port: int,
    tiny_model_path: Path,
    paced: tuple[str, ...],
    other_tiny_model_path: Path,
) -> None:
    model, join = str(tiny_model_path), ("--join", f"127.0.0.1:{free_port}")
    server = start_server("--model", model, *paced, *FLAGS, *cluster_flags, "--mixed", "1")
    refused = {
        "other weights: ": start_host(*join, "--model", str(other_tiny_model_path), "--id", "a"),
        "choose another --id": start_host(*join, "--model", model, "--id", "mixed-0"),
        "needs a cluster secret": start_host(*join, "--model", model, secret=""),
        "anybody could guess it": start_host(*join, "--model", model, secret="short"),
        "choose an address of this host": start_host(
            *join, *("--model", model, "--id", "c", "--kv-blocks", "64", "--listen", ELSEWHERE)
        ),
    }
    for what, host in refused.items():
        assert host.wait() == 2
        assert what in host.log
    stranger = start_host(*join, "--model", model, "--id", "b", secret=SECRET[::-1])
    give_up_s = time.monotonic() + 30
    while "is the cluster secret the same there" not in stranger.log:
        assert time.monotonic() < give_up_s, stranger.log
        PAUSE.wait(0.1)
    assert set(server.workers()) == {"mixed-0"}


def test_a_host_joins_again_over_tls_when_the_gateway_is_back(
    start_server: Callable[..., Any],
    start_host: StartHost,
    cluster_flags: tuple[str, ...],
    free_port: int,
    tiny_model_path: Path,
    paced: tuple[str, ...],
) -> None:
    model = str(tiny_model_path)
    flags = ("--model", model, *paced, *FLAGS, *cluster_flags, *tls_flags(), "--mixed", "1")
    server = start_server(*flags)
    start_host(
        *("--join", f"127.0.0.1:{free_port}", "--model", model, "--id", "far"),
        *("--kv-blocks", "64", "--threads", "1", *tls_flags()),
    )
    server.until(is_ready("far"))
    server.signal(signal.SIGKILL)
    server.wait()
    again = start_server(*flags)
    again.until(is_ready("far"))


@pytest.mark.model
def test_a_joined_worker_of_the_real_model_decodes_over_tls(
    start_server: Callable[..., Any],
    start_host: StartHost,
    cluster_flags: tuple[str, ...],
    free_port: int,
    smollm_path: Path,
) -> None:
    small = ("--model", str(smollm_path), "--kv-blocks", "64", "--threads", "1", *tls_flags())
    join = ("--join", f"127.0.0.1:{free_port}", "--id", "far", "--role", "decode")
    server = start_server(*small, *cluster_flags, "--prefill", "1", "--decode", "0")
    host = start_host(*join, *small)
    server.until(is_ready("far"))
    server.until(lambda _: "far is ready" in host.log)  # the router heard first
    answers = {}
    with server.client() as client:
        for route in ("split", "local"):
            answers[route] = client.completions.create(
                model="smollm2-135m",
                prompt="The capital of France is",
                max_tokens=12,
                temperature=0.0,
                extra_headers={"X-Pdserve-Route": route},
            )
    attempt = last_attempt(server, answers["split"].id)
    assert (attempt["prefill_worker"], attempt["decode_worker"]) == ("prefill-0", "far")
    assert "Paris" in answers["split"].choices[0].text
    assert answers["split"].choices[0].text == answers["local"].choices[0].text
