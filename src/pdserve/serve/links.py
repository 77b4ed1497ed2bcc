"""Links: how two processes of this host talk, over Unix stream sockets with abstract names.

An abstract name is random and leaves nothing on disk. Anybody on the host may connect to it, so the
first frame each way is a proof of the cluster secret (``transport.handshake``): until it has been
checked a link takes one small frame and nothing else, for a few seconds, and whatever is wrong with
it closes that link and touches no other.

The life of a link: `Link` is made from a connected socket and reads at once, guarded. `greet` (the
side that connected) or `answer` (the other) exchange the first frames; the descriptors of a KV pool
travel beside them. `Link.open` then names who hears the messages and the end. From there on
messages arrive in order, and `Link.send` never blocks: what the socket does not take is buffered up
to a bound, and a peer that lets the bound be reached is treated as broken. A link that has been
closed stays closed.
"""

from __future__ import annotations

import array
import asyncio
import contextlib
import os
import secrets
import socket
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

from pdserve.core.errors import ProtocolError
from pdserve.core.ids import Epoch, WorkerId
from pdserve.core.request import Role
from pdserve.transport.base import PoolExport
from pdserve.transport.handshake import (
    NONCE_BYTES,
    Hello,
    PoolOffer,
    Welcome,
    check_hello,
    check_welcome,
    prove,
)
from pdserve.transport.wire import Decoder, WireMessage, encode

MAX_BUFFERED_BYTES = 64 << 20
GREETING_TIMEOUT_S = 5.0
_READ_BYTES = 256 << 10
_MAX_FDS = 8
_BACKLOG = 128


def new_address() -> str:
    """A name for a listener that nobody can guess: of an abstract socket, without its NUL."""
    return f"pdserve-{secrets.token_hex(16)}"


def close_fds(fds: Iterable[int]) -> None:
    """Give descriptors back that nobody will use."""
    for fd in fds:
        with contextlib.suppress(OSError):
            os.close(fd)


@dataclass(frozen=True, slots=True, kw_only=True)
class Identity:
    """Who this side of a link is. ``role`` is None for the gateway; the secret is never shown."""

    worker: WorkerId
    epoch: Epoch
    role: Role | None
    secret: bytes = field(repr=False)


@dataclass(frozen=True, slots=True, kw_only=True)
class Peer:
    """Who proved to be on the other side, and the pool that it offers."""

    worker: WorkerId
    epoch: Epoch
    role: Role | None
    pool: PoolExport | None


class Link:
    """One end of a connection. Used on the event loop's thread only; owns the socket."""

    def __init__(
        self, connected: socket.socket, *, max_buffered_bytes: int = MAX_BUFFERED_BYTES
    ) -> None:
        connected.setblocking(False)
        self._socket = connected
        self._loop = asyncio.get_running_loop()
        self._decoder = Decoder(guarded=True)
        self._max_buffered_bytes = max_buffered_bytes
        self._unsent = bytearray()
        self._first: asyncio.Future[WireMessage] = self._loop.create_future()
        self._fds: list[int] = []
        self._received: Callable[[WireMessage], None] | None = None
        self._ended: Callable[[str], None] | None = None
        self._reason: str | None = None
        self._loop.add_reader(connected, self._read)

    @property
    def is_closed(self) -> bool:
        return self._reason is not None

    async def first_frame(self) -> tuple[WireMessage, tuple[int, ...]]:
        """The peer's first frame and the descriptors beside it, which the caller then owns.

        Raises `ProtocolError` if the link ends, or if nothing comes for `GREETING_TIMEOUT_S`.
        """
        try:
            frame = await asyncio.wait_for(asyncio.shield(self._first), GREETING_TIMEOUT_S)
        except TimeoutError:
            self.close("no first frame came in time")
            raise ProtocolError("no first frame came in time") from None
        fds, self._fds = tuple(self._fds), []
        return frame, fds

    def open(self, received: Callable[[WireMessage], None], ended: Callable[[str], None]) -> None:
        """The peer has proved itself: deliver its messages, and once, with the reason, the end."""
        self._received = received
        self._ended = ended
        if self._reason is not None:
            self._loop.call_soon(ended, self._reason)
            return
        self._loop.add_reader(self._socket, self._read)
        self._decode(self._decoder.admit)

    def send(self, message: WireMessage, fds: tuple[int, ...] = ()) -> None:
        """Send after everything sent before; on a closed link the message is dropped.

        The descriptors go with the first byte and are still the caller's.
        """
        if self._reason is not None:
            return
        try:
            frame = encode(message)
        except ProtocolError as error:
            self.close(f"a message cannot be sent: {error}")
            return
        sent = 0
        if not self._unsent:
            try:
                sent = self._send_now(frame, fds)
            except (BlockingIOError, InterruptedError):
                sent = 0
            except OSError as error:
                self.close(f"sending failed: {error}")
                return
        if sent < len(frame):
            assert not fds or sent, "a first frame finds an empty socket"
            self._buffer(frame, sent)

    def _send_now(self, frame: bytes, fds: tuple[int, ...]) -> int:
        if not fds:
            return self._socket.send(frame)
        rights = (socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", fds))
        return self._socket.sendmsg([frame], [rights])

    def _buffer(self, frame: bytes, start: int) -> None:
        if not self._unsent:
            self._loop.add_writer(self._socket, self._write)
        self._unsent += memoryview(frame)[start:]
        if len(self._unsent) > self._max_buffered_bytes:
            self.close(f"the peer has left {len(self._unsent)} bytes unread")

    def _write(self) -> None:
        try:
            sent = self._socket.send(self._unsent)
        except (BlockingIOError, InterruptedError):
            return
        except OSError as error:
            self.close(f"sending failed: {error}")
            return
        del self._unsent[:sent]
        if not self._unsent:
            self._loop.remove_writer(self._socket)

    def _read(self) -> None:
        try:
            data, fds, _, _ = socket.recv_fds(self._socket, _READ_BYTES, _MAX_FDS)
        except (BlockingIOError, InterruptedError):
            return
        except OSError as error:
            self.close(f"receiving failed: {error}")
            return
        self._fds += fds
        if not data:
            self.close("closed by the peer")
        elif fds and self._first.done():
            self.close("descriptors beside a frame that offers none")
        else:
            self._decode(lambda: self._decoder.feed(data))

    def _decode(self, step: Callable[[], list[WireMessage]]) -> None:
        try:
            messages = step()
        except ProtocolError as error:
            self.close(str(error))
            return
        for message in messages:
            if self._reason is not None:
                return
            if self._received is not None:
                self._received(message)
            else:  # nothing more is read until somebody has looked at it
                self._loop.remove_reader(self._socket)
                self._first.set_result(message)

    def close(self, reason: str) -> None:
        """Close now; what is not sent yet is dropped. Only the first reason counts."""
        if self._reason is not None:
            return
        self._reason = reason
        self._loop.remove_reader(self._socket)
        if self._unsent:
            self._loop.remove_writer(self._socket)
        self._socket.close()
        close_fds(self._fds)
        self._fds = []
        if not self._first.done():
            self._first.set_exception(ProtocolError(reason))
            self._first.exception()  # somebody may wait for it, nobody has to
        if self._ended is not None:
            self._loop.call_soon(self._ended, reason)


async def connect(address: str) -> Link:
    """A link to the listener of that name. Raises `OSError` if there is none."""
    unconnected = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    unconnected.setblocking(False)
    try:
        await asyncio.get_running_loop().sock_connect(unconnected, "\0" + address)
    except BaseException:
        unconnected.close()
        raise
    return Link(unconnected)


async def greet(link: Link, identity: Identity, pool: PoolExport | None) -> Peer:
    """First frames, from the side that connected. Takes the descriptors of ``pool``.

    Raises `ProtocolError` if the other side does not prove itself; the link is closed then.
    """
    hello = prove(
        Hello(
            worker=identity.worker,
            epoch=identity.epoch,
            role=identity.role,
            pool=None if pool is None else PoolOffer.of(pool),
            nonce=secrets.token_bytes(NONCE_BYTES),
        ),
        identity.secret,
    )
    _send_with_pool(link, hello, pool)
    frame, fds = await link.first_frame()
    try:
        return _peer(check_welcome(frame, identity.secret, hello), fds)
    except ProtocolError as error:
        close_fds(fds)
        link.close(str(error))
        raise


async def receive_hello(link: Link, identity: Identity) -> tuple[Hello, Peer]:
    """The other side's hello, checked. Raises `ProtocolError`; the link is closed then."""
    frame, fds = await link.first_frame()
    try:
        hello = check_hello(frame, identity.secret)
        return hello, _peer(hello, fds)
    except ProtocolError as error:
        close_fds(fds)
        link.close(str(error))
        raise


def answer(link: Link, identity: Identity, hello: Hello, pool: PoolExport | None) -> None:
    """Send the welcome to a hello that was accepted. Takes the descriptors of ``pool``."""
    welcome = prove(
        Welcome(
            worker=identity.worker,
            epoch=identity.epoch,
            role=identity.role,
            pool=None if pool is None else PoolOffer.of(pool),
            nonce=secrets.token_bytes(NONCE_BYTES),
            answers=hello.nonce,
        ),
        identity.secret,
    )
    _send_with_pool(link, welcome, pool)


def _send_with_pool(link: Link, frame: Hello | Welcome, pool: PoolExport | None) -> None:
    fds = () if pool is None else pool.fds
    try:
        link.send(frame, fds)
    finally:
        close_fds(fds)


def _peer(frame: Hello | Welcome, fds: tuple[int, ...]) -> Peer:
    if frame.pool is None and fds:
        raise ProtocolError(f"{frame.worker} sent descriptors and offers no pool")
    pool = None if frame.pool is None else frame.pool.export(fds)
    return Peer(worker=frame.worker, epoch=frame.epoch, role=frame.role, pool=pool)


class Listener:
    """Accepts links on an abstract name and hands each one, unproved, to ``accepted``."""

    def __init__(self, address: str, accepted: Callable[[Link], None]) -> None:
        self.address = address
        self._accepted = accepted
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self._socket.setblocking(False)
        self._socket.bind("\0" + address)
        self._socket.listen(_BACKLOG)
        asyncio.get_running_loop().add_reader(self._socket, self._accept)

    def _accept(self) -> None:
        try:
            connected, _ = self._socket.accept()
        except OSError:
            return  # it went away before it was looked at
        self._accepted(Link(connected))

    def close(self) -> None:
        """Take no more links; those that are open stay open."""
        if self._socket.fileno() >= 0:
            asyncio.get_running_loop().remove_reader(self._socket)
            self._socket.close()
