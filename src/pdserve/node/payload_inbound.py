"""The receiving half of a hand-off between engines that batch for themselves.

The life of one: its header waits until the engine has room (*queued*), the ticket reserves that
room under a lease (*granted*), slices arrive in order and are kept, the trailer closes them, and
the engine is given the whole (*adopting*). Once it has checked and taken the payload, the attempt
is a running task.

This worker owns the memory that payloads arrive in. A writer that was stopped past its lease may
still send, but what it sends is for an attempt that is known no more, and is let fall. So nothing
is ever quarantined, and each end frees everything at once.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum

from pdserve.core.effects import CancelTimer
from pdserve.core.engine_work import EngineAdopted, EngineWork
from pdserve.core.events import LifeName
from pdserve.core.ids import AttemptId, Epoch, WorkerId
from pdserve.core.messages import (
    Accepted,
    AttemptFailed,
    FailureKind,
    HandoffRejected,
    Header,
    OpaquePayload,
    PayloadTaken,
    Revoke,
    Ticket,
    TicketGranted,
    TicketRefused,
    Trailer,
)
from pdserve.node.cargo import DIGEST_ALGORITHM
from pdserve.node.engine_tasks import EngineTasks
from pdserve.node.outbox import Outbox
from pdserve.node.settings import WorkerSettings


class ArrivalState(Enum):
    QUEUED = "queued"
    GRANTED = "granted"
    ADOPTING = "adopting"


@dataclass(slots=True)
class Arrival:
    """One hand-off. ``slices`` hold the first ``num_bytes`` of the payload, ``is_whole`` all."""

    header: Header
    peer: WorkerId
    peer_epoch: Epoch
    num_blocks: int
    state: ArrivalState = ArrivalState.QUEUED
    slices: list[bytes] = field(default_factory=list)
    num_bytes: int = 0
    is_whole: bool = False
    trailer: Trailer | None = None


class PayloadArrivals:
    """All hand-offs that arrive at this worker, in order of arrival."""

    def __init__(self, settings: WorkerSettings, tasks: EngineTasks) -> None:
        assert settings.foreign is not None
        self._settings = settings
        self._foreign = settings.foreign
        self._tasks = tasks
        self._arrivals: dict[AttemptId, Arrival] = {}

    @property
    def is_empty(self) -> bool:
        return not self._arrivals

    @property
    def num_queued(self) -> int:
        return sum(a.state is ArrivalState.QUEUED for a in self._arrivals.values())

    @property
    def num_leases(self) -> int:
        return sum(a.state is ArrivalState.GRANTED for a in self._arrivals.values())

    @property
    def num_reserved_blocks(self) -> int:
        """Room that is promised, and that the engine does not count as taken yet."""
        arrivals = self._arrivals.values()
        return sum(a.num_blocks for a in arrivals if a.state is not ArrivalState.QUEUED)

    @property
    def free_blocks(self) -> int:
        """Room that can be promised."""
        return max(0, self._tasks.free_blocks - self.num_reserved_blocks)

    # --- forward ------------------------------------------------------------------------------

    def opened(
        self, header: Header, peer: WorkerId, peer_epoch: Epoch, draining: bool, out: Outbox
    ) -> None:
        if header.attempt in self._arrivals:
            return
        num_blocks = self._settings.layout.num_blocks_for(len(header.token_ids))
        num_blocks += len(header.choices) - 1
        why_not = "draining" if draining else self._refusal(header, num_blocks)
        if why_not is not None:
            out.send(peer, TicketRefused(attempt=header.attempt, detail=why_not))
            return
        self._arrivals[header.attempt] = Arrival(header, peer, peer_epoch, num_blocks)

    def grant_waiting(self, out: Outbox) -> None:
        """Tickets for those who wait, first come first served, as far as the engine has room."""
        for attempt, arrival in self._arrivals.items():
            if arrival.state is not ArrivalState.QUEUED:
                continue
            if arrival.num_blocks > self.free_blocks:
                return
            arrival.state = ArrivalState.GRANTED
            lease_s = self._settings.lease_s
            ticket = Ticket(attempt=attempt, first_block=0, block_ids=(), lease_s=lease_s)
            out.send(arrival.peer, ticket)
            out.tell_router(TicketGranted(attempt=attempt, num_blocks=arrival.num_blocks))
            out.set_timer(_lease_timer(attempt), lease_s)

    def renewed(self, attempt: AttemptId, peer: WorkerId, epoch: Epoch, out: Outbox) -> None:
        arrival = self._from_peer(attempt, peer, epoch)
        if arrival is not None and arrival.state is ArrivalState.GRANTED:
            out.set_timer(_lease_timer(attempt), self._settings.lease_s)

    def slice(self, payload: OpaquePayload, peer: WorkerId, epoch: Epoch, out: Outbox) -> None:
        """Keep the next slice. Taken off the link it is in any case."""
        if payload.data:
            out.send(peer, PayloadTaken(payload.attempt, len(payload.data)))
        arrival = self._from_peer(payload.attempt, peer, epoch)
        if arrival is None or arrival.state is not ArrivalState.GRANTED:
            return
        end = payload.offset + len(payload.data)
        if payload.offset != arrival.num_bytes or arrival.is_whole:
            detail = f"a slice at byte {payload.offset} came where {arrival.num_bytes} was due"
            self._reject(arrival, detail, out)
        elif end > self._foreign.max_payload_bytes:
            limit = self._foreign.max_payload_bytes
            self._reject(arrival, f"the payload is over the limit of {limit} bytes", out)
        else:
            arrival.slices.append(payload.data)
            arrival.num_bytes = end
            arrival.is_whole = payload.last

    def trailer(self, trailer: Trailer, peer: WorkerId, epoch: Epoch, out: Outbox) -> None:
        """All slices have come: let the engine check and take the payload."""
        arrival = self._from_peer(trailer.attempt, peer, epoch)
        if arrival is None or arrival.state is not ArrivalState.GRANTED:
            return
        wrong = _wrong_trailer(arrival, trailer)
        if wrong is not None:
            self._reject(arrival, wrong, out)
            return
        out.add(CancelTimer(_lease_timer(trailer.attempt)))
        arrival.state = ArrivalState.ADOPTING
        arrival.trailer = trailer
        live = tuple(delta for delta in trailer.tokens if delta.finish is None)
        header = arrival.header
        work = EngineWork(
            attempt=header.attempt,
            choices=tuple(delta.choice for delta in live),
            token_ids=header.token_ids,
            num_prompt_tokens=header.num_prompt_tokens,
            params=header.params,
            cache_salt=header.cache_salt,
            trace_context=header.trace_context,
        )
        payload, arrival.slices = b"".join(arrival.slices), []
        self._tasks.adopt(work, live, payload, trailer.chunks[0].layers[0], out)

    def adopted(self, event: EngineAdopted, out: Outbox) -> None:
        """The engine has taken the payload, or found it wrong."""
        arrival = self._arrivals.get(event.attempt)
        if arrival is None or arrival.state is not ArrivalState.ADOPTING:
            return
        if event.detail is not None or self._tasks.get(event.attempt) is None:
            self._reject(arrival, event.detail or "aborted", out)
            return
        assert arrival.trailer is not None
        del self._arrivals[event.attempt]
        self._tasks.adopted(event.attempt)
        out.tell_router(Accepted(event.attempt, arrival.trailer.tokens))
        out.send(arrival.peer, Accepted(event.attempt))
        out.log(LifeName.DECODE_QUEUED, event.attempt)

    # --- backward -----------------------------------------------------------------------------

    def abort(self, attempt: AttemptId, out: Outbox) -> bool:
        """The router wants no more of the attempt. False if it is not being handed over."""
        arrival = self._arrivals.get(attempt)
        if arrival is None:
            return False
        self._drop(arrival, out, revokes=True)
        return True

    def writer_done(self, attempt: AttemptId, peer: WorkerId, epoch: Epoch, out: Outbox) -> bool:
        """The writer gives up. False if the attempt was adopted or never known."""
        arrival = self._from_peer(attempt, peer, epoch)
        if arrival is None:
            return False
        self._drop(arrival, out)
        return True

    def peer_gone(self, peer: WorkerId, epoch: Epoch, out: Outbox) -> None:
        """The writer is known dead; the router resumes what it had not heard to be accepted."""
        for arrival in list(self._arrivals.values()):
            if arrival.peer == peer and arrival.peer_epoch <= epoch:
                self._drop(arrival, out)

    def peer_lost(self, peer: WorkerId, epoch: Epoch, out: Outbox) -> None:
        """The link closed. What has all arrived goes on."""
        for attempt, arrival in list(self._arrivals.items()):
            is_of_peer = (arrival.peer, arrival.peer_epoch) == (peer, epoch)
            if is_of_peer and arrival.state is not ArrivalState.ADOPTING:
                self._tell_failed(attempt, f"lost the link to {peer}", out)
                self._drop(arrival, out)

    def peer_up(self, peer: WorkerId, epoch: Epoch, out: Outbox) -> None:
        """The link is back. Nothing is quarantined, so there is nothing to ask for again."""

    def timer_fired(self, timer: str, out: Outbox) -> bool:
        """True if the timer was one of these hand-offs'."""
        for attempt, arrival in self._arrivals.items():
            if timer == _lease_timer(attempt) and arrival.state is ArrivalState.GRANTED:
                detail = f"the lease of {self._settings.lease_s:g} s ran out"
                self._tell_failed(attempt, detail, out)
                self._drop(arrival, out, revokes=True)
                return True
        return False

    # --- inside -------------------------------------------------------------------------------

    def _from_peer(self, attempt: AttemptId, peer: WorkerId, epoch: Epoch) -> Arrival | None:
        """The hand-off, if this very process is its writer."""
        arrival = self._arrivals.get(attempt)
        if arrival is None or (arrival.peer, arrival.peer_epoch) != (peer, epoch):
            return None
        return arrival

    def _refusal(self, header: Header, num_blocks: int) -> str | None:
        mine = self._foreign.payload_format
        if not header.opaque:
            return f"the engine here takes no KV blocks, only payloads of format {mine}"
        if header.payload_format != mine:
            return f"payload format is {header.payload_format} there and {mine} here"
        if header.layout.weights_digest != self._settings.layout.weights_digest:
            return "the peer serves other weights"
        if header.digest_algorithm != DIGEST_ALGORITHM:
            return f"digest {header.digest_algorithm} is unknown here"
        if len(header.token_ids) >= self._settings.max_model_tokens:
            return f"{len(header.token_ids)} tokens leave no room for more here"
        if num_blocks > self._settings.num_blocks:
            return f"needs {num_blocks} blocks, more than there are"
        return None

    def _tell_failed(self, attempt: AttemptId, detail: str, out: Outbox) -> None:
        kind = FailureKind.HANDOFF
        out.tell_router(AttemptFailed(attempt=attempt, kind=kind, detail=detail))

    def _reject(self, arrival: Arrival, detail: str, out: Outbox) -> None:
        attempt = arrival.header.attempt
        out.send(arrival.peer, HandoffRejected(attempt=attempt, detail=detail))
        self._drop(arrival, out)

    def _drop(self, arrival: Arrival, out: Outbox, *, revokes: bool = False) -> None:
        """Forget it. ``revokes``: the writer would go on if it were not told."""
        attempt = arrival.header.attempt
        del self._arrivals[attempt]
        if arrival.state is ArrivalState.GRANTED:
            out.add(CancelTimer(_lease_timer(attempt)))
        if arrival.state is ArrivalState.ADOPTING:
            self._tasks.end(attempt, out)
        if revokes:
            out.send(arrival.peer, Revoke(attempt))


def _wrong_trailer(arrival: Arrival, trailer: Trailer) -> str | None:
    header = arrival.header
    next_index = len(header.token_ids) - header.num_prompt_tokens
    choices = [delta.choice for delta in trailer.tokens]
    if not set(choices) <= set(header.choices) or len(set(choices)) < len(choices):
        return "the trailer speaks of choices that the header does not have"
    if any(delta.index != next_index for delta in trailer.tokens):
        return f"the trailer's tokens are not those of index {next_index}"
    if all(delta.finish is not None for delta in trailer.tokens):
        return "the trailer leaves nothing to decode"
    if not arrival.is_whole:
        return f"the payload broke off after {arrival.num_bytes} bytes"
    if [len(chunk.layers) for chunk in trailer.chunks] != [1]:
        return "the trailer has not one digest of the payload"
    return None


def _lease_timer(attempt: AttemptId) -> str:
    return f"lease {attempt}"
