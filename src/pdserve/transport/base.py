"""The bytes seam: how one worker writes into another worker's KV pool.

A transport moves regions of bytes and nothing else. Who may write where and when is the business of
the hand-off machines; metrics, retries and back-pressure are the driver's.

The life of a pool: the owner calls `Transport.allocate` once and computes in that memory; it sends
`Pool.export` to each peer in the first frame of their link; the peer calls `Transport.attach` and
from then on writes with `RemotePool.write`, one-sided, from one thread.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class PoolExport:
    """How a peer reaches a pool. ``fds`` travel as SCM_RIGHTS, ``token`` inside the frame.

    The receiver of an export owns the received descriptors until `Transport.attach` takes them.
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
    def export(self) -> PoolExport:
        """What a peer needs to attach. May be called once per peer."""

    @abstractmethod
    def close(self) -> None:
        """Let go of the memory. Peers that still have it attached write into nothing that is used."""


class RemotePool(ABC):
    """A peer's pool, as a writer sees it."""

    @abstractmethod
    def write(self, source: memoryview, regions: Sequence[Region]) -> None:
        """Copy the regions; visible to the owner when this returns.

        Raises `TransferError` if the peer is gone or a region lies outside either pool; then
        nothing of that region is written.
        """

    @abstractmethod
    def close(self) -> None: ...


class Transport(ABC):
    """One way of moving bytes. Holds no module state: two of a kind fit in one process."""

    name: str

    @abstractmethod
    def allocate(self, num_bytes: int) -> Pool:
        """Zeroed memory for a KV pool."""

    @abstractmethod
    def attach(self, export: PoolExport) -> RemotePool:
        """Reach a peer's pool. Raises `TransferError` if that cannot be done."""
