"""What a hand-off moves, on the worker that sends it.

`OutboundHandoffs` knows the protocol: header, ticket, first tokens, trailer, and every way in which
it can end early. A cargo knows the bytes. The life of one: its `header` is sent, `open` is called,
then `bind` once the peer is ready for the bytes; whoever moves them reports to
`OutboundHandoffs.sent`. `stop` asks for no more of them, which is answered to
`OutboundHandoffs.stopped`; after either end `let_go` gives up what the cargo held.
"""

from __future__ import annotations

from abc import ABC, abstractmethod

from pdserve.core.effects import BindTransfer, OpenTransfer, StopTransfer
from pdserve.core.ids import Epoch
from pdserve.core.messages import Header, Ticket
from pdserve.core.request import Job
from pdserve.node.batch import BatchMachine
from pdserve.node.outbox import Outbox
from pdserve.node.sequence import Sequence
from pdserve.node.settings import WorkerSettings

DIGEST_ALGORITHM = "xxh3_128"


class Cargo(ABC):
    """The bytes of one hand-off. ``is_finished``: they were there before it began, and no step
    follows."""

    is_finished = False

    @abstractmethod
    def header(self) -> Header: ...

    @abstractmethod
    def open(self, out: Outbox) -> None:
        """The header is sent."""

    @abstractmethod
    def bind(self, ticket: Ticket, peer_epoch: Epoch, out: Outbox) -> None:
        """The peer has granted its ticket."""

    @abstractmethod
    def stop(self, out: Outbox, *, keeps: bool) -> None:
        """Move no more; ``keeps``: but go on computing here."""

    @abstractmethod
    def let_go(self, out: Outbox) -> None:
        """The hand-off is over, and nothing goes on here."""


class BlockCargo(Cargo):
    """KV blocks of a sequence, written into the peer's pool."""

    def __init__(
        self,
        settings: WorkerSettings,
        batch: BatchMachine,
        job: Job,
        sequence: Sequence,
        *,
        finished: bool = False,
    ) -> None:
        self.is_finished = finished
        self.sequence = sequence
        self._settings = settings
        self._batch = batch
        self._job = job

    def header(self) -> Header:
        job = self._job
        return Header(
            attempt=job.attempt,
            choices=self.sequence.choices,
            token_ids=job.token_ids,
            num_prompt_tokens=job.num_prompt_tokens,
            params=job.params.without_scores(),
            cache_salt=job.cache_salt,
            trace_context=job.trace_context,
            block_hashes=tuple(self.sequence.hashes),
            layout=self._settings.layout,
            digest_algorithm=DIGEST_ALGORITHM,
            number=job.number,
            answer_tokens=job.answer_tokens,
        )

    def open(self, out: Outbox) -> None:
        job, sequence = self._job, self.sequence
        num_blocks = self._settings.layout.num_blocks_for(len(job.token_ids))
        out.add(
            OpenTransfer(
                attempt=job.attempt,
                peer=job.decode_worker,
                block_ids=tuple(sequence.block_ids[:num_blocks]),
                cached_blocks=num_blocks if self.is_finished else sequence.num_cached_blocks,
                one_shot=len(job.token_ids) < self._settings.one_shot_tokens,
                is_finished=self.is_finished,
            )
        )

    def bind(self, ticket: Ticket, peer_epoch: Epoch, out: Outbox) -> None:
        out.add(BindTransfer(ticket, self._job.decode_worker, peer_epoch))

    def stop(self, out: Outbox, *, keeps: bool) -> None:
        """The sequence runs no further step, unless it is kept; a transfer may still read it."""
        if not keeps:
            self._batch.detach(self.sequence)
        out.add(StopTransfer(self._job.attempt))

    def let_go(self, out: Outbox) -> None:
        self._batch.detach(self.sequence)
        self._batch.let_go(self.sequence)
