"""Load clients of other projects, unmodified, as docs/benchmarking.md says. Run with
`make test-clients`."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.clients
TORCH = next(
    line
    for line in (Path(__file__).parents[3] / "constraints.txt").read_text().splitlines()
    if line.startswith("torch==")
)


@pytest.mark.timeout(900)
def test_aiperf(
    client_venv: Callable[..., Any], server: Any, tiny_model_path: Path, tmp_path: Path
) -> None:
    venv = client_venv("aiperf", "aiperf")
    venv.command(
        *("aiperf", "profile", "--model", tiny_model_path.name, "--url", server.url),
        *("--endpoint-type", "chat", "--streaming", "--tokenizer", str(tiny_model_path)),
        *("--concurrency", "2", "--request-count", "8", "--ui", "none"),
        *("--synthetic-input-tokens-mean", "64", "--output-tokens-mean", "16"),
        *("--extra-inputs", "ignore_eos:true", "--artifact-dir", str(tmp_path)),
        cwd=tmp_path,
    )
    told = json.loads((tmp_path / "profile_export_aiperf.json").read_text())
    assert told["request_count"]["avg"] == 8
    assert told["time_to_first_token"]["avg"] > 0


@pytest.mark.timeout(900)
def test_guidellm(
    client_venv: Callable[..., Any], server: Any, tiny_model_path: Path, tmp_path: Path
) -> None:
    venv = client_venv("guidellm", TORCH, "guidellm")
    report = tmp_path / "report.json"
    venv.command(
        *("guidellm", "run", "--disable-progress"),
        *("--backend", f"kind=openai_http,target={server.url},model={tiny_model_path.name}"),
        *("--tokenizer", f"kind=hf_auto,model={tiny_model_path}"),
        *("--profile", "kind=concurrent,streams=2"),
        *("--constraint", "kind=max_requests,count=8"),
        *("--data", "kind=synthetic_text,prompt_tokens=64,output_tokens=16"),
        *("--output", f"kind=json,path={report}"),
        cwd=tmp_path,
    )
    [benchmark] = json.loads(report.read_text())["benchmarks"]
    totals = benchmark["metrics"]["request_totals"]
    assert (totals["successful"], totals["errored"]) == (8, 0)


def test_vllm_bench_serve(server: Any, tiny_model_path: Path, tmp_path: Path) -> None:
    """vLLM is not installed for it; `make test-clients VLLM=COMMAND` names one that is there."""
    command = os.environ["VLLM"]
    arguments = [
        *("bench", "serve", "--backend", "openai-chat", "--endpoint", "/v1/chat/completions"),
        *("--base-url", server.url, "--model", tiny_model_path.name),
        *("--tokenizer", str(tiny_model_path), "--dataset-name", "random"),
        *("--random-input-len", "64", "--random-output-len", "16", "--ignore-eos"),
        *("--num-prompts", "8", "--max-concurrency", "2"),
        *("--save-result", "--result-dir", str(tmp_path), "--result-filename", "result.json"),
    ]
    done = subprocess.run([command, *arguments], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    told = json.loads((tmp_path / "result.json").read_text())
    assert (told["completed"], told["failed"]) == (8, 0)
    assert told["total_output_tokens"] == 8 * 16
