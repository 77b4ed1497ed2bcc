"""What computes under a worker's machine: a runner below our batching, or an engine above it.

`Worker` brings links, timers and the recorder; a `Backend` brings the machine that fits its engine,
and performs the effects that only this kind of machine has. It is loaded on the engine thread,
begun and closed on the node thread.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from pdserve.core.effects import Effect, Input
from pdserve.core.ids import Epoch, WorkerId
from pdserve.core.messages import Ticket
from pdserve.node.settings import WorkerSettings
from pdserve.serve.driver import Machine
from pdserve.serve.engine_thread import JobThread
from pdserve.transport.base import Pool, RemotePool
from pdserve.transport.progress import LayersWritten

RemotePools = Callable[[WorkerId, Epoch], tuple[RemotePool, int] | None]
"""The attached pool of a peer process and its size in bytes, if there is one."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Surroundings:
    """What a backend may use of its worker. All but ``jobs`` are called on the node thread; a
    backend whose engine broke says so (``broken``), and its process ends. ``tell`` sends a peer a
    hint, or drops it. ``slowness``, on any thread: how many times slower the link to a peer is to
    be."""

    jobs: JobThread
    feed: Callable[[Input], None]
    broken: Callable[[BaseException], None]
    remote: RemotePools
    tell: Callable[[WorkerId, LayersWritten], None]
    slowness: Callable[[WorkerId], float]


class Backend(Protocol):
    """``pool`` is what peers may write into, if they may. ``policy`` is the name under which a
    recording knows the batch policy, empty if there is none."""

    settings: WorkerSettings
    policy: str
    device: str
    engine: str
    pool: Pool | None

    def begin(self, surroundings: Surroundings) -> Machine:
        """Make the machine; its effects come to `perform` from now on."""
        ...

    def perform(self, effect: Effect) -> None:
        """Carry out an effect that is not of every worker. Never blocks."""
        ...

    def granting(self, ticket: Ticket) -> None:
        """The machine's ticket is about to be sent to a writer."""
        ...

    def written(self, news: LayersWritten) -> None:
        """A writer says what has arrived."""
        ...

    def close(self) -> None:
        """Feed nothing more and write nothing more; blocks for as long as one write takes. What
        holds weights is closed by a job that this posts."""
        ...
