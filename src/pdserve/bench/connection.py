"""HTTP/1.1 as a load client needs it: many streams, little work for each chunk.

A `Connection` carries one exchange at a time: the request goes out in one write, and the answer is
told to an `Exchange` by calls from the event loop, without a task switch per chunk. That is why
there is no HTTP library below: with httpx a streamed token costs this process several times as much
(docs/benchmarking.md has the measurement), time that on a small machine the server would miss.
Bodies may come chunked, with a length, or until the server closes. Interim answers (1xx) are passed
over. A `Pool` keeps the connections that a server leaves open.
"""

from __future__ import annotations

import asyncio
import ssl
import time
from collections.abc import Callable
from typing import Protocol

from pdserve.core.errors import ProtocolError

MAX_HEAD_BYTES = 65536


class Exchange(Protocol):
    """Hears one answer: ``head``, then ``body`` any number of times, then ``end`` once.

    ``end`` may come at any moment, and alone, if the connection breaks or is dropped.
    """

    def head(self, status: int) -> None: ...

    def body(self, data: bytes, at_s: float) -> None: ...

    def end(self, error: Exception | None) -> None: ...


class StaleConnectionError(Exception):
    """The server had closed a kept connection before it saw the request: send it again."""


class Connection(asyncio.Protocol):
    """One connection; belongs to its event loop. ``idle`` is called when it can be used again."""

    def __init__(self, idle: Callable[[Connection], None]) -> None:
        self._tell_idle = idle
        self._exchange: Exchange | None = None
        self._transport: asyncio.Transport | None = None
        self._read: Callable[[float], bool] = self._read_head
        self._buffer = bytearray()
        self._left_bytes = 0
        self._heard_any = False
        self._keeps_open = True
        self._num_exchanges = 0

    @property
    def is_open(self) -> bool:
        return self._transport is not None and not self._transport.is_closing()

    def exchange(self, request: bytes, exchange: Exchange) -> None:
        """Send ``request``, head and body, and tell ``exchange`` what comes."""
        assert self._exchange is None, "one exchange at a time"
        assert self._transport is not None, "not connected"
        self._exchange = exchange
        self._read = self._read_head
        self._heard_any = False
        self._num_exchanges += 1
        self._transport.write(request)

    def drop(self) -> None:
        """Close at once, as a client does that gives up."""
        if self._transport is not None:
            self._transport.abort()

    # --- called by the event loop -----------------------------------------------------------

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport

    def data_received(self, data: bytes) -> None:
        at_s = time.perf_counter()
        self._heard_any = True
        self._buffer += data
        try:
            while self._exchange is not None and self._read(at_s):
                pass
        except (ValueError, IndexError) as error:
            self._finish(ProtocolError(f"not an HTTP/1.1 answer: {error}"), keep=False)
        if self._exchange is None and self._buffer:
            self.drop()  # something that nobody asked for

    def connection_lost(self, error: Exception | None) -> None:
        self._transport = None
        if self._exchange is None:
            return
        if self._read == self._read_to_close and error is None:
            self._finish(None, keep=False)
        elif not self._heard_any and self._num_exchanges > 1:
            self._finish(StaleConnectionError(), keep=False)
        else:
            reason = str(error) if error is not None else "closed in the middle of an answer"
            self._finish(ConnectionResetError(reason), keep=False)

    # --- reading: each step gives True if it got somewhere ------------------------------------

    def _read_head(self, at_s: float) -> bool:
        end = self._buffer.find(b"\r\n\r\n")
        if end < 0:
            if len(self._buffer) > MAX_HEAD_BYTES:
                raise ValueError("its head does not end")
            return False
        first, *lines = bytes(self._buffer[:end]).split(b"\r\n")
        del self._buffer[: end + 4]
        version, status_text = first.split(b" ", 2)[:2]
        status = int(status_text)
        if not version.startswith(b"HTTP/1."):
            raise ValueError(repr(first[:40]))
        if 100 <= status < 200:
            return True
        fields = {}
        for line in lines:
            name, _, value = line.partition(b":")
            fields[name.strip().lower()] = value.strip().lower()
        self._keeps_open = fields.get(b"connection") != b"close" and version == b"HTTP/1.1"
        self._told().head(status)
        self._begin_body(fields)
        return True

    def _begin_body(self, fields: dict[bytes, bytes]) -> None:
        if fields.get(b"transfer-encoding", b"").endswith(b"chunked"):
            self._read = self._read_chunk
        elif b"content-length" in fields:
            self._left_bytes = int(fields[b"content-length"])
            self._read = self._read_length
        else:
            self._read = self._read_to_close

    def _read_chunk(self, at_s: float) -> bool:
        """All whole chunks that are there."""
        buffer, position, exchange = self._buffer, 0, self._told()
        while True:
            line_end = buffer.find(b"\r\n", position)
            if line_end < 0:
                break
            size = int(buffer[position:line_end].partition(b";")[0], 16)
            data_end = line_end + 2 + size
            if size == 0:
                return self._end_chunks(position)
            if len(buffer) < data_end + 2:
                break
            exchange.body(bytes(buffer[line_end + 2 : data_end]), at_s)
            position = data_end + 2
        del buffer[:position]
        return False

    def _end_chunks(self, position: int) -> bool:
        """Trailers, if any, end with an empty line."""
        del self._buffer[:position]
        end = self._buffer.find(b"\r\n\r\n")
        if end < 0:
            return False
        del self._buffer[: end + 4]
        self._finish(None, keep=self._keeps_open)
        return True

    def _read_length(self, at_s: float) -> bool:
        data = bytes(self._buffer[: self._left_bytes])
        del self._buffer[: self._left_bytes]
        self._left_bytes -= len(data)
        if data:
            self._told().body(data, at_s)
        if self._left_bytes == 0:
            self._finish(None, keep=self._keeps_open)
        return False

    def _read_to_close(self, at_s: float) -> bool:
        data = bytes(self._buffer)
        self._buffer.clear()
        if data:
            self._told().body(data, at_s)
        return False

    def _told(self) -> Exchange:
        assert self._exchange is not None
        return self._exchange

    def _finish(self, error: Exception | None, *, keep: bool) -> None:
        exchange, self._exchange = self._told(), None
        if keep and self.is_open:
            self._tell_idle(self)
        else:
            self.drop()
        exchange.end(error)


class Pool:
    """Connections to one server. Opens as many as are asked for at the same time."""

    def __init__(self, host: str, port: int, tls: ssl.SSLContext | None) -> None:
        self._host = host
        self._port = port
        self._tls = tls
        self._idle: list[Connection] = []
        self._all: set[Connection] = set()

    async def connection(self, *, fresh: bool = False) -> Connection:
        """One that is free now, newly opened if need be or if ``fresh``. Raises `OSError`."""
        while self._idle and not fresh:
            connection = self._idle.pop()
            if connection.is_open:
                return connection
            self._all.discard(connection)
        loop = asyncio.get_running_loop()
        _, opened = await loop.create_connection(
            lambda: Connection(self._idle.append), self._host, self._port, ssl=self._tls
        )
        self._all.add(opened)
        return opened

    def forget(self, connection: Connection) -> None:
        """It was closed, or is to be."""
        connection.drop()
        self._all.discard(connection)

    def close(self) -> None:
        for connection in self._all:
            connection.drop()
        self._all.clear()
        self._idle.clear()
