"""``pdserve sim`` from the command line to the files that it writes."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from xml.etree import ElementTree

import pytest

from pdserve.cli import main
from pdserve.core.events import LifeEvent, LifeName, detail
from pdserve.obs.timeline import describe
from pdserve.sim.report import CLOCK_KEYS
from pdserve.workload.traces import read_trace

SPLIT = ["--cluster", "1xh100:prefill,1xh100:decode", "--model", "llama-3-8b"]
LOAD = ["--rate", "20", "-n", "40", "--input", "100:900", "--output", "exp:20"]


def simulated(capsys: pytest.CaptureFixture[str], *flags: str) -> dict:
    assert main(["sim", *flags, "--json", "-"]) == 0
    captured = capsys.readouterr()
    assert captured.err == ""
    return json.loads(captured.out)


def test_one_run_says_all_there_is_to_say(capsys):
    document = simulated(capsys, *SPLIT, *LOAD, "--slo", "ttft:2000", "tpot=0.1s")
    assert document["requests"] == document["completed"] == 40
    for name in ("ttft_s", "tpot_s", "e2e_s", "itl_s"):
        figures = document[name]
        assert 0 < figures["p50"] <= figures["p90"] <= figures["p99"] <= figures["max"]
    assert document["goodput_rps"] == pytest.approx(40 / document["duration_s"])
    assert document["wall_s"] > 0
    assert document["cluster"] == "1xh100:prefill,1xh100:decode"
    assert (document["policy"], document["batching"], document["seed"]) == ("predicted", "fcfs", 0)
    assert document["load"]["rate"] == 20
    assert document["energy"]["total_j"] > 0
    assert document["cost"]["total"] > 0
    assert document["machines"][0]["name"] == "h100-tp1"
    assert any("nothing was measured" in warning for warning in document["warnings"])
    steps = document["steps"]
    assert steps["all"] == steps["prefill"] + steps["mixed"] + steps["decode"]
    sent = sum(worker["sent_bytes"] for worker in document["workers"].values())
    assert sent == document["transfers"]["bytes"] > 0


def test_the_same_seed_gives_the_same_bytes(capsys):
    texts = []
    for _ in range(2):
        document = simulated(capsys, *SPLIT, *LOAD, "--seed", "3", "--policy", "random")
        texts.append(json.dumps({k: v for k, v in document.items() if k not in CLOCK_KEYS}))
    assert texts[0] == texts[1]
    other = simulated(capsys, *SPLIT, *LOAD, "--seed", "4", "--policy", "random")
    assert other["ttft_s"] != json.loads(texts[0])["ttft_s"]


def test_files_for_others_to_read(capsys, tmp_path):
    events, requests = tmp_path / "events.jsonl", tmp_path / "requests.csv"
    lines, plots, out = tmp_path / "requests.jsonl", tmp_path / "plots", tmp_path / "out.json"
    status = main(
        ["sim", *SPLIT, *LOAD, "--events", str(events), "--requests", str(requests),
         "--plot", str(plots), "--json", str(out)]
    )  # fmt: skip
    shown = capsys.readouterr().out
    assert status == 0
    assert "40 sent: 40 completed" in shown
    assert "1xh100:decode: h100-tp1, 29759 x 16 tokens of KV each" in shown
    assert "x real time" in shown
    document = json.loads(out.read_text())

    replayed = read_trace(events)
    assert len(replayed) == 40
    assert sum(request.output_tokens for request in replayed) == document["tokens"]["output"]
    life = [event for event in map(_event, _lines(events)) if event.request_id == "r7"]
    phases = describe(life)
    assert phases["status"] == "finished"
    assert phases["attempts"][0]["phases"]["prefill"]["duration_ms"] > 0

    rows = list(csv.DictReader(_lines(requests)))
    assert len(rows) == 40
    assert {row["ending"] for row in rows} == {"completed"}
    mean = sum(float(row["ttft_s"]) for row in rows) / 40
    assert mean == pytest.approx(document["ttft_s"]["mean"])
    assert main(["sim", *SPLIT, *LOAD, "--requests", str(lines), "--json", str(out)]) == 0
    assert [json.loads(line)["request_id"] for line in _lines(lines)] == [
        row["request_id"] for row in rows
    ]

    drawn = {path.stem for path in plots.glob("*.svg")}
    assert {"ttft", "tpot", "e2e", "itl", "queue", "decoding", "blocks", "workers"} <= drawn
    for path in plots.glob("*.svg"):
        ElementTree.parse(path)


def _lines(path: Path) -> list[str]:
    return path.read_text().splitlines()


def _event(line: str) -> LifeEvent:
    read = json.loads(line)
    return LifeEvent(
        name=LifeName(read["event"]),
        request_id=read["request_id"],
        epoch=read["epoch"],
        at_s=read["at_s"],
        node=read["node"],
        detail=detail(**read["detail"]),
    )


def test_flags_from_a_file(capsys, tmp_path):
    file = tmp_path / "sim.toml"
    file.write_text(
        """
        [sim]
        cluster = ["1xh100:mixed", "1xl40s:mixed@eth-25"]
        model = "llama-3-8b"
        rate = 20
        num_requests = 30
        slo = "ttft:2000 tpot:200"
        classes = [{ name = "quick", ttft_ms = 500, weight = 3 }]
        class_shares = "quick=0.5,default=0.5"
        """
    )
    document = simulated(capsys, "--config", str(file), "-n", "25")
    assert document["requests"] == 25, "a flag wins over the file"
    assert document["cluster"] == "1xh100:mixed,1xl40s:mixed@eth-25"
    assert document["settings"]["admission"] == "predicted", "a class has a bound"
    assert document["slo"] == "ttft:2000 tpot:200"
    assert document["classes"]["quick"]["slo"] == "ttft:500"
    assert sum(part["ended"] for part in document["classes"].values()) == 25


def test_traces_with_block_hashes_share_their_blocks(capsys, tmp_path):
    trace = tmp_path / "trace.jsonl"
    row = '{"timestamp": %d, "input_length": 1500, "output_length": 5, "hash_ids": [1, 2, %d]}\n'
    trace.write_text("".join(row % (1000 * number, 10 + number) for number in range(10)))
    document = simulated(capsys, *SPLIT, "--trace", str(trace))
    assert {machine["block_size"] for machine in document["machines"]} == {512}
    assert document["tokens"]["cached"] == 9 * 1024
    without = simulated(capsys, *SPLIT, "--trace", str(trace), "--no-prefix-cache")
    assert without["tokens"]["cached"] == 0


def test_a_run_in_which_nothing_completes_says_so(capsys, tmp_path):
    trace = tmp_path / "trace.csv"
    trace.write_text("TIMESTAMP,ContextTokens,GeneratedTokens\n2023-01-01 00:00:00,9000,5\n")
    assert main(["sim", *SPLIT, "--trace", str(trace)]) == 1
    assert "1 x too_long" in capsys.readouterr().out


def mistakes(folder: Path) -> list[tuple[list[str], str]]:
    table = folder / "table.csv"
    table.write_text("no,table\n")
    profile = folder / "profile.json"
    profile.write_text("{}")
    config = folder / "sim.toml"
    config.write_text("[sim]\nclusters = 5")
    bad_row = folder / "bad.csv"
    bad_row.write_text("TIMESTAMP,ContextTokens,GeneratedTokens\n2023-01-01 00:00:00,many,5\n")
    whole = [*SPLIT, *LOAD]
    return [
        ([*LOAD], "say what is simulated, as --cluster"),
        (["--cluster", "2xh100:prefill", "--model", "llama-3-8b", *LOAD], "add decode or mixed"),
        (["--cluster", "h100", "--model", "llama-3-8b", *LOAD], "COUNTxHARDWARE:ROLE"),
        (["--cluster", "1xh100:mixed", *LOAD], "say which model"),
        (["--cluster", "1xh101:mixed", "--model", "llama-3-8b", *LOAD], "did you mean h100?"),
        (["--cluster", "1xh100:mixed@wet-string", "--model", "llama-3-8b", *LOAD], "no link"),
        (["--cluster", "1xl40s-tp1:mixed", "--model", "llama-3-70b", *LOAD], "does not fit"),
        ([*SPLIT], "--rate R"),
        ([*whole, "--slo", "ttft:1"], "no machine here can keep a TTFT of 1 ms"),
        ([*whole, "--slo", "tpot:0.1"], "no machine here can keep a TPOT of 0.1 ms"),
        ([*whole, "--slo", "e2e:20"], "no machine here can keep an E2E of 20 ms"),
        ([*whole, "--classes", "quick:ttft=1"], "no machine here can keep a TTFT of 1 ms"),
        ([*whole, "--slo", "ttlt:1"], "--slo 'ttlt:1'"),
        ([*whole, "--policy", "best"], "no routing policy 'best'"),
        ([*whole, "--mixed-chunk-tokens", "4"], "at least one block, 16 tokens"),
        ([*whole, "--declared-tokens", "all"], "--declared-tokens is 'all'"),
        ([*whole, "--classes", "a:ttft=5; b:ttft=9"], "--class-shares a=1,b=1"),
        ([*whole, "--class-shares", "a=1"], "classes are default"),
        ([*whole, "--profile", "splitwisesim"], "needs --perf-table"),
        ([*whole, "--profile", "table", "--perf-table", str(table)], "no column"),
        (
            [*whole, "--profile", str(profile), "--perf-table", str(table)],
            "--profile table or splitwisesim",
        ),
        ([*whole, "--profile", str(profile)], "cannot be used"),
        ([*whole, "--profile", str(folder / "none.json")], "none.json: No such file"),
        ([*whole, "--config", str(config)], "unknown option 'clusters'; did you mean cluster?"),
        ([*whole, "--json", str(folder / "no" / "out.json")], "there is no folder for"),
        ([*whole, "--json", str(folder)], "is a folder; name a file"),
        ([*whole, "--plot", str(table)], "--plot: cannot write to"),
        (["--cluster", "10001xh100:mixed", "--model", "llama-3-8b", *LOAD], "at most 10000"),
        ([*SPLIT, "--rate", "1e-300", "-n", "5"], "look at the times of the trace, or at --rate"),
        ([*whole, "--events", str(folder / "no" / "events")], "--events: cannot write"),
        ([*whole, "--sample-interval", "0"], "--sample-interval is 0"),
        ([*SPLIT, "--trace", str(bad_row)], "bad.csv, line 2"),
    ]


@pytest.mark.parametrize("number", range(32))
def test_a_mistake_is_one_line_with_the_remedy(number, capsys, tmp_path):
    flags, said = mistakes(tmp_path)[number]
    assert main(["sim", *flags]) == 2
    captured = capsys.readouterr()
    assert said in captured.err
    assert captured.err.count("\n") == 1
    assert captured.out == ""
