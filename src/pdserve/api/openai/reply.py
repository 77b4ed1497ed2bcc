"""Sending an answer: as one JSON document, or as server-sent events while it is written.

The status is decided by the first token. Until then nothing is sent, so a refusal keeps its own
status code, streaming or not; with it the headers of a stream leave at once. An error after that is
an event in the stream, followed by ``[DONE]``. All the while somebody listens for the client to go:
then the gateway's streams are closed, and the blocks of the request are free.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
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


class Frames(Protocol):
    """What differs between the endpoints: how news are put into JSON. One per HTTP request."""

    def document(
        self, pieces: Mapping[int, Sequence[Piece]], generation: Generation
    ) -> dict[str, Any]:
        """The whole answer; all ``pieces`` by choice, in order."""
        ...

    def opening(self, generation: Generation) -> list[bytes]:
        """Events that come before the first token."""
        ...

    def news(self, piece: Piece, generation: Generation) -> list[bytes]:
        """Events of what there is to be told of a choice."""
        ...

    def closing(self, generation: Generation) -> list[bytes]:
        """Events of an answer that is complete."""
        ...

    def failure(self, document: dict[str, Any]) -> list[bytes]:
        """Events of an answer that breaks off, with an error in OpenAI's shape."""
        ...


class GenerationReply(Response):
    """Submits the order when it is called, and answers with what comes."""

    def __init__(
        self, order: Order, frames: Frames, gateway: Gateway, tokenizer: Tokenizer
    ) -> None:
        headers = {REQUEST_ID_HEADER: order.name}
        if order.stream:  # neither a cache nor a proxy may hold it back
            headers |= {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}
        media_type = "text/event-stream" if order.stream else "application/json"
        super().__init__(media_type=media_type, headers=headers)
        # The length is not known yet.
        self.raw_headers = [field for field in self.raw_headers if field[0] != b"content-length"]
        self._order = order
        self._frames = frames
        self._gateway = gateway
        self._generation = Generation(order, tokenizer, gateway.stop_choice)

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
        document = self._frames.document(dict(sorted(pieces.items())), generation)
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
            events = self._frames.opening(self._generation)
            try:
                while step is not None:
                    piece = self._generation.take(*step)
                    if piece is not None:
                        events += self._frames.news(piece, self._generation)
                    if self._generation.is_complete:
                        break
                    if events:
                        await send(_part(events))
                        events = []
                    step = await anext(deltas, None)
                self._check_complete()
                events += self._frames.closing(self._generation)
            except Exception as error:
                if is_bug(error):
                    logger.exception("request %s broke off", self._order.response_id)
                events += self._frames.failure(failure_of(error).document)
            await send({**_part(events), "more_body": False})

    def _check_complete(self) -> None:
        if not self._generation.is_complete:
            raise GenerationError("the answer broke off before its end; please try again")

    async def _send_head(self, send: Send) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})


def _part(events: Sequence[bytes]) -> Message:
    """What is there to be told, in one write."""
    return {"type": "http.response.body", "body": b"".join(events), "more_body": True}
