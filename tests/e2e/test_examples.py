"""Every example does what it says."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"


def run(name: str, *arguments: str) -> str:
    result = subprocess.run(
        [sys.executable, str(EXAMPLES / name), *arguments],
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )
    assert result.returncode == 0, result.stderr
    return result.stdout


def test_two_workers_in_one_process_hand_over() -> None:
    told = run("two_workers_one_process.py")
    assert told.startswith("tokens: [")
    moments = [line.split()[3] for line in told.splitlines()[1:]]
    assert moments.index("handoff_opened") < moments.index("decode_queued")
    assert moments[-1] == "finished"


def test_a_transport_of_ones_own_moves_kv_and_the_openai_client_streams(
    start_server: Any, tiny_model_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PYTHONPATH", str(EXAMPLES), prepend=os.pathsep)
    monkeypatch.setenv("KV_FOLDER", str(tmp_path))
    server = start_server(
        *("--model", str(tiny_model_path), "--transport", "folder_transport:FolderTransport"),
        *("--prefill", "1", "--decode", "1", "--kv-blocks", "64", "--threads", "1"),
    )
    assert len(list(tmp_path.glob("kv-*"))) == 2
    answers = {}
    with server.client() as client:
        for route in ("split", "local"):
            answers[route] = client.completions.create(
                model=tiny_model_path.name,
                prompt="the cat sat on the mat " * 20,
                max_tokens=20,
                temperature=0.0,
                extra_headers={"X-Pdserve-Route": route},
            )
    attempt = server.get(f"/v1/requests/{answers['split'].id}/timeline")["attempts"][-1]
    assert (attempt["prefill_worker"], attempt["decode_worker"]) == ("prefill-0", "decode-0")
    assert answers["split"].choices[0].text == answers["local"].choices[0].text != ""
    assert run("openai_client.py", server.url).strip()
    server.close()
    assert not list(tmp_path.glob("kv-*"))


def test_no_example_is_forgotten() -> None:
    assert {path.name for path in EXAMPLES.glob("*.py")} == {
        "two_workers_one_process.py",
        "openai_client.py",
        "folder_transport.py",
    }
