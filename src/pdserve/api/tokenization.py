"""``POST /tokenize`` and ``POST /detokenize``, in vLLM's shapes."""

from __future__ import annotations

import asyncio
from functools import partial
from typing import Annotated, Any

from fastapi import APIRouter, Request
from pydantic import BaseModel, Discriminator, Field, RootModel, Tag

from pdserve.api.body import read_body
from pdserve.api.documentation import json_route
from pdserve.api.edge import Edge
from pdserve.api.openai.chat import encode_chat
from pdserve.api.openai.requests import check_model, check_vocabulary
from pdserve.api.openai.schema import Body, ChatFields, TokenIds

MAX_TOKENS = 2**20
"""That are made text of at once."""
_INLINE_TOKENS = 4096


class TokenizeText(Body):
    model: str | None = None
    prompt: str
    add_special_tokens: bool = True
    return_token_strs: bool = False


class TokenizeChat(ChatFields):
    model: str | None = None
    add_special_tokens: bool = False
    return_token_strs: bool = False


class TokenizeBody(
    RootModel[
        Annotated[
            Annotated[TokenizeText, Tag("text")] | Annotated[TokenizeChat, Tag("chat")],
            Discriminator(lambda value: "chat" if "messages" in value else "text"),
        ]
    ]
):
    """Body of ``POST /tokenize``: a text or a chat."""


class TokenizeAnswer(BaseModel):
    count: int
    max_model_len: int
    tokens: list[int]
    token_strs: list[str] | None = Field(None, description="With return_token_strs.")


class DetokenizeBody(Body):
    """Body of ``POST /detokenize``."""

    model: str | None = None
    tokens: Annotated[TokenIds, Field(max_length=MAX_TOKENS)]


class DetokenizeAnswer(BaseModel):
    prompt: str


def tokenization_router(edge: Edge) -> APIRouter:
    router = APIRouter(tags=["Tokens"])
    card = edge.gateway.card

    @router.post("/tokenize", **json_route(TokenizeBody, TokenizeAnswer, 429))
    async def tokenize(request: Request) -> Any:
        """Token ids of a text, or of a chat as the model would read it."""
        body = (await read_body(request, TokenizeBody, edge.settings.max_body_bytes)).root
        check_model(body.model, card)
        if isinstance(body, TokenizeChat):
            ids = await encode_chat(edge, body, add_special_tokens=body.add_special_tokens)
        else:
            [ids] = await edge.encode(
                [body.prompt], "prompt", add_special_tokens=body.add_special_tokens
            )
        strings = [edge.tokenizer.token_text(i) for i in ids] if body.return_token_strs else None
        return {
            "count": len(ids),
            "max_model_len": card.max_model_tokens,
            "tokens": ids,
            "token_strs": strings,
        }

    @router.post("/detokenize", **json_route(DetokenizeBody, DetokenizeAnswer, 429))
    async def detokenize(request: Request) -> Any:
        """The text of token ids, special tokens included."""
        body = await read_body(request, DetokenizeBody, edge.settings.max_body_bytes)
        check_model(body.model, card)
        check_vocabulary(body.tokens, card, "tokens")
        decode = partial(edge.tokenizer.decode, body.tokens, skip_special_tokens=False)
        many = len(body.tokens) > _INLINE_TOKENS
        return {"prompt": await asyncio.to_thread(decode) if many else decode()}

    return router
