"""Bytes between hosts, over stream sockets: TCP, or AF_UNIX where both are on one host.

The owner computes in its memory and listens; whoever writes connects with one or more streams,
proves the cluster secret, and sends frames that say where their bytes go (``transport.outbound``).
The owner reads them straight into the pool and acknowledges (``transport.inbound``), so that what
has been written is there.

A pool has two doors: an abstract socket for writers of this host, and a TCP port for others, if it
is told to listen. Its export names both, and the writer takes the first that it can use.
"""

from __future__ import annotations

import mmap
from dataclasses import dataclass, field

import msgspec

from pdserve.core.errors import ConfigError, TransferError
from pdserve.transport.addresses import (
    listen_tcp,
    listen_unix,
    new_name,
    port_of,
    tcp_address,
    unix_address,
)
from pdserve.transport.base import KIN, Pool, PoolExport, RemotePool, Transport, Writer
from pdserve.transport.inbound import Inbound
from pdserve.transport.outbound import STALL_S, Door, Outbound
from pdserve.transport.shm import close_all
from pdserve.transport.tls import Tls

MAX_POOL_BYTES = 1 << 62
MAX_NAME_BYTES = 200
POOL_ID_BYTES = 16


@dataclass(frozen=True, slots=True, kw_only=True)
class SocketOptions:
    """``listen``: (address of this host as peers reach it, port; 0 takes a free one); None: only
    from this host. ``num_streams`` of a writer to another host; on one host a second gains
    nothing."""

    secret: bytes = field(repr=False)
    listen: tuple[str, int] | None = None
    num_streams: int = 2
    stall_s: float = STALL_S
    tls: Tls | None = None


class _Where(msgspec.Struct, array_like=True, frozen=True):
    """The token of an export."""

    pool: bytes
    addresses: tuple[str, ...]
    writer: str


class SocketDoor:
    """Takes writers into a memory that somebody else owns."""

    def __init__(self, memory: memoryview, options: SocketOptions) -> None:
        name = new_name()
        listening = [listen_unix(name)]
        addresses = [unix_address(name)]
        if options.listen is not None:
            host, port = options.listen
            try:
                listening.append(listen_tcp(host, port))
            except BaseException:
                listening[0].close()
                raise
            addresses.append(tcp_address(host, port_of(listening[-1])))
        self._addresses = tuple(addresses)
        self._num_bytes = memory.nbytes
        self._closed = False
        self._inbound = Inbound(memory, listening, secret=options.secret, tls=options.tls)

    def export(self, writer: Writer) -> PoolExport:
        """Raises `TransferError` if closed."""
        if self._closed:
            raise TransferError("the pool is closed and cannot be exported")
        where = _Where(self._inbound.pool_id, self._addresses, writer.name)
        return PoolExport(SocketTransport.name, msgspec.msgpack.encode(where), self._num_bytes)

    def revoke(self, writer: str) -> None:
        self._inbound.revoke(writer)

    def close(self) -> None:
        self._closed = True
        self._inbound.close()


class SocketPool(Pool):
    """Private memory with a door."""

    def __init__(self, num_bytes: int, options: SocketOptions) -> None:
        self.memory = memoryview(mmap.mmap(-1, num_bytes))
        self._door = SocketDoor(self.memory, options)

    def export(self, writer: Writer = KIN) -> PoolExport:
        return self._door.export(writer)

    def revoke(self, writer: str) -> None:
        self._door.revoke(writer)

    def close(self) -> None:
        self._door.close()
        self.memory = memoryview(bytearray())


class SocketTransport(Transport):
    """What the others cannot reach each other without."""

    name = "tcp"

    def __init__(self, options: SocketOptions) -> None:
        assert options.secret, "a stream without a secret proves nothing"
        self._options = options

    def allocate(self, num_bytes: int) -> Pool:
        assert num_bytes > 0, "an empty pool holds no block"
        try:
            return SocketPool(num_bytes, self._options)
        except (OSError, OverflowError, ValueError) as error:
            raise ConfigError(
                f"{num_bytes} bytes of memory for the KV pool cannot be had ({error}): serve with "
                "fewer blocks"
            ) from error

    def attach(self, export: PoolExport) -> RemotePool:
        close_all(export.fds)
        if export.transport != self.name or export.fds:
            raise TransferError(f"not a pool that is reached by a socket: {export}")
        try:
            where = msgspec.msgpack.decode(export.token, type=_Where, strict=True)
        except (ValueError, msgspec.MsgspecError) as error:
            raise TransferError(f"not a pool that is reached by a socket: {error}") from error
        is_sane = (
            0 < export.num_bytes <= MAX_POOL_BYTES
            and len(where.pool) == POOL_ID_BYTES
            and len(where.writer.encode()) <= MAX_NAME_BYTES
        )
        if not is_sane:
            raise TransferError(f"the peer offers a pool that cannot be: {export}")
        return Outbound(
            Door(
                pool=where.pool,
                addresses=where.addresses,
                writer=where.writer,
                num_bytes=export.num_bytes,
            ),
            secret=self._options.secret,
            num_streams=self._options.num_streams,
            stall_s=self._options.stall_s,
            tls=self._options.tls,
        )
