"""Calibrating real processes that keep a known pace finds that pace, and the simulator can use it.

The engine's own clock is what is fitted, so a machine that is busy with something else makes steps
longer, not the test fail: the bounds are wide.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import pytest

from pdserve.calibrate.fit import profile_of
from pdserve.calibrate.live import Asked
from pdserve.cli import main
from pdserve.core.request import Role
from pdserve.core.step import StepShape
from pdserve.cost.profile import from_text, machine_from_profile, to_text
from pdserve.cost.step_times import parse_step_times
from pdserve.serve.recorded import read_run

TIMES = "start=4ms,prompt=100us,pair=100ns,decode=8ms,sequence=500us,context=2us,transfer=2us"


@pytest.fixture
def calibrate(tiny_model_path: Path, tmp_path: Path) -> Callable[..., Path]:
    """Runs the command; gives the profile's file."""

    def run(*flags: str) -> Path:
        out = tmp_path / "profile.json"
        model = ["--model", str(tiny_model_path), "--kv-blocks", "512", "--engine", "modelled"]
        words = ["calibrate", "--out", str(out), "--recording", str(tmp_path), *model, *flags]
        assert main(words) == 0
        return out

    return run


def test_it_finds_the_pace_that_the_engine_keeps(
    calibrate: Callable[..., Path], capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    out = calibrate("--step-times", TIMES, "--seconds", "6", "--quick", "--json")
    text = out.read_text()
    printed: Any = json.loads(capsys.readouterr().out)
    assert printed == json.loads(text)
    profile = from_text(text)
    truth = parse_step_times(TIMES).steps
    fitted = machine_from_profile(profile, Role.PREFILL).steps
    for shape in (
        StepShape(400, 160_000),
        StepShape(800, 640_000),
        StepShape(0, 0, 1, 300),
        StepShape(0, 0, 8, 1_000),
    ):
        assert fitted.step_s(shape) == pytest.approx(truth.step_s(shape), rel=0.25)
    (machine,) = profile.machines
    assert machine.roles == (Role.PREFILL, Role.DECODE)
    assert machine.num_blocks == 512
    assert machine.measured.num_decoding >= 8
    assert machine.errors["decode"].num_steps > 100
    assert profile.workers == {"prefill": 1, "decode": 1}
    assert profile.link is not None
    assert 0 < profile.times.message_s < 0.1
    run = read_run(tmp_path / "recording")
    assert len(run.requests) > 30
    asked = msgspec.json.decode((tmp_path / "asked.json").read_bytes(), type=Asked)
    again = profile_of(
        run,
        asked,
        name=profile.name,
        made=profile.made,
        model=profile.model,
        host=profile.host,
        flags=profile.flags,
        threads=machine.threads,
    )
    assert to_text(again) == text
    assert all(request.num_tokens for request in run.requests.values())

    words = ["sim", "--profile", str(out), "--cluster", "1xcalibrated:prefill,1xcalibrated:decode"]
    load = ["--rate", "2", "--input", "100:500", "--output", "20", "-n", "40", "--json", "-"]
    assert main([*words, *load]) == 0
    report = json.loads(capsys.readouterr().out)
    decode_s = truth.step_s(StepShape(0, 0, 1, 300))
    assert report["requests"] == 40
    assert decode_s < report["tpot_s"]["p50"] < 2 * decode_s


def test_an_engine_that_batches_for_itself_is_refused(
    tiny_model_path: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["calibrate", "--model", str(tiny_model_path), "--engine", "fake-foreign"]
    status = main([*words, "--out", str(tmp_path / "p.json"), "--seconds", "1", "--quick"])
    assert status == 2
    assert "batches for itself" in capsys.readouterr().err
    assert not (tmp_path / "p.json").exists()


def test_a_server_that_cannot_start_is_told(
    tiny_model_path: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["calibrate", "--model", str(tiny_model_path), "--device", "nothing-like-this"]
    assert main([*words, "--out", str(tmp_path / "p.json"), "--quick"]) == 2
    assert "did not start" in capsys.readouterr().err
    assert main(["calibrate", "--out", str(tmp_path / "no" / "p.json")]) == 2
    assert "there is no folder" in capsys.readouterr().err
    assert main(["calibrate", "--out", str(tmp_path)]) == 2
    assert "is a folder; name a file" in capsys.readouterr().err
    assert main(["calibrate", "--seconds", "nan"]) == 2
    assert "--seconds is nan: give a number above 0" in capsys.readouterr().err
