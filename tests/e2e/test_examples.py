"""Every example does what it says."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

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


def test_the_openai_client_streams(start_server: Any, tiny_model_path: Path) -> None:
    server = start_server("--model", str(tiny_model_path), "--kv-blocks", "64", "--threads", "1")
    assert run("openai_client.py", server.url).strip()


def test_no_example_is_forgotten() -> None:
    assert {path.name for path in EXAMPLES.glob("*.py")} == {
        "two_workers_one_process.py",
        "openai_client.py",
    }
