"""The HTTP server as ``pdserve serve`` makes it: TLS, refusals at start, clients that are slow."""

from __future__ import annotations

import asyncio
import contextlib
import importlib.util
import logging
import shutil
import ssl
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any

import httpx2
import pytest
from uvicorn.protocols.http.h11_impl import H11Protocol

from pdserve.api.fake import FakeGateway
from pdserve.api.gateway import ModelCard
from pdserve.config import ServeConfig
from pdserve.core.errors import ConfigError, UnavailableError
from pdserve.edge_config import EdgeConfig
from pdserve.serve import http as http_module
from pdserve.serve.client import Client
from pdserve.serve.connections import MAX_HEADER_BYTES, guarded
from pdserve.serve.edge_files import EdgeFiles
from pdserve.serve.http import http_server
from pdserve.serve.server import bind

TLS = Path(__file__).parent / "tls"
SERVERS = ["h11", *(["httptools"] if importlib.util.find_spec("httptools") else [])]


def files_of(api_key: str | None = None, **edge: Any) -> EdgeFiles:
    return EdgeFiles(ServeConfig(api_key=api_key, edge=EdgeConfig(**edge)))


def protocol_of(name: str) -> type[asyncio.Protocol]:
    if name == "h11":
        return H11Protocol
    from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

    return HttpToolsProtocol


@pytest.fixture
def serving(tiny_model_path: Path) -> Callable[..., contextlib.AbstractAsyncContextManager[int]]:
    """The server over these files; gives its port."""

    @contextlib.asynccontextmanager
    async def serve(files: EdgeFiles) -> AsyncIterator[int]:
        card = ModelCard(
            name="tiny", max_model_tokens=256, vocab_size=384, eos_token_ids=(2,), created=0
        )
        server = http_server(FakeGateway(card), tiny_model_path, files)
        with bind("127.0.0.1", 0) as bound:
            running = asyncio.create_task(server.serve([bound]))
            yield bound.getsockname()[1]
            server.should_exit = True
            await running

    return serve


def run(work: Callable[[], Awaitable[None]]) -> None:
    async def bounded() -> None:
        await asyncio.wait_for(work(), 60)

    asyncio.run(bounded())


def trusting(certificate: Path | None = None) -> ssl.SSLContext:
    context = ssl.create_default_context(cafile=str(TLS / "ca.pem"))
    if certificate is not None:
        context.load_cert_chain(certificate)
    return context


async def version(port: int, context: ssl.SSLContext) -> int:
    async with httpx2.AsyncClient(verify=context) as client:
        return (await client.get(f"https://localhost:{port}/version")).status_code


async def name_shown(port: int) -> str:
    """Of the certificate that a new connection gets."""
    _, writer = await asyncio.open_connection("localhost", port, ssl=trusting())
    shown = writer.get_extra_info("peercert")
    writer.close()
    return next(value for [(key, value)] in shown["subject"] if key == "commonName")


def test_tls(serving: Callable[..., Any]) -> None:
    async def work() -> None:
        async with serving(files_of(ssl_certfile=TLS / "server.pem")) as port:
            assert await version(port, trusting()) == 200
            with pytest.raises(httpx2.ConnectError):
                await version(port, ssl.create_default_context())
            with pytest.raises(UnavailableError, match="SSL_CERT_FILE names"):
                await asyncio.to_thread(Client(f"https://localhost:{port}").cluster)
            old = trusting()
            old.minimum_version = ssl.TLSVersion.TLSv1_2
            old.maximum_version = ssl.TLSVersion.TLSv1_2
            assert await version(port, old) == 200
            async with httpx2.AsyncClient() as client:
                with pytest.raises(httpx2.TransportError):
                    await client.get(f"http://localhost:{port}/version")

    run(work)


def test_clients_can_be_asked_for_a_certificate(serving: Callable[..., Any]) -> None:
    async def work() -> None:
        files = files_of(ssl_certfile=TLS / "server.pem", ssl_ca_certs=TLS / "ca.pem")
        async with serving(files) as port:
            assert await version(port, trusting(TLS / "client.pem")) == 200
            with pytest.raises(httpx2.TransportError):
                await version(port, trusting())

    run(work)


def test_a_new_certificate_is_taken_up_and_a_broken_one_is_not(
    serving: Callable[..., Any], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    file = tmp_path / "server.pem"
    shutil.copy(TLS / "server.pem", file)

    async def work() -> None:
        files = files_of(ssl_certfile=file)
        async with serving(files) as port:
            assert await name_shown(port) == "pdserve tests server"
            file.write_text("half a certif")
            files.reload()
            assert "the certificate stays as it was" in caplog.text
            assert await name_shown(port) == "pdserve tests server"
            shutil.copy(TLS / "other.pem", file)
            files.reload()
            assert await name_shown(port) == "pdserve tests other"

    run(work)


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"ssl_certfile": TLS / "nowhere.pem"}, "No such file"),
        ({"ssl_certfile": TLS / "ca.pem"}, "--ssl-keyfile"),
        ({"ssl_certfile": TLS / "server.pem", "ssl_keyfile": TLS / "other.pem"}, "mismatch"),
        ({"ssl_certfile": TLS / "server.pem", "ssl_keyfile": TLS / "locked.key"}, "is encrypted"),
        (
            {"ssl_certfile": TLS / "server.pem", "ssl_ca_certs": TLS / "README.md"},
            "--ssl-ca-certs",
        ),
        ({"ssl_keyfile": TLS / "server.pem"}, "give --ssl-certfile too"),
        ({"ssl_ca_certs": TLS / "ca.pem"}, "give --ssl-certfile too"),
        ({"api_keys_file": TLS / "nowhere"}, "cannot read"),
        ({"api_keys_file": TLS / "README.md"}, "README.md, line 1"),
        ({"cors_origin": ("https://a.example/",)}, "an origin is a scheme"),
        ({"cors_origin": ("a.example",)}, "an origin is a scheme"),
        ({"cache_salt": "pepper"}, "per-key, none"),
        ({"request_timeout": 0.0}, "--request-timeout is 0"),
        ({"read_timeout": -1.0}, "--read-timeout is -1"),
        ({"max_body_size": 0}, "--max-body-size must be at least 1024"),
    ],
)
def test_what_cannot_work_is_told_before_anything_starts(
    options: dict[str, Any], told: str
) -> None:
    with pytest.raises(ConfigError) as caught:
        files_of(**options)
    assert told in str(caught.value)


@pytest.mark.parametrize(
    ("host", "api_key", "options", "told"),
    [
        ("127.0.0.1", None, {}, None),
        ("::1", None, {}, None),
        ("0.0.0.0", None, {}, "without API keys"),
        ("fe80::1%eth0", None, {"ssl_certfile": TLS / "server.pem"}, "without API keys"),
        ("10.1.2.3", "own", {}, "without TLS"),
        ("10.1.2.3", "own", {"ssl_certfile": TLS / "server.pem"}, None),
    ],
)
def test_an_open_door_is_told(
    caplog: pytest.LogCaptureFixture,
    host: str,
    api_key: str | None,
    options: dict[str, Any],
    told: str | None,
) -> None:
    with caplog.at_level(logging.WARNING, "pdserve"):
        files_of(api_key, **options).warn(host)
    assert [told in record.getMessage() for record in caplog.records if told] == (
        [] if told is None else [True]
    )
    assert bool(caplog.records) is (told is not None)


@pytest.mark.parametrize("name", SERVERS)
@pytest.mark.parametrize(
    "sent",
    [
        b"",
        b"GET /version HTTP/1.1\r\nhost: x\r\nx-slow: ",
        b"GET /version HTTP/1.1\r\nhost: x\r\n\r\n|GET /version HTT",
    ],
)
def test_a_client_that_does_not_ask_is_left(
    serving: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, name: str, sent: bytes
) -> None:
    monkeypatch.setattr(http_module, "guarded", lambda s: guarded(s, protocol_of(name)))

    async def work() -> None:
        async with serving(files_of(read_timeout=0.2)) as port:
            reader, writer = await asyncio.open_connection("127.0.0.1", port)
            first, _, rest = sent.rpartition(b"|")
            if first:  # a whole request, and its answer, come before
                writer.write(first)
                assert (await reader.readuntil(b"}")).startswith(b"HTTP/1.1 200 OK")
            writer.write(rest)
            assert (await reader.read()).startswith(b"HTTP/1.1 408 Request Timeout")
            writer.close()

    run(work)


@pytest.mark.parametrize("name", SERVERS)
def test_a_connection_that_asks_again_and_again_is_kept(
    serving: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.setattr(http_module, "guarded", lambda s: guarded(s, protocol_of(name)))

    async def work() -> None:
        async with serving(files_of(read_timeout=30)) as port:
            reader, writer = await asyncio.open_connection("127.0.0.1", port)
            for _ in range(3):
                for part in (b"GET /version HTTP/1.1\r\n", b"host: x\r\n", b"\r\n"):
                    writer.write(part)
                    await writer.drain()
                head = await reader.readuntil(b"\r\n\r\n")
                assert head.startswith(b"HTTP/1.1 200 OK")
                length = next(
                    int(line.partition(b":")[2])
                    for line in head.split(b"\r\n")
                    if line.lower().startswith(b"content-length")
                )
                await reader.readexactly(length)
            writer.close()

    run(work)


@pytest.mark.parametrize("name", SERVERS)
def test_headers_without_end_are_refused(
    serving: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.setattr(http_module, "guarded", lambda s: guarded(s, protocol_of(name)))

    async def work() -> None:
        async with serving(files_of()) as port:
            reader, writer = await asyncio.open_connection("127.0.0.1", port)
            writer.write(b"GET /version HTTP/1.1\r\nhost: x\r\nx: ")
            with contextlib.suppress(ConnectionError):
                for _ in range(2 * MAX_HEADER_BYTES // 1024):
                    writer.write(b"y" * 1024)
                    await writer.drain()
                answer = await reader.read()
                assert answer.split(b" ")[1] in (b"400", b"431")
            writer.close()

    run(work)
