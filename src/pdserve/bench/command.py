"""``pdserve bench``: make the load, send it, show what came of it."""

from __future__ import annotations

import argparse
import asyncio
import json
import sys
from contextlib import nullcontext
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from pdserve.bench.arguments import faults_of, options_of
from pdserve.bench.options import OutputOptions, TargetOptions
from pdserve.bench.plan import Load, make_load
from pdserve.bench.plot import write_plots
from pdserve.bench.report import document, print_report, summary_of
from pdserve.bench.run import Result, run_load
from pdserve.bench.scenario import FaultOptions, run_scenario
from pdserve.bench.target import Target
from pdserve.core.errors import ConfigError, why
from pdserve.page import page
from pdserve.workload.outcome import Ending, Outcome
from pdserve.workload.scenario_score import lines_of
from pdserve.workload.summary import latencies_ms

NOTHING_COMPLETED_STATUS = 1
_LOOKS_PER_SECOND = 2.0
"""Drawing the bar costs this process CPU time, which is part of what it reports about itself."""


def run(parsed: argparse.Namespace) -> int:
    """Gives the exit status: 0 if any request completed."""
    target, wanted, output = options_of(parsed)
    faults = faults_of(parsed)
    load = make_load(wanted)
    with _Bar(load, shown=output.progress) as bar:
        model, result, scored = asyncio.run(_send(target, load, bar, faults))
    if output.json is not None:
        whole = document(target, model, wanted, load, result, output)
        if scored is not None:
            whole["scenario"] = scored
        _write(output.json, json.dumps(whole, allow_nan=False))
    if output.json != "-":
        print_report(page(), load, result, summary_of(result, output))
        for line in () if scored is None else lines_of(scored):
            print(line)
    if output.plot is not None:
        _plot(output.plot, result, output)
    completed = any(outcome.ending is Ending.COMPLETED for outcome in result.outcomes)
    return 0 if completed else NOTHING_COMPLETED_STATUS


async def _send(
    options: TargetOptions, load: Load, bar: _Bar, faults: FaultOptions | None
) -> tuple[str, Result, dict[str, Any] | None]:
    target = Target(options)
    try:
        model = await target.ask_for_model()
        if faults is None:
            return model, await run_load(load, target, bar), None
        return model, *await run_scenario(faults, load, target, bar)
    finally:
        target.close()


def _write(place: str, text: str) -> None:
    if place == "-":
        print(text)
        return
    try:
        Path(place).write_text(text + "\n")
    except OSError as error:
        raise ConfigError(f"--json: cannot write {place}: {why(error)}") from error


def _plot(folder: Path, result: Result, output: OutputOptions) -> None:
    completed = [o for o in result.outcomes if o.ending is Ending.COMPLETED]
    bounds = dict(output.slo.bounds_ms) if output.slo is not None else {}
    paths = write_plots(folder, latencies_ms(completed), bounds)
    if output.json != "-":
        for path in paths:
            print(path)


class _Bar:
    """A progress bar on stderr, with what is in flight and what has failed."""

    def __init__(self, load: Load, *, shown: bool) -> None:
        self._num_sent = self._num_ended = self._num_failed = 0
        self._progress = (
            Progress(
                TextColumn("{task.description}"),
                BarColumn(),
                MofNCompleteColumn(),
                TimeElapsedColumn(),
                console=Console(file=sys.stderr),
                refresh_per_second=_LOOKS_PER_SECOND,
                transient=True,
            )
            if shown and sys.stderr.isatty()
            else None
        )
        if self._progress is not None:
            self._task = self._progress.add_task("starting", total=load.num_requests)

    def __enter__(self) -> _Bar:
        (self._progress or nullcontext()).__enter__()
        return self

    def __exit__(self, *_: object) -> None:
        if self._progress is not None:
            self._progress.stop()

    def sent(self) -> None:
        self._num_sent += 1

    def ended(self, outcome: Outcome) -> None:
        self._num_ended += 1
        self._num_failed += outcome.ending is Ending.FAILED
        if self._progress is not None:
            failed = f", {self._num_failed} failed" if self._num_failed else ""
            text = f"{self._num_sent - self._num_ended} in flight{failed}"
            self._progress.update(self._task, completed=self._num_ended, description=text)
