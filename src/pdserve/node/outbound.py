"""The sending half of a hand-off, on the worker that prefills.

The life of one: the attempt is next to run, so a `Header` goes out and the transfer is opened
(*open*). The ticket and the end of the prefill come in either order; once both are there, token 0
leaves for the client. When all bytes are written the `Trailer` follows, and `Accepted` ends it. If
anything goes wrong before that, the transfer is stopped first (*stopping*), and only when no write
can follow are the blocks released and the peer told.

What is moved, and how, is the business of a `Cargo`; what for, that of an `Errand`. The sequence's
blocks stay referenced until then. What a failed hand-off has computed is in the prefix cache, so
the resume that the router starts finds it there.
"""

from __future__ import annotations

from dataclasses import dataclass

from pdserve.core.effects import CancelTimer, TransferSent
from pdserve.core.events import LifeName, Scalar
from pdserve.core.ids import AttemptId, Epoch, WorkerId
from pdserve.core.messages import (
    ChunkDigest,
    FailureKind,
    HandoffAbort,
    LeaseRenew,
    RevokeAck,
    Ticket,
    TokenDelta,
    Tokens,
    Trailer,
)
from pdserve.core.request import Job
from pdserve.core.step import TransferSample
from pdserve.node.cargo import BlockCargo, Cargo
from pdserve.node.errands import Errand, JobErrand
from pdserve.node.outbox import Outbox
from pdserve.node.sequence import Sequence
from pdserve.node.settings import WorkerSettings


@dataclass(slots=True)
class Outbound:
    """One hand-off. ``deltas``: the next token of each choice, once prefill is done. ``chunks``:
    digests, once all is written. ``granted_at_s`` and ``prefilled_at_s``: when there was a ticket,
    and when the prefill was done. ``keeps_sequence``: it goes on here after the transfer stops."""

    attempt: AttemptId
    job: Job
    cargo: Cargo
    errand: Errand
    ticket: Ticket | None = None
    deltas: tuple[TokenDelta, ...] | None = None
    chunks: tuple[ChunkDigest, ...] | None = None
    num_bytes: int = 0
    granted_at_s: float = 0.0
    prefilled_at_s: float = 0.0
    first_tokens_sent: bool = False
    trailer_sent: bool = False
    stopping: bool = False
    revoked: bool = False
    tells_peer: bool = True
    keeps_sequence: bool = False
    detail: str = ""


class OutboundHandoffs:
    """All hand-offs that leave this worker."""

    def __init__(self, settings: WorkerSettings) -> None:
        self._settings = settings
        self._open: dict[AttemptId, Outbound] = {}

    def __len__(self) -> int:
        return len(self._open)

    def __contains__(self, attempt: AttemptId) -> bool:
        return attempt in self._open

    def sequences(self) -> list[Sequence]:
        """Sequences whose blocks a hand-off holds."""
        return [
            handoff.cargo.sequence
            for handoff in self._open.values()
            if isinstance(handoff.cargo, BlockCargo) and not handoff.keeps_sequence
        ]

    # --- forward ------------------------------------------------------------------------------

    def open(self, job: Job, cargo: Cargo, out: Outbox, errand: Errand | None = None) -> None:
        """The attempt runs in the next step, or its KV is finished, whatever the errand is."""
        attempt = job.attempt
        handoff = Outbound(attempt, job, cargo, errand or JobErrand(attempt))
        self._open[attempt] = handoff
        out.send(job.decode_worker, cargo.header())
        cargo.open(out)
        _log(handoff, LifeName.HANDOFF_OPENED, out, peer=job.decode_worker)

    def granted(self, ticket: Ticket, peer: WorkerId, peer_epoch: Epoch, out: Outbox) -> None:
        handoff = self._from_peer(ticket.attempt, peer)
        if handoff is None or handoff.stopping or handoff.ticket is not None:
            return
        handoff.ticket = ticket
        handoff.granted_at_s = out.now
        out.add(CancelTimer(_ticket_timer(ticket.attempt)))
        handoff.cargo.bind(ticket, peer_epoch, out)
        out.set_timer(_lease_timer(ticket.attempt), ticket.lease_s / 3)
        blocks, reused = len(ticket.block_ids), ticket.first_block
        _log(handoff, LifeName.HANDOFF_GRANTED, out, blocks=blocks, reused_blocks=reused)
        self._advance(handoff, out)

    def prefilled(self, attempt: AttemptId, deltas: tuple[TokenDelta, ...], out: Outbox) -> None:
        """The last chunk is computed, and the next token of each choice drawn."""
        handoff = self._open.get(attempt)
        if handoff is None or handoff.stopping:
            return
        handoff.deltas = deltas
        handoff.prefilled_at_s = out.now
        is_over = all(delta.finish is not None for delta in deltas)
        if is_over and handoff.errand.is_attempt:
            if deltas:
                out.tell_router(Tokens(deltas))
            self._stop(handoff, "every choice ended with its first token", out)
            return
        if handoff.ticket is None:
            out.set_timer(_ticket_timer(attempt), self._settings.ticket_timeout_s)
        self._advance(handoff, out)

    def sent(self, event: TransferSent, out: Outbox) -> None:
        handoff = self._open.get(event.attempt)
        if handoff is None or handoff.stopping:
            return
        handoff.chunks = event.chunks
        handoff.num_bytes = event.num_bytes
        self._advance(handoff, out)

    def accepted(self, attempt: AttemptId, peer: WorkerId, out: Outbox) -> TransferSample | None:
        """The hand-off is over: how it went, or None if there was none."""
        handoff = self._from_peer(attempt, peer)
        if handoff is None or not handoff.trailer_sent or handoff.stopping:
            return None
        _log(handoff, LifeName.HANDOFF_CLOSED, out, ok=True, bytes=handoff.num_bytes)
        handoff.errand.accepted(out)
        self._forget(handoff, out)
        return self._sample(handoff, out.now)

    def _advance(self, handoff: Outbound, out: Outbox) -> None:
        """Send what is due: token 0 with the ticket, the trailer with the last byte."""
        if handoff.ticket is None or handoff.deltas is None:
            return
        attempt = handoff.attempt
        if not handoff.first_tokens_sent:
            handoff.first_tokens_sent = True
            handoff.errand.drawn(handoff.deltas, out)
        if handoff.chunks is not None and not handoff.trailer_sent:
            handoff.trailer_sent = True
            out.add(CancelTimer(_lease_timer(attempt)))
            trailer = Trailer(attempt=attempt, tokens=handoff.deltas, chunks=handoff.chunks)
            out.send(handoff.job.decode_worker, trailer)

    # --- backward -----------------------------------------------------------------------------

    def fail(
        self,
        attempt: AttemptId,
        kind: FailureKind,
        detail: str,
        out: Outbox,
        *,
        peer: WorkerId | None = None,
        tells_peer: bool = True,
    ) -> None:
        """The hand-off cannot go on: stop it, and give the attempt back to the router."""
        handoff = self._open.get(attempt) if peer is None else self._from_peer(attempt, peer)
        if handoff is None or handoff.stopping:
            return
        undecided = handoff.trailer_sent
        handoff.keeps_sequence = handoff.errand.failed(kind, detail, out, undecided=undecided)
        handoff.tells_peer = tells_peer
        self._stop(handoff, detail, out)

    def peer_lost(self, peer: WorkerId, detail: str, out: Outbox) -> None:
        for attempt, handoff in list(self._open.items()):
            if handoff.job.decode_worker == peer:
                handoff.tells_peer = False
                self.fail(attempt, FailureKind.HANDOFF, detail, out, tells_peer=False)

    def abort(self, attempt: AttemptId, choices: tuple[int, ...] | None, out: Outbox) -> bool:
        """The router wants no more of these choices. False if the attempt is not handed off here.

        Choices that D adopts all the same are dropped when the router hears `Accepted`.
        """
        handoff = self._open.get(attempt)
        if handoff is not None and handoff.cargo.is_finished:
            handoff.keeps_sequence = False  # it is in no queue, so nobody else will let it go
        if handoff is None or handoff.keeps_sequence:
            return False
        left = [c for c in handoff.job.choices if choices is not None and c not in choices]
        if not left and not handoff.stopping:
            self._stop(handoff, "aborted", out)
        return True

    def gives_up(self, sequence: Sequence, detail: str, out: Outbox) -> bool:
        """End the hand-off, and let the sequence go on here; False if it was ending already."""
        handoff = self._open.get(sequence.attempt)
        if handoff is None or handoff.stopping:
            return False
        handoff.keeps_sequence = True
        self._stop(handoff, detail, out)
        return True

    def revoked(self, attempt: AttemptId, peer: WorkerId, out: Outbox) -> None:
        """The decode worker takes the ticket back. Unknown attempts have settled long ago."""
        handoff = self._from_peer(attempt, peer)
        if handoff is None:
            out.send(peer, RevokeAck(attempt))
            return
        handoff.revoked = True
        self.fail(attempt, FailureKind.HANDOFF, "the ticket was revoked", out)

    def stopped(self, attempt: AttemptId, out: Outbox) -> None:
        """No write will follow: tell the peer, release the blocks."""
        handoff = self._open.get(attempt)
        if handoff is None or not handoff.stopping:
            return
        _log(handoff, LifeName.HANDOFF_CLOSED, out, ok=False, detail=handoff.detail)
        if handoff.revoked:
            out.send(handoff.job.decode_worker, RevokeAck(attempt))
        elif handoff.tells_peer:
            detail = handoff.detail
            out.send(handoff.job.decode_worker, HandoffAbort(attempt=attempt, detail=detail))
        self._forget(handoff, out)

    def timer_fired(self, timer: str, out: Outbox) -> bool:
        """True if the timer was one of these hand-offs'."""
        for attempt, handoff in self._open.items():
            if timer == _lease_timer(attempt):
                if handoff.ticket is not None and not handoff.stopping:
                    out.send(handoff.job.decode_worker, LeaseRenew(attempt))
                    out.set_timer(timer, handoff.ticket.lease_s / 3)
                return True
            if timer == _ticket_timer(attempt):
                detail = f"no ticket within {self._settings.ticket_timeout_s:g} s"
                self.fail(attempt, FailureKind.REFUSED, detail, out)
                return True
        return False

    # --- inside -------------------------------------------------------------------------------

    def _from_peer(self, attempt: AttemptId, peer: WorkerId) -> Outbound | None:
        handoff = self._open.get(attempt)
        return handoff if handoff is not None and handoff.job.decode_worker == peer else None

    def _sample(self, handoff: Outbound, now: float) -> TransferSample:
        """In one shot, and of an engine that gives its payload at the end, nothing is hidden."""
        could_send_at_s = max(handoff.prefilled_at_s, handoff.granted_at_s)
        one_shot = len(handoff.job.token_ids) < self._settings.one_shot_tokens
        at_end = one_shot or self._settings.foreign is not None
        return TransferSample(
            peer=handoff.job.decode_worker,
            num_bytes=handoff.num_bytes,
            exposed_s=now - could_send_at_s,
            hidden_s=0.0 if at_end else could_send_at_s - handoff.granted_at_s,
        )

    def _stop(self, handoff: Outbound, detail: str, out: Outbox) -> None:
        """No write may follow. The sequence runs no further step, unless it is kept."""
        handoff.stopping = True
        handoff.detail = detail
        attempt = handoff.attempt
        out.add(CancelTimer(_lease_timer(attempt)))
        out.add(CancelTimer(_ticket_timer(attempt)))
        handoff.cargo.stop(out, keeps=handoff.keeps_sequence)

    def _forget(self, handoff: Outbound, out: Outbox) -> None:
        del self._open[handoff.attempt]
        if handoff.keeps_sequence:
            handoff.errand.kept(out)
        else:
            handoff.cargo.let_go(out)


def _log(handoff: Outbound, name: LifeName, out: Outbox, **values: Scalar) -> None:
    if out.logs and handoff.errand.is_attempt:
        out.log(name, handoff.attempt, **values)


def _lease_timer(attempt: AttemptId) -> str:
    return f"renew {attempt}"


def _ticket_timer(attempt: AttemptId) -> str:
    return f"ticket {attempt}"
