"""The bytes seam: how one worker writes into another worker's KV pool.

A transport moves regions of bytes and nothing else. Who may write where and when is the business of
the hand-off machines; metrics, retries and back-pressure are the driver's.

The life of a pool: the owner calls `Transport.allocate` once and computes in that memory; it sends
`Pool.export` to each peer in the first frame of their link; the peer calls `Transport.attach` and
from then on writes with `RemotePool.write`, one-sided, from one thread.

A write that fails has either landed, or not, or in part, and where bytes travel over a network some
of them may still be on their way. `RemotePool.settle` says when that is over, and `Pool.revoke`
ends it from the owner's side. Memory that is mapped has nothing on its way.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Writer:
    """Who is to write into a pool. ``name`` is of one process, and no later one has it. ``is_kin``:
    it dies with the process that started the pool's owner, so that its death is always known."""

    name: str
    is_kin: bool


KIN = Writer("", True)
"""A writer of whom nothing else needs to be known."""


@dataclass(frozen=True, slots=True)
class PoolExport:
    """How a peer reaches a pool. ``fds`` travel as SCM_RIGHTS, ``token`` inside the frame.

    Whoever holds an export owns its descriptors. `Pool.export` makes new ones each time: the
    owner's side closes them once they are sent. The receiver owns what it received until
    `Transport.attach` takes (and closes) them, whether that succeeds or not.
    """

    transport: str
    token: bytes
    num_bytes: int
    fds: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class Region:
    """``length`` bytes from ``source`` in the writer's pool to ``target`` in the receiver's."""

    source: int
    target: int
    length: int


class Pool(ABC):
    """Memory of one worker that peers can write into."""

    memory: memoryview

    @abstractmethod
    def export(self, writer: Writer = KIN) -> PoolExport:
        """What this peer needs to attach. Raises `TransferError` if closed."""

    def revoke(self, writer: str) -> None:  # noqa: B027
        """Nothing that this writer writes lands any more once this returns: the cluster counts it
        as gone. Never waits for it. Transports whose writers are all kin have nothing to do: kin
        that counts as gone is dead."""

    @abstractmethod
    def close(self) -> None:
        """Let go of the memory. Peers that still have it attached write into nothing that is used.

        Views of ``memory`` that others still hold stay valid; the bytes go with the last of them.
        """


class RemotePool(ABC):
    """A peer's pool, as a writer sees it."""

    @abstractmethod
    def write(self, source: memoryview, regions: Sequence[Region]) -> None:
        """Copy the regions of ``source`` (writable, contiguous); visible to the owner on return.

        Raises `TransferError` if this side is closed, if the peer is known to be gone, or if a
        region lies outside either pool; then nothing of the call is written. Over a network also if
        the link breaks under it; then some of it may be, now or until `settle` says otherwise.
        """

    def settle(self, done: Callable[[], None]) -> None:
        """Call ``done`` once, from any thread, as soon as no byte of an earlier write can land any
        more. Memory that is mapped has nothing on its way."""
        done()

    @abstractmethod
    def close(self) -> None: ...


class Transport(ABC):
    """One way of moving bytes. Holds no module state: two of a kind fit in one process."""

    name: str

    @abstractmethod
    def allocate(self, num_bytes: int) -> Pool:
        """Zeroed, page-aligned memory for a KV pool. Raises `ConfigError` if it cannot be had."""

    @abstractmethod
    def attach(self, export: PoolExport) -> RemotePool:
        """Reach a peer's pool. Raises `TransferError` if that cannot be done."""
