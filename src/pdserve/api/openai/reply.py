"""Sending an answer: as one JSON document, or as server-sent events while it is written.

The status is decided by the first token. Until then nothing is sent, so a refusal keeps its own
status code, streaming or not; with it the headers of a stream leave at once. An error after that is
an event in the stream, followed by ``[DONE]``. All the while somebody listens for the client to go:
then the gateway's streams are closed, and the blocks of the request are free.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from contextlib import aclosing
from typing import Any, Protocol

import msgspec
from starlette.responses import Response
from starlette.types import Message, Receive, Scope, Send

from pdserve.api.disconnect import run_while_connected
from pdserve.api.errors import failure_of, is_bug
from pdserve.api.gateway import Gateway
from pdserve.api.middleware import REQUEST_ID_HEADER
from pdserve.api.openai.choice import Piece
from pdserve.api.openai.generation import Generation
from pdserve.api.openai.requests import Order
from pdserve.api.openai.streams import token_deltas
from pdserve.core.errors import GenerationError
from pdserve.text.tokenizer import Tokenizer

logger = logging.getLogger(__name__)

_DONE = b"data: [DONE]\n\n"


class Shape(Protocol):
    """What differs between the endpoints: the JSON of a choice. One per HTTP request."""

    whole_object: str
    chunk_object: str

    def opening(self) -> Sequence[dict[str, Any]]:
        """Chunks (without head) that come before the first token."""
        ...

    def delta(self, piece: Piece) -> dict[str, Any]:
        """An entry of ``choices`` in a chunk."""
        ...

    def whole(self, piece: Piece) -> dict[str, Any]:
        """An entry of ``choices`` in a document."""
        ...

    def document_extras(self) -> dict[str, Any]:
        """Fields of the document beside ``choices``."""
        ...


class GenerationReply(Response):
    """Submits the order when it is called, and answers with what comes."""

    def __init__(self, order: Order, shape: Shape, gateway: Gateway, tokenizer: Tokenizer) -> None:
        headers = {REQUEST_ID_HEADER: order.name}
        if order.stream:  # neither a cache nor a proxy may hold it back
            headers |= {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}
        media_type = "text/event-stream" if order.stream else "application/json"
        super().__init__(media_type=media_type, headers=headers)
        # The length is not known yet.
        self.raw_headers = [field for field in self.raw_headers if field[0] != b"content-length"]
        self._order = order
        self._shape = shape
        self._gateway = gateway
        self._generation = Generation(order, tokenizer, gateway.stop_choice)
        self._head = {
            "id": order.response_id,
            "object": shape.chunk_object if order.stream else shape.whole_object,
            "created": int(time.time()),
            "model": gateway.card.name,
        }

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        work = self._send_stream(send) if self._order.stream else self._send_whole(send)
        await run_while_connected(receive, work)

    async def _send_whole(self, send: Send) -> None:
        generation = self._generation
        pieces: dict[int, list[Piece]] = {}
        async with aclosing(token_deltas(self._gateway, self._order.requests)) as deltas:
            async for prompt, delta in deltas:
                piece = generation.take(prompt, delta)
                if piece is not None:
                    pieces.setdefault(piece.choice, []).append(piece)
                if generation.is_complete:
                    break
        self._check_complete()
        document = {
            **self._head,
            "choices": [self._shape.whole(Piece.joined(pieces[index])) for index in sorted(pieces)],
            "usage": generation.usage(),
            **self._shape.document_extras(),
        }
        body = msgspec.json.encode(document)
        self.headers["Content-Length"] = str(len(body))
        await self._send_head(send)
        await send({"type": "http.response.body", "body": body})

    async def _send_stream(self, send: Send) -> None:
        async with aclosing(token_deltas(self._gateway, self._order.requests)) as deltas:
            step = await anext(deltas, None)
            if step is None:
                self._check_complete()
                return
            await self._send_head(send)
            events = [self._event(chunk) for chunk in self._shape.opening()]
            try:
                while step is not None:
                    piece = self._generation.take(*step)
                    if piece is not None:
                        events.append(self._event({"choices": [self._shape.delta(piece)]}))
                    if self._generation.is_complete:
                        break
                    if events:
                        await send(_part(events))
                        events = []
                    step = await anext(deltas, None)
                self._check_complete()
                if self._order.options.include_usage:
                    usage = self._generation.usage()
                    events.append(self._event({"choices": [], "usage": usage}))
            except Exception as error:
                if is_bug(error):
                    logger.exception("request %s broke off", self._order.response_id)
                events.append(_event(failure_of(error).document))
            events.append(_DONE)
            await send({**_part(events), "more_body": False})

    def _check_complete(self) -> None:
        if not self._generation.is_complete:
            raise GenerationError("the answer broke off before its end; please try again")

    async def _send_head(self, send: Send) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})

    def _event(self, chunk: dict[str, Any]) -> bytes:
        options = self._order.options
        if options.continuous_usage and chunk["choices"]:
            chunk["usage"] = self._generation.usage_of(chunk["choices"][0]["index"])
        elif options.include_usage:
            chunk.setdefault("usage", None)  # as OpenAI has it: null in every chunk but the last
        return _event({**self._head, **chunk})


def _part(events: Sequence[bytes]) -> Message:
    """What is there to be told, in one write."""
    return {"type": "http.response.body", "body": b"".join(events), "more_body": True}


def _event(document: dict[str, Any]) -> bytes:
    data = msgspec.json.encode(document)
    if not data.isascii():
        data = _escape_line_ends(data)
    return b"data: %b\n\n" % data


def _escape_line_ends(data: bytes) -> bytes:
    """Escape what only Unicode takes for a line end: some clients split events there.

    They can only stand inside JSON strings, where an escape means the same.
    """
    return (
        data.replace(b"\xc2\x85", b"\\u0085")
        .replace(b"\xe2\x80\xa8", b"\\u2028")
        .replace(b"\xe2\x80\xa9", b"\\u2029")
    )
