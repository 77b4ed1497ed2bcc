"""The receiving half of a hand-off, on the worker that decodes.

The life of one: its header waits until blocks can be had (*queued*), the ticket reserves them under
a lease (*granted*), the trailer starts the check of what arrived (*verifying*), and then the batch
machine adopts it. A reservation whose writer has neither finished nor promised to stop is
*quarantined*: its blocks stay out of circulation until the writer says `RevokeAck` or
`HandoffAbort`, or is known dead. Time alone never frees them.
"""

from __future__ import annotations

from pdserve.core.effects import CancelTimer, SetTimer, TransferVerified, VerifyTransfer
from pdserve.core.events import LifeName
from pdserve.core.ids import AttemptId, Epoch, RequestId, WorkerId
from pdserve.core.messages import (
    Accepted,
    AttemptFailed,
    FailureKind,
    HandoffRejected,
    Header,
    Revoke,
    Ticket,
    TicketGranted,
    TicketRefused,
    Trailer,
)
from pdserve.kv.hashing import root_hash
from pdserve.node.batch import BatchMachine
from pdserve.node.cargo import DIGEST_ALGORITHM
from pdserve.node.inbound_state import Inbound, InboundState
from pdserve.node.outbox import Outbox
from pdserve.node.sequence import Sequence
from pdserve.node.settings import WorkerSettings

ASK_TIMER = "ask for room"
_HAS_PLACE = (InboundState.GRANTED, InboundState.VERIFYING)
"""It is to decode here, and has blocks."""


class InboundHandoffs:
    """All hand-offs that arrive at this worker, in order of arrival."""

    def __init__(self, settings: WorkerSettings, batch: BatchMachine) -> None:
        self._settings = settings
        self._layout = settings.layout
        self._batch = batch
        self._pool = batch.tables.pool
        self._handoffs: dict[AttemptId, Inbound] = {}
        self.num_queued = 0
        self.num_leases = 0
        """Tickets that a writer may use now, and what has come by one and is being checked."""
        self.num_blocks_granted = 0
        """By all tickets that ever were: the router has heard of them."""
        self._stuck = (-1, AttemptId(RequestId(""), Epoch(0)))

    @property
    def is_empty(self) -> bool:
        return not self._handoffs

    @property
    def is_stuck(self) -> bool:
        """True if the first one in the queue has found no room, and there has been no change."""
        changes, attempt = self._stuck
        head = self._handoffs.get(attempt) if changes == self._batch.changes else None
        return head is not None and head.state is InboundState.QUEUED

    @property
    def is_settled(self) -> bool:
        """True if nobody waits, or whoever waits will go on waiting until there is a change."""
        return not self.num_queued or self.is_stuck or self._settings.ask_again_s > 0

    def handoffs(self) -> list[Inbound]:
        """All of them, for invariant checks."""
        return list(self._handoffs.values())

    # --- forward ------------------------------------------------------------------------------

    def opened(
        self, header: Header, peer: WorkerId, peer_epoch: Epoch, draining: bool, out: Outbox
    ) -> None:
        if header.attempt in self._handoffs:
            return
        why_not = self._refusal(header, draining)
        if why_not is not None:
            out.send(peer, TicketRefused(attempt=header.attempt, detail=why_not))
            return
        self._handoffs[header.attempt] = Inbound(header, peer, peer_epoch)
        self.num_queued += 1

    def grant_waiting(self, out: Outbox) -> None:
        """Tickets for those who wait, first come first served, as far as blocks go. A prefix that
        is only to be had here too does not wait: nobody shall for its sake. Who found no room is
        not tried again until there has been a change."""
        if not self.num_queued or self.is_stuck:
            return
        if self._settings.ask_again_s:
            self._let_ask(out)
            return
        for handoff in list(self._handoffs.values()):
            if handoff.state is not InboundState.QUEUED or self._grant(handoff, out):
                continue
            attempt = handoff.header.attempt
            if handoff.header.choices:
                self._stuck = (self._batch.changes, attempt)
                break
            self._forget(handoff)
            out.send(handoff.peer, TicketRefused(attempt=attempt, detail="no room for a prefix"))

    def renewed(self, attempt: AttemptId, peer: WorkerId, epoch: Epoch, out: Outbox) -> None:
        handoff = self._from_peer(attempt, peer, epoch)
        if handoff is not None and handoff.state is InboundState.GRANTED:
            out.set_timer(_lease_timer(attempt), self._settings.lease_s)

    def trailer(self, trailer: Trailer, peer: WorkerId, epoch: Epoch, out: Outbox) -> None:
        """The writer has finished: check what arrived."""
        handoff = self._from_peer(trailer.attempt, peer, epoch)
        if handoff is None:
            return
        if handoff.state is InboundState.QUARANTINED:
            self._drop(handoff, out)
            return
        if handoff.state is not InboundState.GRANTED:
            return
        out.add(CancelTimer(_lease_timer(trailer.attempt)))
        handoff.trailer = trailer
        wrong = self._wrong_trailer(handoff, trailer)
        if wrong is not None:
            self._reject(handoff, wrong, out)
        elif not handoff.fresh:
            self._accept(handoff, out)
        else:
            self._put(handoff, InboundState.VERIFYING)
            out.add(
                VerifyTransfer(
                    attempt=trailer.attempt,
                    first_block=len(handoff.pinned),
                    block_ids=tuple(handoff.fresh),
                    chunks=trailer.chunks,
                )
            )

    def verified(self, event: TransferVerified, out: Outbox) -> None:
        handoff = self._handoffs.get(event.attempt)
        if handoff is None or handoff.state is not InboundState.VERIFYING:
            return
        if handoff.doomed:
            self._drop(handoff, out)
        elif event.detail is not None:
            self._reject(handoff, event.detail, out)
        else:
            self._accept(handoff, out)

    # --- backward -----------------------------------------------------------------------------

    def abort(self, attempt: AttemptId, out: Outbox) -> bool:
        """The router wants no more of the attempt. False if it is not being handed over."""
        handoff = self._handoffs.get(attempt)
        if handoff is None:
            return False
        self._end(handoff, out)
        return True

    def writer_done(self, attempt: AttemptId, peer: WorkerId, epoch: Epoch, out: Outbox) -> bool:
        """`HandoffAbort` or `RevokeAck`: no write will follow. False if it was adopted or never
        known."""
        handoff = self._from_peer(attempt, peer, epoch)
        if handoff is None:
            return False
        if handoff.state is InboundState.VERIFYING:
            handoff.doomed = True
        else:
            self._drop(handoff, out)
        return True

    def peer_gone(self, peer: WorkerId, epoch: Epoch, out: Outbox) -> None:
        """The writer is known dead: nothing will be written, and nothing more will be said."""
        for handoff in list(self._handoffs.values()):
            if handoff.peer == peer and handoff.peer_epoch <= epoch:
                if handoff.state is InboundState.VERIFYING:
                    handoff.doomed = True
                else:
                    self._drop(handoff, out)

    def peer_lost(self, peer: WorkerId, epoch: Epoch, out: Outbox) -> None:
        """The link closed; the writer may live and write. What was verified or is, goes on."""
        for handoff in list(self._handoffs.values()):
            if (handoff.peer, handoff.peer_epoch) != (peer, epoch):
                continue
            if handoff.state in (InboundState.QUEUED, InboundState.GRANTED):
                self._fail(handoff, f"lost the link to {peer}", out)

    def peer_up(self, peer: WorkerId, epoch: Epoch, out: Outbox) -> None:
        """The link is back: ask again for the blocks that are still in quarantine. A later process
        of the peer cannot answer for the one that was to write."""
        for attempt, handoff in self._handoffs.items():
            is_writer = (handoff.peer, handoff.peer_epoch) == (peer, epoch)
            if is_writer and handoff.state is InboundState.QUARANTINED:
                out.send(peer, Revoke(attempt))

    def timer_fired(self, timer: str, out: Outbox) -> bool:
        """True if the timer was one of these hand-offs'."""
        if timer == ASK_TIMER:
            return True  # what follows every input follows
        for attempt, handoff in self._handoffs.items():
            if timer == _lease_timer(attempt):
                if handoff.state is InboundState.GRANTED:
                    self._fail(handoff, f"the lease of {self._settings.lease_s:g} s ran out", out)
                return True
        return False

    # --- inside -------------------------------------------------------------------------------

    def _let_ask(self, out: Outbox) -> None:
        """Whoever is to ask for room now, and finds none, asks again later."""
        for handoff in list(self._handoffs.values()):
            waits = handoff.state is InboundState.QUEUED and handoff.asks_at_s <= out.now
            if waits and not self._grant(handoff, out):
                handoff.asks_at_s = out.now + self._settings.ask_again_s
        asks = [h.asks_at_s for h in self._handoffs.values() if h.state is InboundState.QUEUED]
        if asks:
            out.add(SetTimer(ASK_TIMER, min(asks)))

    def _from_peer(self, attempt: AttemptId, peer: WorkerId, epoch: Epoch) -> Inbound | None:
        """The hand-off, if this very process is its writer."""
        handoff = self._handoffs.get(attempt)
        if handoff is None or (handoff.peer, handoff.peer_epoch) != (peer, epoch):
            return None
        return handoff

    def _refusal(self, header: Header, draining: bool) -> str | None:
        if draining:
            return "draining"
        if header.opaque:
            return "the payload is of another kind of engine"
        if header.digest_algorithm != DIGEST_ALGORITHM:
            return f"digest {header.digest_algorithm} is unknown here"
        mismatch = self._layout.mismatch(header.layout)
        if mismatch is not None:
            return f"other KV layout: {mismatch}"
        if self._num_needed(header) > self._settings.num_blocks:
            return f"needs {self._num_needed(header)} blocks, more than there are"
        return None

    def _num_needed(self, header: Header) -> int:
        """Blocks for all tokens and for each further choice's copy of the last one."""
        further = max(0, len(header.choices) - 1)
        num_tokens = len(header.token_ids) + self._batch.reserves
        return self._layout.num_blocks_for(num_tokens) + further

    def _grant(self, handoff: Inbound, out: Outbox) -> bool:
        header = handoff.header
        pinned = self._pool.match(header.block_hashes)
        taken = self._num_needed(header) - self._pool.num_shared(pinned)
        if taken > self._batch.spare_blocks:
            return False
        self._batch.let_past()
        self._pool.acquire(pinned)
        num_blocks = self._layout.num_blocks_for(len(header.token_ids))
        handoff.pinned = pinned
        handoff.fresh = self._pool.allocate(num_blocks - len(pinned))
        if self._batch.reserves:
            with_first = self._layout.num_blocks_for(len(header.token_ids) + 1)
            handoff.spare = self._pool.allocate(with_first - num_blocks)
        self._put(handoff, InboundState.GRANTED)
        out.send(
            handoff.peer,
            Ticket(
                attempt=header.attempt,
                first_block=len(pinned),
                block_ids=tuple(handoff.fresh),
                lease_s=self._settings.lease_s,
            ),
        )
        if header.choices:
            self.num_blocks_granted += taken
            out.tell_router(TicketGranted(attempt=header.attempt, num_blocks=taken))
        out.set_timer(_lease_timer(header.attempt), self._settings.lease_s)
        return True

    def _wrong_trailer(self, handoff: Inbound, trailer: Trailer) -> str | None:
        if {delta.choice for delta in trailer.tokens} - set(handoff.header.choices):
            return "the trailer speaks of choices that the header does not have"
        first = len(handoff.pinned)
        end = first + len(handoff.fresh)
        for chunk in trailer.chunks:
            if chunk.first_block != first or len(chunk.layers) != self._layout.num_layers:
                return "the digests do not cover the blocks that were to come"
            first += chunk.num_blocks
        return None if first == end else "the digests do not cover the blocks that were to come"

    def _accept(self, handoff: Inbound, out: Outbox) -> None:
        header, trailer = handoff.header, handoff.trailer
        assert trailer is not None
        self._forget(handoff)
        same_class = header.layout.numerics == self._layout.numerics
        parent = Sequence(
            attempt=header.attempt,
            choices=header.choices,
            params=header.params,
            given=header.token_ids,
            num_prompt_tokens=header.num_prompt_tokens,
            root=root_hash(self._layout, header.cache_salt),
            arrival=0,
            extends_hashes=same_class,
            num_computed=len(header.token_ids),
            num_published=len(handoff.pinned),
            block_ids=handoff.pinned + handoff.fresh + handoff.spare,
            hashes=list(header.block_hashes),
            number=header.number,
            answer_tokens=header.answer_tokens or header.params.max_tokens,
            reserved_tokens=len(header.token_ids) + 1 if self._batch.reserves else 0,
        )
        out.send(handoff.peer, Accepted(header.attempt))
        self._batch.adopt(parent, trailer.tokens)
        if header.choices:
            out.tell_router(Accepted(header.attempt, trailer.tokens))
            out.log(LifeName.DECODE_QUEUED, header.attempt)

    def _reject(self, handoff: Inbound, detail: str, out: Outbox) -> None:
        attempt = handoff.header.attempt
        out.send(handoff.peer, HandoffRejected(attempt=attempt, detail=detail))
        self._drop(handoff, out)

    def _fail(self, handoff: Inbound, detail: str, out: Outbox) -> None:
        """The writer is not to be waited for: the router resumes the attempt elsewhere."""
        attempt = handoff.header.attempt
        out.tell_router(AttemptFailed(attempt=attempt, kind=FailureKind.HANDOFF, detail=detail))
        self._end(handoff, out)

    def _end(self, handoff: Inbound, out: Outbox) -> None:
        """It ends from this side: blocks that the writer may still write are quarantined."""
        if handoff.state is InboundState.QUEUED:
            self._drop(handoff, out)
        elif handoff.state is InboundState.VERIFYING:
            handoff.doomed = True
        elif handoff.state is InboundState.GRANTED:
            out.add(CancelTimer(_lease_timer(handoff.header.attempt)))
            self._pool.release(handoff.pinned + handoff.spare)
            self._pool.quarantine(handoff.fresh)
            handoff.pinned, handoff.spare = [], []
            self._put(handoff, InboundState.QUARANTINED)
            out.send(handoff.peer, Revoke(handoff.header.attempt))

    def _drop(self, handoff: Inbound, out: Outbox) -> None:
        """Forget it. Nobody writes or reads its blocks any more."""
        self._forget(handoff)
        if handoff.state is InboundState.QUARANTINED:
            self._pool.release_quarantine(handoff.fresh)
        else:
            out.add(CancelTimer(_lease_timer(handoff.header.attempt)))
            self._pool.release(handoff.pinned + handoff.fresh + handoff.spare)

    def _put(self, handoff: Inbound, state: InboundState) -> None:
        """It is in this state from now on."""
        self._uncount(handoff)
        handoff.state = state
        if state in _HAS_PLACE:
            self.num_leases += 1

    def _forget(self, handoff: Inbound) -> None:
        del self._handoffs[handoff.header.attempt]
        self._uncount(handoff)

    def _uncount(self, handoff: Inbound) -> None:
        if handoff.state is InboundState.QUEUED:
            self.num_queued -= 1
        elif handoff.state in _HAS_PLACE:
            self.num_leases -= 1


def _lease_timer(attempt: AttemptId) -> str:
    return f"lease {attempt}"
