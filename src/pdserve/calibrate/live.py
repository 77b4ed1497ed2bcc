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
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from pdserve.bench.options import TargetOptions
from pdserve.bench.target import Target
from pdserve.calibrate.design import LOAD, Design, Pace, Stage
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
    """What was sent in some ``spans`` of time (begin, end), and what came of it; times are on the
    machine's monotonic clock. What a recording has of other times is no part of the calibration.
    ``stages``: each one's name and span."""

    spans: tuple[tuple[float, float], ...] = ()
    outcomes: tuple[Outcome, ...] = ()
    stages: tuple[tuple[str, float, float], ...] = ()

    def holds(self, at_s: float) -> bool:
        """Whether this was in one of the spans."""
        return self.round_of(at_s) is not None

    def round_of(self, at_s: float) -> int | None:
        """In which span this was, counted from 0."""
        for place, (begun_s, ended_s) in enumerate(self.spans):
            if begun_s <= at_s <= ended_s:
                return place
        return None

    def is_usual(self, at_s: float) -> bool:
        """Whether the server had a load as its clients send it, at that time."""
        return any(
            begun_s <= at_s <= ended_s for name, begun_s, ended_s in self.stages if name == LOAD
        )

    def plus(self, other: Asked) -> Asked:
        """Both."""
        return Asked(
            spans=self.spans + other.spans,
            outcomes=self.outcomes + other.outcomes,
            stages=self.stages + other.stages,
        )

    @property
    def seconds(self) -> float:
        """Of all spans."""
        return sum(ended_s - begun_s for begun_s, ended_s in self.spans)


class Asker:
    """Asks one server the rounds of a design, each when it is told to; other loads may come in
    between. Before the first one it finds out how fast the server is."""

    def __init__(self, url: str, design: Design, *, vocab_size: int) -> None:
        self._url = url
        self._design = design
        self._vocab_size = vocab_size
        self._pace: Pace | None = None
        self._longer = 1.0  # than planned: rounds that are have less to do the next time

    async def round(self, budget_s: float, told: Callable[[str], None]) -> Asked:
        """Send one round, of about so many seconds; ``told`` of each stage before it begins. The
        probes are not in what is returned. Raises `UnavailableError` if requests fail."""
        async with _targets(self._url, self._vocab_size) as targets:
            if self._pace is None:
                told("probing")
                probed = [(await _send(targets, stage))[0] for stage in self._design.probes()]
                self._pace = _pace(probed[1], probed[2])
            outcomes: list[Outcome] = []
            stages: list[tuple[str, float, float]] = []
            begun_s = time.perf_counter()
            for stage in self._design.round(self._pace, budget_s / self._longer):
                told(stage.name)
                stage_s = time.perf_counter()
                outcomes += await _send(targets, stage)
                stages.append((stage.name, stage_s, time.perf_counter()))
            ended_s = time.perf_counter()
        self._longer *= max(1.0, (ended_s - begun_s) / budget_s)
        return Asked(spans=((begun_s, ended_s),), outcomes=tuple(outcomes), stages=tuple(stages))


async def ask(asker: Asker, rounds: int, seconds: float, progress: Progress) -> Asked:
    """So many rounds, of ``seconds`` in all, one after the other."""
    asked = Asked()
    for number in range(rounds):
        if asked.seconds > seconds:
            break  # the server is slower than it was when it was probed
        begun_s = time.perf_counter()

        def told(
            stage: str, number: int = number, before_s: float = asked.seconds - begun_s
        ) -> None:
            done = min(1.0, (before_s + time.perf_counter()) / seconds)
            progress(f"round {number + 1} of {rounds}: {stage}", done)

        asked = asked.plus(await asker.round(seconds / rounds, told))
    progress("done", 1.0)
    return asked


@contextlib.asynccontextmanager
async def _targets(url: str, vocab_size: int) -> AsyncIterator[dict[str, Target]]:
    """One for each route that a stage may ask for."""
    targets: dict[str, Target] = {}
    try:
        for route in ("auto", "split", "local"):
            headers = () if route == "auto" else (("X-Pdserve-Route", route),)
            targets[route] = Target(TargetOptions(url=url, headers=headers, vocab_size=vocab_size))
            await targets[route].ask_for_model()
        yield targets
    finally:
        for target in targets.values():
            target.close()


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
