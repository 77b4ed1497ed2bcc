"""The studies of ``benchmarks/papers`` in small: what they search, keep, judge and write."""

from __future__ import annotations

import importlib
import itertools
import json
import random
import sys
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import pytest

from pdserve.core.ids import RequestId
from pdserve.cost.table import COLUMNS
from pdserve.sim.observe import Ended

FOLDER = Path(__file__).parents[3] / "benchmarks" / "papers"
DATA = Path(__file__).parents[1] / "workload" / "data"
MODULES = (
    "paper_runs",
    "paper_tables",
    "splitwise_clusters",
    "splitwise_slowdowns",
    "splitwise_tables",
    "splitwise",
    "mooncake",
    "taichi",
    "fleet",
)


@pytest.fixture
def study(monkeypatch):
    """Imports a script of the folder, and forgets it and what it imported from there."""
    monkeypatch.syspath_prepend(str(FOLDER))
    for name in MODULES:
        monkeypatch.delitem(sys.modules, name, raising=False)
    yield importlib.import_module
    for name in MODULES:
        sys.modules.pop(name, None)


@pytest.fixture
def data(tmp_path):
    """What a user would have: traces and measurements, but few and made up."""
    folder = tmp_path / "data"
    folder.mkdir()
    rng = random.Random(0)
    for name in ("azure_2023_conv.csv", "azure_2023_code.csv"):
        rows = ["TIMESTAMP,ContextTokens,GeneratedTokens"]
        rows += [
            f"2023-11-16 18:{i // 60:02}:{i % 60:02},{rng.randint(100, 900)},{rng.randint(2, 20)}"
            for i in range(120)
        ]
        (folder / name).write_text("\n".join(rows) + "\n")
    (folder / "mooncake_conversation.jsonl").write_text((DATA / "mooncake_ticks.jsonl").read_text())
    (folder / "splitwise_perf_model.csv").write_text(perf_table())
    return folder


def perf_table():
    """A hundredth of a millisecond a prompt token on A100, half of it on H100; some more to start.
    Decodes take 20 and 15 ms."""
    lines = [",".join(COLUMNS)]
    speeds = {"a100-80gb": (0.1, 20.0), "h100-80gb": (0.05, 15.0), "h100-80gb-pcap": (0.07, 15.0)}
    for hardware, (per_token, decode) in speeds.items():
        runs = [(length, 1, 128) for length in (128, 256, 1024, 4096)]
        runs += [(512, batch, 128) for batch in (1, 2, 4, 16, 64)]
        runs += [(512, 1, 1024)]
        for prompt, batch, output in runs:
            prompt_ms = 10 + per_token * prompt * batch
            token_ms = decode + 0.1 * batch + 0.0001 * batch * (prompt + output)
            values = {
                "model": "bloom-176b", "hardware": hardware, "prompt_size": prompt,
                "batch_size": batch, "token_size": output, "prompt_time": prompt_ms,
                "token_time": token_ms, "tensor_parallel": 8,
            }  # fmt: skip
            lines.append(",".join(str(values[column]) for column in COLUMNS))
    return "\n".join(lines) + "\n"


def runs_in(folder):
    return (folder / "runs.jsonl").read_text().splitlines()


def is_svg(path):
    return ElementTree.parse(path).getroot().tag.endswith("svg")


# --- searches and kept runs -------------------------------------------------------------------


@pytest.mark.parametrize("guess", [1, 3, 17, 200])
def test_searches_find_the_border_with_few_questions(study, guess):
    runs = study("paper_runs")
    for border in (*range(9), 16, 50, 99, 100):
        asked = []

        def passes(number, border=border, asked=asked):
            asked.append(number)
            return number <= border

        assert runs.highest(passes, guess, 100) == border
        assert len(asked) == len(set(asked)) <= 16
        assert all(1 <= number <= 100 for number in asked)
        least = runs.lowest(lambda number, border=border: number > border, guess, 100)
        assert least == (None if border >= 100 else border + 1)


def test_a_run_is_made_once(study, tmp_path):
    runs = study("paper_runs")
    made = []

    def work():
        made.append(1)
        return {"answer": len(made)}

    lab = runs.Lab(tmp_path, shown=False)
    assert lab.result({"rate": 1}, work) == lab.result({"rate": 1}, work) == {"answer": 1}
    with (tmp_path / "runs.jsonl").open("a") as file:
        file.write('{"asked": {"rate": 2}, "ans')  # the machine went down
    again = runs.Lab(tmp_path, shown=False)
    assert again.result({"rate": 1}, work) == {"answer": 1}
    assert again.result({"rate": 2}, work) == {"answer": 2}
    assert runs.Lab(tmp_path, shown=False).result({"rate": 2}, work) == {"answer": 2}
    assert runs.Lab(tmp_path, fresh=True, shown=False).result({"rate": 2}, work) == {"answer": 3}


# --- judging ----------------------------------------------------------------------------------


def ended(ttft_s, tpot_s, prompt=512, answer=11):
    return Ended(
        index=0,
        request_id=RequestId("r"),
        arrived_s=0.0,
        first_s=ttft_s,
        second_s=ttft_s + tpot_s,
        last_s=ttft_s + (answer - 1) * tpot_s,
        prompt_tokens=prompt,
        cached_tokens=0,
        output_tokens=answer,
    )


def test_a_run_is_stopped_only_when_an_objective_is_lost(study, data, tmp_path):
    runs, splitwise = study("paper_runs"), study("splitwise")
    made = splitwise.Study(runs.Lab(tmp_path, shown=False), data, duration_s=1.0, grid=5, seed=0)
    measure = made.measure("pdserve")
    rng = random.Random(1)
    verdicts = set()
    for _ in range(200):
        late = rng.uniform(0.0, 0.15)
        requests = [
            ended(0.0612 * (7 if rng.random() < late else rng.uniform(1, 2.9)), 0.0202)
            for _ in range(300)
        ]
        watched = splitwise.Slowdowns(measure, len(requests), count_all=True)
        for request in requests:
            watched.ended(0.0, request)
        kept = not watched.violated()
        stopped = False
        quick = splitwise.Slowdowns(measure, len(requests), count_all=False)
        try:
            for request in requests:
                quick.ended(0.0, request)
        except runs.EnoughError:
            stopped = True
        assert not (stopped and kept), "it was stopped though all was kept"
        verdicts.add((kept, stopped))
    assert verdicts >= {(True, False), (False, True)}


def test_slowdowns_are_against_an_idle_machine(study, data, tmp_path):
    runs, splitwise = study("paper_runs"), study("splitwise")
    made = splitwise.Study(runs.Lab(tmp_path, shown=False), data, duration_s=1.0, grid=5, seed=0)
    watched = splitwise.Slowdowns(made.measure("pdserve"), 1, count_all=True)
    watched.ended(0.0, ended(2 * (0.010 + 0.1e-3 * 512), 0.05))
    assert watched.values["ttft"] == [pytest.approx(2.0, rel=1e-3)]
    assert watched.violated() == ["ttft_p50", "tbt_p50", "tbt_p90", "e2e_p50", "e2e_p90"]


def test_divisions_spend_the_budget(study):
    splitwise = study("splitwise")
    paper = splitwise.COUNTS["equal power", "conversation"]
    for name in splitwise.ROBUST:
        design = splitwise.DESIGNS[name]
        share = paper[name][0] * splitwise.POWER[design.prompt] / (40 * 44.0)
        assert splitwise.division("equal power", name, share) == paper[name]
        for tenth in range(1, 10):
            counts = splitwise.division("equal power", name, tenth / 10)
            taken = design.total(counts, splitwise.POWER)
            assert 40 * 44.0 - 24.8 - 0.5 * 44 < taken <= 40 * 44.0


def test_a_cluster_is_slimmed_as_far_as_it_bears_the_load(study):
    splitwise = study("splitwise")
    design, of = splitwise.DESIGNS["HHcap"], splitwise.POWER

    def least(bears):
        sizes = itertools.product(range(1, 80), repeat=2)
        return min(design.total(counts, of) for counts in sizes if bears(counts))

    for bears in (
        lambda counts: counts[0] >= 17 and counts[1] >= 22,
        lambda counts: counts[0] * counts[1] >= 600,
        lambda counts: min(2 * counts[0], counts[1]) >= 30,
    ):
        found = splitwise.slimmer(bears, (40, 45), design, of)
        assert bears(found)
        assert design.total(found, of) <= 1.02 * least(bears)


# --- the scripts ------------------------------------------------------------------------------


def test_splitwise(study, data, tmp_path, monkeypatch, capsys):
    splitwise = study("splitwise")
    small = {name: (2,) if design.mixed else (1, 1) for name, design in splitwise.DESIGNS.items()}
    monkeypatch.setattr(splitwise, "COUNTS", dict.fromkeys(splitwise.COUNTS, small))
    for setting, (of, hardware, _) in splitwise.BUDGETS.items():
        monkeypatch.setitem(splitwise.BUDGETS, setting, (of, hardware, 2))
    saver = ("AA", "Baseline-A100", 1.0, splitwise.COST, "nothing stated")
    monkeypatch.setattr(splitwise, "SAVERS", [saver])
    guesses = (4,) * len(splitwise.DESIGNS)
    monkeypatch.setattr(splitwise, "GUESSES", dict.fromkeys(splitwise.GUESSES, guesses))
    out = tmp_path / "out"
    flags = ["--data", str(data), "--out", str(out), "--duration", "6"]
    designs = ["Baseline-A100", "AA"]
    flags += ["--designs", *designs, "--grid", "2"]
    splitwise.main([*flags, "--loads", "conversation"])
    document = json.loads((out / "splitwise.json").read_text())
    assert document["rates"].keys() == {"pdserve", "splitwisesim"}
    rates = document["rates"]["pdserve"]
    assert set(rates) == {
        f"{setting} | conversation | {name}"
        for setting, name in itertools.product(("equal power", "equal cost"), designs)
    }
    assert all(rate >= 2 and rate % 2 == 0 for rate in rates.values())
    assert document["robustness"]["pdserve"].keys() == {"AA"}
    for way in ("pdserve", "splitwisesim"):
        saved = document["equal_throughput"][way]
        assert [row[:3] for row in saved] == [[way, "AA", "1 x Baseline-A100"]]
    [divided] = document["divided_anew"]
    assert divided[0] == "AA"
    assert divided[4] >= divided[2] == rates["equal power | conversation | AA"]
    shown = capsys.readouterr().out
    assert "AA / Baseline-A100 | equal power | conversation | 2.15" in shown
    assert is_svg(out / "splitwise-equal-power-conversation.svg")
    made = runs_in(out)
    splitwise.main([*flags, "--loads", "conversation"])
    assert runs_in(out) == made, "nothing is run twice"


def test_mooncake(study, data, tmp_path):
    runs, mooncake = study("paper_runs"), study("mooncake")
    lab = runs.Lab(tmp_path / "out", shown=False)
    small = mooncake.Study(
        lab,
        data / "mooncake_conversation.jsonl",
        cluster="2xa100-tp8:prefill,1xa100-tp8:decode",
        scarce=["1xa100-tp8:prefill,1xa100-tp8:decode"],
        num_requests=40,
        num_overload=20,
        num_seeds=2,
    )
    mooncake.answer(small, [4.0])
    document = json.loads((tmp_path / "out" / "mooncake.json").read_text())
    routed = document["routing"]
    assert {name: found["num"] for name, found in routed.items()} == dict.fromkeys(
        [*mooncake.ROUTING, "global, no fetches"], 40
    )
    assert routed["local cache-aware"]["cached_share"] > routed["random"]["cached_share"] > 0.2
    kinds = document["rejection"][f"{small.cluster} x 4"]
    assert kinds.keys() == mooncake.REJECTION.keys()
    assert [found["refused"] for found in kinds["no rejection"]] == [0]
    assert document["rejection"].keys() == {f"{c} x 4" for c in (small.cluster, *small.scarce)}
    scarce = document["rejection"][f"{small.scarce[0]} x 4"]
    assert [len(runs) for runs in scarce.values()] == [1, 2, 2]
    bare = document["without_margin"][f"{small.scarce[0]} x 4"]
    assert [len(runs) for runs in bare.values()] == [2, 2]
    assert all(run["decoding"].keys() == {"mean", "deviation"} for run in scarce["predicted"])
    text = (tmp_path / "out" / "mooncake.md").read_text()
    assert "| random | `random` | 19.6 |" in text
    assert is_svg(tmp_path / "out" / "mooncake-routing.svg")
    assert is_svg(tmp_path / "out" / "mooncake-rejection-4x.svg")


def test_taichi(study, data, tmp_path):
    runs, taichi = study("paper_runs"), study("taichi")
    lab = runs.Lab(tmp_path / "out", shown=False)
    small = taichi.Study(
        lab, data / "azure_2023_conv.csv", rates=[2.0, 6.0], duration_s=5.0, num_workers=2
    )
    taichi.answer(small)
    document = json.loads((tmp_path / "out" / "taichi.json").read_text())
    assert document["attainment"].keys() == taichi.SHAPES.keys()
    for layouts in document["attainment"].values():
        assert layouts.keys() == {"aggregated", "split", "predicted"}
        assert all(0 <= share <= 1 for each in layouts.values() for share in each["curve"].values())
    assert is_svg(tmp_path / "out" / "taichi-3.svg")


def test_goodput_is_where_a_curve_crosses_the_attainment(study):
    taichi = study("taichi")
    assert taichi.goodput({1.0: 1.0, 2.0: 0.95, 3.0: 0.85, 4.0: 0.2}) == pytest.approx(2.5)
    assert taichi.goodput({1.0: 0.5, 2.0: 0.1}) == 0.0
    assert taichi.goodput({1.0: 1.0, 2.0: 0.99}) == 2.0


def test_fleet(study, data, tmp_path):
    runs, fleet = study("paper_runs"), study("fleet")
    lab = runs.Lab(tmp_path / "out", shown=False)
    small = fleet.Study(
        lab, data, speed=20.0, window_s=(0.0, 60.0), ttft_s=0.5, tpot_s=0.05, most=6
    )
    fleet.answer(small, ["conversation"], 2)
    document = json.loads((tmp_path / "out" / "fleet.json").read_text())
    workers = {
        name: found["workers"] for name, found in document["workers"]["conversation"].items()
    }
    assert workers.keys() == set(fleet.FLEETS)
    assert all(1 <= number <= 6 for number in workers.values())
    for name, number in workers.items():
        share = document["workers"]["conversation"][name]["prefill_share"]
        assert small.keeps("conversation", name, number, share)
        assert number == 1 or not small.keeps("conversation", name, number - 1, share)
    assert document["latencies"]["conversation"].keys() == set(fleet.FLEETS)
    assert is_svg(tmp_path / "out" / "fleet-workers.svg")
