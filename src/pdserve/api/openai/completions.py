"""``POST /v1/completions``: prompts as text or token ids, one or many."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, cast

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
from pdserve.api.openai.responses import Completion
from pdserve.api.openai.schema import CompletionBody
from pdserve.core.errors import RequestError


def completions_router(edge: Edge) -> APIRouter:
    router = APIRouter(tags=["OpenAI"], route_class=DirectRoute)

    @router.post("/v1/completions", **generating_route(CompletionBody, Completion))
    async def create_completion(request: Request) -> Response:
        """Write on at the end of each prompt."""
        body = await read_body(request, CompletionBody, edge.settings.max_body_bytes)
        order, prompts = await _order(edge, request, body)
        echoes = [_text_of(edge, prompt) for prompt in prompts] if body.echo else None
        shape = CompletionShape(order, echoes, LogprobWriter(edge.tokenizer))
        frames = ChoiceFrames(order, shape, edge.gateway.card.name)
        return GenerationReply(order, frames, edge.gateway, edge.tokenizer)

    return router


async def _order(
    edge: Edge, request: Request, body: CompletionBody
) -> tuple[Order, list[str | list[int]]]:
    card, settings = edge.gateway.card, edge.settings
    check_model(body.model, card)
    options = output_options(body, settings, body.logprobs, "logprobs", continues_text=True)
    prompts, is_list = _prompts(body)
    check_choices(len(prompts), body.n, settings)
    token_ids = await _token_ids(edge, prompts, body)
    constraint = await edge.constraint_of(body)
    params = []
    for ids in token_ids:
        default = settings.default_max_tokens
        # Without an answer one token is drawn and dropped.
        wanted = None if body.max_tokens is None else max(1, body.max_tokens)
        max_tokens = answer_tokens(len(ids), wanted, default, card, "prompt")
        echoed = body.logprobs if body.echo else None
        of_prompt = sampling_params(body, card, max_tokens, body.logprobs, echoed)
        params.append(replace(of_prompt, constraint=constraint))
    name, response_id, ids_of_requests = edge.directory.assign(
        "cmpl", client_request_id(request, body), len(prompts) if is_list else None
    )
    order = Order(
        name=name,
        response_id=response_id,
        requests=make_requests(ids_of_requests, token_ids, params, body, request, settings),
        options=options,
        stream=body.stream,
    )
    return order, prompts


def _prompts(body: CompletionBody) -> tuple[list[str | list[int]], bool]:
    """The prompts, and whether the client sent a list of them. Raises `RequestError`."""
    prompt = body.prompt
    is_list = isinstance(prompt, list) and bool(prompt) and not isinstance(prompt[0], int)
    prompts = cast("list[str | list[int]]", prompt if is_list else [prompt])
    if not all(prompts):
        raise RequestError("prompt: a prompt must not be empty", "prompt")
    return prompts, is_list


async def _token_ids(
    edge: Edge, prompts: Sequence[str | list[int]], body: CompletionBody
) -> list[list[int]]:
    texts = [prompt for prompt in prompts if isinstance(prompt, str)]
    given = [prompt for prompt in prompts if not isinstance(prompt, str)]  # all or nothing
    encoded = await edge.encode(texts, "prompt", add_special_tokens=body.add_special_tokens)
    if not all(encoded):
        raise RequestError("prompt: a prompt has no tokens", "prompt")
    for ids in given or encoded:  # a tokenizer may know more tokens than its model
        check_vocabulary(ids, edge.gateway.card, "prompt")
    return given or encoded


def _text_of(edge: Edge, prompt: str | list[int]) -> str:
    if isinstance(prompt, str):
        return prompt
    return edge.tokenizer.decode(prompt, skip_special_tokens=False)


class CompletionShape:
    """JSON of ``/v1/completions``. ``echoes`` holds the text of each prompt to be put in front."""

    whole_object = "text_completion"
    chunk_object = "text_completion"

    def __init__(self, order: Order, echoes: Sequence[str] | None, writer: LogprobWriter) -> None:
        self._order = order
        self._echoes = echoes
        self._writer = writer
        self._begun: set[int] = set()

    def opening(self) -> Sequence[dict[str, Any]]:
        return ()

    def delta(self, piece: Piece) -> dict[str, Any]:
        is_first = piece.choice not in self._begun
        self._begun.add(piece.choice)
        return self._choice(piece, is_first=is_first)

    def whole(self, piece: Piece) -> dict[str, Any]:
        return self._choice(piece, is_first=True)

    def document_extras(self) -> dict[str, Any]:
        return {}

    def _choice(self, piece: Piece, *, is_first: bool) -> dict[str, Any]:
        options = self._order.options
        echo = self._echo_of(piece) if is_first else ""
        prompt_token_ids = self._order.requests[self._prompt_of(piece)].prompt_token_ids
        choice: dict[str, Any] = {
            "index": piece.choice,
            "text": echo + piece.text,
            "logprobs": self._logprobs(piece, prompt_token_ids, is_first=is_first),
            "finish_reason": piece.finish_reason,
            "stop_reason": piece.stop_reason,
        }
        if options.with_token_ids:
            choice["token_ids"] = piece.token_ids
            if is_first:
                choice["prompt_token_ids"] = prompt_token_ids
        if options.with_prompt_logprobs:
            choice["prompt_logprobs"] = self._writer.prompt(prompt_token_ids, piece.prompt_logprobs)
        return choice

    def _prompt_of(self, piece: Piece) -> int:
        return piece.choice // self._order.num_choices

    def _echo_of(self, piece: Piece) -> str:
        return "" if self._echoes is None else self._echoes[self._prompt_of(piece)]

    def _logprobs(
        self, piece: Piece, prompt_token_ids: Sequence[int], *, is_first: bool
    ) -> dict[str, Any] | None:
        num_top = self._order.options.num_top_logprobs
        if num_top is None:
            return None
        echo = self._echo_of(piece)
        answer = self._writer.completion(piece.logged, num_chars_before=len(echo))
        if self._echoes is None or not is_first:
            return answer
        prompt = self._writer.echoed(prompt_token_ids, piece.prompt_logprobs, num_top, len(echo))
        return {key: prompt[key] + answer[key] for key in prompt}
