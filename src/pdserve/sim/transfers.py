"""The transfer thread of a simulated worker: when the bytes of a hand-off are where they belong.

A transfer is opened before its prefill starts and bound when the ticket is there, in either order
with the steps. Layer by layer: a chunk of the prompt can be sent from when its first layer is
computed, which is a layer's share of the step after it began, and its last layer when the step is
over; what the link has not carried by then is what the request sees. In one shot nothing is sent
before the last step is over. What was cached is there at once.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from pdserve.core.effects import (
    BindTransfer,
    Input,
    OpenTransfer,
    TransferSent,
    TransferStopped,
)
from pdserve.core.ids import AttemptId, WorkerId
from pdserve.core.messages import ChunkDigest, Ticket
from pdserve.cost.machine import MachineModel
from pdserve.sim.clock import Clock
from pdserve.sim.network import End, Flow, Network

Sent = Callable[[WorkerId, int, float], None]
"""(receiver, bytes, when it was bound): a transfer is over."""


@dataclass(slots=True, eq=False)
class _Transfer:
    """``ready_tokens`` from the front can be sent, or are there; ``tail_bytes`` of the last chunk
    only once its step is over (``closed``)."""

    opened: OpenTransfer
    ready_tokens: int
    num_tokens: int = 0
    closed: bool = False
    tail_tokens: int = 0
    ticket: Ticket | None = None
    flow: Flow | None = None
    bound_s: float = 0.0
    released_bytes: int = 0
    stopped: bool = False


class Transfers:
    """All transfers that a worker sends. ``hear`` takes what its machine is to hear."""

    def __init__(
        self,
        clock: Clock,
        network: Network,
        end: End,
        machine: MachineModel,
        end_of: Callable[[WorkerId], End | None],
        hear: Callable[[Input], None],
        sent: Sent,
        exposed: Callable[[AttemptId], float | None] | None = None,
    ) -> None:
        """``exposed``: seconds from when a transfer is computed and bound until it is sent, where
        that is not for the link to say."""
        self._clock = clock
        self._network = network
        self._end = end
        self._machine = machine
        self._end_of = end_of
        self._hear = hear
        self._sent = sent
        self._exposed = exposed or (lambda attempt: None)
        self._open: dict[AttemptId, _Transfer] = {}

    @property
    def num_open(self) -> int:
        """Transfers that have been opened and not ended."""
        return len(self._open)

    def open(self, effect: OpenTransfer) -> None:
        ready = effect.cached_blocks * self._machine.block_size
        transfer = _Transfer(effect, ready_tokens=ready)
        if effect.is_finished:
            transfer.num_tokens = len(effect.block_ids) * self._machine.block_size
            transfer.ready_tokens = transfer.num_tokens
            transfer.closed = True
        self._open[effect.attempt] = transfer

    def computes(
        self, attempt: AttemptId, end_token: int, begun_s: float, ended_s: float, *, last: bool
    ) -> None:
        """A step computes the attempt's tokens up to ``end_token``."""
        transfer = self._open.get(attempt)
        if transfer is None:
            return
        if not transfer.opened.one_shot:
            first_layer_s = (ended_s - begun_s) / self._machine.num_layers
            self._clock.at(begun_s + first_layer_s, self._ready, transfer, end_token)
        if last:
            self._clock.at(ended_s, self._computed, transfer, end_token)

    def bind(self, effect: BindTransfer) -> None:
        transfer = self._open.get(effect.ticket.attempt)
        receiver = self._end_of(effect.peer)
        if transfer is None or receiver is None:
            return  # the peer is gone: its machine's `PeerLost` follows
        transfer.ticket = effect.ticket
        transfer.bound_s = self._clock.now
        transfer.flow = Flow(self._end, receiver, lambda: self._drained(transfer))
        self._release(transfer)
        if transfer.closed:
            self._close(transfer)

    def stop(self, attempt: AttemptId) -> None:
        transfer = self._open.pop(attempt, None)
        if transfer is not None:
            self._cancel(transfer)
        self._clock.after(0.0, self._hear, TransferStopped(attempt))

    def stop_all(self) -> None:
        """The worker is dead."""
        for transfer in self._open.values():
            self._cancel(transfer)
        self._open.clear()

    # --- inside -------------------------------------------------------------------------------

    def _cancel(self, transfer: _Transfer) -> None:
        transfer.stopped = True
        if transfer.flow is not None:
            self._network.stop(transfer.flow)

    def _ready(self, transfer: _Transfer, end_token: int) -> None:
        if transfer.stopped:
            return
        transfer.tail_tokens = end_token - transfer.ready_tokens
        transfer.ready_tokens = max(transfer.ready_tokens, end_token)
        self._release(transfer)

    def _computed(self, transfer: _Transfer, end_token: int) -> None:
        if transfer.stopped:
            return
        if transfer.opened.one_shot:
            transfer.ready_tokens = end_token
        transfer.num_tokens = end_token
        transfer.closed = True
        self._release(transfer)
        self._close(transfer)

    def _release(self, transfer: _Transfer) -> None:
        ticket, flow = transfer.ticket, transfer.flow
        if ticket is None or flow is None:
            return
        first = ticket.first_block * self._machine.block_size
        ready = max(0, transfer.ready_tokens - first) * self._machine.token_kv_bytes
        if ready > transfer.released_bytes:
            more, transfer.released_bytes = ready - transfer.released_bytes, ready
            if self._exposed(transfer.opened.attempt) is None:
                self._network.release(flow, more)

    def _close(self, transfer: _Transfer) -> None:
        """All is computed. If all but the last layer is sent, that is what remains."""
        flow = transfer.flow
        if transfer.ticket is None or flow is None or flow in self._end.flows_out:
            return
        exposed_s = self._exposed(transfer.opened.attempt)
        if exposed_s is not None:
            self._clock.after(exposed_s, self._done, transfer)
            return
        tail = 0.0
        if not transfer.opened.one_shot and transfer.bound_s < self._clock.now:
            layer_bytes = self._machine.token_kv_bytes / self._machine.num_layers
            tail_bytes = min(transfer.tail_tokens * layer_bytes, transfer.released_bytes)
            tail = tail_bytes / self._network.alone_rate(self._end, flow.receiver)
        self._clock.after(tail + self._end.spec.fixed_s, self._done, transfer)

    def _drained(self, transfer: _Transfer) -> None:
        if transfer.closed:
            self._clock.after(self._end.spec.fixed_s, self._done, transfer)

    def _done(self, transfer: _Transfer) -> None:
        if transfer.stopped:
            return
        ticket = transfer.ticket
        assert ticket is not None
        attempt = transfer.opened.attempt
        del self._open[attempt]
        transfer.flow = None  # which refers to the transfer: both are garbage now
        chunks: tuple[ChunkDigest, ...] = ()
        if ticket.block_ids:
            layers = (b"",) * self._machine.num_layers
            chunks = (
                ChunkDigest(
                    first_block=ticket.first_block, num_blocks=len(ticket.block_ids), layers=layers
                ),
            )
        self._sent(transfer.opened.peer, transfer.released_bytes, transfer.bound_s)
        self._hear(TransferSent(attempt=attempt, chunks=chunks, num_bytes=transfer.released_bytes))
