"""Connections that do not ask for anything, or do not come to an end of asking.

uvicorn waits without an end for the first request of a connection, and for the end of its headers.
A client that sends a byte now and then would hold a connection for ever, and some thousands of them
all that the server may have. `guarded` gives uvicorn's protocol a clock: a connection on which
nothing is being answered has so long to send the headers of a request. It also bounds their size
where uvicorn's parser (httptools) does not.
"""

from __future__ import annotations

import asyncio
from typing import Any

from uvicorn.protocols.http.auto import AutoHTTPProtocol

MAX_HEADER_BYTES = 64 * 1024


class _Guard(asyncio.Protocol):
    """In front of a protocol class of uvicorn. Uses of it: ``cycle``, the request that is being
    answered, with ``response_complete``; ``transport``."""

    read_timeout_s: float
    _clock: asyncio.TimerHandle | None = None
    cycle: Any
    transport: Any

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        super().connection_made(transport)
        self._start()

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        if self._is_answering:
            self._stop()
        elif self._clock is None:
            self._start()

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop()
        super().connection_lost(exc)

    @property
    def _is_answering(self) -> bool:
        return self.cycle is not None and not self.cycle.response_complete

    def _start(self) -> None:
        loop = asyncio.get_running_loop()
        self._clock = loop.call_later(self.read_timeout_s, self._time_is_up)

    def _stop(self) -> None:
        if self._clock is not None:
            self._clock.cancel()
            self._clock = None

    def _time_is_up(self) -> None:
        self._clock = None
        if not self._is_answering:
            self._give_up(b"408 Request Timeout")

    def _give_up(self, status: bytes) -> None:
        if self.transport.is_closing():
            return
        if not self._is_answering:
            self.transport.write(
                b"HTTP/1.1 %b\r\nconnection: close\r\ncontent-length: 0\r\n\r\n" % status
            )
        self.transport.close()


class _CountingGuard(_Guard):
    """The same in front of httptools, which reads headers and trailers of any length, those of the
    next request beside an answer too: what comes while no body does is counted."""

    _num_header_bytes = 0

    def data_received(self, data: bytes) -> None:
        self._num_header_bytes += len(data)
        super().data_received(data)
        if self._num_header_bytes > MAX_HEADER_BYTES:
            self._give_up(b"431 Request Header Fields Too Large")

    def on_message_begin(self) -> None:
        self._num_header_bytes = 0
        super().on_message_begin()  # type: ignore[misc]  # the protocol's, which comes after this

    def on_body(self, body: bytes) -> None:
        self._num_header_bytes = 0
        super().on_body(body)  # type: ignore[misc]


def guarded(
    read_timeout_s: float, protocol: type[asyncio.Protocol] = AutoHTTPProtocol
) -> type[asyncio.Protocol]:
    """uvicorn's protocol, with a clock of so many seconds."""
    guard = _CountingGuard if hasattr(protocol, "on_message_begin") else _Guard
    return type("GuardedProtocol", (guard, protocol), {"read_timeout_s": read_timeout_s})
