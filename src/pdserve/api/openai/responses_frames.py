"""Answers of ``/v1/responses``: the response around its items, and the events by which it grows.

Each event has its name, and a number that counts up from 0.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from typing import Any

from pdserve.api.openai.choice import Piece
from pdserve.api.openai.events import event
from pdserve.api.openai.generation import Generation
from pdserve.api.openai.logprobs import LogprobWriter
from pdserve.api.openai.reply import Frames
from pdserve.api.openai.requests import Order
from pdserve.api.openai.responses_body import ResponsesBody
from pdserve.api.openai.responses_items import COMPLETED, IN_PROGRESS, INCOMPLETE, Event, Items
from pdserve.core.request import FinishReason


class ResponseFrames(Frames):
    """State of one response: its items so far, and why it ended."""

    def __init__(
        self, order: Order, body: ResponsesBody, model: str, writer: LogprobWriter
    ) -> None:
        [request] = order.requests
        options = order.options
        self._items = Items(
            order.response_id,
            None if options.num_top_logprobs is None else writer,
            may_call=options.tools is not None,
            calls_are_certain=request.params.constraint is not None,
        )
        self._finish_reason: str | None = None
        self._number = 0
        self._head = {
            "id": order.response_id,
            "object": "response",
            "created_at": int(time.time()),
            "model": model,
            "instructions": body.instructions,
            "max_output_tokens": request.params.max_tokens,
            "metadata": body.metadata,
            "parallel_tool_calls": body.parallel_tool_calls,
            "previous_response_id": None,
            "store": False,
            "temperature": body.temperature,
            "text": body.text or {"format": {"type": "text"}},
            "tool_choice": body.told_tool_choice(),
            "tools": body.told_tools(),
            "top_logprobs": body.top_logprobs,
            "top_p": body.top_p,
            "truncation": body.truncation,
        }

    def document(
        self, pieces: Mapping[int, Sequence[Piece]], generation: Generation
    ) -> dict[str, Any]:
        self._items.begin()
        for piece in pieces[0]:
            self._take(piece)
        self._items.end(self._status)
        return self._response(self._status, generation)

    def opening(self, generation: Generation) -> list[bytes]:
        begun = self._response(IN_PROGRESS, None)
        return [
            self._event("response.created", response=begun),
            self._event("response.in_progress", response=begun),
            *self._events(self._items.begin()),
        ]

    def news(self, piece: Piece, generation: Generation) -> list[bytes]:
        return self._events(self._take(piece))

    def closing(self, generation: Generation) -> list[bytes]:
        status = self._status
        return [
            *self._events(self._items.end(status)),
            self._event(f"response.{status}", response=self._response(status, generation)),
        ]

    def failure(self, document: dict[str, Any]) -> list[bytes]:
        error = document["error"]
        told = {name: error[name] for name in ("code", "message", "param")}
        return [self._event("error", **told)]

    # --- inside -------------------------------------------------------------------------------

    def _take(self, piece: Piece) -> list[Event]:
        self._finish_reason = piece.finish_reason
        return self._items.take(piece)

    @property
    def _status(self) -> str:
        """Of an answer that is over."""
        is_cut = self._finish_reason == FinishReason.LENGTH.value
        return INCOMPLETE if is_cut else COMPLETED

    def _response(self, status: str, generation: Generation | None) -> dict[str, Any]:
        """The whole response; without ``generation`` there is no usage yet."""
        cut = {"reason": "max_output_tokens"} if status == INCOMPLETE else None
        return {
            **self._head,
            "status": status,
            "error": None,
            "incomplete_details": cut,
            "output": self._items.output(),
            "usage": None if generation is None else _usage(generation.usage()),
        }

    def _events(self, events: Sequence[Event]) -> list[bytes]:
        return [self._event(name, **fields) for name, fields in events]

    def _event(self, name: str, /, **fields: Any) -> bytes:
        number, self._number = self._number, self._number + 1
        return event({"type": name, "sequence_number": number, **fields}, name)


def _usage(usage: dict[str, Any]) -> dict[str, Any]:
    return {
        "input_tokens": usage["prompt_tokens"],
        "input_tokens_details": usage["prompt_tokens_details"],
        "output_tokens": usage["completion_tokens"],
        "output_tokens_details": {"reasoning_tokens": 0},
        "total_tokens": usage["total_tokens"],
    }
