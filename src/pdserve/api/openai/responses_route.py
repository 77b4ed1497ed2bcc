"""``POST /v1/responses``: OpenAI's newer route, as a layer over chat."""

from __future__ import annotations

from typing import Any, Literal

from fastapi import APIRouter, Request
from pydantic import BaseModel, Field
from starlette.responses import Response

from pdserve.api.body import read_body
from pdserve.api.direct_route import DirectRoute
from pdserve.api.documentation import generating_route
from pdserve.api.edge import Edge
from pdserve.api.openai.chat import chat_order
from pdserve.api.openai.logprobs import LogprobWriter
from pdserve.api.openai.reply import GenerationReply
from pdserve.api.openai.responses_body import ResponsesBody, fields_of_responses
from pdserve.api.openai.responses_frames import ResponseFrames


class OutputText(BaseModel):
    type: Literal["output_text"]
    text: str
    annotations: list[Any]


class OutputMessage(BaseModel):
    id: str
    type: Literal["message"]
    role: Literal["assistant"]
    status: Literal["completed", "incomplete"]
    content: list[OutputText]


class OutputCall(BaseModel):
    id: str
    type: Literal["function_call"]
    call_id: str
    name: str
    arguments: str = Field(description="A JSON object.")
    status: Literal["completed", "incomplete"]


class ResponseUsage(BaseModel):
    input_tokens: int
    output_tokens: int
    total_tokens: int


class ResponseDocument(BaseModel):
    """Answer of ``POST /v1/responses``. Its other fields repeat what was asked for."""

    id: str
    object: Literal["response"]
    created_at: int
    model: str
    status: Literal["completed", "incomplete"]
    output: list[OutputMessage | OutputCall]
    usage: ResponseUsage


def responses_router(edge: Edge) -> APIRouter:
    router = APIRouter(tags=["OpenAI"], route_class=DirectRoute)

    @router.post("/v1/responses", **generating_route(ResponsesBody, ResponseDocument))
    async def create_response(request: Request) -> Response:
        """Answer an input. Nothing is kept: a conversation is sent as a whole each time."""
        body = await read_body(request, ResponsesBody, edge.settings.max_body_bytes)
        with fields_of_responses():
            order = await chat_order(edge, request, body.chat(), "resp")
        writer = LogprobWriter(edge.tokenizer)
        frames = ResponseFrames(order, body, edge.gateway.card.name, writer)
        return GenerationReply(order, frames, edge.gateway, edge.tokenizer)

    return router
