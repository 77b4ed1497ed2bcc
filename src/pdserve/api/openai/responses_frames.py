"""Answers of ``/v1/responses``: one message with one text, and the events by which it grows.

The events and their order are those of OpenAI's reference ("Streaming events" of Responses), as far
as a text needs them. Each has its name, and a number that counts up from 0.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

from pdserve.api.openai.choice import Piece
from pdserve.api.openai.events import event
from pdserve.api.openai.generation import Generation
from pdserve.api.openai.logprobs import LogprobWriter
from pdserve.api.openai.reply import Frames
from pdserve.api.openai.requests import Order
from pdserve.api.openai.responses_body import ResponsesBody
from pdserve.core.request import FinishReason


class ResponseFrames(Frames):
    """State of one response: the text so far, and why it ended."""

    def __init__(
        self, order: Order, body: ResponsesBody, model: str, writer: LogprobWriter
    ) -> None:
        self._body = body
        self._writer = writer
        self._has_logprobs = order.options.num_top_logprobs is not None
        self._item_id = order.response_id.replace("resp", "msg", 1)
        self._text = ""
        self._logprobs: list[dict[str, Any]] = []
        self._finish_reason: str | None = None
        self._number = 0
        [request] = order.requests
        self._head = {
            "id": order.response_id,
            "object": "response",
            "created_at": int(time.time()),
            "model": model,
            "instructions": body.instructions,
            "max_output_tokens": request.params.max_tokens,
            "metadata": body.metadata,
            "parallel_tool_calls": False,
            "previous_response_id": None,
            "store": False,
            "temperature": body.temperature,
            "text": body.text or {"format": {"type": "text"}},
            "tool_choice": "none",
            "tools": [],
            "top_logprobs": body.top_logprobs,
            "top_p": body.top_p,
            "truncation": body.truncation,
        }

    def document(self, pieces: Mapping[int, Piece], generation: Generation) -> dict[str, Any]:
        self._take(pieces[0])
        return self._ended(generation)

    def opening(self, generation: Generation) -> list[bytes]:
        begun = {
            **self._head,
            "status": "in_progress",
            "error": None,
            "incomplete_details": None,
            "output": [],
            "usage": None,
        }
        return [
            self._event("response.created", response=begun),
            self._event("response.in_progress", response=begun),
            self._event("response.output_item.added", output_index=0, item=self._item(None)),
            self._text_event("response.content_part.added", part=self._part()),
        ]

    def news(self, piece: Piece, generation: Generation) -> list[bytes]:
        logprobs = self._take(piece)
        if not piece.text and not logprobs:
            return []
        name = "response.output_text.delta"
        return [self._text_event(name, delta=piece.text, logprobs=logprobs)]

    def closing(self, generation: Generation) -> list[bytes]:
        response = self._ended(generation)
        [item] = response["output"]
        text, logprobs = self._text, self._logprobs
        return [
            self._text_event("response.output_text.done", text=text, logprobs=logprobs),
            self._text_event("response.content_part.done", part=self._part()),
            self._event("response.output_item.done", output_index=0, item=item),
            self._event(f"response.{response['status']}", response=response),
        ]

    def failure(self, document: dict[str, Any]) -> list[bytes]:
        error = document["error"]
        told = {name: error[name] for name in ("code", "message", "param")}
        return [self._event("error", **told)]

    # --- inside -------------------------------------------------------------------------------

    def _take(self, piece: Piece) -> list[dict[str, Any]]:
        """Log-probabilities of the piece's tokens."""
        self._text += piece.text
        self._finish_reason = piece.finish_reason
        if not self._has_logprobs:
            return []
        logprobs: list[dict[str, Any]] = self._writer.chat(piece.logged)["content"]
        self._logprobs += logprobs
        return logprobs

    def _ended(self, generation: Generation) -> dict[str, Any]:
        is_cut = self._finish_reason == FinishReason.LENGTH.value
        status = "incomplete" if is_cut else "completed"
        return {
            **self._head,
            "status": status,
            "error": None,
            "incomplete_details": {"reason": "max_output_tokens"} if is_cut else None,
            "output": [self._item(status)],
            "usage": _usage(generation.usage()),
        }

    def _item(self, status: str | None) -> dict[str, Any]:
        return {
            "id": self._item_id,
            "type": "message",
            "role": "assistant",
            "status": status or "in_progress",
            "content": [] if status is None else [self._part()],
        }

    def _part(self) -> dict[str, Any]:
        part: dict[str, Any] = {"type": "output_text", "text": self._text, "annotations": []}
        return {**part, "logprobs": list(self._logprobs)} if self._has_logprobs else part

    def _text_event(self, name: str, **fields: Any) -> bytes:
        return self._event(name, item_id=self._item_id, output_index=0, content_index=0, **fields)

    def _event(self, name: str, **fields: Any) -> bytes:
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
