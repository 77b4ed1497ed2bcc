"""A server of the calibration's own, and how it is asked.

The server is the real one: its own processes, started as ``pdserve serve`` with the flags to be
measured, and recording. The client is that of ``pdserve bench``, on the same machine and the same
monotonic clock as the recordings, which is what lets the edge be measured.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from pdserve.bench.options import TargetOptions
from pdserve.bench.target import Target
from pdserve.calibrate.design import Design, Pace, Stage
from pdserve.core.errors import UnavailableError
from pdserve.workload.outcome import Ending, Outcome

END_TIMEOUT_S = 60.0
Progress = Callable[[str, float], None]
"""Told (what is going on, share of all that is done)."""


@contextlib.contextmanager
def serving(flags: Sequence[str], recording: Path) -> Iterator[str]:
    """The URL of a server with these flags that records; ended on leaving. Raises
    `UnavailableError` with its last words if it does not get ready."""
    log_file = recording.with_suffix(".log")
    command = [sys.executable, "-m", "pdserve", "serve", "--port", "0", "--log-format", "json"]
    with log_file.open("wb") as log:
        process = subprocess.Popen(
            [*command, "--record", str(recording), *flags], stdout=subprocess.PIPE, stderr=log
        )
    try:
        assert process.stdout is not None
        line = process.stdout.readline()  # empty if it ends before it is ready
        if not line:
            process.wait()
            words = log_file.read_text(errors="replace").strip().splitlines()
            last = words[-1] if words else "it said nothing"
            raise UnavailableError(f"the server to be measured did not start: {last}")
        yield str(json.loads(line)["url"])
    finally:
        process.terminate()
        try:
            process.wait(END_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        if process.stdout is not None:
            process.stdout.close()


@dataclass(frozen=True, slots=True, kw_only=True)
class Asked:
    """What was sent after the probes, from ``since_s`` on, and what came of it; times are on the
    machine's monotonic clock."""

    since_s: float
    outcomes: tuple[Outcome, ...]
    stages: tuple[str, ...]


async def ask(
    url: str, design: Design, rounds: int, seconds: float, *, vocab_size: int, progress: Progress
) -> Asked:
    """Send the design's rounds, of ``seconds`` in all. Raises `UnavailableError` if requests
    fail."""
    targets: dict[str, Target] = {}
    outcomes: list[Outcome] = []
    stages: list[str] = []
    try:
        for route in ("auto", "split", "local"):
            headers = () if route == "auto" else (("X-Pdserve-Route", route),)
            targets[route] = Target(TargetOptions(url=url, headers=headers, vocab_size=vocab_size))
            await targets[route].ask_for_model()
        progress("probing", 0.0)
        probed = [(await _send(targets, stage))[0] for stage in design.probes()]
        pace = _pace(probed[1], probed[2])
        since_s = time.perf_counter()
        for number in range(rounds):
            begun_s = time.perf_counter()
            if number and begun_s - since_s > seconds:
                break  # it is slower than it was when it was probed
            for stage in design.round(pace, seconds / rounds):
                done = min(1.0, (time.perf_counter() - since_s) / seconds)
                progress(f"round {number + 1} of {rounds}: {stage.name}", done)
                outcomes += await _send(targets, stage)
                stages.append(stage.name)
            pace = pace.slower((time.perf_counter() - begun_s) / (seconds / rounds))
    finally:
        for target in targets.values():
            target.close()
    progress("done", 1.0)
    return Asked(since_s=since_s, outcomes=tuple(outcomes), stages=tuple(stages))


async def _send(targets: dict[str, Target], stage: Stage) -> list[Outcome]:
    target = targets[stage.route]
    prepared = [(request, target.prepare(request)) for request in stage.requests]
    begun_s = time.perf_counter()
    if stage.in_turn:
        outcomes = [await target.send(request, data, 0.0) for request, data in prepared]
    else:

        async def one(place: int) -> Outcome:
            request, data = prepared[place]
            await asyncio.sleep(max(0.0, begun_s + request.at_s - time.perf_counter()))
            return await target.send(request, data, 0.0)

        outcomes = list(await asyncio.gather(*map(one, range(len(prepared)))))
    for outcome in outcomes:
        if outcome.ending is not Ending.COMPLETED:
            raise UnavailableError(
                f"a request of the calibration failed ({outcome.failure}: {outcome.message}); what "
                "the server said is beside its recording"
            )
    return outcomes


def _pace(short: Outcome, long: Outcome) -> Pace:
    """Of two prompts of different length, each followed by some decoding."""
    more = max(1, long.prompt_tokens - short.prompt_tokens)
    longer_s = (long.ttft_s or 0.0) - (short.ttft_s or 0.0)
    slope_s = max(longer_s / more, 0.05 * (long.ttft_s or 0.0) / max(1, long.prompt_tokens))
    steps_s = [outcome.tpot_s or 0.0 for outcome in (short, long)]
    return Pace(prompt_token_s=max(slope_s, 1e-7), decode_s=max(min(steps_s), 1e-5))
