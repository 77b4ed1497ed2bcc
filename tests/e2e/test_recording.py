"""``--record`` on real processes, one of them killed: other processes replay it byte by byte."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any


def test_a_recorded_server_replays_the_same(
    start_server: Callable[..., Any],
    tiny_model_path: Path,
    paced: tuple[str, ...],
    tmp_path: Path,
) -> None:
    folder = tmp_path / "recording"
    server = start_server(
        *("--model", str(tiny_model_path), *paced),
        *("--prefill", "1", "--decode", "1", "--record", str(folder)),
    )
    asked: dict[str, Any] = {
        "model": tiny_model_path.name,
        "prompt": ["the cat sat on the mat " * 30, "hello"],
        "max_tokens": 200,
        "n": 2,
        "seed": 3,
        "extra_body": {"ignore_eos": True},
    }
    with server.client() as client:
        pid = server.workers()["decode-0"]["pid"]
        for number, _ in enumerate(client.completions.create(**asked, stream=True)):
            if number == 50:
                os.kill(pid, signal.SIGKILL)
    server.signal(signal.SIGTERM)
    assert server.wait() == 0, server.log

    replayed = subprocess.run(
        [sys.executable, "-m", "pdserve", "replay", str(folder), "--json"],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONHASHSEED": "1"},
    )
    document = json.loads(replayed.stdout)
    assert document["equal"], document
    assert replayed.returncode == 0
    nodes = [file["node"] for file in document["files"]]
    assert sorted(set(nodes)) == ["decode-0", "gateway", "prefill-0"]
    assert all(file["num_inputs"] > 50 for file in document["files"] if file["node"] != "decode-0")
