"""The transfers of a simulated worker: when the bytes of a hand-off are where they belong.

A transfer is opened before its prefill starts and bound when the ticket is there, in either order
with the steps. Layer by layer: a chunk of the prompt can be sent from when its first layer is
computed, which is a layer's share of the step after it began, and its last layer when the step is
over; what the link has not carried by then is what the request sees. In one shot nothing is sent
before the last step is over. What was cached is there at once. Where the end of a running step may
move (`sim.tempo`), layers that it has not computed yet move along.
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


@dataclass(slots=True, eq=False)
class _Step:
    """A step whose end may move, with what it computes of each transfer: (transfer, up to which
    token, whether that is all). It has ``done`` such a share of its work by ``since_s``."""

    begun_s: float
    since_s: float
    ended_s: float
    computes: list[tuple[_Transfer, int, bool]]
    done: float = 0.0
    is_begun: bool = False
    version: int = 0


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
        *,
        ends_move: bool = False,
    ) -> None:
        """``exposed``: seconds from when a transfer is computed and bound until it is sent, where
        that is not for the link to say. ``ends_move``: `moved` will say so."""
        self._clock = clock
        self._network = network
        self._end = end
        self._machine = machine
        self._end_of = end_of
        self._hear = hear
        self._sent = sent
        self._exposed = exposed or (lambda attempt: None)
        self._open: dict[AttemptId, _Transfer] = {}
        self._ends_move = ends_move
        self._step: _Step | None = None

    def __len__(self) -> int:
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
        if self._ends_move:
            self._computes_while_it_may_move(transfer, end_token, begun_s, ended_s, last)
            return
        if not transfer.opened.one_shot:
            first_layer_s = (ended_s - begun_s) / self._machine.num_layers
            self._clock.at(begun_s + first_layer_s, self._ready, transfer, end_token)
        if last:
            self._clock.at(ended_s, self._computed, transfer, end_token)

    def moved(self, ended_s: float) -> None:
        """The running step ends then, not when it was said: its pace is another from now on."""
        step, now = self._step, self._clock.now
        if step is None or step.ended_s <= now:
            return  # what runs computes nothing that is to be sent
        since_s = max(now, step.since_s)
        if since_s > step.since_s:
            share = (since_s - step.since_s) / (step.ended_s - step.since_s)
            step.done += (1.0 - step.done) * share
        step.since_s, step.ended_s = since_s, ended_s
        self._expect(step)

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

    def _computes_while_it_may_move(
        self, transfer: _Transfer, end_token: int, begun_s: float, ended_s: float, last: bool
    ) -> None:
        step = self._step
        if step is None or step.begun_s != begun_s:
            step = self._step = _Step(begun_s, begun_s, ended_s, [])
            self._expect(step)
        step.computes.append((transfer, end_token, last))

    def _expect(self, step: _Step) -> None:
        """Be called when its first layer is computed, if that is not so yet, and its last."""
        step.version += 1
        if not step.is_begun:
            left = 1.0 / self._machine.num_layers - step.done
            share = left / (1.0 - step.done) if left > 0.0 else 0.0
            first_layer_s = share * (step.ended_s - step.since_s)
            self._clock.at(step.since_s + first_layer_s, self._first_layer, step, step.version)
        self._clock.at(step.ended_s, self._last_layer, step, step.version)

    def _first_layer(self, step: _Step, version: int) -> None:
        if step.version == version:
            step.is_begun = True
            for transfer, end_token, _ in step.computes:
                if not transfer.opened.one_shot:
                    self._ready(transfer, end_token)

    def _last_layer(self, step: _Step, version: int) -> None:
        if step.version == version:
            for transfer, end_token, is_last in step.computes:
                if is_last:
                    self._computed(transfer, end_token)

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
        machine = self._machine
        tokens = transfer.ready_tokens - ticket.first_block * machine.block_size
        ready = tokens * machine.token_kv_bytes
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
