"""What travels between two pools over a stream socket, and how the two sides greet each other.

::

    receiver -> writer   magic | nonce
    writer -> receiver   pool, session, nonce, generation, size of the pool, name | proof
    receiver -> writer   verdict | proof
    then, again and again
    writer -> receiver   number, bytes, pieces | where each piece goes and how long it is | bytes
    receiver -> writer   number | verdict          once all of it lies in the pool

All numbers are little-endian. Each side proves with an HMAC over the other's nonce that it knows
the cluster secret, so that what was recorded of another stream is worthless.

A *session* is one writer's view of one pool; it may have several streams, all of the same
*generation*. When one breaks, all are given up and made again with the next generation: as soon as
the receiver has admitted a stream of it, it takes nothing more from the older ones, whatever is
still in their buffers.
"""

from __future__ import annotations

import hashlib
import hmac
import select
import socket
import ssl
import struct
import time
from dataclasses import dataclass, replace

import numpy as np

from pdserve.core.errors import ProofError
from pdserve.transport.scatter import Cursor, Numbers, whole
from pdserve.transport.tls import Tls

MAGIC = b"pdkv\x00\x00\x00\x01"
NONCE_BYTES = 16
PROOF_BYTES = 32
GREETING = struct.Struct(f"<8s{NONCE_BYTES}s")
REQUEST = struct.Struct(f"<16s16s{NONCE_BYTES}sIQ255p{PROOF_BYTES}s")
VERDICT = struct.Struct(f"<B{PROOF_BYTES}s")
FRAME = struct.Struct("<QQQ")
ACK = struct.Struct("<QQ")

MAX_FRAME_PIECES = 1 << 16
WAKE_BYTES = 128 << 10
"""A reader that is woken for less spends its time on waking up."""
UNIX_BUFFER_BYTES = 1 << 20
"""A writer is woken when three quarters of its buffer are free: a small one would run empty."""
GREETING_TIMEOUT_S = 5.0

TAKEN, UNKNOWN, REVOKED, STALE = range(4)
"""Verdicts: over a session, or over what came. `UNKNOWN`: no such pool, or a place outside it."""

WHY = {
    UNKNOWN: "the peer has no such pool, or it is of another size",
    REVOKED: "the peer counts this process as gone",
    STALE: "a later stream of this writer has replaced this one",
}


class Channel:
    """A connected stream socket that never blocks by itself. It owns the socket."""

    def __init__(self, connected: socket.socket) -> None:
        connected.setblocking(False)
        if connected.family == socket.AF_UNIX:
            connected.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, UNIX_BUFFER_BYTES)
        self._socket = connected
        self._poll = select.poll()
        self._fd = connected.fileno()
        self._wakes_late = connected.family != socket.AF_UNIX
        self._wanted = 1

    def fileno(self) -> int:
        return self._fd

    def read(self, cursor: Cursor) -> int:
        """As `Cursor.read_from`."""
        return cursor.read_from(self._fd)

    def write(self, cursor: Cursor) -> int:
        """As `Cursor.write_to`."""
        return cursor.write_to(self._fd)

    def write_out(self, cursor: Cursor, timeout_s: float) -> None:
        """As `Cursor.write_all_to`, if it can be had."""
        cursor.write_all_to(self._fd, timeout_s)

    def wait(self, events: int, timeout_s: float) -> bool:
        """Until there is something to do, or the stream has broken; False if neither in time."""
        self._poll.register(self._fd, events)
        return bool(self._poll.poll(timeout_s * 1000))

    def want(self, num_bytes: int) -> None:
        """Wake the reader when so many bytes are there, or a good part of them."""
        wanted = min(num_bytes, WAKE_BYTES)
        if wanted != self._wanted and self._wakes_late:
            self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVLOWAT, wanted)
            self._wanted = wanted

    def read_all(self, num_bytes: int, timeout_s: float) -> bytes:
        """So many bytes, more than 0. Raises `OSError`; `TimeoutError` if they take longer."""
        buffer = bytearray(num_bytes)
        self._move_all(whole(buffer), select.POLLIN, timeout_s)
        return bytes(buffer)

    def write_all(self, data: bytes, timeout_s: float) -> None:
        """As `read_all`, the other way."""
        self._move_all(whole(bytearray(data)), select.POLLOUT, timeout_s)

    def _move_all(self, cursor: Cursor, events: int, timeout_s: float) -> None:
        deadline_s = time.monotonic() + timeout_s
        move = self.read if events == select.POLLIN else self.write
        while cursor.remaining:
            try:
                move(cursor)
            except BlockingIOError:
                left_s = deadline_s - time.monotonic()
                if left_s <= 0 or not self.wait(events, left_s):
                    raise TimeoutError("the peer says nothing") from None

    def shutdown(self) -> None:
        """Wake whoever waits here; reads and writes fail from now on. From any thread."""
        try:
            self._socket.shutdown(socket.SHUT_RDWR)
        except OSError:
            return  # the peer was faster

    def close(self) -> None:
        """By the thread that uses it, or when none does."""
        self._socket.close()


class TlsChannel(Channel):
    """A channel inside TLS: one copy more on each side, and no scatter/gather."""

    def __init__(self, connected: socket.socket, context: ssl.SSLContext, is_server: bool) -> None:
        connected.setblocking(False)
        self._tls = context.wrap_socket(
            connected, server_side=is_server, do_handshake_on_connect=False
        )
        super().__init__(self._tls)
        self._wakes_late = False  # what OpenSSL has read already would be waited for again

    def greet(self, timeout_s: float) -> None:
        """The TLS handshake. Raises `OSError`."""
        deadline_s = time.monotonic() + timeout_s
        while True:
            try:
                self._tls.do_handshake()
                return
            except ssl.SSLWantReadError:
                events = select.POLLIN
            except ssl.SSLWantWriteError:
                events = select.POLLOUT
            left_s = deadline_s - time.monotonic()
            if left_s <= 0 or not self.wait(events, left_s):
                raise TimeoutError("the peer says nothing")

    def read(self, cursor: Cursor) -> int:
        try:
            got = self._tls.recv_into(cursor.piece())
        except (ssl.SSLWantReadError, ssl.SSLWantWriteError):
            raise BlockingIOError from None
        if got == 0:
            raise ConnectionError("closed by the peer")
        cursor.advance(got)
        return got

    def write(self, cursor: Cursor) -> int:
        try:
            sent = self._tls.send(cursor.piece())
        except (ssl.SSLWantReadError, ssl.SSLWantWriteError):
            raise BlockingIOError from None
        cursor.advance(sent)
        return sent

    def write_out(self, cursor: Cursor, timeout_s: float) -> None:
        """OpenSSL takes one piece at a time."""

    def wait(self, events: int, timeout_s: float) -> bool:
        if events & select.POLLIN and self._tls.pending():
            return True
        return super().wait(events, timeout_s)


def channel_over(connected: socket.socket, tls: Tls | None, *, is_server: bool) -> Channel:
    """The connected socket, inside TLS if there is any and it leaves the host. Raises `OSError`;
    the socket is then closed, or still the caller's to close."""
    if tls is None or connected.family == socket.AF_UNIX:
        return Channel(connected)
    channel = TlsChannel(connected, tls.server if is_server else tls.client, is_server)
    try:
        channel.greet(GREETING_TIMEOUT_S)
    except BaseException:
        channel.close()
        raise
    return channel


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """What a writer says first. ``name`` is that of `base.Writer`, at most 254 bytes."""

    pool: bytes
    session: bytes
    nonce: bytes
    generation: int
    num_bytes: int
    name: str
    proof: bytes = bytes(PROOF_BYTES)

    def pack(self) -> bytes:
        return REQUEST.pack(
            *(self.pool, self.session, self.nonce, self.generation, self.num_bytes),
            *(self.name.encode(), self.proof),
        )

    @classmethod
    def unpack(cls, data: bytes) -> Request:
        """Raises `ProofError` for what is no request."""
        pool, session, nonce, generation, num_bytes, name, proof = REQUEST.unpack(data)
        try:
            text = name.decode()
        except UnicodeDecodeError as error:
            raise ProofError("a stream for KV begins with a name that is no text") from error
        return cls(
            pool=pool,
            session=session,
            nonce=nonce,
            generation=generation,
            num_bytes=num_bytes,
            name=text,
            proof=proof,
        )

    def proved(self, secret: bytes, asked: bytes) -> Request:
        """With the proof for the receiver's nonce."""
        return replace(self, proof=self._proof(secret, asked))

    def check(self, secret: bytes, asked: bytes) -> None:
        """Raises `ProofError` if its sender does not know the secret."""
        if not hmac.compare_digest(self.proof, self._proof(secret, asked)):
            raise ProofError("a writer does not know the cluster secret")

    def _proof(self, secret: bytes, asked: bytes) -> bytes:
        bare = replace(self, proof=bytes(PROOF_BYTES)).pack()
        return hmac.new(secret, b"write" + asked + bare, hashlib.sha256).digest()


def pack_verdict(verdict: int, secret: bytes, asked: bytes) -> bytes:
    """``asked`` is the writer's nonce."""
    return VERDICT.pack(verdict, _verdict_proof(verdict, secret, asked))


def unpack_verdict(data: bytes, secret: bytes, asked: bytes) -> int:
    """Raises `ProofError` if the receiver does not know the secret."""
    verdict, proof = VERDICT.unpack(data)
    if not hmac.compare_digest(proof, _verdict_proof(verdict, secret, asked)):
        raise ProofError("the peer that takes KV does not know the cluster secret")
    return int(verdict)


def _verdict_proof(verdict: int, secret: bytes, asked: bytes) -> bytes:
    return hmac.new(secret, b"taken" + asked + bytes((verdict,)), hashlib.sha256).digest()


def pack_frame(number: int, targets: Numbers, lengths: Numbers) -> bytearray:
    """All of a frame but the bytes that it carries."""
    head = bytearray(FRAME.pack(number, int(lengths.sum()), len(targets)))
    head += np.stack((targets, lengths), axis=1).astype("<i8").tobytes()
    return head


def unpack_pieces(data: bytes) -> tuple[Numbers, Numbers]:
    """(targets, lengths) of a frame's second part."""
    table = np.frombuffer(data, "<i8").reshape(-1, 2)
    return table[:, 0].astype(np.int64), table[:, 1].astype(np.int64)


def lies_inside(targets: Numbers, lengths: Numbers, num_bytes: int, total: int) -> bool:
    """Do these pieces, which a peer names, lie in a pool of that size and add up to ``total``?"""
    if not len(targets) or targets.min() < 0 or lengths.min() < 1 or lengths.max() > num_bytes:
        return False
    # No sum overflows: each length is at most the pool's size.
    return bool((targets <= num_bytes - lengths).all()) and int(lengths.sum()) == total
