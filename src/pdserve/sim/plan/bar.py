"""What the search does, on stderr: which design by how many windows, and simulations so far."""

from __future__ import annotations

import sys
import time

from rich.console import Console
from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

from pdserve.sim.plan.trial import Evaluation, Trial


class SearchBar:
    """Only on a terminal. How far there is to go nobody knows, so it counts what was done."""

    def __init__(self, *, shown: bool) -> None:
        self._begun_s = time.perf_counter()
        self._num = 0
        self._doing = "starting"
        self._progress: Progress | None = None
        if shown and sys.stderr.isatty():
            self._progress = Progress(
                SpinnerColumn(),
                TextColumn("{task.description}"),
                TimeElapsedColumn(),
                console=Console(file=sys.stderr),
                refresh_per_second=4,
                transient=True,
            )
            self._task = self._progress.add_task(self._doing, total=None)

    @property
    def passed_s(self) -> float:
        return time.perf_counter() - self._begun_s

    def __enter__(self) -> SearchBar:
        if self._progress is not None:
            self._progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._progress is not None:
            self._progress.stop()

    def doing(self, what: str) -> None:
        self._doing = what
        self._show("")

    def evaluated(self, trial: Trial, evaluation: Evaluation) -> None:
        self._num += 1
        verdict = "ends" if evaluation.complete else "lost"
        self._show(
            f", {trial.candidate.cluster} at {trial.conditions.rate:.4g}/s {verdict} in "
            f"{evaluation.wall_s:.1f} s"
        )

    def _show(self, latest: str) -> None:
        if self._progress is not None:
            text = f"{self._doing}: {self._num} simulations{latest}"
            self._progress.update(self._task, description=text)
