"""The receiver's end of KV that comes over sockets: straight from the socket into the pool.

One thread accepts streams, one more for each stream reads it. The owner of the pool decides what
lands: each system call that moves bytes into the pool is made under the stream's lock, and a stream
that was barred there makes no other. So when `Inbound.revoke` or `Inbound.close` returns, or a
stream of a later generation is admitted, what the older ones still held in their buffers is lost,
as it should be: its blocks may belong to somebody else by now.

Back-pressure is the socket's: who is not read from fills its buffer, and the writer waits.
"""

from __future__ import annotations

import contextlib
import logging
import os
import select
import socket
import threading
from collections.abc import Sequence

from pdserve.core.errors import ProofError
from pdserve.transport.addresses import tune
from pdserve.transport.scatter import Cursor
from pdserve.transport.streams import (
    ACK,
    FRAME,
    GREETING,
    GREETING_TIMEOUT_S,
    MAGIC,
    MAX_FRAME_PIECES,
    NONCE_BYTES,
    REQUEST,
    REVOKED,
    STALE,
    TAKEN,
    UNKNOWN,
    Channel,
    Request,
    channel_over,
    lies_inside,
    pack_verdict,
    unpack_pieces,
)
from pdserve.transport.tls import Tls

log = logging.getLogger(__name__)

MAX_STREAMS = 1024
IDLE_S = 3600.0
"""How long a read waits before it looks again; a stream that ends is noticed at once."""


class Inbound:
    """Streams into one pool. ``memory`` is the pool's; the listening sockets are taken over."""

    def __init__(
        self,
        memory: memoryview,
        listening: Sequence[socket.socket],
        *,
        secret: bytes,
        tls: Tls | None,
    ) -> None:
        self.pool_id = os.urandom(16)
        self._memory = memory
        self._secret = secret
        self._tls = tls
        self._lock = threading.Lock()
        self._streams: set[_Stream] = set()
        self._generations: dict[tuple[str, bytes], int] = {}
        self._revoked: set[str] = set()
        self._closed = False
        self._listening = list(listening)
        self._wake, self._woken = os.pipe()
        self._thread = threading.Thread(target=self._accept, name="kv-accept", daemon=True)
        self._thread.start()

    def revoke(self, writer: str) -> None:
        """Nothing of this writer lands any more, now and later. From any thread."""
        with self._lock:
            self._revoked.add(writer)
            for key in [key for key in self._generations if key[0] == writer]:
                del self._generations[key]
            ending = [stream for stream in self._streams if stream.writer == writer]
        for stream in ending:
            stream.bar()

    def close(self) -> None:
        """Nothing lands any more, whoever writes it. Ends all threads."""
        with self._lock:
            if self._closed:
                return
            self._closed = True
            streams = list(self._streams)
        for stream in streams:
            stream.bar()
        os.write(self._woken, b"x")
        self._thread.join()
        for stream in streams:
            stream.join()
        for listening in self._listening:
            listening.close()
        os.close(self._wake)
        os.close(self._woken)
        self._memory = memoryview(b"")

    # --- of the accepting thread --------------------------------------------------------------

    def _accept(self) -> None:
        poll = select.poll()
        poll.register(self._wake, select.POLLIN)
        for listening in self._listening:
            poll.register(listening, select.POLLIN)
        by_fd = {listening.fileno(): listening for listening in self._listening}
        while True:
            for fd, _ in poll.poll():
                if fd == self._wake:
                    return
                with contextlib.suppress(OSError):  # it went away before it was looked at
                    self._begin(by_fd[fd].accept()[0])

    def _begin(self, connected: socket.socket) -> None:
        with self._lock:
            if self._closed or len(self._streams) >= MAX_STREAMS:
                connected.close()
                return
            tune(connected)
            stream = _Stream(self, connected, self._memory)
            self._streams.add(stream)
        stream.start()

    # --- of the streams' threads --------------------------------------------------------------

    @property
    def secret(self) -> bytes:
        return self._secret

    def channel(self, connected: socket.socket) -> Channel:
        """The socket, inside TLS if there is any. Raises `OSError`."""
        return channel_over(connected, self._tls, is_server=True)

    def admit(self, stream: _Stream, asked: Request) -> int:
        """The verdict over a writer that has proved itself. Bars what it replaces."""
        key = (asked.name, asked.session)
        with self._lock:
            if self._closed or (asked.pool, asked.num_bytes) != (self.pool_id, self._memory.nbytes):
                return UNKNOWN
            if asked.name in self._revoked:
                return REVOKED
            if asked.generation < self._generations.get(key, 0):
                return STALE
            self._generations[key] = asked.generation
            stream.writer, stream.session = asked.name, asked.session
            stream.generation = asked.generation
            older = [other for other in self._streams if other.is_replaced_by(stream)]
        for other in older:
            other.bar()
        return TAKEN

    def ended(self, stream: _Stream) -> None:
        with self._lock:
            self._streams.discard(stream)


class _Stream:
    """One stream, on a thread of its own from the first byte to the last."""

    def __init__(self, inbound: Inbound, connected: socket.socket, memory: memoryview) -> None:
        self.writer = ""
        self.session = b""
        self.generation = 0
        self._inbound = inbound
        self._memory = memory
        self._socket = connected
        self._lock = threading.Lock()
        self._channel: Channel | None = None
        self._barred = False
        self._thread = threading.Thread(target=self._run, name="kv-stream", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def join(self) -> None:
        self._thread.join()

    def is_replaced_by(self, other: _Stream) -> bool:
        return (self.writer, self.session) == (other.writer, other.session) and (
            self.generation < other.generation
        )

    def bar(self) -> None:
        """Not a byte more lands. Waits for the system call that is under way, which never
        blocks."""
        with self._lock:
            self._barred = True
            if self._channel is not None:
                self._channel.shutdown()

    def _run(self) -> None:
        try:
            channel = self._inbound.channel(self._socket)
        except OSError as error:
            log.warning("a stream for KV was refused: %s", error)
            self._socket.close()
            self._inbound.ended(self)
            return
        try:
            with self._lock:
                self._channel = channel
            if self._greet(channel):
                while not self._barred:
                    self._take_frame(channel)
        except ProofError as error:
            log.warning("a stream for KV was refused: %s", error)
        except OSError as error:
            log.debug("a stream of %s ended: %s", self.writer or "nobody", error)
        finally:
            self._inbound.ended(self)
            with self._lock:
                self._channel = None
                channel.close()
            self._memory = memoryview(b"")

    def _greet(self, channel: Channel) -> bool:
        nonce = os.urandom(NONCE_BYTES)
        channel.write_all(GREETING.pack(MAGIC, nonce), GREETING_TIMEOUT_S)
        asked = Request.unpack(channel.read_all(REQUEST.size, GREETING_TIMEOUT_S))
        asked.check(self._inbound.secret, nonce)
        verdict = self._inbound.admit(self, asked)
        answer = pack_verdict(verdict, self._inbound.secret, asked.nonce)
        channel.write_all(answer, GREETING_TIMEOUT_S)
        return verdict == TAKEN

    def _take_frame(self, channel: Channel) -> None:
        number, total, count = FRAME.unpack(channel.read_all(FRAME.size, IDLE_S))
        if not 0 < count <= MAX_FRAME_PIECES:
            raise ConnectionError(f"a frame of {count} pieces")
        targets, lengths = unpack_pieces(channel.read_all(16 * count, GREETING_TIMEOUT_S))
        if not lies_inside(targets, lengths, self._memory.nbytes, total):
            channel.write_all(ACK.pack(number, UNKNOWN), GREETING_TIMEOUT_S)
            raise ConnectionError("a frame goes beyond the pool")
        cursor = Cursor(self._memory, targets, lengths)
        while cursor.remaining:
            try:
                with self._lock:
                    if self._barred:
                        return
                    channel.read(cursor)
            except BlockingIOError:
                channel.want(cursor.remaining)
                channel.wait(select.POLLIN, IDLE_S)
        channel.want(1)
        channel.write_all(ACK.pack(number, TAKEN), GREETING_TIMEOUT_S)
