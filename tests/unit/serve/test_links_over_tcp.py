"""Links to other hosts: challenged first, inside TLS on request, and otherwise as on one host."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import replace
from pathlib import Path

import pytest

from pdserve.core.errors import ConfigError, ProofError, ProtocolError
from pdserve.core.ids import AttemptId, Epoch, RequestId, WorkerId
from pdserve.core.messages import LeaseRenew, OpaquePayload
from pdserve.core.request import Role
from pdserve.serve import links
from pdserve.serve.greetings import Identity, Peer, answer, greet, receive_hello
from pdserve.serve.links import Link, Listener, connect, new_address
from pdserve.transport.handshake import Challenge, Hello
from pdserve.transport.tls import Tls, load_tls, tls_files
from pdserve.transport.wire import WireMessage

SECRET = b"s" * 32
PKI = Path(__file__).parents[2] / "pki"


def tls_of(name: str) -> Tls | None:
    return load_tls(
        tls_files(str(PKI / f"{name}.pem"), str(PKI / f"{name}.key"), str(PKI / f"{name}-ca.pem"))
    )


def identity(name: str) -> Identity:
    return Identity(
        worker=WorkerId(name), epoch=Epoch(1), role=Role.MIXED, secret=SECRET, family=name
    )


def run(work: Callable[[], Awaitable[None]]) -> None:
    async def bounded() -> None:
        await asyncio.wait_for(work(), 20)

    asyncio.run(bounded())


class Office:
    """A listener over TCP, and the links that came in."""

    def __init__(self, tls: Tls | None = None) -> None:
        self.arrived: asyncio.Queue[Link] = asyncio.Queue()
        self.listener = Listener(
            new_address(), self.arrived.put_nowait, listen=("127.0.0.1", 0), tls=tls
        )
        self.address = self.listener.addresses[1]

    async def welcome(self) -> tuple[Link, Peer]:
        link = await self.arrived.get()
        hello, peer = await receive_hello(link, identity("office"))
        answer(link, identity("office"), hello, None)
        return link, peer


def payload(num_bytes: int) -> OpaquePayload:
    attempt = AttemptId(RequestId("r"), Epoch(1))
    return OpaquePayload(attempt=attempt, offset=0, data=bytes(num_bytes), last=False)


@pytest.mark.parametrize("name", [None, "cluster"])
def test_messages_of_any_size_arrive_in_order(name: str | None) -> None:
    async def work() -> None:
        tls = None if name is None else tls_of(name)
        office = Office(tls)
        link = await connect(office.address, tls)
        assert link.is_remote
        of_office, (other, of_link) = await asyncio.gather(
            greet(link, identity("guest"), None), office.welcome()
        )
        assert (of_office.worker, of_link.worker, of_link.family) == ("office", "guest", "guest")
        heard: list[WireMessage] = []
        ended: asyncio.Future[str] = asyncio.get_running_loop().create_future()
        sent: list[WireMessage] = [LeaseRenew(AttemptId(RequestId("r"), Epoch(1)))]
        sent += [payload(size) for size in (1, 3 << 20, 70_000, 5 << 20, 16)]
        for message in sent:
            link.send(message)
        other.open(heard.append, ended.set_result)
        link.open(lambda message: None, lambda reason: None)
        back = LeaseRenew(AttemptId(RequestId("back"), Epoch(2)))
        other.send(back)
        while len(heard) < len(sent):
            await asyncio.wait((ended,), timeout=0.01)
        assert heard == sent
        link.close("done")
        assert "closed" in await ended
        office.listener.close()

    run(work)


def test_a_recorded_hello_opens_no_other_link() -> None:
    async def work() -> None:
        office = Office()
        first = await connect(office.address)
        greeting = asyncio.ensure_future(greet(first, identity("guest"), None))
        link = await office.arrived.get()
        hello, _ = await receive_hello(link, identity("office"))
        answer(link, identity("office"), hello, None)
        await greeting

        replayed = await connect(office.address)
        again = await office.arrived.get()
        refused = asyncio.ensure_future(receive_hello(again, identity("office")))
        challenge, _ = await replayed.first_frame()
        assert isinstance(challenge, Challenge)
        assert isinstance(hello, Hello)
        replayed.send(hello)
        with pytest.raises(ProofError, match="another challenge"):
            await refused

        late = await connect(office.address)
        refused = asyncio.ensure_future(receive_hello(await office.arrived.get(), identity("x")))
        asked, _ = await late.first_frame()
        assert isinstance(asked, Challenge)
        late.send(replace(hello, answers=asked.nonce))
        with pytest.raises(ProofError, match="secret"):
            await refused
        for open_link in (first, link, replayed, late):
            open_link.close("")
        office.listener.close()

    run(work)


def test_who_sends_no_challenge_gets_no_hello() -> None:
    async def work() -> None:
        office = Office()
        link = await connect(office.address)
        end = await office.arrived.get()
        greeting = asyncio.ensure_future(greet(link, identity("guest"), None))
        end.send(Hello(worker=WorkerId("x"), epoch=Epoch(1), role=None, pool=None, nonce=bytes(16)))
        with pytest.raises(ProtocolError, match="no challenge"):
            await greeting
        end.close("")
        office.listener.close()

    run(work)


@pytest.mark.parametrize("theirs", ["stranger", None])
def test_a_host_of_another_authority_is_not_let_in(
    theirs: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(links, "GREETING_TIMEOUT_S", 0.5)

    async def work() -> None:
        office = Office(tls_of("cluster"))

        async def come_in() -> None:
            link = await connect(office.address, None if theirs is None else tls_of(theirs))
            try:
                await greet(link, identity("guest"), None)
            finally:
                link.close("")

        with pytest.raises((OSError, ProtocolError)):
            await come_in()
        assert office.arrived.empty()
        office.listener.close()

    run(work)


def test_a_port_that_is_taken_says_what_to_change() -> None:
    async def work() -> None:
        office = Office()
        port = int(office.address.rpartition(":")[2])
        with pytest.raises(ConfigError, match="choose an address of this host and a port"):
            Listener(new_address(), office.arrived.put_nowait, listen=("127.0.0.1", port))
        office.listener.close()

    run(work)
