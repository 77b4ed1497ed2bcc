"""The HTTP server of a gateway: the edge's routes on uvicorn, within somebody else's event loop."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

import uvicorn

from pdserve.api.app import create_app
from pdserve.api.gateway import Gateway
from pdserve.serve.connections import MAX_HEADER_BYTES, guarded
from pdserve.serve.edge_files import EdgeFiles
from pdserve.text.chat import ChatTemplate
from pdserve.text.tokenizer import Tokenizer

GRACE_S = 3
"""How long responses may still be written once every answer is over."""


class HttpServer(uvicorn.Server):
    """uvicorn without its signal handlers: ``serve.server`` decides when to end."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


def http_server(gateway: Gateway, model_path: Path, files: EdgeFiles) -> HttpServer:
    """The server for this gateway and the tokenizer of this model; not serving yet.

    Raises `ModelError` if the folder's tokenizer or chat template cannot be used.
    """
    app = create_app(
        gateway,
        Tokenizer.from_folder(model_path),
        ChatTemplate.from_folder(model_path),
        files.settings,
        files.keys,
    )
    config = uvicorn.Config(
        app,
        http=guarded(files.settings.read_timeout_s),
        ws="none",
        log_config=None,
        access_log=False,
        lifespan="off",
        server_header=False,
        h11_max_incomplete_event_size=MAX_HEADER_BYTES,
        timeout_graceful_shutdown=GRACE_S,
    )
    config.load()
    config.ssl = files.ssl
    return HttpServer(config)
