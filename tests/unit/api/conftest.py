"""A server with scripted tokens and real words: the tiny model's tokenizer and chat template."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import json
import socket
import threading
from collections.abc import AsyncIterator, Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import httpx2
import openai
import pytest
import uvicorn
from fastapi import FastAPI

from pdserve.api.app import create_app
from pdserve.api.fake import FakeGateway
from pdserve.api.gateway import ModelCard
from pdserve.api.settings import ApiSettings
from pdserve.core.request import Request
from pdserve.text.chat import ChatTemplate
from pdserve.text.tokenizer import Tokenizer


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


@pytest.fixture(scope="session")
def tokenizer(tiny_model_path: Path) -> Tokenizer:
    return Tokenizer.from_folder(tiny_model_path)


@pytest.fixture(scope="session")
def chat_template(tiny_model_path: Path) -> ChatTemplate:
    return ChatTemplate.from_folder(tiny_model_path)


@pytest.fixture(scope="session")
def eos(tokenizer: Tokenizer) -> int:
    """The token that ends a choice."""
    [token_id] = tokenizer.encode("<|im_end|>", add_special_tokens=False)
    return token_id


@pytest.fixture(scope="session")
def card(tokenizer: Tokenizer, eos: int) -> ModelCard:
    return ModelCard(
        name="tiny",
        max_model_tokens=256,
        vocab_size=tokenizer.vocab_size,
        eos_token_ids=(eos,),
        created=1_700_000_000,
    )


@pytest.fixture
def gateway(card: ModelCard) -> FakeGateway:
    return FakeGateway(card)


@pytest.fixture
def say(tokenizer: Tokenizer, eos: int) -> Callable[..., Callable[[Request, int], list[int]]]:
    """A script: choice c of every request says text c (the last one from there on), then ends."""

    def script_of(*texts: str) -> Callable[[Request, int], list[int]]:
        ids = [tokenizer.encode(text, add_special_tokens=False) for text in texts]
        return lambda request, choice: [*ids[min(choice, len(ids) - 1)], eos]

    return script_of


@pytest.fixture
def make_app(tokenizer: Tokenizer, chat_template: ChatTemplate) -> Callable[..., FastAPI]:
    def make(
        gateway: FakeGateway,
        *,
        has_template: bool = True,
        template_text: str | None = None,
        **settings: Any,
    ) -> FastAPI:
        template = chat_template if has_template else ChatTemplate(None)
        if template_text is not None:
            template = ChatTemplate(template_text)
        return create_app(gateway, tokenizer, template, ApiSettings(**settings))

    return make


@pytest.fixture
def client_of(make_app: Callable[..., FastAPI]) -> Callable[..., httpx2.AsyncClient]:
    """An HTTP client whose requests go straight into the application."""

    def client(gateway: FakeGateway, **settings: Any) -> httpx2.AsyncClient:
        transport = httpx2.ASGITransport(make_app(gateway, **settings))
        return httpx2.AsyncClient(transport=transport, base_url="http://edge")

    return client


@pytest.fixture
def joined() -> Callable[[Iterable[Iterable[Any]]], list[Any]]:
    """Lists end to end."""
    return lambda lists: list(itertools.chain.from_iterable(lists))


@pytest.fixture
def events_of() -> Callable[[str], list[Any]]:
    """The documents of a server-sent event stream, ``[DONE]`` as that string."""

    def parse(text: str) -> list[Any]:
        assert text.endswith("\n\n")
        events = text.removesuffix("\n\n").split("\n\n")
        assert all(event.startswith("data: ") and "\n" not in event for event in events)
        data = [event.removeprefix("data: ") for event in events]
        return [item if item == "[DONE]" else json.loads(item) for item in data]

    return parse


class _Server(uvicorn.Server):
    """Tells when it is up, so that nobody has to ask again and again."""

    def __init__(self, config: uvicorn.Config, started: Callable[[], None]) -> None:
        super().__init__(config)
        self._tell_started = started

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        self._tell_started()


def _listen(
    app: FastAPI, started: Callable[[], None], http: str = "auto"
) -> tuple[_Server, socket.socket, str]:
    listener = socket.socket()
    listener.bind(("127.0.0.1", 0))
    config = uvicorn.Config(app, http=http, log_level="warning", lifespan="off", ws="none")
    return _Server(config, started), listener, "http://{}:{}".format(*listener.getsockname())


@pytest.fixture
def serving() -> Callable[..., contextlib.AbstractAsyncContextManager[str]]:
    """Serve an application over TCP on the test's own event loop; gives the base URL."""

    @contextlib.asynccontextmanager
    async def serve(app: FastAPI, http: str = "auto") -> AsyncIterator[str]:
        started = asyncio.Event()
        server, listener, url = _listen(app, started.set, http)
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
    """The same on a thread of its own, for clients that block."""

    @contextlib.contextmanager
    def serve(app: FastAPI) -> Iterator[str]:
        started = threading.Event()
        server, listener, url = _listen(app, started.set)
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
def connect(
    serving_in_thread: Callable[[FastAPI], contextlib.AbstractContextManager[str]],
    make_app: Callable[..., FastAPI],
    card: ModelCard,
    say: Callable[..., Any],
) -> Callable[..., contextlib.AbstractContextManager[tuple[openai.OpenAI, FakeGateway]]]:
    """Serve a gateway that says these texts and give (client, gateway)."""

    @contextlib.contextmanager
    def connected(
        *texts: str,
        settings: Mapping[str, Any] | None = None,
        client_options: Mapping[str, Any] | None = None,
        **gateway_options: Any,
    ) -> Iterator[tuple[openai.OpenAI, FakeGateway]]:
        script = {"script": say(*texts)} if texts else {}
        gateway = FakeGateway(card, **{**script, **gateway_options})
        with serving_in_thread(make_app(gateway, **(settings or {}))) as url:
            options = {"api_key": "none", **(client_options or {})}
            with openai.OpenAI(base_url=f"{url}/v1", max_retries=0, **options) as client:
                yield client, gateway

    return connected
