"""Who may join, and what becomes of a guest's slot: the gateway's side, host by host."""

from __future__ import annotations

import asyncio
import re
import ssl
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest

from pdserve.cli import main
from pdserve.core.errors import ConfigError, ProtocolError
from pdserve.core.ids import GATEWAY, Epoch, WorkerId
from pdserve.core.request import Role
from pdserve.serve import guests as guests_module
from pdserve.serve.cluster_secret import read_secret, require_secret
from pdserve.serve.greetings import Identity, answer, greet, receive_hello
from pdserve.serve.guests import GuestEvents, Guests, Supervisors
from pdserve.serve.host import reason_of
from pdserve.serve.links import Link, Listener, connect, new_address
from pdserve.serve.start import WorkerStart
from pdserve.transport.joining import (
    EndProcess,
    Join,
    Joined,
    Leave,
    NotJoined,
    ProcessBegan,
    ProcessEnded,
)
from pdserve.transport.tls import load_tls, tls_files
from pdserve.transport.wire import WireMessage

SECRET = b"s" * 32
FAR = WorkerId("far")
OWN = WorkerId("prefill-0")
DIGEST = "d" * 32


class Gateway:
    """The gateway's side with a log of what it was told."""

    def __init__(self, start: Callable[[WorkerId, Epoch, Role], WorkerStart]) -> None:
        self.log: list[tuple[Any, ...]] = []
        self.drained = asyncio.Event()
        self.hosts: list[HostEnd] = []

        async def digest() -> str:
            return DIGEST

        self.guests = Guests(
            [OWN],
            GuestEvents(
                digest=digest,
                start=start,
                came=lambda worker, role, host: self.log.append(("came", worker, role, host)),
                ended=lambda worker, epoch, why: self.log.append(("ended", worker, epoch)),
                left=lambda worker: self.log.append(("left", worker)),
                drain=lambda worker: self.drained.wait(),
            ),
        )
        self.identity = Identity(worker=GATEWAY, epoch=Epoch(0), role=None, secret=SECRET)
        self._tasks: list[asyncio.Task[None]] = []
        self.listener = Listener(new_address(), self._accept)

    def _accept(self, link: Link) -> None:
        self._tasks.append(asyncio.get_running_loop().create_task(self._greet(link)))

    async def _greet(self, link: Link) -> None:
        hello, peer = await receive_hello(link, self.identity)
        answer(link, self.identity, hello, None)
        self.guests.joining(link, peer)

    def close(self) -> None:
        for host in self.hosts:
            host.link.close("the test is over")
        self.guests.close()
        self.listener.close()


class HostEnd:
    """A host, as the gateway sees it."""

    def __init__(self, link: Link) -> None:
        self.link = link
        self.heard: asyncio.Queue[WireMessage] = asyncio.Queue()
        self.ended: asyncio.Future[str] = asyncio.get_running_loop().create_future()
        link.open(self.heard.put_nowait, self.ended.set_result)

    @classmethod
    async def connect(cls, gateway: Gateway, worker: WorkerId = FAR) -> HostEnd:
        link = await connect(gateway.listener.address)
        identity = Identity(worker=worker, epoch=Epoch(0), role=Role.DECODE, secret=SECRET)
        await greet(link, identity, None)
        host = cls(link)
        gateway.hosts.append(host)
        return host

    async def join(self, worker: WorkerId = FAR, digest: str = DIGEST) -> WireMessage:
        self.link.send(Join(worker=worker, role=Role.DECODE, weights_digest=digest))
        return await self.heard.get()


@pytest.fixture
def run(make_cluster: Callable[..., Any]) -> Callable[[Callable[[Gateway], Awaitable[None]]], None]:
    template = next(iter(make_cluster([(FAR, Role.DECODE)])._slots.values())).start

    def run(work: Callable[[Gateway], Awaitable[None]]) -> None:
        async def bounded() -> None:
            gateway = Gateway(lambda worker, epoch, role: template)
            try:
                await asyncio.wait_for(work(gateway), 20)
            finally:
                gateway.close()

        asyncio.run(bounded())

    return run


def test_each_process_gets_a_newer_epoch(run: Any) -> None:
    async def work(gateway: Gateway) -> None:
        host = await HostEnd.connect(gateway)
        for epoch in (1, 2):
            joined = await host.join()
            assert isinstance(joined, Joined)
            assert joined.epoch == epoch
            host.link.send(ProcessBegan(epoch=Epoch(epoch), pid=4000 + epoch))
            host.link.send(ProcessEnded(epoch=Epoch(epoch - 1), detail="an old one"))
        assert gateway.guests.expects(FAR, Epoch(2))
        assert not gateway.guests.expects(FAR, Epoch(1))
        host.link.send(ProcessEnded(epoch=Epoch(2), detail="exit status 1"))
        assert isinstance(await host.join(), Joined)
        assert [entry for entry in gateway.log if entry[0] == "ended"] == [
            ("ended", FAR, 1),
            ("ended", FAR, 2),
        ]
        assert gateway.guests.slots() == ((FAR, 3, 0),)

    run(work)


def test_a_host_that_was_rebooted_takes_its_slot_up_with_the_next_epoch(run: Any) -> None:
    async def work(gateway: Gateway) -> None:
        host = await HostEnd.connect(gateway)
        await host.join()
        second = await HostEnd.connect(gateway)
        refused = await second.join()  # while the first one is there
        assert isinstance(refused, NotJoined)
        assert not refused.is_final
        host.link.close("power cut")
        while ("ended", FAR, 1) not in gateway.log:
            await asyncio.wait((second.ended,), timeout=0.01)
        joined = await second.join()
        assert isinstance(joined, Joined)
        assert joined.epoch == 2

    run(work)


@pytest.mark.parametrize(
    ("worker", "digest", "detail"),
    [
        (FAR, "e" * 32, f"other weights: {'e' * 32} there, {DIGEST} here"),
        (OWN, DIGEST, "choose another --id"),
        (GATEWAY, DIGEST, "choose another --id"),
    ],
)
def test_who_may_not_join_is_told_why(run: Any, worker: WorkerId, digest: str, detail: str) -> None:
    async def work(gateway: Gateway) -> None:
        host = await HostEnd.connect(gateway, worker)
        refused = await host.join(worker, digest)
        assert isinstance(refused, NotJoined)
        assert refused.is_final
        assert detail in refused.detail
        assert gateway.log == []

    run(work)


def test_nobody_joins_in_the_name_of_another(run: Any) -> None:
    async def work(gateway: Gateway) -> None:
        host = await HostEnd.connect(gateway)
        host.link.send(Join(worker=WorkerId("other"), role=Role.DECODE, weights_digest=DIGEST))
        assert "closed" in await host.ended

    run(work)


def test_a_host_leaves_when_its_worker_holds_nothing(run: Any) -> None:
    async def work(gateway: Gateway) -> None:
        host = await HostEnd.connect(gateway)
        await host.join()
        host.link.send(Leave())
        hearing = asyncio.ensure_future(host.heard.get())
        await asyncio.wait((hearing,), timeout=0.02)
        assert not hearing.done()
        gateway.drained.set()
        assert await hearing == EndProcess(epoch=Epoch(1))
        assert gateway.log[-2:] == [("ended", FAR, 1), ("left", FAR)]
        assert gateway.guests.slots() == ()

    run(work)


def test_a_host_whose_process_has_ended_leaves_at_once(run: Any) -> None:
    async def work(gateway: Gateway) -> None:
        host = await HostEnd.connect(gateway)
        await host.join()
        host.link.send(ProcessEnded(epoch=Epoch(1), detail="exit status 2"))
        host.link.send(Leave())
        host.link.close("it cannot run here")
        while gateway.guests.slots():
            await asyncio.wait((host.ended,), timeout=0.01)
        assert gateway.log[-2:] == [("ended", FAR, 1), ("left", FAR)]

    run(work)


def test_a_host_that_does_not_kill_its_process_is_given_up(
    run: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(guests_module, "KILL_GRACE_S", 0.02)

    async def work(gateway: Gateway) -> None:
        host = await HostEnd.connect(gateway)
        await host.join()
        slots = Supervisors(gateway.guests)
        slots.kill(FAR, Epoch(7))
        slots.kill(FAR, Epoch(1))
        assert await host.heard.get() == EndProcess(epoch=Epoch(1))
        assert "closed" in await host.ended
        assert gateway.log[-1] == ("ended", FAR, 1)

    run(work)


# --- why there is no link ---------------------------------------------------------------------


@pytest.mark.parametrize(
    ("error", "has_tls", "what"),
    [
        (ConnectionRefusedError(111, "refused"), False, "its --listen-workers"),
        (OSError("tcp://10.0.0.1:7000 does not answer"), False, "does not answer"),
        (ssl.SSLError(1, "[SSL: WRONG_VERSION_NUMBER] wrong"), True, "certificates of one author"),
        (ProtocolError("protocol version 5 is not 6: run the same build"), False, r"same build$"),
        (ProtocolError("closed by the peer"), False, "secret the same there, and does it want TLS"),
        (ProtocolError("closed by the peer"), True, "secret the same there, and has it no TLS"),
    ],
)
def test_a_host_that_gets_no_link_says_what_to_look_at(
    error: OSError | ProtocolError, has_tls: bool, what: str
) -> None:
    pki = Path(__file__).parents[2] / "pki"
    files = tls_files(*(str(pki / f"cluster{end}") for end in (".pem", ".key", "-ca.pem")))
    assert re.search(what, reason_of(error, load_tls(files if has_tls else None)))


# --- the secret and the flags -----------------------------------------------------------------


def test_the_secret_comes_from_a_file_or_the_environment(tmp_path: Path) -> None:
    file = tmp_path / "secret"
    file.write_text("  0123456789abcdef\n")
    file.chmod(0o600)
    environment = {"PDSERVE_CLUSTER_SECRET": "fedcba9876543210"}
    assert read_secret(str(file), environment) == b"0123456789abcdef"
    assert read_secret(None, environment) == b"fedcba9876543210"
    assert read_secret(None, {}) is None
    with pytest.raises(ConfigError, match="openssl rand -hex 32"):
        require_secret(None, {}, "--join")
    for content in ("", "short"):
        file.write_text(content)
        with pytest.raises(ConfigError, match="anybody could guess it"):
            read_secret(str(file), environment)
    with pytest.raises(ConfigError, match="cannot be read from"):
        read_secret(str(tmp_path / "missing"), environment)


@pytest.mark.parametrize(
    ("arguments", "what"),
    [
        (["--role", "decode"], "needs --join HOST:PORT"),
        (["--join", "nowhere"], "must be HOST:PORT"),
        (["--join", "h:1", "--listen", "0.0.0.0:7100"], "does not say where other hosts find"),
        (["--join", "h:1", "--id", "a b"], "--id is 'a b'"),
        (["--join", "h:1", "--kv-blocks", "1", "--kv-memory", "1GiB"], "give one of them"),
        (["--join", "h:1", "--kv-memory", "much"], "a size such as"),
        (["--join", "h:1", "--cluster-tls-cert", "c.pem"], "give all three"),
    ],
)
def test_a_mistake_in_the_flags_is_told(
    arguments: list[str],
    what: str,
    tiny_model_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("PDSERVE_CLUSTER_SECRET", SECRET.decode())
    assert main(["worker", "--model", str(tiny_model_path), *arguments]) == 2
    assert what in capsys.readouterr().err


def test_a_server_takes_workers_only_with_a_secret(
    tiny_model_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv("PDSERVE_CLUSTER_SECRET", raising=False)
    flags = ["--model", str(tiny_model_path), "--port", "0", "--listen-workers", "127.0.0.1:0"]
    assert main(["serve", *flags]) == 2
    assert "--listen-workers needs a cluster secret" in capsys.readouterr().err
