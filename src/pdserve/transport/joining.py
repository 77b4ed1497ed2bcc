"""How a host brings a worker: what it and the gateway say to each other.

The host's link stays open for as long as it takes part. It asks (`Join`), is told what to run
(`Joined`) or why not (`NotJoined`), starts the process (`ProcessBegan`), which makes a link of its
own, and says when that has ended (`ProcessEnded`). The gateway may want the end of it
(`EndProcess`). A host that goes says `Leave` first, and goes when the answer, an `EndProcess`, says
that nobody needs it.
"""

from __future__ import annotations

from dataclasses import dataclass

from pdserve.core.ids import Epoch, WorkerId
from pdserve.core.request import Role


@dataclass(frozen=True, slots=True, kw_only=True)
class Join:
    """``weights_digest`` names the weights that the host has (see ``weights.digest``)."""

    worker: WorkerId
    role: Role
    weights_digest: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Joined:
    """``start`` is an encoded ``WorkerStart`` without what only the host knows, and without the
    secret, which it knows."""

    epoch: Epoch
    start: bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class NotJoined:
    """``is_final``: asking again does not help."""

    detail: str
    is_final: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class ProcessBegan:
    """It runs, under this process id of its host."""

    epoch: Epoch
    pid: int


@dataclass(frozen=True, slots=True, kw_only=True)
class ProcessEnded:
    """The host saw the process end: it will neither write nor speak again."""

    epoch: Epoch
    detail: str


@dataclass(frozen=True, slots=True, kw_only=True)
class EndProcess:
    """Kill this process, if it still runs; `ProcessEnded` follows."""

    epoch: Epoch


@dataclass(frozen=True, slots=True)
class Leave:
    """The host wants to go: send its worker nothing new, and say when it holds nothing."""
