"""Prefixes that are fetched from another worker's cache before a prompt is computed.

A route may name a worker that has more of the prompt cached than the one that is to compute it.
Then the router asks the former to send what it has (`SendPrefix`) and holds the job back until it
has (`PrefixSent`), or cannot any more, or has taken too long. After that the job starts as if
nothing had been: whatever is not there is computed, so a fetch that fails costs only time.

A job that is held back counts in the books of its worker, which has not heard of it. It may end
meanwhile like any other attempt; the fetch goes on, for the prefix is wanted often, or would not be
worth a fetch.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from pdserve.core.effects import CancelTimer
from pdserve.core.events import LifeName
from pdserve.core.ids import AttemptId, BlockHash, Epoch, RequestId, WorkerId
from pdserve.core.messages import AbortAttempt, PrefixSent, SendPrefix, StartJob
from pdserve.core.request import Job
from pdserve.node.books import ClusterBooks
from pdserve.node.lives import Attempt, Life
from pdserve.node.outbox import Outbox
from pdserve.node.prefixes import Prefixes

FETCH_TIMEOUT_S = 4.0
"""A prefix that takes longer is better computed, or its holder does not answer."""
MAX_FETCHES = 4
"""Fetches that leave one worker, or reach one, at a time: links that more share are slow."""


@dataclass(slots=True)
class Fetch:
    """One prefix on its way. ``waiting``: the attempts that are held back for it, each with the
    tokens that are to be computed if it does not come."""

    fetch_id: AttemptId
    source: WorkerId
    to: WorkerId
    hashes: Sequence[BlockHash]
    num_tokens: int = 0
    waiting: dict[AttemptId, tuple[Life, Attempt, int]] = field(default_factory=dict)

    def covers(self, to: WorkerId, hashes: Sequence[BlockHash]) -> bool:
        """True if it brings all of these blocks to that worker."""
        last = len(hashes) - 1
        return to == self.to and len(self.hashes) > last and self.hashes[last] == hashes[last]


class Fetches:
    """Fetches under way, and the start of every job. Owned by the router's dispatch."""

    def __init__(self, books: ClusterBooks, prefixes: Prefixes) -> None:
        self._books = books
        self._prefixes = prefixes
        self._num_fetches = 0
        self._open: dict[AttemptId, Fetch] = {}
        self._held: dict[AttemptId, Fetch] = {}

    def __len__(self) -> int:
        """Fetches under way."""
        return len(self._open)

    @property
    def num_held(self) -> int:
        """Jobs that are held back."""
        return len(self._held)

    def start(
        self, life: Life, attempt: Attempt, num_new: int, source: WorkerId | None, out: Outbox
    ) -> None:
        """Send a job to its prefill worker, at once or when the prefix has come from ``source``.

        ``num_new``: tokens that the worker has not cached."""
        fetch = None if source is None else self._fetch(life, attempt, source, out)
        if fetch is None:
            self._send(life, attempt, num_new, out)
            return
        job = attempt.job
        book = self._books.workers[fetch.to]
        book.hold_job(job.attempt, _left(job, fetch, num_new))
        fetch.waiting[job.attempt] = (life, attempt, num_new)
        self._held[job.attempt] = fetch

    def forget(self, attempt: Attempt) -> None:
        """The attempt is over, whether its job was held back or not."""
        if not self._held:
            return
        fetch = self._held.pop(attempt.job.attempt, None)
        if fetch is not None:
            del fetch.waiting[attempt.job.attempt]
            book = self._books.workers.get(fetch.to)
            if book is not None:
                book.let_job_go(attempt.job.attempt)

    def sent(self, sender: WorkerId, message: PrefixSent, out: Outbox) -> None:
        """The holder says what has come of it."""
        fetch = self._open.get(message.attempt)
        if fetch is not None and fetch.source == sender:
            outcome = "sent" if message.num_blocks else "failed"
            self._end(fetch, outcome, out, message.num_blocks)

    def worker_lost(self, worker: WorkerId, out: Outbox) -> None:
        """After the attempts that the worker owned have ended."""
        for fetch in list(self._open.values()):
            if worker in (fetch.source, fetch.to):
                self._end(fetch, "lost", out)

    def timer_fired(self, timer: str, out: Outbox) -> bool:
        """True if the timer was a fetch's."""
        for fetch in self._open.values():
            if timer == _timer(fetch):
                out.send(fetch.source, AbortAttempt(fetch.fetch_id))
                self._end(fetch, "late", out)
                return True
        return False

    # --- inside -------------------------------------------------------------------------------

    def _fetch(self, life: Life, attempt: Attempt, source: WorkerId, out: Outbox) -> Fetch | None:
        """A fetch to wait for: one that is under way, or a new one; None if it makes no sense."""
        job = attempt.job
        to = job.prefill_worker
        hashes = self._prefixes.fetchable(life, job.choices[0], source, to)
        if not hashes or source == to:
            return None
        for fetch in self._open.values():
            if fetch.covers(to, hashes):
                return fetch
        for end in (source, to):
            if sum(end in (fetch.source, fetch.to) for fetch in self._open.values()) >= MAX_FETCHES:
                return None
        self._num_fetches += 1
        fetch_id = AttemptId(RequestId(f"fetch {self._num_fetches}"), Epoch(0))
        fetch = self._open[fetch_id] = Fetch(fetch_id, source, to, hashes)
        fetch.num_tokens = len(hashes) * self._books.workers[to].block_size
        out.send(
            source,
            SendPrefix(
                attempt=fetch_id,
                to=to,
                token_ids=job.token_ids[: fetch.num_tokens],
                cache_salt=job.cache_salt,
            ),
        )
        out.set_timer(_timer(fetch), FETCH_TIMEOUT_S)
        return fetch

    def _end(self, fetch: Fetch, outcome: str, out: Outbox, num_blocks: int = 0) -> None:
        """Nothing more is to be expected of it: start what was held back."""
        del self._open[fetch.fetch_id]
        out.add(CancelTimer(_timer(fetch)))
        for life, attempt, num_new in list(fetch.waiting.values()):
            self.forget(attempt)
            out.log(
                LifeName.PREFIX_FETCHED,
                attempt.job.attempt,
                source=fetch.source,
                outcome=outcome,
                blocks=num_blocks,
            )
            if num_blocks:
                num_new = _left(attempt.job, fetch, num_new)
            self._send(life, attempt, num_new, out)

    def _send(self, life: Life, attempt: Attempt, num_new: int, out: Outbox) -> None:
        """The choices that are wanted still."""
        job = attempt.job
        book = self._books.workers[job.prefill_worker]
        attempt.job = job.sent(life.live_choices(job.epoch), book.debit_job(num_new))
        out.send(job.prefill_worker, StartJob(attempt.job))


def _left(job: Job, fetch: Fetch, num_new: int) -> int:
    """Tokens that are to be computed once the prefix has come; it may be longer than this prompt,
    whose last token is computed in any case."""
    return max(1, min(num_new, len(job.token_ids) - fetch.num_tokens))


def _timer(fetch: Fetch) -> str:
    return str(fetch.fetch_id)
