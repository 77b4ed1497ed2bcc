"""The router's watch over its workers: who is silent, and whose step takes far too long.

Every so often each live worker is looked at, three times in the time after which one is silent:
every half second. One that has missed a few heartbeats gets no new
work until it is heard again. One that hangs is killed once; its death then comes back as
`WorkerLost`, like any other.
"""

from __future__ import annotations

from pdserve.core.effects import KillWorker
from pdserve.node.books import ClusterBooks, WorkerBook
from pdserve.node.outbox import Outbox
from pdserve.node.settings import RouterSettings

WATCH_TIMER = "watch"
LOOKS_UNTIL_SILENT = 3


class Watch:
    def __init__(self, books: ClusterBooks, settings: RouterSettings) -> None:
        self._books = books
        self._settings = settings
        self._interval_s = settings.silent_after_s / LOOKS_UNTIL_SILENT
        self._looked_at_s = 0.0

    def start(self, out: Outbox) -> None:
        self._looked_at_s = out.now
        out.set_timer(WATCH_TIMER, self._interval_s)

    def look(self, out: Outbox) -> None:
        """Kill workers that are silent, or whose step takes far longer than it should."""
        late_s = out.now - self._looked_at_s - self._interval_s
        self.start(out)
        for worker, book in sorted(self._books.workers.items()):
            if late_s > self._interval_s:  # this process slept: their reports wait in its sockets
                book.heard_at_s = out.now
            silent = out.now - book.heard_at_s > self._settings.silent_after_s
            if silent is not book.silent:
                book.set_silent(silent)
            detail = self._wrong_with(book, out.now)
            if detail is not None and not book.killed:
                book.set_killed()
                out.add(KillWorker(worker, book.up.epoch, detail))

    def _wrong_with(self, book: WorkerBook, now: float) -> str | None:
        silent_s = now - book.heard_at_s
        if silent_s > self._settings.report_timeout_s:
            return f"silent for {silent_s:.1f} s"
        if book.report is not None and book.report.step_age_s > 0:
            age_s = book.report.step_age_s + silent_s
            if age_s > max(self._settings.step_timeout_s, 10 * book.report.step_expected_s):
                return f"a step has taken {age_s:.1f} s"
        return None
