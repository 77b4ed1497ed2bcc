"""What the generating routes answer, as the published schema shows it.

Answers are written as plain documents, one per token when streaming; these models are for readers
and for tests, which hold the documents against them.
"""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, Field


class PromptTokensDetails(BaseModel):
    cached_tokens: int = Field(description="Tokens of the prompts that a prefix cache held.")


class Usage(BaseModel):
    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptTokensDetails


class RankedToken(BaseModel):
    logprob: float
    rank: int
    decoded_token: str


PromptLogprobs = list[dict[str, RankedToken] | None]
"""By token id; None for the first token."""


class _Choice(BaseModel):
    index: int
    finish_reason: Literal["stop", "length", "tool_calls", "abort"]
    stop_reason: str | int | None = Field(
        description="The stop string or stop token id that ended the choice."
    )
    token_ids: list[int] | None = Field(None, description="With return_token_ids.")


class CompletionLogprobs(BaseModel):
    text_offset: list[int]
    token_logprobs: list[float | None]
    tokens: list[str]
    top_logprobs: list[dict[str, float] | None]


class CompletionChoice(_Choice):
    text: str
    logprobs: CompletionLogprobs | None
    prompt_token_ids: list[int] | None = Field(None, description="With return_token_ids.")
    prompt_logprobs: PromptLogprobs | None = Field(None, description="With prompt_logprobs.")


class Completion(BaseModel):
    """Answer of ``POST /v1/completions``; choices go prompt by prompt."""

    id: str
    object: Literal["text_completion"]
    created: int
    model: str
    choices: list[CompletionChoice]
    usage: Usage


class LikelyToken(BaseModel):
    token: str
    logprob: float
    bytes: list[int]


class ChatToken(LikelyToken):
    top_logprobs: list[LikelyToken]


class ChatLogprobs(BaseModel):
    content: list[ChatToken]


class CalledFunction(BaseModel):
    name: str
    arguments: str = Field(description="A JSON object.")


class ToolCall(BaseModel):
    id: str
    type: Literal["function"]
    function: CalledFunction


class AnswerMessage(BaseModel):
    role: str
    content: str | None = Field(description="Null if there is nothing but calls of tools.")
    refusal: None
    tool_calls: list[ToolCall] | None = Field(None, description="With tools.")


class ChatChoice(_Choice):
    message: AnswerMessage
    logprobs: ChatLogprobs | None


class ChatCompletion(BaseModel):
    """Answer of ``POST /v1/chat/completions``."""

    id: str
    object: Literal["chat.completion"]
    created: int
    model: str
    choices: list[ChatChoice]
    usage: Usage
    prompt_token_ids: list[int] | None = Field(None, description="With return_token_ids.")
    prompt_logprobs: PromptLogprobs | None = Field(None, description="With prompt_logprobs.")
