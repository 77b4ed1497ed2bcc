"""Servers to load: the real HTTP edge over a scripted gateway, and one that follows a script."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import threading
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import uvicorn
from fastapi import FastAPI

from pdserve.api.app import create_app
from pdserve.api.fake import FakeGateway
from pdserve.api.gateway import ModelCard
from pdserve.api.settings import ApiSettings
from pdserve.text.chat import ChatTemplate
from pdserve.text.tokenizer import Tokenizer

Talk = Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


@pytest.fixture(scope="session")
def bench_tokenizer(tiny_model_path: Path) -> Tokenizer:
    return Tokenizer.from_folder(tiny_model_path)


@pytest.fixture(scope="session")
def bench_card(bench_tokenizer: Tokenizer) -> ModelCard:
    return ModelCard(
        name="tiny",
        max_model_tokens=512,
        vocab_size=bench_tokenizer.vocab_size,
        eos_token_ids=(0,),
        created=1_700_000_000,
    )


@pytest.fixture
def make_app(bench_tokenizer: Tokenizer, tiny_model_path: Path) -> Callable[..., FastAPI]:
    template = ChatTemplate.from_folder(tiny_model_path)

    def make(gateway: FakeGateway, **settings: Any) -> FastAPI:
        return create_app(gateway, bench_tokenizer, template, ApiSettings(**settings))

    return make


class _Server(uvicorn.Server):
    def __init__(self, config: uvicorn.Config, started: Callable[[], None]) -> None:
        super().__init__(config)
        self._tell_started = started

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        self._tell_started()


def _server(app: FastAPI, started: Callable[[], None]) -> tuple[_Server, socket.socket, str]:
    listener = socket.socket()
    listener.bind(("127.0.0.1", 0))
    config = uvicorn.Config(app, log_level="warning", lifespan="off", ws="none")
    return _Server(config, started), listener, "http://{}:{}".format(*listener.getsockname())


@pytest.fixture
def serving() -> Callable[[FastAPI], contextlib.AbstractAsyncContextManager[str]]:
    """On the test's own event loop; gives the base URL."""

    @contextlib.asynccontextmanager
    async def serve(app: FastAPI) -> AsyncIterator[str]:
        started = asyncio.Event()
        server, listener, url = _server(app, started.set)
        running = asyncio.create_task(server.serve([listener]))
        try:
            await started.wait()
            yield url
        finally:
            server.should_exit = True
            await running
            listener.close()

    return serve


@pytest.fixture
def serving_in_thread() -> Callable[[FastAPI], contextlib.AbstractContextManager[str]]:
    """On a thread of its own, for commands that have an event loop themselves."""

    @contextlib.contextmanager
    def serve(app: FastAPI) -> Iterator[str]:
        started = threading.Event()
        server, listener, url = _server(app, started.set)
        thread = threading.Thread(target=server.run, args=([listener],))
        thread.start()
        try:
            assert started.wait(30)
            yield url
        finally:
            server.should_exit = True
            thread.join()
            listener.close()

    return serve


@pytest.fixture
def scripted() -> Callable[[Talk], contextlib.AbstractAsyncContextManager[str]]:
    """A server whose every connection is handled by ``talk``; gives the base URL."""

    @contextlib.asynccontextmanager
    async def serve(talk: Talk) -> AsyncIterator[str]:
        async def closing(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            try:
                await talk(reader, writer)
            except (asyncio.IncompleteReadError, ConnectionError):
                pass  # the client has left
            finally:
                writer.close()

        server = await asyncio.start_server(closing, "127.0.0.1", 0)
        try:
            yield "http://{}:{}".format(*server.sockets[0].getsockname())
        finally:
            server.close()
            await server.wait_closed()

    return serve
