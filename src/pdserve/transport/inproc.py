"""Bytes between workers that are threads of one process.

Both sides are given the same `InprocHub`, which knows the open pools by their tokens. A writer
copies into the owner's memory directly. The hub forgets a pool when its owner closes it, and from
then on a write raises `TransferError`.
"""

from __future__ import annotations

import itertools
import mmap
from collections.abc import Sequence

from pdserve.core.errors import ConfigError, TransferError
from pdserve.transport.base import (
    KIN,
    Pool,
    PoolExport,
    Region,
    RemotePool,
    Transport,
    Writer,
)
from pdserve.transport.regions import copy_regions


class InprocHub:
    """Where the workers of one process find each other's pools. Safe to use from any thread."""

    def __init__(self) -> None:
        self._pools: dict[bytes, memoryview] = {}
        self._numbers = itertools.count()

    def add(self, memory: memoryview) -> bytes:
        """Make a pool reachable; gives its token."""
        token = b"pool-%d" % next(self._numbers)
        self._pools[token] = memory
        return token

    def find(self, token: bytes) -> memoryview | None:
        """The pool's memory, or None if its owner has closed it."""
        return self._pools.get(token)

    def remove(self, token: bytes) -> None:
        self._pools.pop(token, None)


class InprocPool(Pool):
    def __init__(self, hub: InprocHub, num_bytes: int) -> None:
        self.memory = memoryview(mmap.mmap(-1, num_bytes))
        self._hub = hub
        self._num_bytes = num_bytes
        self._token = hub.add(self.memory)

    def export(self, writer: Writer = KIN) -> PoolExport:
        if self._hub.find(self._token) is None:
            raise TransferError("the pool is closed and cannot be exported")
        return PoolExport("inproc", self._token, self._num_bytes)

    def close(self) -> None:
        self._hub.remove(self._token)
        self.memory = memoryview(bytearray())


class InprocRemotePool(RemotePool):
    def __init__(self, hub: InprocHub, token: bytes) -> None:
        self._hub: InprocHub | None = hub
        self._token = token

    def write(self, source: memoryview, regions: Sequence[Region]) -> None:
        hub = self._hub
        if hub is None:
            raise TransferError("this side has closed its view of the peer's pool")
        memory = hub.find(self._token)
        if memory is None:
            raise TransferError("the peer has closed its pool")
        copy_regions(source, memory, regions)

    def close(self) -> None:
        self._hub = None


class InprocTransport(Transport):
    name = "inproc"

    def __init__(self, hub: InprocHub) -> None:
        self._hub = hub

    def allocate(self, num_bytes: int) -> Pool:
        assert num_bytes > 0, "an empty pool holds no block"
        try:
            return InprocPool(self._hub, num_bytes)
        except (OSError, OverflowError) as error:
            raise ConfigError(
                f"{num_bytes} bytes for the KV pool cannot be had ({error}): "
                "serve with fewer blocks"
            ) from error

    def attach(self, export: PoolExport) -> RemotePool:
        memory = self._hub.find(export.token)
        if export.transport != self.name or export.fds or memory is None:
            raise TransferError(f"no pool of this process: {export}")
        if memory.nbytes != export.num_bytes:
            raise TransferError(
                f"the peer promised {export.num_bytes} bytes, its pool has {memory.nbytes}"
            )
        return InprocRemotePool(self._hub, export.token)
