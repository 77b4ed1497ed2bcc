"""Links: who gets in, what travels, and that a bad peer hurts nobody but itself."""

from __future__ import annotations

import asyncio
import os
import socket
from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest

from pdserve.core.errors import ProofError, ProtocolError
from pdserve.core.ids import AttemptId, Epoch, RequestId, WorkerId
from pdserve.core.messages import LeaseRenew, OpaquePayload
from pdserve.core.request import Role
from pdserve.serve import links
from pdserve.serve.greetings import (
    Identity,
    Peer,
    answer,
    greet,
    receive_hello,
)
from pdserve.serve.links import Link, Listener, connect, new_address
from pdserve.transport.base import PoolExport
from pdserve.transport.handshake import Hello
from pdserve.transport.wire import WireMessage, encode

SECRET = b"s" * 32


def identity(name: str, secret: bytes = SECRET) -> Identity:
    return Identity(worker=WorkerId(name), epoch=Epoch(1), role=Role.MIXED, secret=secret)


def renew(number: int) -> LeaseRenew:
    return LeaseRenew(AttemptId(RequestId("r"), Epoch(number)))


def payload(num_bytes: int) -> OpaquePayload:
    attempt = AttemptId(RequestId("r"), Epoch(1))
    return OpaquePayload(attempt=attempt, offset=0, data=bytes(num_bytes), last=False)


def run(work: Callable[[], Awaitable[None]]) -> None:
    async def bounded() -> None:
        await asyncio.wait_for(work(), 20)

    asyncio.run(bounded())


def pair(**options: int) -> tuple[Link, Link]:
    left, right = socket.socketpair()
    return Link(left, **options), Link(right, **options)


async def introduce(left: Link, right: Link, pool: PoolExport | None = None) -> tuple[Peer, Peer]:
    """Both greetings; what each side learned of the other."""

    async def welcoming() -> Peer:
        hello, peer = await receive_hello(right, identity("right"))
        answer(right, identity("right"), hello, None)
        return peer

    of_right, of_left = await asyncio.gather(greet(left, identity("left"), pool), welcoming())
    return of_right, of_left


class Ear:
    """Opens a link and collects what it hears."""

    def __init__(self, link: Link) -> None:
        self.heard: list[WireMessage] = []
        self.reason: asyncio.Future[str] = asyncio.get_running_loop().create_future()
        self._news = asyncio.Event()
        link.open(self._hear, self.reason.set_result)

    def _hear(self, message: WireMessage) -> None:
        self.heard.append(message)
        self._news.set()

    async def until(self, count: int) -> None:
        while len(self.heard) < count:
            self._news.clear()
            await self._news.wait()


def test_both_sides_learn_who_the_other_is_and_messages_keep_their_order() -> None:
    async def work() -> None:
        left, right = pair()
        of_right, of_left = await introduce(left, right)
        assert (of_right.worker, of_left.worker) == ("right", "left")
        left.send(renew(0))  # sent before the other side listens
        ear = Ear(right)
        for number in range(1, 300):
            left.send(renew(number))
        await ear.until(300)
        assert ear.heard == [renew(number) for number in range(300)]
        left.close("done")
        assert await ear.reason == "closed by the peer"
        assert right.is_closed

    run(work)


def test_a_pool_travels_with_the_hello(tmp_path: Path) -> None:
    async def work() -> None:
        left, right = pair()
        file = tmp_path / "pool"
        file.write_bytes(b"kv")
        fd = os.open(file, os.O_RDONLY)
        export = PoolExport("shm", b"token", 2, (fd,))
        _, of_left = await introduce(left, right, export)
        assert of_left.pool is not None
        assert (of_left.pool.token, of_left.pool.num_bytes) == (b"token", 2)
        (received,) = of_left.pool.fds
        assert os.read(received, 10) == b"kv"
        os.close(received)
        with pytest.raises(OSError, match="Bad file descriptor"):
            os.fstat(fd)  # the sender gave its copy back
        left.close("")
        right.close("")

    run(work)


def test_a_peer_with_another_secret_is_shut_out() -> None:
    async def work() -> None:
        left, right = pair()
        greeting = asyncio.ensure_future(greet(left, identity("left", b"x" * 32), None))
        with pytest.raises(ProofError, match="does not know the cluster secret"):
            await receive_hello(right, identity("right"))
        assert right.is_closed
        with pytest.raises(ProtocolError, match="closed by the peer"):
            await greeting

    run(work)


def test_a_listener_that_does_not_know_the_secret_is_not_believed() -> None:
    async def work() -> None:
        left, right = pair()
        greeting = asyncio.ensure_future(greet(left, identity("left"), None))
        frame, _ = await right.first_frame()
        assert isinstance(frame, Hello)
        answer(right, identity("right", b"x" * 32), frame, None)
        with pytest.raises(ProofError):
            await greeting
        assert left.is_closed
        right.close("")

    run(work)


@pytest.mark.parametrize(
    ("first_bytes", "reason"),
    [
        (b"GET / HTTP/1.1\r\n\r\n", "protocol version"),
        (encode(renew(1)), "before any proof"),
        (bytes.fromhex("7fffffff0501") + b"x" * 100, "over the limit"),
        (bytes.fromhex("000000030501c1"), "not one"),
    ],
)
def test_garbage_closes_its_link_and_no_other(first_bytes: bytes, reason: str) -> None:
    async def work() -> None:
        arrived: asyncio.Queue[Link] = asyncio.Queue()
        listener = Listener(new_address(), arrived.put_nowait)
        good = await connect(listener.address)
        good_end = await arrived.get()
        await introduce(good, good_end)
        ear = Ear(good_end)

        bad = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        bad.connect("\0" + listener.address.rpartition("/")[2])
        bad_end = await arrived.get()
        bad.send(first_bytes)
        with pytest.raises(ProtocolError, match=reason):
            await receive_hello(bad_end, identity("right"))
        assert bad_end.is_closed

        good.send(renew(7))
        await ear.until(1)
        bad.close()
        good.close("")
        await ear.reason
        listener.close()

    run(work)


def test_garbage_after_the_greeting_closes_the_link() -> None:
    async def work() -> None:
        raw, socket_end = socket.socketpair()
        right = Link(socket_end)
        hello = asyncio.ensure_future(receive_hello(right, identity("right")))
        left = Link(raw.dup())
        greeting = asyncio.ensure_future(greet(left, identity("left"), None))
        answer(right, identity("right"), (await hello)[0], None)
        await greeting
        ear = Ear(right)
        raw.send(encode(renew(1)) + b"\0" * 64)
        assert "protocol version" in await ear.reason
        left.close("")
        raw.close()

    run(work)


def test_descriptors_after_the_first_frame_close_the_link(tmp_path: Path) -> None:
    async def work() -> None:
        left, right = pair()
        await introduce(left, right)
        ear = Ear(right)
        with (tmp_path / "f").open("w") as file:
            left.send(renew(1), (file.fileno(),))
        assert "descriptors" in await ear.reason
        left.close("")

    run(work)


def test_a_peer_that_says_nothing_is_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(links, "GREETING_TIMEOUT_S", 0.01)

    async def work() -> None:
        left, right = pair()
        with pytest.raises(ProtocolError, match="in time"):
            await receive_hello(right, identity("right"))
        assert right.is_closed
        left.close("")

    run(work)


def test_a_peer_that_does_not_read_is_broken_once_the_buffer_is_full() -> None:
    async def work() -> None:
        left, right = pair(max_buffered_bytes=1 << 20)
        await introduce(left, right)
        ear = Ear(left)
        asyncio.get_running_loop().remove_reader(right._socket)
        for _ in range(8):
            left.send(payload(1 << 19))
        assert "unread" in await ear.reason
        right.close("")

    run(work)


def test_more_than_the_socket_holds_arrives_whole() -> None:
    async def work() -> None:
        left, right = pair()
        await introduce(left, right)
        ear = Ear(right)
        sent = [payload(1 << 20), renew(1), payload(1 << 21), renew(2)]
        for message in sent:
            left.send(message)
        await ear.until(4)
        assert ear.heard == sent
        left.close("")
        right.close("")

    run(work)


def test_the_end_is_told_once_and_also_to_who_opens_late() -> None:
    async def work() -> None:
        left, right = pair()
        await introduce(left, right)
        right.close("first")
        right.close("second")
        right.send(renew(1))
        ear = Ear(right)
        assert await ear.reason == "first"
        assert ear.heard == []
        left.close("")

    run(work)


def test_nobody_listens_on_a_name_that_is_not_there() -> None:
    async def work() -> None:
        with pytest.raises(OSError, match="refused"):
            await connect(new_address())

    run(work)
