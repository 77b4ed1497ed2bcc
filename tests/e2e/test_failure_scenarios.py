"""One scenario file, a live cluster and a simulated one, the same figures from both."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from pdserve.cli import main

SCENARIO = Path(__file__).resolve().parents[2] / "examples" / "failures.toml"
LOAD = (
    *("--seed", "1", "--input", "100:400", "--output", "20"),
    *("--no-progress", "--json", "-"),
)


def in_half_the_time(folder: Path) -> Path:
    """The example, its moments and all that lasts for two seconds cut in half."""
    text = re.sub(r"(?<=at_s = )\d+", lambda at_s: str(int(at_s[0]) / 2), SCENARIO.read_text())
    scenario = folder / "failures.toml"
    scenario.write_text(text.replace("for_s = 2", "for_s = 1"))
    return scenario


def test_a_live_cluster_survives_the_example(
    start_server: Callable[..., Any],
    tiny_model_path: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    server = start_server(
        *("--model", str(tiny_model_path), "--engine", "modelled", "--allow-faults"),
        *("--prefill", "2", "--decode", "2", "--kv-blocks", "2000", "--threads", "1"),
        *("--max-model-len", "1024"),
    )
    halved = ["--scenario", str(in_half_the_time(tmp_path)), "--rate", "12", "--duration", "8"]
    objective = ["--goodput", "ttft:5000", "--vocab-size", "300", "--check-answers"]
    assert main(["bench", "--url", server.url, *halved, *LOAD, *objective]) == 0
    score = json.loads(capsys.readouterr().out)["scenario"]
    assert [event["kind"] for event in score["events"]] == [
        "kill", "hang", "slow_link", "partition",
    ]  # fmt: skip
    assert all(event["workers"] and not event["detail"] for event in score["events"])
    kill, hang, slow, cut = (event["over_s"] - event["done_s"] for event in score["events"])
    assert kill > 1.0  # held for a second, and then it has to load
    assert hang == pytest.approx(1.0, abs=0.5)
    assert (slow, cut) == pytest.approx((1.0, 1.0), abs=0.5)
    assert score["sent"] == score["completed"] > 50
    assert (score["lost"], score["wrong"]) == (0, 0)
    assert score["settled"]
    assert (score["leaked_blocks"], score["workers_down"]) == (0, [])
    assert "cut on purpose" in server.log
    assert server.get("/cluster")["faults"] == []
    assert server.workers()["decode-0"]["epoch"] >= 2


def test_a_simulated_cluster_goes_through_the_same(capsys: pytest.CaptureFixture[str]) -> None:
    cluster = ("--cluster", "2xh100:prefill,2xh100:decode", "--model", "llama-3-8b")
    whole = ("--scenario", str(SCENARIO), "--rate", "6", "--duration", "16")
    documents = []
    for _ in range(2):
        assert main(["sim", *cluster, *whole, *LOAD, "--slo", "ttft:5000"]) == 0
        documents.append(json.loads(capsys.readouterr().out)["scenario"])
    score = documents[0]
    assert documents[1] == score
    assert [(event["kind"], event["done_s"]) for event in score["events"]] == [
        ("kill", 4.0), ("hang", 7.0), ("slow_link", 9.0), ("partition", 12.0),
    ]  # fmt: skip
    assert [event["over_s"] for event in score["events"]] == [10.0, 8.0, 11.0, 14.0]
    assert score["sent"] == score["completed"] > 50
    assert score["settled"]
    assert (score["lost"], score["leaked_blocks"], score["quarantined_blocks"]) == (0, 0, 0)
