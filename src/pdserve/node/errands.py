"""What a hand-off is for: what the router hears of it, and what becomes of the sequence.

Most hand-offs carry an attempt from its prefill to its decode worker. Two others carry KV that is
finished when they begin: a running choice that moves to another decode worker, and a cached prefix
that another worker is to have too. `OutboundHandoffs` treats them alike and asks the errand where
they differ.
"""

from __future__ import annotations

from abc import ABC, abstractmethod

from pdserve.core.ids import AttemptId
from pdserve.core.messages import (
    AttemptFailed,
    FailureKind,
    MoveFailed,
    PrefixSent,
    TokenDelta,
    Tokens,
)
from pdserve.node.batch import BatchMachine
from pdserve.node.outbox import Outbox
from pdserve.node.sequence import Sequence


class Errand(ABC):
    """``is_attempt``: its moments belong into the life of a request."""

    is_attempt = True

    def __init__(self, attempt: AttemptId) -> None:
        self.attempt = attempt

    @abstractmethod
    def drawn(self, deltas: tuple[TokenDelta, ...], out: Outbox) -> None:
        """The next tokens are known, and the receiver has granted its ticket."""

    @abstractmethod
    def accepted(self, out: Outbox) -> None:
        """The receiver has it."""

    @abstractmethod
    def failed(self, kind: FailureKind, detail: str, out: Outbox, *, undecided: bool) -> bool:
        """It cannot go on. True if the sequence goes on here once no write can follow.

        ``undecided``: the trailer is sent, so the receiver may have accepted.
        """

    @abstractmethod
    def kept(self, out: Outbox) -> None:
        """No write can follow, and the sequence is to go on here."""


class JobErrand(Errand):
    """An attempt on its way from prefill to decode."""

    def drawn(self, deltas: tuple[TokenDelta, ...], out: Outbox) -> None:
        out.tell_router(Tokens(deltas))

    def accepted(self, out: Outbox) -> None:
        """The receiver says so to the router itself."""

    def failed(self, kind: FailureKind, detail: str, out: Outbox, *, undecided: bool) -> bool:
        out.tell_router(AttemptFailed(attempt=self.attempt, kind=kind, detail=detail))
        return False

    def kept(self, out: Outbox) -> None:
        """It has never left its queue."""


class LateErrand(JobErrand):
    """An attempt whose hand-off begins when its prefill is done."""

    def drawn(self, deltas: tuple[TokenDelta, ...], out: Outbox) -> None:
        """The router has had them."""


class MoveErrand(Errand):
    """A running choice on its way to another decode worker."""

    def __init__(self, attempt: AttemptId, batch: BatchMachine, sequence: Sequence) -> None:
        super().__init__(attempt)
        self._batch = batch
        self._sequence = sequence

    def drawn(self, deltas: tuple[TokenDelta, ...], out: Outbox) -> None:
        """The router has had them."""

    def accepted(self, out: Outbox) -> None:
        """The receiver says so to the router itself."""

    def failed(self, kind: FailureKind, detail: str, out: Outbox, *, undecided: bool) -> bool:
        if undecided:
            out.tell_router(AttemptFailed(attempt=self.attempt, kind=kind, detail=detail))
        else:
            out.tell_router(MoveFailed(attempt=self.attempt, detail=detail))
        return not undecided

    def kept(self, out: Outbox) -> None:
        self._batch.go_on(self._sequence)


class PrefixErrand(Errand):
    """A cached prefix that another worker is to have too."""

    is_attempt = False

    def __init__(self, attempt: AttemptId, num_blocks: int) -> None:
        super().__init__(attempt)
        self._num_blocks = num_blocks

    def drawn(self, deltas: tuple[TokenDelta, ...], out: Outbox) -> None:
        """There are none."""

    def accepted(self, out: Outbox) -> None:
        out.tell_router(PrefixSent(attempt=self.attempt, num_blocks=self._num_blocks))

    def failed(self, kind: FailureKind, detail: str, out: Outbox, *, undecided: bool) -> bool:
        out.tell_router(PrefixSent(attempt=self.attempt, num_blocks=0))
        return False

    def kept(self, out: Outbox) -> None:
        """Nothing was going on."""
