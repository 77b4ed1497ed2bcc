"""Progress bars for what takes more than a moment: download, conversion, digest.

Whoever does the work calls a `Report` with bytes done; whether anybody sees it is decided once, at
the outermost call, by `progress_bar`. Bars go to stderr: stdout belongs to ``--json``.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

Report = Callable[[str, int, int], None]
"""``report(what, done_bytes, total_bytes)``; ``total_bytes`` 0 means that nobody knows."""


def silent(what: str, done_bytes: int, total_bytes: int) -> None:
    """A `Report` that shows nothing."""


@contextmanager
def progress_bar(show: bool | None = None) -> Iterator[Report]:
    """One bar per kind of work on stderr. ``show`` None: only if stderr is a terminal."""
    if not (sys.stderr.isatty() if show is None else show):
        yield silent
        return
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        DownloadColumn(binary_units=True),
        TimeRemainingColumn(),
    )
    tasks: dict[str, int] = {}
    with Progress(*columns, console=Console(stderr=True)) as bars:

        def report(what: str, done_bytes: int, total_bytes: int) -> None:
            total = total_bytes or None
            if what not in tasks:
                tasks[what] = bars.add_task(what, total=total)
            bars.update(tasks[what], completed=done_bytes, total=total)  # type: ignore[arg-type]

        yield report
