"""Headers that come beside an answer, or behind a body, do not pile up in memory."""

from __future__ import annotations

import asyncio
import contextlib
import importlib.util
from typing import Any

import pytest
import uvicorn
from uvicorn.server import ServerState

from pdserve.serve.connections import MAX_HEADER_BYTES, guarded

SERVERS = ["h11", *(["httptools"] if importlib.util.find_spec("httptools") else [])]
REQUEST = b"GET / HTTP/1.1\r\nhost: x\r\n"
CHUNKED = b"POST / HTTP/1.1\r\nhost: x\r\ntransfer-encoding: chunked\r\n\r\n1\r\na\r\n0\r\n"


async def begin_to_answer(scope: Any, receive: Any, send: Any) -> None:
    """An answer that goes on until the client leaves."""
    await send({"type": "http.response.start", "status": 200, "headers": []})
    await send({"type": "http.response.body", "body": b"begun", "more_body": True})
    while (await receive())["type"] != "http.disconnect":
        pass


def protocol_of(name: str, seen: list[int], made: list[Any]) -> type[asyncio.Protocol]:
    """uvicorn's, behind the guard; counts each piece that it is given."""
    module = importlib.import_module(f"uvicorn.protocols.http.{name}_impl")
    of_uvicorn = {"h11": "H11Protocol", "httptools": "HttpToolsProtocol"}[name]
    protocol = guarded(30.0, getattr(module, of_uvicorn))

    def data_received(self: Any, data: bytes) -> None:
        seen.append(len(data))
        made.append(self)
        protocol.data_received(self, data)

    return type("Counted", (protocol,), {"data_received": data_received})


@pytest.mark.parametrize("name", SERVERS)
@pytest.mark.parametrize("sent", [REQUEST + b"\r\n" + REQUEST, CHUNKED], ids=["next", "trailer"])
@pytest.mark.parametrize("flood", [b"y" * 32_000, b"a: b\r\n" * 5_000], ids=["long", "many"])
def test_a_flood_beside_an_answer_is_cut_off(name: str, sent: bytes, flood: bytes) -> None:
    seen: list[int] = []
    made: list[Any] = []

    async def work() -> None:
        config = uvicorn.Config(
            begin_to_answer, log_config=None, h11_max_incomplete_event_size=MAX_HEADER_BYTES
        )
        config.load()
        make: Any = protocol_of(name, seen, made)
        state = ServerState()
        server = await asyncio.get_running_loop().create_server(
            lambda: make(config=config, server_state=state, app_state={}), "127.0.0.1", 0
        )
        async with server:
            reader, writer = await asyncio.open_connection(*server.sockets[0].getsockname())
            writer.write(sent + b"x: " * (flood[:1] == b"y"))
            await reader.readuntil(b"begun")
            with contextlib.suppress(ConnectionError, TimeoutError):
                async with asyncio.timeout(0.5):  # nobody reads on: the writer waits
                    for _ in range(500):
                        writer.write(flood)
                        await writer.drain()
            made[0].transport.abort()
            await asyncio.gather(*state.tasks)
            writer.close()

    asyncio.run(work())
    assert sum(seen) < 8 * MAX_HEADER_BYTES
