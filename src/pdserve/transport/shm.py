"""Bytes between processes of one host, through shared memory that has no name.

The owner makes an anonymous file (`memfd_create`), maps it, seals it against any change of its size
and computes in the mapping. A peer gets the descriptor over a Unix socket, maps it too and writes
with plain copies: one-sided, the owner's process takes no part. There is nothing to clean up after
a `kill -9`: the kernel frees the memory with its last mapping, and a container's limit on /dev/shm
does not apply.

The seals are what lets a writer trust a peer's memory: a file that could shrink would turn a write
into SIGBUS.
"""

from __future__ import annotations

import errno
import fcntl
import mmap
import os
import stat
from collections.abc import Iterable, Sequence

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

SIZE_SEALS = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW
"""What an attaching peer insists on."""

_MADV_POPULATE_WRITE = 23  # Linux 5.14; not yet named by `mmap`.
_POPULATE_BYTES = 8 << 20  # `madvise` keeps the GIL: other threads get their turn in between.


def _populate(mapping: mmap.mmap, num_bytes: int) -> None:
    """Take the page faults of the whole mapping now, where the kernel can do it at once."""
    try:
        for start in range(0, num_bytes, _POPULATE_BYTES):
            mapping.madvise(_MADV_POPULATE_WRITE, start, min(_POPULATE_BYTES, num_bytes - start))
    except OSError as error:
        if error.errno != errno.EINVAL:
            raise
        # An older kernel, which does not know the advice: pages come when they are touched.


def close_all(descriptors: Iterable[int]) -> None:
    """Give back descriptors that nobody will use; what is none of this process is ignored."""
    for descriptor in descriptors:
        try:
            os.close(descriptor)
        except (OSError, OverflowError):
            continue  # Not a descriptor of this process: nothing to give back.


class ShmPool(Pool):
    """Memory of this process that others can map."""

    def __init__(self, num_bytes: int, *, prefault: bool) -> None:
        self._num_bytes = num_bytes
        self._descriptor = os.memfd_create("pdserve-kv", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        try:
            os.ftruncate(self._descriptor, num_bytes)
            fcntl.fcntl(self._descriptor, fcntl.F_ADD_SEALS, SIZE_SEALS | fcntl.F_SEAL_SEAL)
            mapping = mmap.mmap(self._descriptor, num_bytes)
            if prefault:
                _populate(mapping, num_bytes)
        except BaseException:
            self.close()
            raise
        self.memory = memoryview(mapping)

    def export(self, writer: Writer = KIN) -> PoolExport:
        if self._descriptor < 0:
            raise TransferError("the pool is closed and cannot be exported")
        return PoolExport("shm", b"", self._num_bytes, (os.dup(self._descriptor),))

    def close(self) -> None:
        # Never unmapped by hand: tensors may still look at it, and the last one frees it.
        self.memory = memoryview(bytearray())
        descriptor, self._descriptor = self._descriptor, -1
        if descriptor >= 0:
            os.close(descriptor)


class ShmRemotePool(RemotePool):
    """A peer's memory, mapped here. The peer's death does not disturb a writer."""

    def __init__(self, mapping: mmap.mmap) -> None:
        self._memory: memoryview | None = memoryview(mapping)

    def write(self, source: memoryview, regions: Sequence[Region]) -> None:
        memory = self._memory
        if memory is None:
            raise TransferError("this side has closed its view of the peer's pool")
        copy_regions(source, memory, regions)

    def close(self) -> None:
        self._memory = None


class ShmTransport(Transport):
    """``prefault`` commits a pool's memory when it is allocated or attached, so that neither a step
    nor a transfer takes page faults, and too large a pool fails at the start."""

    name = "shm"

    def __init__(self, *, prefault: bool = True) -> None:
        self._prefault = prefault

    def allocate(self, num_bytes: int) -> Pool:
        assert num_bytes > 0, "an empty pool holds no block"
        try:
            return ShmPool(num_bytes, prefault=self._prefault)
        except (OSError, OverflowError, ValueError) as error:
            raise ConfigError(
                f"{num_bytes} bytes of shared memory for the KV pool cannot be had ({error}): "
                "serve with fewer blocks"
            ) from error

    def attach(self, export: PoolExport) -> RemotePool:
        try:
            if export.transport != self.name or len(export.fds) != 1 or export.num_bytes <= 0:
                raise TransferError(f"not a shared-memory pool: {export}")
            mapping = self._map(export.fds[0], export.num_bytes)
        except (OSError, OverflowError, ValueError) as error:
            raise TransferError(f"the peer's pool cannot be mapped: {error}") from error
        finally:
            close_all(export.fds)
        return ShmRemotePool(mapping)

    def _map(self, descriptor: int, num_bytes: int) -> mmap.mmap:
        """Map what the peer sent, once it is known to be what it should be."""
        status = os.fstat(descriptor)
        if not stat.S_ISREG(status.st_mode):
            raise TransferError("the peer's descriptor is not memory")
        if status.st_size != num_bytes:
            raise TransferError(
                f"the peer promised {num_bytes} bytes, its pool has {status.st_size}"
            )
        # Plain files have no seals: the kernel answers EINVAL.
        seals = fcntl.fcntl(descriptor, fcntl.F_GET_SEALS)
        if seals & SIZE_SEALS != SIZE_SEALS:
            raise TransferError(
                "the peer's pool is not sealed: its size could change under a write"
            )
        mapping = mmap.mmap(descriptor, num_bytes)
        if self._prefault:
            _populate(mapping, num_bytes)
        return mapping
