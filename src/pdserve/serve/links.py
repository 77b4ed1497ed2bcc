"""Links: how two processes talk, over Unix stream sockets with abstract names, or over TCP.

An abstract name is random and leaves nothing on disk. Anybody on the host may connect to it, and to
a TCP port anybody at all, so the first frame each way is a proof of the cluster secret
(``transport.handshake``): until it has been checked a link takes one small frame and nothing else,
for a few seconds, and whatever is wrong with it closes that link and touches no other. TCP links
are inside TLS if the cluster has certificates; what happens on one host is not.

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
import logging
import os
import socket
import ssl
from collections.abc import Callable, Iterable, Sequence

from pdserve.core.errors import ProtocolError
from pdserve.transport.addresses import (
    UNIX,
    listen_tcp,
    listen_unix,
    new_name,
    port_of,
    resolve,
    tcp_address,
    tune,
    unix_address,
    usable,
)
from pdserve.transport.tls import Tls
from pdserve.transport.wire import Decoder, WireMessage, encode

log = logging.getLogger(__name__)

MAX_BUFFERED_BYTES = 64 << 20
GREETING_TIMEOUT_S = 5.0
CONNECT_TIMEOUT_S = 3.0
_READ_BYTES = 256 << 10
_MAX_FDS = 8
_NOT_NOW = (BlockingIOError, InterruptedError, ssl.SSLWantReadError, ssl.SSLWantWriteError)


def new_address() -> str:
    """An address on this host that nobody can guess."""
    return unix_address(new_name())


def close_fds(fds: Iterable[int]) -> None:
    """Give descriptors back that nobody will use."""
    for fd in fds:
        with contextlib.suppress(OSError):
            os.close(fd)


def _remote_host(connected: socket.socket) -> str:
    try:
        return str(connected.getpeername()[0])
    except OSError:
        return "unknown"  # it is gone already


class Link:
    """One end of a connection. Used on the event loop's thread only; owns the socket."""

    def __init__(
        self, connected: socket.socket, *, max_buffered_bytes: int = MAX_BUFFERED_BYTES
    ) -> None:
        connected.setblocking(False)
        self._socket = connected
        self.is_remote = connected.family != socket.AF_UNIX
        self.local_host = str(connected.getsockname()[0]) if self.is_remote else ""
        self.remote_host = _remote_host(connected) if self.is_remote else "this host"
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

    def read_on(self) -> None:
        """The frame was a challenge: another one comes before the proof."""
        self._first = self._loop.create_future()
        self._resume_reading()
        self._decode(lambda: self._decoder.feed(b""))

    def open(self, received: Callable[[WireMessage], None], ended: Callable[[str], None]) -> None:
        """The peer has proved itself: deliver its messages, and once, with the reason, the end."""
        self._received = received
        self._ended = ended
        if self._reason is not None:
            self._loop.call_soon(ended, self._reason)
            return
        self._resume_reading()
        self._decode(self._decoder.admit)

    def _resume_reading(self) -> None:
        self._loop.add_reader(self._socket, self._read)
        if isinstance(self._socket, ssl.SSLSocket):
            self._loop.call_soon(self._read)  # what is decrypted already wakes nobody

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
            except _NOT_NOW:
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
        except _NOT_NOW:
            return
        except OSError as error:
            self.close(f"sending failed: {error}")
            return
        del self._unsent[:sent]
        if not self._unsent:
            self._loop.remove_writer(self._socket)

    def _read(self) -> None:
        if self._reason is not None:
            return
        fds: Sequence[int] = ()
        try:
            if isinstance(self._socket, ssl.SSLSocket):
                data = self._socket.recv(_READ_BYTES)
                if self._socket.pending():
                    self._loop.call_soon(self._read)
            else:
                data, fds, _, _ = socket.recv_fds(self._socket, _READ_BYTES, _MAX_FDS)
        except _NOT_NOW:
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


async def connect(addresses: str | Sequence[str], tls: Tls | None = None) -> Link:
    """A link to a listener, at the best of its addresses. Raises `OSError` if there is none."""
    address = usable((addresses,) if isinstance(addresses, str) else addresses)
    loop = asyncio.get_running_loop()
    if address.startswith(UNIX):
        family, where = resolve(address)
    else:
        family, where = await loop.run_in_executor(None, resolve, address)
    connected = socket.socket(family, socket.SOCK_STREAM)
    connected.setblocking(False)
    try:
        await asyncio.wait_for(loop.sock_connect(connected, where), CONNECT_TIMEOUT_S)
        tune(connected)
        if tls is not None and family != socket.AF_UNIX:
            connected = await _secure(connected, tls.client, is_server=False)
        return Link(connected)
    except TimeoutError:
        connected.close()
        raise OSError(f"{address} does not answer") from None
    except BaseException:
        connected.close()
        raise


async def _secure(plain: socket.socket, context: ssl.SSLContext, is_server: bool) -> ssl.SSLSocket:
    """The socket inside TLS, once both sides are content. Takes the socket. Raises `OSError`."""
    loop = asyncio.get_running_loop()
    wrapped = context.wrap_socket(plain, server_side=is_server, do_handshake_on_connect=False)
    over = loop.create_future()

    def go_on() -> None:
        loop.remove_reader(wrapped)
        loop.remove_writer(wrapped)
        try:
            wrapped.do_handshake()
        except ssl.SSLWantReadError:
            loop.add_reader(wrapped, go_on)
        except ssl.SSLWantWriteError:
            loop.add_writer(wrapped, go_on)
        except OSError as error:
            if not over.done():
                over.set_exception(error)
        else:
            if not over.done():
                over.set_result(None)

    try:
        go_on()
        await asyncio.wait_for(over, GREETING_TIMEOUT_S)
    except BaseException:
        loop.remove_reader(wrapped)
        loop.remove_writer(wrapped)
        wrapped.close()
        raise
    return wrapped


class Listener:
    """Accepts links and hands each one, unproved, to ``accepted``.

    ``address`` is on this host (`new_address`). With ``listen``, a host and a port (0: a free one),
    it takes links over TCP too, inside TLS if there is any.
    """

    def __init__(
        self,
        address: str,
        accepted: Callable[[Link], None],
        *,
        listen: tuple[str, int] | None = None,
        tls: Tls | None = None,
    ) -> None:
        self.address = address
        self.addresses: tuple[str, ...] = (address,)
        self._accepted = accepted
        self._tls = tls
        self._tasks: set[asyncio.Task[None]] = set()
        self._sockets = [listen_unix(address.rpartition("/")[2])]
        if listen is not None:
            try:
                self._sockets.append(listen_tcp(*listen))
            except BaseException:
                self._sockets[0].close()
                raise
            self.addresses += (tcp_address(listen[0], port_of(self._sockets[1])),)
        for listening in self._sockets:
            asyncio.get_running_loop().add_reader(listening, self._accept, listening)

    def _accept(self, listening: socket.socket) -> None:
        try:
            connected, _ = listening.accept()
        except OSError:
            return  # it went away before it was looked at
        connected.setblocking(False)
        tune(connected)
        if self._tls is None or connected.family == socket.AF_UNIX:
            self._accepted(Link(connected))
            return
        task = asyncio.get_running_loop().create_task(self._accept_tls(connected, self._tls))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _accept_tls(self, connected: socket.socket, tls: Tls) -> None:
        remote_host = _remote_host(connected)
        try:
            self._accepted(Link(await _secure(connected, tls.server, is_server=True)))
        except OSError as error:
            log.warning("a link from %s was refused, for it needs TLS: %s", remote_host, error)

    def close(self) -> None:
        """Take no more links; those that are open stay open."""
        for task in self._tasks:
            task.cancel()
        for listening in self._sockets:
            if listening.fileno() >= 0:
                asyncio.get_running_loop().remove_reader(listening)
                listening.close()
