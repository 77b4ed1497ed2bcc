"""A bar on stderr while a run goes on: virtual time, requests, how fast it goes."""

from __future__ import annotations

import sys
import time

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

from pdserve.core.ids import RequestId
from pdserve.sim.observe import Observer

SHOWN_AFTER_S = 1.0
_LOOK_EVERY = 64
"""Requests between two looks at the clock."""


class Bar(Observer):
    """Shown once a run has taken a second, and only to a terminal. ``end_s`` or ``num_requests``:
    how far it will go, if that is known."""

    def __init__(self, *, shown: bool, end_s: float | None, num_requests: int | None) -> None:
        self._shown = shown and sys.stderr.isatty()
        self._end_s, self._num_requests = end_s, num_requests
        self._begun_s = time.perf_counter()
        self._progress: Progress | None = None
        self._num = 0

    def __enter__(self) -> Bar:
        return self

    def __exit__(self, *_: object) -> None:
        if self._progress is not None:
            self._progress.stop()

    def arrived(self, at_s: float, request_id: RequestId, prompt_tokens: int) -> None:
        self._num += 1
        if self._shown and self._num % _LOOK_EVERY == 0:
            self._look(at_s)

    def _look(self, at_s: float) -> None:
        passed_s = time.perf_counter() - self._begun_s
        if passed_s < SHOWN_AFTER_S:
            return
        if self._progress is None:
            self._progress = Progress(
                TextColumn("{task.description}"),
                BarColumn(),
                TimeElapsedColumn(),
                console=Console(file=sys.stderr),
                refresh_per_second=4,
                transient=True,
            )
            self._task = self._progress.add_task("", total=self._num_requests or self._end_s)
            self._progress.start()
        done = self._num if self._num_requests else at_s
        text = f"{at_s:.0f} s, {self._num} requests, {at_s / passed_s:.0f} x real time"
        self._progress.update(self._task, completed=done, description=text)
