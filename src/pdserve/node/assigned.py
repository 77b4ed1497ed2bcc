"""What the router has given each worker to do, by its own count.

Reports say what a worker holds, as of when they were sent. This is what it was given and has not
finished, as the router knows it from tokens and hand-offs: exact at any moment, though it cannot
tell what of a prompt is computed. An attempt's prompt counts on its prefill worker until its first
token has come; the attempt counts on its decode worker until it ends. Its KV counts on both: on the
prefill worker until the hand-off is accepted, with room for the first token; on the decode worker
from the start, with as much of the answer as the route reserves.
"""

from __future__ import annotations

from dataclasses import dataclass

from pdserve.core.ids import AttemptId
from pdserve.core.request import Job
from pdserve.node.books import WorkerBook


@dataclass(slots=True)
class _Given:
    prefill: WorkerBook
    decode: WorkerBook
    prompt_tokens: int
    kv_tokens: int
    prefilled: bool = False
    handed_over: bool = False


class Assignments:
    """By attempt. Owned by the router."""

    def __init__(self) -> None:
        self._given: dict[AttemptId, _Given] = {}

    def begin(self, job: Job, prefill: WorkerBook, decode: WorkerBook) -> None:
        tokens = len(job.token_ids)
        kv_tokens = (tokens + max(1, job.answer_tokens)) * len(job.choices)
        given = _Given(prefill, decode, tokens, kv_tokens)
        self._given[job.attempt] = given
        is_local = prefill is decode
        prefill.assign(tokens, 0, int(is_local), 0 if is_local else tokens + 1)
        decode.assign(0, 1, 0, kv_tokens)

    def prefilled(self, attempt: AttemptId) -> None:
        """Its first token has come."""
        given = self._given.get(attempt)
        if given is not None and not given.prefilled:
            given.prefilled = True
            given.prefill.assign(-given.prompt_tokens, 0, -int(given.prefill is given.decode), 0)

    def accepted(self, attempt: AttemptId, book: WorkerBook) -> None:
        """A worker has it by a hand-off; after the first one it has moved there."""
        given = self._given.get(attempt)
        if given is None:
            return
        if not given.handed_over and given.prefill is not given.decode:
            given.handed_over = True
            given.prefill.assign(0, 0, 0, -given.prompt_tokens - 1)
        if book is not given.decode:
            self.prefilled(attempt)
            given.decode.assign(0, -1, 0, -given.kv_tokens)
            book.assign(0, 1, 0, given.kv_tokens)
            given.prefill, given.decode, given.handed_over = book, book, True

    def end(self, attempt: AttemptId) -> None:
        """It works on nothing any more."""
        given = self._given.get(attempt)
        if given is None:
            return
        self.prefilled(attempt)
        if not given.handed_over and given.prefill is not given.decode:
            given.prefill.assign(0, 0, 0, -given.prompt_tokens - 1)
        given.decode.assign(0, -1, 0, -given.kv_tokens)
        del self._given[attempt]
