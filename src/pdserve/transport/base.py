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
    def export(self) -> PoolExport:
        """What one peer needs to attach. Called once per peer; raises `TransferError` if closed."""

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
        region lies outside either pool; then nothing of the call is written.
        """

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
