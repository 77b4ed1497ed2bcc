"""``POST /v1/chat/completions``: messages, rendered by the model's chat template."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from fastapi import APIRouter, Request
from starlette.responses import Response

from pdserve.api.body import read_body
from pdserve.api.direct_route import DirectRoute
from pdserve.api.documentation import generating_route
from pdserve.api.edge import Edge
from pdserve.api.openai.choice import Piece
from pdserve.api.openai.choice_frames import ChoiceFrames
from pdserve.api.openai.logprobs import LogprobWriter
from pdserve.api.openai.reply import GenerationReply
from pdserve.api.openai.requests import (
    Order,
    answer_tokens,
    check_choices,
    check_model,
    check_vocabulary,
    client_request_id,
    make_requests,
    output_options,
    sampling_params,
)
from pdserve.api.openai.responses import ChatCompletion
from pdserve.api.openai.schema import ChatBody, ChatFields
from pdserve.api.openai.tools import tool_use
from pdserve.core.errors import RequestError
from pdserve.core.step import TokenLogprobs
from pdserve.text.tools.stream import CallPart, whole_calls


def chat_router(edge: Edge) -> APIRouter:
    router = APIRouter(tags=["OpenAI"], route_class=DirectRoute)

    @router.post("/v1/chat/completions", **generating_route(ChatBody, ChatCompletion))
    async def create_chat_completion(request: Request) -> Response:
        """Write the next message of a chat."""
        body = await read_body(request, ChatBody, edge.settings.max_body_bytes)
        order = await chat_order(edge, request, body, "chatcmpl")
        # A message that is only written on keeps its role.
        role = "assistant" if body.opens_answer else body.messages[-1].role
        shape = ChatShape(order, role, LogprobWriter(edge.tokenizer))
        frames = ChoiceFrames(order, shape, edge.gateway.card.name)
        return GenerationReply(order, frames, edge.gateway, edge.tokenizer)

    return router


async def encode_chat(edge: Edge, body: ChatFields, *, add_special_tokens: bool) -> list[int]:
    """Token ids of the rendered messages. Raises `RequestError` if the template refuses them."""
    text = edge.chat_template.render(
        [message.for_template() for message in body.messages],
        add_generation_prompt=body.opens_answer,
        continue_final_message=body.continue_final_message,
        tools=body.tools_for_template(),
        template_arguments=body.chat_template_kwargs,
    )
    [ids] = await edge.encode([text], "messages", add_special_tokens=add_special_tokens)
    if not ids:
        raise RequestError("messages: the rendered chat has no tokens", "messages")
    check_vocabulary(ids, edge.gateway.card, "messages")
    return ids


async def chat_order(edge: Edge, request: Request, body: ChatBody, kind: str) -> Order:
    """What is asked for; ``kind`` is the prefix of the response's id. Raises `RequestError`."""
    card, settings = edge.gateway.card, edge.settings
    check_model(body.model, card)
    num_top = body.top_logprobs if body.logprobs else None
    options = output_options(
        body, settings, num_top, "top_logprobs", continues_text=not body.opens_answer
    )
    check_choices(1, body.n, settings)
    ids = await encode_chat(edge, body, add_special_tokens=body.add_special_tokens)
    wanted = body.max_tokens if body.max_completion_tokens is None else body.max_completion_tokens
    max_tokens = answer_tokens(len(ids), wanted, None, card, "messages")
    tools, constraint = await tool_use(edge, body)
    params = replace(sampling_params(body, card, max_tokens, num_top), constraint=constraint)
    name, response_id, ids_of_requests = edge.directory.assign(
        kind, client_request_id(request, body), None
    )
    return Order(
        name=name,
        response_id=response_id,
        requests=make_requests(ids_of_requests, [ids], [params], body, request, settings),
        options=replace(options, tools=tools),
        stream=body.stream,
    )


class ChatShape:
    """JSON of ``/v1/chat/completions``."""

    whole_object = "chat.completion"
    chunk_object = "chat.completion.chunk"

    def __init__(self, order: Order, role: str, writer: LogprobWriter) -> None:
        self._order = order
        self._role = role
        self._writer = writer
        self._prompt_logprobs: tuple[TokenLogprobs, ...] = ()

    def opening(self) -> Sequence[dict[str, Any]]:
        """The role of each choice, in a chunk of its own."""
        return [
            {
                "choices": [
                    {
                        "index": index,
                        "delta": {"role": self._role, "content": ""},
                        "logprobs": None,
                        "finish_reason": None,
                    }
                ],
                **self.document_extras(),
            }
            for index in range(self._order.num_choices)
        ]

    def delta(self, piece: Piece) -> dict[str, Any]:
        content: dict[str, Any] = {"content": piece.text} if piece.text else {}
        calls = [_call_delta(part) for part in piece.calls if part.call_id or part.arguments]
        return self._choice(piece, "delta", content | ({"tool_calls": calls} if calls else {}))

    def whole(self, piece: Piece) -> dict[str, Any]:
        calls = whole_calls(piece.calls)
        content = None if calls and not piece.text else piece.text
        message: dict[str, Any] = {"role": self._role, "content": content, "refusal": None}
        if calls:
            message["tool_calls"] = [
                {"id": call.call_id, "type": "function", "function": _function(call)}
                for call in calls
            ]
        if piece.prompt_logprobs is not None:
            self._prompt_logprobs = piece.prompt_logprobs
        return self._choice(piece, "message", message)

    def document_extras(self) -> dict[str, Any]:
        extras: dict[str, Any] = {}
        ids = self._order.requests[0].prompt_token_ids
        if self._order.options.with_token_ids:
            extras["prompt_token_ids"] = ids
        if self._order.options.with_prompt_logprobs and not self._order.stream:
            extras["prompt_logprobs"] = self._writer.prompt(ids, self._prompt_logprobs)
        return extras

    def _choice(self, piece: Piece, key: str, content: dict[str, Any]) -> dict[str, Any]:
        options = self._order.options
        choice: dict[str, Any] = {
            "index": piece.choice,
            key: content,
            "logprobs": (
                None if options.num_top_logprobs is None else self._writer.chat(piece.logged)
            ),
            "finish_reason": piece.finish_reason,
            "stop_reason": piece.stop_reason,
        }
        if options.with_token_ids:
            choice["token_ids"] = piece.token_ids
        return choice


def _call_delta(part: CallPart) -> dict[str, Any]:
    """The part of a call as OpenAI streams it: its id and its tool come once."""
    if part.call_id is None:
        return {"index": part.index, "function": {"arguments": part.arguments}}
    return {
        "index": part.index,
        "id": part.call_id,
        "type": "function",
        "function": _function(part),
    }


def _function(part: CallPart) -> dict[str, Any]:
    return {"name": part.name, "arguments": part.arguments}
