"""How right is the simulator? A calibrated profile predicts loads that it was not calibrated on.

For each layout of the live server on this machine (one prefill and one decode worker; one mixed
worker): calibrate; measure what it can do in a closed loop (its capacity, for each mix of lengths);
then send open loads at 0.2, 0.5 and 0.75 of that, each twice with the same arrivals and lengths and
other prompts, and simulate the same loads with the profile. The second runs begin when all first
ones are done: minutes lie between two runs of a load, so that how the machine itself drifts is in
what they differ by. A cell is a percentile of TTFT, TPOT or E2E: it is met if the prediction (the
median of five seeds) is off the mean of the two live runs by no more than the larger of 10 % (TTFT)
or 5 % (TPOT, E2E) and of what the two runs differ by.

Whatever is measured is kept in ``--folder`` at once, and what is there already is not measured
again: the script can be stopped, and the layouts be measured in separate runs. The model is that
of ``pdserve serve``; further flags go to it, and to the calibration.

    python benchmarks/fidelity.py --folder fidelity [--layouts 1+1,mixed] [--cores 0,1] [FLAG ...]
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import statistics
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from server import Server, serving

from pdserve.bench.options import LoadOptions, TargetOptions
from pdserve.bench.plan import Load, make_load
from pdserve.bench.run import Result, run_load
from pdserve.bench.target import Target
from pdserve.cost.profile import Profile, from_text, machine_from_profile
from pdserve.sim.observe import Ended, Observer
from pdserve.sim.settings import SimSettings
from pdserve.sim.simulation import Simulation
from pdserve.sim.spec import parse_cluster
from pdserve.workload.outcome import Ending
from pdserve.workload.summary import percentile

LAYOUTS = {
    "1+1": (["--prefill", "1", "--decode", "1"], "1xcalibrated:prefill,1xcalibrated:decode"),
    "mixed": (["--mixed", "1"], "1xcalibrated:mixed"),
}
MIXES = {"short": ("32:256", "16:64"), "long": ("256:1024", "8:32")}
"""Prompt and answer tokens, drawn evenly."""
SHARES = (0.2, 0.5, 0.75)
BOUNDS = {"TTFT": 0.10, "TPOT": 0.05, "E2E": 0.05}
PERCENTS = (50, 90, 99)
SEEDS = range(5)
CAPACITY_STREAMS = 16
LEAST_REQUESTS = 30
FORCED = ("--admission", "none", "--queue-timeout", "600")

Latencies = dict[str, list[float]]
"""In seconds, by what they are; sorted."""


class Quiet:
    """Watches a run without a word."""

    def sent(self) -> None: ...

    def ended(self, outcome: object) -> None: ...


@dataclass(frozen=True, slots=True)
class Kept:
    """Everything that was measured, one file each."""

    folder: Path

    def path(self, *parts: object) -> Path:
        return self.folder / ("-".join(map(str, parts)) + ".json")

    def load(self, *parts: object) -> Any:
        path = self.path(*parts)
        return json.loads(path.read_text()) if path.exists() else None

    def save(self, value: Any, *parts: object) -> Any:
        self.path(*parts).write_text(json.dumps(value))
        return value


# --- live --------------------------------------------------------------------------------------


def calibrate(kept: Kept, layout: str, seconds: float, flags: Sequence[str]) -> Profile:
    path = kept.path("profile", layout)
    if not path.exists():
        say(f"{layout}: calibrating for about {seconds:g} s")
        roles, _ = LAYOUTS[layout]
        command = [sys.executable, "-m", "pdserve", "calibrate", *roles, *flags]
        command += ["--seconds", str(seconds), "--out", str(path)]
        command += ["--recording", str(kept.folder / f"calibration-{layout}")]
        subprocess.run(command, check=True, stdout=sys.stderr)
    return from_text(path.read_text(), str(path))


class Live:
    """One server for all runs of a layout, started when the first one needs it."""

    def __init__(self, layout: str, flags: Sequence[str]) -> None:
        self._flags = [*LAYOUTS[layout][0], *FORCED, *flags]
        self._entered: Any = None
        self._server: Server | None = None
        self._runs = 0

    @property
    def url(self) -> str:
        if self._server is None:
            self._entered = serving(self._flags)
            self._server = self._entered.__enter__()
        return self._server.url

    def close(self) -> None:
        if self._entered is not None:
            self._entered.__exit__(None, None, None)

    def send(self, load: Load, seed: int) -> Result:
        """``seed``: of the prompts."""
        return asyncio.run(self._send(load, seed))

    async def _send(self, load: Load, seed: int) -> Result:
        target = Target(TargetOptions(url=self.url, seed=seed))
        try:
            await target.ask_for_model()
            return await run_load(load, target, Quiet())
        finally:
            target.close()


@contextmanager
def live(layout: str, flags: Sequence[str]) -> Iterator[Live]:
    server = Live(layout, flags)
    try:
        yield server
    finally:
        server.close()


def load_of(mix: str, seed: int, **options: Any) -> Load:
    prompts, answers = MIXES[mix]
    return make_load(
        LoadOptions(input_tokens=prompts, output_tokens=answers, seed=seed, warmup=3, **options)
    )


def capacity_of(kept: Kept, server: Live, layout: str, mix: str, seconds: float) -> float:
    """Requests per second in a closed loop, of those that ended while it was full."""
    found = kept.load("capacity", layout, mix)
    if found is None:
        say(f"{layout}, {mix}: what it can do, for {seconds:g} s")
        load = load_of(mix, 7, concurrency=CAPACITY_STREAMS, duration_s=seconds)
        result = server.send(load, 1 + list(MIXES).index(mix))
        ends = [o.last_s for o in result.outcomes if o.last_s is not None and o.last_s <= seconds]
        found = kept.save(len(ends) / seconds, "capacity", layout, mix)
    return float(found)


def measured(
    kept: Kept, server: Live, layout: str, mix: str, share: float, run: int, load: Load
) -> Latencies:
    found: Latencies | None = kept.load("live", layout, mix, share, run)
    if found is None:
        say(f"{layout}, {mix}, {share:g} of its capacity, run {run + 1}: {load.num_requests}")
        # No prompt may begin like one of another run: the server would have its KV.
        seed = 1000 * (1 + list(MIXES).index(mix)) + 100 * run + round(100 * share)
        outcomes = server.send(load, seed).outcomes
        if any(outcome.ending is not Ending.COMPLETED for outcome in outcomes):
            say("  some requests failed; the others count")
        found = kept.save(latencies(outcomes), "live", layout, mix, share, run)
    return found


def latencies(requests: Sequence[Any]) -> Latencies:
    """Of live outcomes or of simulated ones."""
    done = [request for request in requests if request.ending is Ending.COMPLETED]
    values = {
        "TTFT": [request.ttft_s for request in done],
        "TPOT": [request.tpot_s for request in done],
        "E2E": [request.e2e_s for request in done],
    }
    return {name: sorted(v for v in of if v is not None) for name, of in values.items()}


# --- simulated ---------------------------------------------------------------------------------


class Ends(Observer):
    def __init__(self) -> None:
        self.requests: list[Ended] = []

    def ended(self, at_s: float, request: Ended) -> None:
        self.requests.append(request)


def simulated(profile: Profile, layout: str, load: Load, seed: int) -> Latencies:
    cluster = parse_cluster(LAYOUTS[layout][1])
    settings = SimSettings(
        cluster=cluster,
        machines=tuple(machine_from_profile(profile, group.role) for group in cluster.groups),
        times=profile.times,
        declared_tokens=None,
        heartbeat_s=0.5,
        queue_timeout_s=600.0,
        seed=seed,
    )
    ends = Ends()
    Simulation(settings, iter(load.requests), [ends]).run()
    return latencies(ends.requests)


# --- together ----------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class Cell:
    layout: str
    mix: str
    share: float
    name: str
    percent: int
    num: int
    lives_s: tuple[float, float]
    predicted_s: float

    @property
    def live_s(self) -> float:
        return statistics.fmean(self.lives_s)

    @property
    def off(self) -> float:
        return self.predicted_s / self.live_s - 1.0

    @property
    def bound(self) -> float:
        spread = abs(self.lives_s[0] - self.lives_s[1]) / self.live_s
        return max(BOUNDS[self.name], spread)

    @property
    def is_met(self) -> bool:
        return abs(self.off) <= self.bound


def loads_of(
    kept: Kept, server: Live, layout: str, arguments: argparse.Namespace
) -> dict[tuple[str, float], Load]:
    """By mix of lengths and share of the capacity."""
    loads = {}
    for mix in MIXES:
        capacity = capacity_of(kept, server, layout, mix, arguments.capacity_seconds)
        for share in SHARES:
            rate = share * capacity
            seconds = min(max(arguments.duration, LEAST_REQUESTS / rate), 2.0 * arguments.duration)
            loads[mix, share] = load_of(mix, 11, rate=rate, duration_s=seconds)
    return loads


def cells_of(
    kept: Kept, profile: Profile, server: Live, layout: str, arguments: argparse.Namespace
) -> Iterator[Cell]:
    loads = loads_of(kept, server, layout, arguments)
    lives = [
        {
            (mix, share): measured(kept, server, layout, mix, share, run, load)
            for (mix, share), load in loads.items()
        }
        for run in range(2)
    ]
    for (mix, share), load in loads.items():
        runs = [run[mix, share] for run in lives]
        predictions = [simulated(profile, layout, load, seed) for seed in SEEDS]
        for name in BOUNDS:
            for percent in PERCENTS:
                first_s, second_s = (percentile(run[name], percent) for run in runs)
                guesses_s = [percentile(guess[name], percent) for guess in predictions]
                yield Cell(
                    layout=layout,
                    mix=mix,
                    share=share,
                    name=name,
                    percent=percent,
                    num=len(runs[0][name]),
                    lives_s=(first_s, second_s),
                    predicted_s=statistics.median(guesses_s),
                )


def show(cells: Sequence[Cell]) -> None:
    print(
        "| layout | lengths | of capacity | requests | | live ms | predicted ms | off | bound | |"
    )
    print("| --- | --- | ---: | ---: | --- | ---: | ---: | ---: | ---: | --- |")
    for cell in cells:
        lives = " / ".join(f"{live_s * 1e3:.4g}" for live_s in cell.lives_s)
        print(
            f"| {cell.layout} | {cell.mix} | {cell.share:g} | {cell.num} "
            f"| {cell.name} P{cell.percent} | {lives} | {cell.predicted_s * 1e3:.4g} "
            f"| {cell.off:+.1%} | {cell.bound:.1%} | {'' if cell.is_met else 'miss'} |"
        )
    print()
    for name in BOUNDS:
        of = [cell for cell in cells if cell.name == name]
        met = sum(cell.is_met for cell in of)
        middle = statistics.median(abs(cell.off) for cell in of)
        print(
            f"{name}: {met} of {len(of)} cells within the bound, off by {middle:.1%} in the median"
        )


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument(
        "--folder", type=Path, required=True, help="where what was measured is kept"
    )
    parser.add_argument("--layouts", default=",".join(LAYOUTS), help="of " + ", ".join(LAYOUTS))
    parser.add_argument("--cores", help="run on these, as 0,1 (client, gateway and workers)")
    parser.add_argument("--seconds", type=float, default=150.0, help="of each calibration")
    parser.add_argument("--capacity-seconds", type=float, default=20.0)
    parser.add_argument("--duration", type=float, default=30.0, help="seconds of arrivals in a run")
    arguments, flags = parser.parse_known_args()
    if arguments.cores:
        os.sched_setaffinity(0, {int(core) for core in arguments.cores.split(",")})
    arguments.folder.mkdir(parents=True, exist_ok=True)
    kept = Kept(arguments.folder)
    cells: list[Cell] = []
    for layout in arguments.layouts.split(","):
        profile = calibrate(kept, layout, arguments.seconds, flags)
        with live(layout, flags) as server:
            cells += cells_of(kept, profile, server, layout, arguments)
        print(f"{layout}: {profile.host.cpu}, {profile.host.pinning}, ", end="")
        print(f"{profile.machines[0].threads} threads a worker; steps off by ", end="")
        errors = [(k, e) for machine in profile.machines for k, e in machine.errors.items()]
        print(", ".join(f"{kind} {error.median:.1%}" for kind, error in errors))
        for warning in profile.warnings:
            print(f"warning: {warning}")
    print()
    show(cells)


if __name__ == "__main__":
    main()
