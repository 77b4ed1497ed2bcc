"""What a live server does in a fidelity run: calibrated and loaded in the same minutes.

A machine that others share drifts by a tenth or a quarter within minutes: a profile made before the
loads that it is to predict would be judged by how the machine changed, not by how right it is. So
one server per layout records everything, and rounds of the calibration lie between its loads:
calibration, three loads, calibration, three loads ... Both see the same minutes. The profile is
fitted to what was recorded in the calibration's own spans of time alone, so the loads stay unseen.
In between a few lone requests tell the pace of the machine, for the reader's sake; nothing else
comes of them.

Whatever was measured of a layout is in its folder: the recordings, when and what the calibration
asked (``asked.json``), and the loads' latencies (``measured.json``, written last).
"""

from __future__ import annotations

import argparse
import asyncio
import shutil
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import msgspec

from pdserve.bench.options import LoadOptions, TargetOptions
from pdserve.bench.plan import Load, make_load
from pdserve.bench.run import run_load
from pdserve.bench.target import Target
from pdserve.calibrate.arguments import add_arguments
from pdserve.calibrate.command import (
    asker_of,
    deployment_of,
    kept_asked,
    profile_from,
    this_host,
)
from pdserve.calibrate.live import Asked, serving
from pdserve.cost.profile import Host, Profile
from pdserve.serve.deployment import Deployment
from pdserve.workload.outcome import Ending, Outcome
from pdserve.workload.summary import percentile

LAYOUTS = {
    "1+1": (["--prefill", "1", "--decode", "1"], "1xcalibrated:prefill,1xcalibrated:decode"),
    "mixed": (["--mixed", "1"], "1xcalibrated:mixed"),
}
"""Flags of the server, and the cluster that simulates it."""
MIXES = {"short": ("32:256", "16:64"), "long": ("256:1024", "8:32")}
"""Prompt and answer tokens, drawn evenly."""
SHARES = (0.2, 0.5, 0.75)
NUM_RUNS = 2
CAPACITY_STREAMS = 16
FILLING = 1 / 3
"""Of the time in which the capacity is found: till then the server fills."""
LEAST_REQUESTS = 30
"""Of a load, if that takes no more than twice its time."""
FEWEST_REQUESTS = 5
"""However long that takes."""
LOADS_BETWEEN = 3
"""Loads between two rounds of the calibration."""
PACE_REQUESTS = 5
FORCED = ("--admission", "none", "--queue-timeout", "600", "--drain-timeout", "5")

Latencies = dict[str, list[float]]
"""In seconds, by what they are; sorted."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Ran:
    """One live run of a load. ``span`` is on the clock of the recordings."""

    mix: str
    share: float
    run: int
    rate: float
    seconds: float
    span: tuple[float, float]
    latencies: Latencies


@dataclass(slots=True, kw_only=True)
class Measured:
    """All of a layout. ``flags`` are those of the server; ``capacity`` in requests per second, by
    mix; ``paces``: when a lone request's (TTFT, TPOT) was read, and what it was."""

    host: Host
    flags: list[str]
    capacity: dict[str, float] = field(default_factory=dict)
    runs: list[Ran] = field(default_factory=list)
    paces: list[tuple[float, float, float]] = field(default_factory=list)

    def of(self, mix: str, share: float) -> list[Ran]:
        """The runs of one load."""
        return [ran for ran in self.runs if (ran.mix, ran.share) == (mix, share)]


@dataclass(frozen=True, slots=True)
class Place:
    """Where a layout's measurements are."""

    folder: Path

    @property
    def recording(self) -> Path:
        return self.folder / "recording"

    @property
    def _measured(self) -> Path:
        return self.folder / "measured.json"

    def read(self) -> Measured | None:
        """None: it was not measured, or not to the end."""
        if not self._measured.exists():
            return None
        return msgspec.json.decode(self._measured.read_bytes(), type=Measured)

    def keep(self, measured: Measured) -> None:
        self._measured.write_bytes(msgspec.json.encode(measured))


@dataclass(frozen=True, slots=True, kw_only=True)
class Times:
    """How long things take, in seconds: all rounds of the calibration together; a load at least;
    finding out the capacity for one mix."""

    calibration: float
    load: float
    capacity: float


class Quiet:
    """Watches a run without a word."""

    def sent(self) -> None: ...

    def ended(self, outcome: object) -> None: ...


def measured(place: Place, layout: str, times: Times, flags: Sequence[str]) -> Measured:
    """Of the folder, or of a server that is started for it."""
    found = place.read()
    if found is None:
        shutil.rmtree(place.folder, ignore_errors=True)  # what was broken off is of other minutes
        place.folder.mkdir(parents=True)
        deployment, words = _deployment(layout, flags)
        say(f"{layout}: starting")
        found = Measured(host=this_host(), flags=list(flags))
        with serving((*words, *FORCED), place.recording) as url:
            asked = _Session(layout, url, deployment, times, found).run()
        kept_asked(place.recording).write_bytes(msgspec.json.encode(asked))
        place.keep(found)
    return found


def fitted(place: Place, layout: str, found: Measured) -> Profile:
    """Fitted to what the folder has, in the calibration's spans alone."""
    deployment, words = _deployment(layout, found.flags)
    asked = msgspec.json.decode(kept_asked(place.recording).read_bytes(), type=Asked)
    profile = profile_from(place.recording, asked, deployment, words, "calibrated")
    return replace(profile, host=found.host)


def _deployment(layout: str, flags: Sequence[str]) -> tuple[Deployment, tuple[str, ...]]:
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    return deployment_of(parser.parse_args([*LAYOUTS[layout][0], *flags]))


class _Session:
    """One server, from its first request to its last."""

    def __init__(
        self, layout: str, url: str, deployment: Deployment, times: Times, found: Measured
    ) -> None:
        self._layout = layout
        self._url = url
        self._times = times
        self._found = found
        self._asker = asker_of(url, deployment, 0)
        self._asked = Asked()

    def run(self) -> Asked:
        plans = [(mix, share, run) for run in range(NUM_RUNS) for mix in MIXES for share in SHARES]
        num_rounds = 1 + -(-len(plans) // LOADS_BETWEEN)
        self._calibrate(1, num_rounds)
        for mix in MIXES:
            self._find_capacity(mix)
        for place, plan in enumerate(plans):
            self._load(*plan)
            if (place + 1) % LOADS_BETWEEN == 0 or place + 1 == len(plans):
                self._calibrate(2 + place // LOADS_BETWEEN, num_rounds)
        return self._asked

    def _calibrate(self, number: int, num_rounds: int) -> None:
        self._read_pace()
        self._say(f"calibration, round {number} of {num_rounds}")
        budget_s = self._times.calibration / num_rounds
        self._asked = self._asked.plus(asyncio.run(self._asker.round(budget_s, lambda stage: None)))
        self._read_pace()

    def _find_capacity(self, mix: str) -> None:
        """In a closed loop, of the requests that ended while it was full: not at first."""
        seconds = self._times.capacity
        load = load_of(mix, 7, concurrency=CAPACITY_STREAMS, duration_s=seconds)
        outcomes = self._send(load, 1 + list(MIXES).index(mix))
        since_s = FILLING * seconds
        ends = sum(o.last_s is not None and since_s <= o.last_s <= seconds for o in outcomes)
        self._found.capacity[mix] = capacity = max(1, ends) / (seconds - since_s)
        self._say(f"{mix}: {capacity:.2f} requests/s")

    def _load(self, mix: str, share: float, run: int) -> None:
        rate = share * self._found.capacity[mix]
        least_s = self._times.load
        seconds = min(max(least_s, LEAST_REQUESTS / rate), 2.0 * least_s)
        seconds = max(seconds, FEWEST_REQUESTS / rate)
        load = timed_load(mix, rate, seconds)
        self._say(f"{mix}, {share:g} of its capacity, run {run + 1}: {load.num_requests} requests")
        # No prompt may begin like one of another run: the server would have its KV.
        begun_s = time.perf_counter()
        outcomes = self._send(
            load, 1000 * (1 + list(MIXES).index(mix)) + 100 * run + round(100 * share)
        )
        span = (begun_s, time.perf_counter())
        if any(outcome.ending is not Ending.COMPLETED for outcome in outcomes):
            self._say("some requests failed; the others count")
        self._found.runs.append(
            Ran(
                mix=mix,
                share=share,
                run=run,
                rate=rate,
                seconds=seconds,
                span=span,
                latencies=latencies(outcomes),
            )
        )
        self._read_pace()

    def _read_pace(self) -> None:
        """What a request takes that has the server to itself, in the median."""
        if self._found.paces and time.perf_counter() - self._found.paces[-1][0] < 1.0:
            return
        found = latencies(self._send(pace_load(), 50_000 + len(self._found.paces)))
        ttft_s, tpot_s = (percentile(found[name], 50) for name in ("TTFT", "TPOT"))
        self._found.paces.append((time.perf_counter(), ttft_s, tpot_s))

    def _send(self, load: Load, seed: int) -> list[Outcome]:
        """``seed``: of the prompts."""
        return asyncio.run(_sent(self._url, load, seed))

    def _say(self, text: str) -> None:
        say(f"{self._layout}: {text}")


async def _sent(url: str, load: Load, seed: int) -> list[Outcome]:
    target = Target(TargetOptions(url=url, seed=seed))
    try:
        await target.ask_for_model()
        return (await run_load(load, target, Quiet())).outcomes
    finally:
        target.close()


def timed_load(mix: str, rate: float, seconds: float) -> Load:
    """The same for a live run and for its simulation."""
    return load_of(mix, 11, rate=rate, duration_s=seconds)


def pace_load() -> Load:
    """Requests that have the server to themselves."""
    return make_load(
        LoadOptions(
            input_tokens="64",
            output_tokens="32",
            concurrency=1,
            num_requests=PACE_REQUESTS,
            seed=3,
            warmup=1,
        )
    )


def load_of(mix: str, seed: int, **options: Any) -> Load:
    prompts, answers = MIXES[mix]
    return make_load(
        LoadOptions(input_tokens=prompts, output_tokens=answers, seed=seed, warmup=3, **options)
    )


def latencies(requests: Sequence[Any]) -> Latencies:
    """Of live outcomes or of simulated ones."""
    done = [request for request in requests if request.ending is Ending.COMPLETED]
    values = {
        "TTFT": [request.ttft_s for request in done],
        "TPOT": [request.tpot_s for request in done],
        "E2E": [request.e2e_s for request in done],
    }
    return {name: sorted(v for v in of if v is not None) for name, of in values.items()}


def say(text: str) -> None:
    print(time.strftime("%H:%M:%S"), text, file=sys.stderr, flush=True)
