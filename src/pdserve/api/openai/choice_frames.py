"""Answers made of ``choices``: those of ``/v1/completions`` and ``/v1/chat/completions``."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from pdserve.api.openai.choice import Piece
from pdserve.api.openai.events import DONE, event
from pdserve.api.openai.generation import Generation
from pdserve.api.openai.reply import Frames
from pdserve.api.openai.requests import Order


class Shape(Protocol):
    """What differs between the two: the JSON of a choice. One per HTTP request."""

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


class ChoiceFrames(Frames):
    """Puts choices into documents and chunks, with usage where it is wanted."""

    def __init__(self, order: Order, shape: Shape, model: str) -> None:
        self._options = order.options
        self._shape = shape
        self._head = {
            "id": order.response_id,
            "object": shape.chunk_object if order.stream else shape.whole_object,
            "created": int(time.time()),
            "model": model,
        }

    def document(
        self, pieces: Mapping[int, Sequence[Piece]], generation: Generation
    ) -> dict[str, Any]:
        return {
            **self._head,
            "choices": [self._shape.whole(Piece.joined(all_of)) for all_of in pieces.values()],
            "usage": generation.usage(),
            **self._shape.document_extras(),
        }

    def opening(self, generation: Generation) -> list[bytes]:
        return [self._chunk(chunk, generation) for chunk in self._shape.opening()]

    def news(self, piece: Piece, generation: Generation) -> list[bytes]:
        return [self._chunk({"choices": [self._shape.delta(piece)]}, generation)]

    def closing(self, generation: Generation) -> list[bytes]:
        if not self._options.include_usage:
            return [DONE]
        return [self._chunk({"choices": [], "usage": generation.usage()}, generation), DONE]

    def failure(self, document: dict[str, Any]) -> list[bytes]:
        return [event(document), DONE]

    def _chunk(self, chunk: dict[str, Any], generation: Generation) -> bytes:
        options = self._options
        if options.continuous_usage and chunk["choices"]:
            chunk["usage"] = generation.usage_of(chunk["choices"][0]["index"])
        elif options.include_usage:
            chunk.setdefault("usage", None)  # as OpenAI has it: null in every chunk but the last
        return event({**self._head, **chunk})
