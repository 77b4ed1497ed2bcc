"""What a server does when there is nothing to do, and when it is told to end at once."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

FLAGS = ("--dtype", "fp32", "--kv-blocks", "256", "--threads", "1", "--mixed", "1")
MAX_IDLE_CPU_S = 0.03


def cpu_s(pid: int) -> float:
    """CPU time of a process so far."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def test_an_idle_worker_uses_no_cpu(
    start_server: Callable[..., Any], tiny_model_path: Path
) -> None:
    server = start_server("--model", str(tiny_model_path), *FLAGS)
    with server.client() as client:
        client.completions.create(model=tiny_model_path.name, prompt="hello", max_tokens=5)

    def wait_for_heartbeats(count: int) -> None:
        """Each takes half a second in which the worker has nothing to do."""
        begun = server.workers()["mixed-0"]["load"]["seq"]
        while server.workers()["mixed-0"]["load"]["seq"] < begun + count:
            pass

    wait_for_heartbeats(2)
    pid = server.workers()["mixed-0"]["pid"]
    before_s = cpu_s(pid)
    wait_for_heartbeats(5)
    assert cpu_s(pid) - before_s <= MAX_IDLE_CPU_S


def test_a_second_signal_ends_the_server_at_once(
    start_server: Callable[..., Any],
    tiny_model_path: Path,
    paced: tuple[str, ...],
    wait_for_exit: Callable[[list[int]], None],
) -> None:
    server = start_server("--model", str(tiny_model_path), *paced, "--mixed", "1")
    pids = server.pids()
    with server.client() as client:
        stream = client.completions.create(
            model=tiny_model_path.name,
            prompt="hello",
            max_tokens=3000,
            stream=True,
            extra_body={"ignore_eos": True},
        )
        pieces = [next(stream)]
        server.signal(signal.SIGINT)
        pieces += [next(stream) for _ in range(5)]  # it drains
        server.signal(signal.SIGINT)
        with pytest.raises(Exception, match=r"shutting down|peer closed|incomplete|disconnect"):
            pieces.extend(stream)
    assert len(pieces) < 2999
    assert server.wait(20) == 0
    wait_for_exit(pids)


def test_a_worker_that_cannot_start_ends_the_server_with_the_reason(
    tiny_model_path: Path, start_server: Callable[..., Any]
) -> None:
    with pytest.raises(pytest.fail.Exception, match=r"prefill-0 cannot start: .*cuda"):
        start_server("--model", str(tiny_model_path), "--device", "cuda:77", "--prefill", "1")
