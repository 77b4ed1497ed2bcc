"""From options to requests, as both the load client and the simulator do it."""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
from pathlib import Path

import pytest

from pdserve.core.errors import ConfigError
from pdserve.workload.arguments import add_contents, add_times, workload_options
from pdserve.workload.arrivals import RateStep
from pdserve.workload.build import build, build_open
from pdserve.workload.options import WorkloadOptions

DATA = Path(__file__).parent / "data"
AZURE = str(DATA / "azure_2024.csv")
MOONCAKE = str(DATA / "mooncake_ticks.jsonl")


def asked(*flags):
    parser = argparse.ArgumentParser()
    add_contents(parser.add_argument_group("what"))
    add_times(parser.add_argument_group("when"))
    return build_open(workload_options(parser.parse_args(flags)))


def test_ticks_are_smeared_unless_told_otherwise():
    lines = Path(MOONCAKE).read_text().splitlines()
    stamps = [json.loads(line)["timestamp"] / 1e3 for line in lines]
    together = [request.at_s for request in asked("--trace", MOONCAKE, "--no-smear").requests]
    assert together == stamps
    smeared = [request.at_s for request in asked("--trace", MOONCAKE).requests]
    assert len(set(smeared)) == len(smeared)
    offsets = [after - before for before, after in zip(stamps, smeared, strict=True)]
    assert 0 <= min(offsets) <= max(offsets) < 3.002
    assert smeared == [request.at_s for request in asked("--trace", MOONCAKE).requests]
    assert smeared != [r.at_s for r in asked("--trace", MOONCAKE, "--seed", "1").requests]
    plain = [request.at_s for request in asked("--trace", AZURE).requests]
    assert plain == [r.at_s for r in asked("--trace", AZURE, "--no-smear").requests]


def test_rates_that_change_are_written_as_flags():
    steps = asked("--rates", "2:600,8:600")
    assert steps.arrivals == "steps"
    times = [request.at_s for request in steps.requests]  # one round of the steps
    assert max(times) < 1200
    assert sum(t < 600 for t in times) == pytest.approx(1200, rel=0.1)
    assert sum(t >= 600 for t in times) == pytest.approx(4800, rel=0.05)
    wave = asked("--rate", "5", "--amplitude", "0.8", "--period", "360", "--duration", "3600")
    assert wave.arrivals == "sinusoid"
    phases = [request.at_s % 360 for request in wave.requests]
    rising = sum(t < 180 for t in phases)
    assert rising / (len(phases) - rising) == pytest.approx(1.509 / 0.491, rel=0.1)


def test_a_trace_at_other_times_keeps_its_requests():
    trace = list(asked("--trace", AZURE).requests)
    moved = list(asked("--trace", AZURE, "--rates", "1:60,10:60").requests)
    assert [(r.segments, r.output_tokens) for r in moved] == [
        (r.segments, r.output_tokens) for r in trace
    ]
    assert [r.at_s for r in moved] != [r.at_s for r in trace]


def test_lengths_drawn_from_a_trace():
    trace = list(asked("--trace", AZURE).requests)
    known = {(r.prompt_tokens, r.output_tokens) for r in trace}
    pairs = asked("--trace", AZURE, "--draw", "pairs", "--rate", "50", "-n", "4000")
    drawn = list(pairs.requests)
    assert {(r.prompt_tokens, r.output_tokens) for r in drawn} == known
    mean = statistics.fmean(r.prompt_tokens for r in trace)
    assert statistics.fmean(r.prompt_tokens for r in drawn) == pytest.approx(mean, rel=0.05)
    assert len({r.segments for r in drawn}) == 4000, "no prompt comes twice"
    sizes = list(
        itertools.islice(
            asked(
                "--trace", AZURE, "--draw", "sizes", "--rate", "50", "--duration", "80"
            ).requests, 4000,
        )
    )  # fmt: skip
    found = {(r.prompt_tokens, r.output_tokens) for r in sizes}
    assert len(found) > 10 * len(known)
    assert {pair[1] for pair in found} == {pair[1] for pair in known}


def test_bounds_and_windows_of_a_trace():
    requests = list(asked("--trace", AZURE, "--max-input", "1000", "--max-output", "20").requests)
    assert 0 < len(requests) < 64
    assert max(r.prompt_tokens for r in requests) <= 1000
    assert max(r.output_tokens for r in requests) == 20
    part = list(asked("--trace", AZURE, "--window", "1:2", "--rate-scale", "0.5").requests)
    whole = list(asked("--trace", AZURE).requests)
    assert [r.at_s for r in part] == pytest.approx(
        [2 * (r.at_s - 1) for r in whole if 1 <= r.at_s < 2]
    )


def test_nothing_is_made_before_it_is_taken():
    endless = WorkloadOptions(rate=1e-3, duration_s=1e15)
    first = list(itertools.islice(build(endless).requests, 3))
    assert [request.index for request in first] == [0, 1, 2]
    assert build(WorkloadOptions(arrivals="closed")).is_endless is False  # 100 requests
    assert build(WorkloadOptions(arrivals="closed", duration_s=5.0)).is_endless


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        ([], "--rate R, --rates R:S,... or --trace FILE"),
        (["--arrivals", "closed"], "say how fast"),
        (["--arrivals", "sinusoid", "--rate", "1"], "--amplitude A"),
        (["--rate", "1", "--period", "9"], "--amplitude A"),
        (["--rate", "1", "--amplitude", "0.5"], "no amplitude"),
        (["--rate", "1", "--amplitude", "1.5", "--period", "9"], "0 to 1"),
        (
            ["--rate", "inf", "-n", "5", "--amplitude", "0.5", "--period", "9"],
            "sinusoid around inf",
        ),
        (["--arrivals", "steps"], "go together"),
        (["--rates", "2:60", "--rate", "5"], "leave out --rate"),
        (["--rates", "2:60", "--arrivals", "poisson"], "need --rate"),
        (["--rates", "2"], "RATE:SECONDS"),
        (["--rate", "1", "--draw", "pairs"], "need --trace"),
        (["--trace", AZURE, "--draw", "pairs"], "give --rate R"),
        (["--trace", AZURE, "--draw", "pairs", "--rate", "1", "--max-input", "1"], "draw from"),
        (["--trace", AZURE, "--rate", "1", "--keep-times"], "leave out other arrivals"),
        (["--trace", AZURE, "--keep-times"], "are dates"),
        (["--rate", "1", "--keep-times"], "need --trace"),
    ],
)
def test_what_makes_no_sense_is_refused(flags, says):
    with pytest.raises(ConfigError, match=says):
        asked(*flags)


def test_steps_in_a_program():
    options = WorkloadOptions(rates=(RateStep(5.0, 2.0), RateStep(1.0, 2.0)), num_requests=50)
    assert len(list(build(options).requests)) == 50, "more than one round"
