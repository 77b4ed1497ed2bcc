"""Deadlines of answers, and clients that are slow to send."""

from __future__ import annotations

import asyncio
import importlib.util
import json
from collections.abc import Callable
from typing import Any

import httpx2
import pytest
from starlette.types import Message, Receive, Scope, Send

from pdserve.api import time_limits
from pdserve.api.fake import FakeGateway
from pdserve.api.time_limits import TimeLimits

pytestmark = pytest.mark.anyio

SERVERS = ["h11", *(["httptools"] if importlib.util.find_spec("httptools") else [])]
URL = "/v1/completions"
BODY = {"prompt": [5, 6, 7], "max_tokens": 9}
SOON = {"X-Pdserve-Timeout": "0.05"}

Clients = Callable[..., httpx2.AsyncClient]


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("by_client", [False, True])
async def test_before_the_first_token_it_is_a_504(
    card: Any, client_of: Clients, stream: bool, by_client: bool
) -> None:
    gateway = FakeGateway(card, permits=0)
    settings = {"request_timeout_s": 60.0 if by_client else 0.05}
    async with client_of(gateway, **settings) as client:
        response = await client.post(
            URL, json={**BODY, "stream": stream}, headers=SOON if by_client else {}
        )
    assert response.status_code == 504
    error = response.json()["error"]
    assert (error["type"], error["code"]) == ("timeout_error", "deadline_exceeded")
    assert "0.05 s" in error["message"]
    assert response.headers["x-should-retry"] == "false"
    assert response.headers["x-request-id"]
    assert len(gateway.aborted) == 1  # nothing computes on


async def test_the_sooner_deadline_counts(card: Any, client_of: Clients) -> None:
    gateway = FakeGateway(card, permits=0)
    async with client_of(gateway, request_timeout_s=0.05) as client:
        response = await client.post(URL, json=BODY, headers={"X-Pdserve-Timeout": "900"})
    assert response.status_code == 504


@pytest.mark.parametrize("prompts", [[5, 6, 7], [[5, 6], [7, 8]]])
async def test_in_a_stream_it_is_an_event(
    card: Any, client_of: Clients, events_of: Callable[[str], list[Any]], prompts: list[Any]
) -> None:
    gateway = FakeGateway(card, permits=3)
    body = {**BODY, "prompt": prompts, "stream": True}
    async with client_of(gateway) as client:
        response = await client.post(URL, json=body, headers={"X-Pdserve-Timeout": "0.3"})
    events = events_of(response.text)
    assert response.status_code == 200
    assert events[-1] == "[DONE]"
    assert events[-2]["error"]["code"] == "deadline_exceeded"
    assert len([event for event in events[:-2] if event["choices"]]) == 3
    assert len(gateway.aborted) == len(gateway.submitted)


async def test_an_answer_in_time_is_as_ever(gateway: FakeGateway, client_of: Clients) -> None:
    async with client_of(gateway, request_timeout_s=60.0) as client:
        for stream in (False, True):
            response = await client.post(URL, json={**BODY, "stream": stream})
            assert response.status_code == 200
    assert gateway.aborted == []


@pytest.mark.parametrize("value", ["0", "-1", "soon", "nan", "inf", ""])
async def test_a_deadline_that_is_none(
    gateway: FakeGateway, client_of: Clients, value: str
) -> None:
    async with client_of(gateway) as client:
        response = await client.post(URL, json=BODY, headers={"X-Pdserve-Timeout": value})
    assert response.status_code == 400
    assert response.json()["error"]["param"] == "X-Pdserve-Timeout"


async def test_a_drain_has_no_deadline(gateway: FakeGateway, client_of: Clients) -> None:
    async with client_of(gateway, request_timeout_s=1e-9) as client:
        response = await client.post("/cluster/workers/fake-0/drain", json={})
    assert response.status_code == 200


async def test_a_timeout_of_the_routes_own_is_a_bug_not_a_deadline(
    card: Any, client_of: Clients
) -> None:
    gateway = FakeGateway(card, fail_before=TimeoutError())
    async with client_of(gateway, request_timeout_s=60.0) as client:
        response = await client.post(URL, json=BODY)
    assert response.status_code == 500


async def test_a_client_that_does_not_read_its_stream_is_cut_off(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The server's ``send`` waits for it; neither the answer nor its last event do for ever."""
    monkeypatch.setattr(time_limits, "_LAST_WORDS_S", 0.01)
    sent: list[str] = []
    freed = asyncio.Event()

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        fields = [(b"content-type", b"text/event-stream")]
        await send({"type": "http.response.start", "status": 200, "headers": fields})
        try:
            await send({"type": "http.response.body", "body": b"data: 1", "more_body": True})
        finally:
            freed.set()

    async def send(message: Message) -> None:
        sent.append(message["type"])
        if message["type"] == "http.response.body":
            await asyncio.Event().wait()

    async def receive() -> Message:
        return {"type": "http.disconnect"}

    scope = {"type": "http", "method": "POST", "path": URL, "headers": []}
    async with asyncio.timeout(20):
        await TimeLimits(app, read_s=1.0, request_s=0.01)(scope, receive, send)
    assert freed.is_set()
    # It was not told that this is the end, so the server closes the connection.
    assert sent == ["http.response.start", "http.response.body", "http.response.body"]


@pytest.mark.parametrize("http", SERVERS)
async def test_a_body_that_does_not_come_is_a_408(
    gateway: FakeGateway, make_app: Callable[..., Any], serving: Callable[..., Any], http: str
) -> None:
    async with serving(make_app(gateway, read_timeout_s=0.05), http) as url:
        host, port = url.removeprefix("http://").split(":")
        reader, writer = await asyncio.open_connection(host, int(port))
        writer.write(
            b"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\n"
            b'content-length: 100\r\n\r\n{"prompt": '
        )
        async with asyncio.timeout(20):
            response = await reader.read()
        writer.close()
    assert response.startswith(b"HTTP/1.1 408")
    assert b"connection: close" in response.lower()
    assert json.loads(response.partition(b"\r\n\r\n")[2])["error"]["code"] == "request_timeout"
