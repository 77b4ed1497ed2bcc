"""One hand-off as the worker that receives it knows it."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum

from pdserve.core.ids import BlockId, Epoch, WorkerId
from pdserve.core.messages import Header, Trailer


class InboundState(Enum):
    QUEUED = "queued"
    GRANTED = "granted"
    VERIFYING = "verifying"
    QUARANTINED = "quarantined"


@dataclass(slots=True)
class Inbound:
    """One hand-off. ``pinned`` were here already; the peer writes ``fresh``, which follow them.
    ``spare``: a slot for the first token, where answers are reserved. ``doomed``: dropped while the
    check reads the blocks; they are released when it ends. ``asks_at_s``: not before, for room."""

    header: Header
    peer: WorkerId
    peer_epoch: Epoch
    state: InboundState = InboundState.QUEUED
    pinned: list[BlockId] = field(default_factory=list)
    fresh: list[BlockId] = field(default_factory=list)
    spare: list[BlockId] = field(default_factory=list)
    asks_at_s: float = 0.0
    trailer: Trailer | None = None
    doomed: bool = False
