"""HTTP/1.1 in every shape a server may give it, in pieces of every size."""

from __future__ import annotations

import asyncio
import re

import pytest

from pdserve.bench.connection import Connection
from pdserve.bench.options import TargetOptions
from pdserve.bench.target import Target
from pdserve.core.errors import ConfigError, ProtocolError, UnavailableError
from pdserve.workload.outcome import Ending
from pdserve.workload.request import TraceRequest, own_segment

pytestmark = pytest.mark.anyio


class Wire(asyncio.Transport):
    """A transport whose other side is the test."""

    def __init__(self):
        super().__init__()
        self.sent = b""
        self.closed = False

    def write(self, data):
        self.sent += data

    def abort(self):
        self.closed = True

    def is_closing(self):
        return self.closed


class Heard:
    def __init__(self):
        self.status = None
        self.data = b""
        self.ends = []

    def head(self, status):
        self.status = status

    def body(self, data, at_s):
        self.data += data

    def end(self, error):
        self.ends.append(error)


@pytest.fixture
def talk():
    """(connection, wire, connections that are idle)"""
    idle = []
    connection, wire = Connection(idle.append), Wire()
    connection.connection_made(wire)
    return connection, wire, idle


CHUNKED = (
    b"HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n"
    b"5\r\nhello\r\nA;x=1\r\n, world...\r\n0\r\nTrailer: t\r\n\r\n"
)
SIZED = b"HTTP/1.1 429 Too Many\r\ncontent-length: 15\r\n\r\nhello, world..."


@pytest.mark.parametrize("piece", [1, 2, 3, 7, 1000])
@pytest.mark.parametrize(("answer", "status"), [(CHUNKED, 200), (SIZED, 429)])
async def test_answers_in_pieces(talk, answer, status, piece):
    connection, wire, idle = talk
    for turn in range(2):  # the same connection again
        heard = Heard()
        connection.exchange(b"ask", heard)
        for start in range(0, len(answer), piece):
            assert heard.ends == []
            connection.data_received(answer[start : start + piece])
        assert (heard.status, heard.data, heard.ends) == (status, b"hello, world...", [None])
        assert len(idle) == turn + 1
    assert wire.sent == b"askask"


async def test_an_answer_until_the_close(talk):
    connection, _, idle = talk
    heard = Heard()
    connection.exchange(b"ask", heard)
    connection.data_received(b"HTTP/1.1 200 OK\r\n\r\nhel")
    connection.data_received(b"lo")
    assert heard.ends == []
    connection.connection_lost(None)
    assert (heard.data, heard.ends, idle) == (b"hello", [None], [])


@pytest.mark.parametrize("field", [b"Connection: close\r\n", b"CONNECTION: Close\r\n"])
async def test_a_connection_that_the_server_closes_is_not_kept(talk, field):
    connection, wire, idle = talk
    heard = Heard()
    connection.exchange(b"ask", heard)
    connection.data_received(b"HTTP/1.1 200 OK\r\n" + field + b"Content-Length: 0\r\n\r\n")
    assert heard.ends == [None]
    assert (idle, wire.closed) == ([], True)


async def test_a_break_is_told_once(talk):
    connection, _, _ = talk
    heard = Heard()
    connection.exchange(b"ask", heard)
    connection.data_received(CHUNKED[:-20])
    connection.connection_lost(None)
    [error] = heard.ends
    assert isinstance(error, ConnectionResetError)


@pytest.mark.parametrize(
    "nonsense",
    [
        b"SSH-2.0-x\r\n\r\n",
        b"HTTP/1.1\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n",
        b"HTTP/2 200\r\n\r\n",
        b"x" * 70_000,
    ],
)
async def test_nonsense_ends_the_connection(talk, nonsense):
    connection, wire, idle = talk
    heard = Heard()
    connection.exchange(b"ask", heard)
    connection.data_received(nonsense)
    [error] = heard.ends
    assert isinstance(error, ProtocolError)
    assert (idle, wire.closed) == ([], True)


async def test_words_that_nobody_asked_for_close_the_connection(talk):
    connection, wire, _ = talk
    connection.exchange(b"ask", Heard())
    connection.data_received(SIZED + SIZED)
    assert wire.closed


def a_request(**fields):
    return TraceRequest(
        **{"index": 0, "at_s": 0.0, "segments": (own_segment(0, 4),), "output_tokens": 2} | fields
    )


STREAM = (
    b'data: {"choices":[{"text":"a"}]}\n\n'
    b'data: {"choices":[{"text":"b","finish_reason":"length"}]}\n\ndata: [DONE]\n\n'
)


async def read_request(reader):
    head = await reader.readuntil(b"\r\n\r\n")
    length = re.search(rb"Content-Length: (\d+)", head)
    return head, await reader.readexactly(int(length[1])) if length else b""


def sized(body, status=b"200 OK"):
    return b"HTTP/1.1 %b\r\nContent-Length: %d\r\n\r\n%b" % (status, len(body), body)


async def ask(url, request=None, **options):
    target = Target(TargetOptions(url=url, model="m", **options))
    try:
        wanted = a_request() if request is None else request
        return await target.send(wanted, target.prepare(wanted), 0.0)
    finally:
        target.close()


async def test_a_kept_connection_that_was_closed_is_not_the_servers_fault(scripted):
    connections = []

    async def answer_once(reader, writer):
        connections.append(await read_request(reader))
        writer.write(sized(STREAM))
        await reader.readuntil(b"\r\n\r\n")  # close on the second request, without a word

    async with scripted(answer_once) as url:
        target = Target(TargetOptions(url=url, model="m"))
        for _ in range(3):
            outcome = await target.send(a_request(), target.prepare(a_request()), 0.0)
            assert outcome.ending is Ending.COMPLETED, outcome
        target.close()
    assert len(connections) == 3


async def test_a_server_that_hangs_up_is_a_failure(scripted):
    async def hang_up(reader, writer):
        await read_request(reader)

    async with scripted(hang_up) as url:
        outcome = await ask(url)
    assert (outcome.ending, outcome.failure) == (Ending.FAILED, "disconnected")


async def test_a_server_that_is_not_there_is_a_failure(unused_url):
    outcome = await ask(unused_url)
    assert (outcome.ending, outcome.failure) == (Ending.FAILED, "no connection")
    target = Target(TargetOptions(url=unused_url))
    with pytest.raises(UnavailableError, match="--url"):
        await target.ask_for_model()


@pytest.fixture
async def unused_url():
    server = await asyncio.start_server(lambda reader, writer: None, "127.0.0.1", 0)
    url = "http://{}:{}".format(*server.sockets[0].getsockname())
    server.close()
    await server.wait_closed()
    return url


async def test_a_server_without_an_end_runs_into_the_time_limit(scripted):
    left = asyncio.Event()

    async def never_end(reader, writer):
        await read_request(reader)
        writer.write(b"HTTP/1.1 200 OK\r\n\r\n" + STREAM[:34])
        assert await reader.read() == b""
        left.set()

    async with scripted(never_end) as url:
        outcome = await ask(url, timeout_s=0.5)
        await asyncio.wait_for(left.wait(), 20)
    assert (outcome.ending, outcome.failure) == (Ending.FAILED, "timeout")
    assert outcome.output_tokens == 1


async def test_what_is_sent(scripted):
    seen = []

    async def note(reader, writer):
        seen.append(await read_request(reader))
        writer.write(sized(STREAM))

    async with scripted(note) as url:
        await ask(
            url + "/base/v1/", api_key="k", headers=(("X-Route", "split"),), temperature=0.5,
            extra_body={"top_k": 3}, vocab_size=100, seed=5,
        )  # fmt: skip
    [(head, body)] = seen
    assert head.startswith(b"POST /base/v1/completions HTTP/1.1\r\n")
    assert b"\r\nAuthorization: Bearer k\r\n" in head
    assert b"\r\nX-Route: split\r\n" in head
    for part in (b'"top_k":3', b'"seed":5', b'"ignore_eos":true', b'"include_usage":true',
                 b'"max_tokens":2', b'"model":"m"', b'"prompt":['):  # fmt: skip
        assert part in body


@pytest.mark.parametrize("url", ["localhost:8000", "ftp://x", "http://", "http://x:port"])
async def test_what_is_no_url_is_refused(url):
    with pytest.raises(ConfigError, match="http://HOST:PORT"):
        Target(TargetOptions(url=url))
