"""Processes that are killed in mid-stream: the answer goes on the same, and nothing is left."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

FLAGS = ("--dtype", "fp32", "--kv-blocks", "512", "--threads", "1")


def all_are_ready(workers: dict[str, dict[str, Any]]) -> bool:
    return all(worker["state"] == "ready" for worker in workers.values())


def test_a_killed_worker_costs_a_pause_and_no_token(
    start_server: Callable[..., Any], tiny_model_path: Path
) -> None:
    server = start_server(
        "--model", str(tiny_model_path), *FLAGS, "--prefill", "1", "--decode", "1"
    )
    asked: dict[str, Any] = {
        "model": tiny_model_path.name,
        "prompt": "the cat sat on the mat " * 20,
        "max_tokens": 250,
        "temperature": 1.0,
        "seed": 7,
        "extra_body": {"ignore_eos": True},
    }
    with server.client() as client:
        expected = client.completions.create(**asked).choices[0].text
        for victim, survivor in (("decode-0", "prefill-0"), ("prefill-0", "decode-0")):
            pid = server.until(all_are_ready)[victim]["pid"]  # the last victim's successor too
            text, answer_id = "", ""
            for number, chunk in enumerate(client.completions.create(**asked, stream=True)):
                text += chunk.choices[0].text
                answer_id = chunk.id
                if number == 20:
                    os.kill(pid, signal.SIGKILL)
            assert text == expected
            # The survivor wrote all of it: nothing waited for the new process. How long the pause
            # is, benchmarks/failover.py measures.
            last_attempt = server.get(f"/v1/requests/{answer_id}/timeline")["attempts"][-1]
            assert last_attempt["decode_worker"] == survivor
            # The slot has a new process, or will have one: the next request does not wait for it.
            assert client.completions.create(**asked).choices[0].text == expected
        told = [line for line in server.log.splitlines() if "killed by SIGKILL" in line]
    assert {victim for line in told for victim in server.workers() if victim in line} == {
        "decode-0",
        "prefill-0",
    }


def test_workers_do_not_outlive_a_killed_gateway(
    start_server: Callable[..., Any],
    tiny_model_path: Path,
    paced: tuple[str, ...],
    wait_for_exit: Callable[[list[int]], None],
) -> None:
    server = start_server(
        "--model", str(tiny_model_path), *paced, "--prefill", "1", "--decode", "1"
    )
    pids = server.pids()
    server.signal(signal.SIGKILL)
    assert server.wait() == -signal.SIGKILL
    wait_for_exit(pids)


def test_a_stopped_worker_is_replaced(
    start_server: Callable[..., Any], tiny_model_path: Path, paced: tuple[str, ...]
) -> None:
    server = start_server(
        "--model", str(tiny_model_path), *paced, "--prefill", "1", "--decode", "1"
    )
    asked: dict[str, Any] = {
        "model": tiny_model_path.name,
        "prompt": "hello",
        "max_tokens": 150,
        "temperature": 0,
        "extra_body": {"ignore_eos": True},
    }
    with server.client() as client:
        expected = client.completions.create(**asked).choices[0].text
        pid = server.workers()["decode-0"]["pid"]
        text = ""
        for number, chunk in enumerate(client.completions.create(**asked, stream=True)):
            text += chunk.choices[0].text
            if number == 20:
                os.kill(pid, signal.SIGSTOP)
        assert text == expected


def test_running_requests_are_finished_before_the_server_ends_and_new_ones_refused(
    start_server: Callable[..., Any], tiny_model_path: Path, paced: tuple[str, ...]
) -> None:
    server = start_server("--model", str(tiny_model_path), *paced, "--mixed", "1")
    asked: dict[str, Any] = {
        "model": tiny_model_path.name,
        "prompt": "hello",
        "max_tokens": 400,
        "temperature": 0,
        "extra_body": {"ignore_eos": True},
    }
    with server.client() as client, server.client() as other:
        expected = client.completions.create(**asked).choices[0].text
        text, refusals = "", []
        for number, chunk in enumerate(client.completions.create(**asked, stream=True)):
            text += chunk.choices[0].text
            if number == 20:
                server.signal(signal.SIGTERM)
            if number > 40 and not refusals:
                with pytest.raises(Exception, match="shutting down") as refusal:
                    other.completions.create(**asked)
                refusals.append(refusal)
        assert text == expected
        assert refusals
    assert server.wait() == 0
