"""``pdserve plan`` from its flags to its answer, with the real simulator."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from pdserve.cli import main

TRAFFIC = ["--input", "lognormal:800:0.4", "--output", "lognormal:24:0.4", "-n", "400"]
QUICK = ["--windows", "2", "--window-s", "4", "--no-progress", "--error", "0.1"]
ASKED = ["plan", "--model", "llama-3-8b", "--slo", "ttft:300", "tpot:25", *TRAFFIC, *QUICK]


def planned(capsys: pytest.CaptureFixture[str], *flags: str) -> dict:
    assert main([*ASKED, "--json", "-", *flags]) == 0
    return json.loads(capsys.readouterr().out)


def finals(whole: dict) -> list[dict]:
    """Designs that were judged by all windows."""
    last = max(each["windows_level"] for each in whole["designs"])
    return [each for each in whole["designs"] if each["windows_level"] == last and each["best"]]


def test_a_rate_gets_the_cheapest_cluster_and_what_is_to_be_known_of_it(capsys, tmp_path):
    flags = ["--hardware", "l40s,h100", "--rate", "8", "--policies", "splitwise"]
    journal, plots = tmp_path / "journal.jsonl", tmp_path / "plots"
    whole = planned(capsys, *flags, "--resume", str(journal), "--plot", str(plots))
    winner, other = whole["winner"], whole["other_kind"]
    assert whole["split"] == winner["split"] != other["split"]
    assert winner["cost"] == min(each["best"]["cost"] for each in finals(whole))
    assert whole["saving"] == pytest.approx(1 - winner["cost"] / other["cost"])
    assert whole["answer"][0].startswith("Split" if whole["split"] else "Do not split")
    assert 0 <= whole["sureness"]["stays"] <= 1
    assert whole["sureness"]["step_time_errors"] == {"h100": 0.1, "l40s": 0.1}
    assert {turn["what"] for turn in whole["changes"]} == {
        "rate", "ttft bound", "tpot bound", "price of h100", "price of l40s"
    }  # fmt: skip
    assert whole["front"]
    assert {path.name for path in plots.iterdir()} == {"plan-cost.svg", "plan-power.svg"}
    again = planned(capsys, *flags, "--resume", str(journal))
    assert again["simulations"] == 0
    timed = ("wall_s", "simulations")
    assert {k: v for k, v in again.items() if k not in timed} == {
        k: v for k, v in whole.items() if k not in timed
    }


def test_a_budget_gets_the_most_goodput(capsys):
    quick = ["--no-sureness", "--no-changes", "--precision", "0.2", "--policies", "splitwise",
             "--input", "4000", "--slo", "ttft:1500", "tpot:40"]  # fmt: skip
    whole = planned(capsys, "--hardware", "h100", "--budget-cost", "10", *quick)
    assert whole["winner"]["cost"] <= 10
    assert whole["winner"]["rate_rps"] == max(each["best"]["rate_rps"] for each in finals(whole))
    assert "requests/s within the SLO" in whole["answer"][0]


def test_people_get_a_sentence_first(capsys):
    flags = ["--hardware", "h100", "--rate", "5", "--no-sureness", "--no-changes"]
    assert main([*ASKED, *flags, "--policies", "splitwise"]) == 0
    out = capsys.readouterr().out
    assert out.startswith(("Split: ", "Do not split: "))
    assert "Pareto front" in out


def test_a_hardware_can_have_another_link(capsys):
    flags = ["--hardware", "h100@ib-200,h100", "--rate", "5", "--no-sureness", "--no-changes"]
    whole = planned(capsys, *flags, "--policies", "splitwise")
    designs = {each["design"] for each in whole["designs"]}
    assert "h100@ib-200 prefill + h100 decode, splitwise" in designs
    assert "h100@ib-200 mixed, aggregated" in designs


def test_the_nine_slowdowns_are_an_slo(capsys):
    flags = ["--hardware", "h100", "--rate", "5", "--no-sureness", "--no-changes"]
    flags += ["--policies", "splitwise"]
    assert main(["plan", "--model", "llama-3-8b", *TRAFFIC, *QUICK, *flags,
                 "--slo", "splitwise", "--json", "-"]) == 0  # fmt: skip
    whole = json.loads(capsys.readouterr().out)
    assert "times an idle a100" in whole["slo"]
    assert whole["winner"]["cluster"].startswith("1xh100")


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--hardware", "h100", "--rate", "5", "--budget-cost", "9"], "one of --rate"),
        (["--hardware", "h100", "--rate", "-1"], "above 0"),
        (["--rate", "5"], "--hardware a100,h100"),
        (["--hardware", "h100,h20", "--rate", "5"], "no hardware 'h20'; did you mean h200?"),
        (["--hardware", "h100", "--rate", "9e5"], "ask for shorter ones (--window-s)"),
        (["--hardware", "2xh100:mixed", "--rate", "5"], "write names and commas between"),
        (["--hardware", "h100", "--budget-cost", "0.01"],
         "do this: the smallest such cluster takes 4.76 of the budget of 0.01\n"),
        (["--hardware", "h100", "--price", "a100=3", "--rate", "5"], "a100"),
        (["--hardware", "h100", "--rate", "5", "--target", "1.5"], "share"),
        (["--hardware", "h100", "--rate", "5", "--slo", "ttft:1"], "an idle h100 worker has"),
        (["--hardware", "h100", "--rate", "5", "--slo", "tpot:50"], "every queue grow"),
        (["--hardware", "h100", "--rate", "5", "--policies", "best"], "no routing policy"),
        (["--hardware", "a100-tp1", "--model", "llama-2-70b", "--rate", "5"], "does not fit on"),
        (["--live", "http://127.0.0.1:1"], "name the right one with --live"),
    ],
)  # fmt: skip
def test_what_cannot_be_is_refused_with_the_bound(capsys, flags, said):
    assert main([*ASKED, *flags]) == 2
    assert said in capsys.readouterr().err


def test_flags_can_stand_in_a_file(capsys, tmp_path: Path):
    file = tmp_path / "plan.toml"
    file.write_text('[plan]\nhardware = "h100"\nrate = 5\nsureness = false\nchanges = false\n')
    whole = planned(capsys, "--config", str(file), "--policies", "splitwise")
    assert whole["goal"]["rate"] == 5.0
    assert whole["sureness"] is None
