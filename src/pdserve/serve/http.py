"""The HTTP server of a gateway: the edge's routes on uvicorn, within somebody else's event loop."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

import uvicorn

from pdserve.api.app import create_app
from pdserve.api.gateway import Gateway
from pdserve.api.settings import ApiSettings
from pdserve.service_classes import ONE_CLASS, ServiceClasses
from pdserve.text.chat import ChatTemplate
from pdserve.text.tokenizer import Tokenizer

GRACE_S = 3
"""How long responses may still be written once every answer is over."""


class HttpServer(uvicorn.Server):
    """uvicorn without its signal handlers: ``serve.server`` decides when to end."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


def http_server(
    gateway: Gateway,
    model_path: Path,
    api_key: str | None,
    service_classes: ServiceClasses = ONE_CLASS,
) -> HttpServer:
    """The server for this gateway and the tokenizer of this model; not serving yet.

    Raises `ModelError` if the folder's tokenizer or chat template cannot be used.
    """
    app = create_app(
        gateway,
        Tokenizer.from_folder(model_path),
        ChatTemplate.from_folder(model_path),
        ApiSettings(
            api_key=api_key,
            classes={service.name: service for service in service_classes.classes},
            class_of_key=service_classes.class_of_key,
        ),
    )
    config = uvicorn.Config(
        app,
        log_config=None,
        access_log=False,
        lifespan="off",
        server_header=False,
        timeout_graceful_shutdown=GRACE_S,
    )
    return HttpServer(config)
