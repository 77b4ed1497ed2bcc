"""What came of one request, as its client saw it. The raw material of every figure."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum


class Ending(StrEnum):
    COMPLETED = "completed"
    CANCELLED = "cancelled"
    """The client left on purpose, as the workload says."""
    FAILED = "failed"


class CountedBy(StrEnum):
    """Where the number of output tokens comes from, best first."""

    USAGE = "usage"
    TOKEN_IDS = "token_ids"
    CHUNKS = "chunks"
    """One per chunk: too few if the server puts several tokens into one."""


def time_per_token_s(
    first_s: float | None, last_s: float | None, output_tokens: int
) -> float | None:
    """From the times of an answer's first and last token; see `Outcome.tpot_s`."""
    if first_s is None or last_s is None or output_tokens < 2:
        return None
    return (last_s - first_s) / (output_tokens - 1)


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """Times are seconds on one clock, from the start of the run.

    ``due_s`` is when the workload wanted the request sent, ``sent_s`` when it was. ``first_s`` and
    ``last_s`` are the times of the first and the last chunk with output (None: there was none), and
    ``gaps_s`` are the times between them, one less than there were chunks. ``failure`` says what
    went wrong, as a word that can be counted (``429``, ``timeout``, ``disconnected`` ...);
    ``message`` says it in the server's words. ``response_id`` is what
    the server calls the answer. ``ended_s``: when its end was known, whatever it was.
    ``asked_tokens``: how long an answer that cannot stop by itself should be. ``digest``: of its
    tokens, if it was to be kept.
    """

    index: int
    response_id: str = ""
    due_s: float
    sent_s: float
    ending: Ending
    first_s: float | None = None
    last_s: float | None = None
    gaps_s: tuple[float, ...] = ()
    prompt_tokens: int = 0
    cached_tokens: int = 0
    output_tokens: int = 0
    counted_by: CountedBy = CountedBy.USAGE
    finish_reason: str | None = None
    ended_s: float | None = None
    asked_tokens: int | None = None
    digest: str = ""
    failure: str | None = None
    message: str = ""

    @property
    def ttft_s(self) -> float | None:
        """Time to first token: from sending to the first chunk with output."""
        return None if self.first_s is None else self.first_s - self.sent_s

    @property
    def e2e_s(self) -> float | None:
        """From sending to the last chunk with output."""
        return None if self.last_s is None else self.last_s - self.sent_s

    @property
    def tpot_s(self) -> float | None:
        """Time per output token after the first: (E2E - TTFT) / (output tokens - 1).

        None for an answer of one token, which has no such time.
        """
        return time_per_token_s(self.first_s, self.last_s, self.output_tokens)

    @property
    def lag_s(self) -> float:
        """How late the request was sent."""
        return max(0.0, self.sent_s - self.due_s)
