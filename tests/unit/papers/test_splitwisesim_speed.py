"""Timing SplitwiseSim beside ours, with a stand-in for it that knows one answer."""

from __future__ import annotations

import importlib
import json
import os
import sys
from pathlib import Path

import pytest

from pdserve.cost.table import COLUMNS

FOLDER = Path(__file__).parents[3] / "benchmarks" / "papers"
PROMPT_S, TOKEN_S = 0.110, 0.020
"""Of a prompt of 1,000 tokens, and of a decode step: what the table below says."""
STAND_IN = """
import csv, json, pathlib, sys
options = dict(option.split("=", 1) for option in sys.argv[1:])
with open(f"traces/{options['trace.filename']}.csv") as lines:
    rows = list(csv.DictReader(lines))
assert all((row["prompt_size"], row["token_size"]) == ("1000", "11") for row in rows)
with open("asked.jsonl", "a") as asked:
    asked.write(json.dumps([len(rows), options]) + "\\n")
folder = pathlib.Path(options["output_dir"])
folder.mkdir()
answer = json.loads(pathlib.Path("answer.json").read_text())
names = [f"{name}_p{percent}" for name in answer for percent in (50, 90, 99)]
values = [str(value) for value in answer.values() for _ in range(3)]
(folder / "summary.csv").write_text(",".join(names) + "\\n" + ",".join(values) + "\\n")
"""


@pytest.fixture
def speed(monkeypatch):
    monkeypatch.syspath_prepend(str(FOLDER))
    monkeypatch.delitem(sys.modules, "splitwisesim_speed", raising=False)
    yield importlib.import_module("splitwisesim_speed")
    sys.modules.pop("splitwisesim_speed", None)


@pytest.fixture
def simulators(speed, tmp_path, monkeypatch):
    """A copy of the stand-in, and a table in which decodes always take the same."""
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(sys.path))
    lines = [",".join(COLUMNS)]
    for hardware in ("a100-80gb", "h100-80gb", "h100-80gb-pcap"):
        for prompt in (100, 500, 2000, 4000):
            values = {
                "model": "bloom-176b", "hardware": hardware, "prompt_size": prompt,
                "batch_size": 1, "token_size": 128, "prompt_time": 10 + 0.1 * prompt,
                "token_time": 20.0, "tensor_parallel": 8,
            }  # fmt: skip
            lines.append(",".join(str(values[column]) for column in COLUMNS))
    table = tmp_path / "table.csv"
    table.write_text("\n".join(lines) + "\n")
    (tmp_path / "traces").mkdir()
    (tmp_path / "run.py").write_text(STAND_IN)
    return speed.Simulators(tmp_path, Path(sys.executable), table)


def test_both_run_in_turn_and_their_reports_are_compared(speed, simulators, capsys):
    e2e_s = PROMPT_S + 10 * TOKEN_S
    answer = {
        "ttft_times": PROMPT_S,
        "tbt_times": (e2e_s - PROMPT_S) / 11,
        "response_times": 1.02 * e2e_s,
    }
    (simulators.theirs / "answer.json").write_text(json.dumps(answer))
    rows = [(1.0 + 5 * number, 1000, 11) for number in range(4)]
    load = speed.Load("two", "Baseline-A100", (2,), "2xa100:mixed", "bloom-176b", rows)
    before = getattr(os, "sched_getaffinity", int)(0)
    assert simulators.take_turns([load], 1) == 1, "two percent off"
    assert getattr(os, "sched_getaffinity", int)(0) == before
    printed = capsys.readouterr().out
    assert "largest difference of a percentile 1.96%" in printed
    [row] = [line for line in printed.splitlines() if line.startswith("| two |")]
    ratio = float(row.split("|")[4])
    assert 0 < ratio < 1, "the stand-in does next to nothing"
    lines = (simulators.theirs / "asked.jsonl").read_text()
    asked = [json.loads(line) for line in lines.splitlines()]
    assert [number for number, _ in asked] == [1, 4], "start-up is timed with one request"
    assert asked[0][1]["cluster.servers.0.count"] == "2"
    assert asked[0][1]["applications.0.scheduler"] == "token_jsq"


def test_ratios_are_of_runs_side_by_side(speed):
    """A machine that is slow for a while is slow for both: ratios first, then the median."""
    whole = speed.Pair([2.0, 4.0, 2.0], [10.0, 20.0, 12.0])
    assert whole.ratio() == 5.0
    start = speed.Pair([1.0, 1.0, 1.0], [2.0, 2.0, 2.0])
    assert whole.ratio(start) == 8.0  # of 8, 6 and 10


def test_a_command_that_fails_says_what_it_said(speed, simulators):
    (simulators.theirs / "run.py").write_text("raise SystemExit('no such option')")
    load = speed.Load("HH", "HH", (1, 1), "1xh100:prefill,1xh100:decode", "bloom-176b", [])
    with pytest.raises(SystemExit, match="no such option"):
        speed.cpu_s(simulators.their_command(load, Path("unused")), simulators.theirs)
