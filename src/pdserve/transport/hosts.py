"""Shared memory for kin, sockets for everybody else, into the same pool.

A worker whose cluster spans hosts has a pool that others can reach both ways. Memory that is mapped
cannot be taken back, so only those get it whose death is always known: the processes of the same
launcher. Workers that joined by themselves write over sockets, also on the same host, where the
owner of the pool decides what lands.
"""

from __future__ import annotations

from pdserve.transport.base import KIN, Pool, PoolExport, RemotePool, Transport, Writer
from pdserve.transport.shm import ShmTransport
from pdserve.transport.tcp import SocketDoor, SocketOptions, SocketTransport


class HostsPool(Pool):
    """Shared memory with a door for those who are no kin."""

    def __init__(self, inner: Pool, options: SocketOptions) -> None:
        self._inner = inner
        self.memory = inner.memory
        self._door = SocketDoor(inner.memory, options)

    def export(self, writer: Writer = KIN) -> PoolExport:
        return self._inner.export(writer) if writer.is_kin else self._door.export(writer)

    def revoke(self, writer: str) -> None:
        self._door.revoke(writer)

    def close(self) -> None:
        self._door.close()
        self._inner.close()
        self.memory = memoryview(bytearray())


class HostsTransport(Transport):
    """Goes by what an export says, and offers each writer what fits it."""

    name = "hosts"

    def __init__(self, options: SocketOptions, *, prefault: bool = True) -> None:
        self._options = options
        self._shm = ShmTransport(prefault=prefault)
        self._sockets = SocketTransport(options)

    def allocate(self, num_bytes: int) -> Pool:
        inner = self._shm.allocate(num_bytes)
        try:
            return HostsPool(inner, self._options)
        except BaseException:
            inner.close()
            raise

    def attach(self, export: PoolExport) -> RemotePool:
        is_shared = export.transport == self._shm.name
        return (self._shm if is_shared else self._sockets).attach(export)
