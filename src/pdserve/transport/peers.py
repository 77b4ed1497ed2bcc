"""Who else is there: what the gateway tells each worker about the others."""

from __future__ import annotations

from dataclasses import dataclass

from pdserve.core.ids import Epoch, WorkerId

LINK_TIMEOUT_S = 2.0
"""How long a message may wait for a link before the peer counts as lost."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PeerAddress:
    """A worker process that is up, and the addresses (``transport.addresses``) at which it takes
    links. ``family`` names who started it: see ``handshake.Hello``."""

    worker: WorkerId
    epoch: Epoch
    addresses: tuple[str, ...]
    family: str = ""


@dataclass(frozen=True, slots=True)
class Reachable:
    """What a worker says of itself before it is up: where it takes links."""

    addresses: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Peers:
    """All workers that are up, the receiver among them. Replaces what was said before.

    Of each pair the worker with the smaller id connects. It is a frame of the link, not of the
    machines: a machine hears of peers by `PeerUp` and `PeerLost`.
    """

    workers: tuple[PeerAddress, ...]
