"""A client that goes away: the gateway hears of it at once, wherever the request stands."""

from __future__ import annotations

import asyncio
import importlib.util
import json
from contextlib import asynccontextmanager
from urllib.parse import urlsplit

import pytest

from pdserve.api.disconnect import run_while_connected
from pdserve.api.fake import FakeGateway

pytestmark = pytest.mark.anyio

# h11 is what every installation has; httptools is taken instead where it is installed.
SERVERS = ["h11", *(["httptools"] if importlib.util.find_spec("httptools") else [])]


@asynccontextmanager
async def posted(base_url, path, body, *, part=1.0):
    """A raw connection on which a request (or the first part of it) has been sent."""
    url = urlsplit(base_url)
    reader, writer = await asyncio.open_connection(url.hostname, url.port)
    data = json.dumps(body).encode()
    head = (
        f"POST {path} HTTP/1.1\r\nHost: {url.netloc}\r\nContent-Type: application/json\r\n"
        f"Content-Length: {len(data)}\r\n\r\n"
    )
    writer.write(head.encode() + data[: int(len(data) * part)])
    await writer.drain()
    try:
        yield reader
    finally:
        writer.close()
        await writer.wait_closed()


async def turns(number):
    """Let everybody else run so many times."""
    loop = asyncio.get_running_loop()
    for _ in range(number):
        turned = asyncio.Event()
        loop.call_soon(turned.set)
        await turned.wait()


async def all_ended(gateway):
    async with asyncio.timeout(20):
        await gateway.until(lambda: gateway.num_running == 0)


@pytest.mark.parametrize("http", SERVERS)
@pytest.mark.parametrize("permits", [0, 1, 3])
@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("num_prompts", [1, 3])
async def test_leaving_aborts(serving, make_app, card, http, permits, stream, num_prompts):
    gateway = FakeGateway(card, permits=permits)
    body = {"prompt": [[65]] * num_prompts, "max_tokens": 100, "stream": stream}
    async with serving(make_app(gateway), http) as url:
        async with posted(url, "/v1/completions", body) as reader:
            await gateway.until(lambda: len(gateway.submitted) == num_prompts)
            if stream and permits:
                assert b"200 OK" in await reader.readuntil(b"\r\n\r\n")
        await all_ended(gateway)
    assert sorted(gateway.aborted) == sorted(r.request_id for r in gateway.submitted)


async def test_leaving_a_chat_stream_aborts_every_choice(serving, make_app, card):
    gateway = FakeGateway(card, permits=5)
    body = {"messages": [{"role": "user", "content": "a"}], "n": 3, "stream": True}
    async with serving(make_app(gateway)) as url:
        async with posted(url, "/v1/chat/completions", body) as reader:
            await reader.readuntil(b'"index":2')
        await all_ended(gateway)
    assert len(gateway.aborted) == 1


async def test_leaving_before_the_body_is_there_begins_nothing(serving, make_app, gateway, caplog):
    async with serving(make_app(gateway)) as url:
        async with posted(url, "/v1/completions", {"prompt": "a" * 100}, part=0.5):
            pass
        async with posted(url, "/v1/completions", {"prompt": "a"}) as reader:
            assert b"200 OK" in await reader.readuntil(b"\r\n\r\n")
    assert len(gateway.submitted) == 1
    assert not caplog.records, "nothing went wrong, so nothing is said"


async def test_headers_leave_with_the_first_token_even_without_text(
    serving, make_app, card, tokenizer
):
    [first, *_] = tokenizer.encode("\U0001f680", add_special_tokens=False)
    gateway = FakeGateway(card, script=lambda request, choice: [first] * 99, permits=1)
    async with serving(make_app(gateway)) as url:
        body = {"prompt": "a", "stream": True}
        async with posted(url, "/v1/completions", body) as reader, asyncio.timeout(20):
            head = await reader.readuntil(b"\r\n\r\n")
            assert b"200 OK" in head
            assert b"text/event-stream" in head
            assert gateway.num_running == 1


async def test_a_storm_of_leavers_leaves_nothing(serving, make_app, card):
    gateway = FakeGateway(card, permits=0)
    async with serving(make_app(gateway)) as url:
        async with asyncio.timeout(60):
            for number in range(40):
                body = {"prompt": "a", "stream": number % 2 == 0}
                async with posted(url, "/v1/completions", body):
                    await gateway.until(lambda n=number: len(gateway.submitted) == n + 1)
        await all_ended(gateway)
        gateway.allow(100)
        async with posted(url, "/v1/completions", {"prompt": "a"}) as reader:
            assert b"200 OK" in await reader.readuntil(b"\r\n\r\n")
    assert len(gateway.aborted) == 40


async def test_work_is_cancelled_when_its_caller_is():
    """A server that shuts down cancels the whole request, not only one half of it."""
    began, ended = asyncio.Event(), asyncio.Event()

    async def receive():
        return await asyncio.Future()

    async def work():
        began.set()
        try:
            await asyncio.Future()
        finally:
            ended.set()

    caller = asyncio.create_task(run_while_connected(receive, work()))
    await began.wait()
    caller.cancel()
    with pytest.raises(asyncio.CancelledError):
        await caller
    assert ended.is_set()


async def test_work_that_ends_first_tells_its_error():
    async def receive():
        return await asyncio.Future()

    async def work():
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        await run_while_connected(receive, work())


async def test_a_client_that_has_gone_stops_the_work():
    async def receive():
        return {"type": "http.disconnect"}

    assert await run_while_connected(receive, asyncio.Event().wait()) is False


async def test_a_connection_that_cannot_be_read_stops_the_work():
    async def receive():
        raise ConnectionResetError

    assert await run_while_connected(receive, asyncio.Event().wait()) is False


async def test_a_caller_that_is_cancelled_is_so_even_if_the_client_leaves_too():
    left = asyncio.Event()

    async def receive():
        await left.wait()
        return {"type": "http.disconnect"}

    async def work():
        try:
            await asyncio.Future()
        finally:
            left.set()
            await turns(2)  # the watcher hears of the client now

    caller = asyncio.create_task(run_while_connected(receive, work()))
    await turns(2)
    caller.cancel()
    with pytest.raises(asyncio.CancelledError):
        await caller
    assert caller.cancelled()


async def test_what_follows_finished_work_is_not_cancelled():
    """The client leaves in the very moment in which the work ends."""
    left = asyncio.Event()

    async def receive():
        await left.wait()
        return {"type": "http.disconnect"}

    async def work():
        await turns(2)  # the watcher waits
        left.set()

    assert await run_while_connected(receive, work()) is True
    await turns(5)
    assert asyncio.current_task().cancelling() == 0
