"""The body of ``POST /v1/responses``, and the chat that it stands for.

The route is a layer over chat: text in, text out, nothing kept between requests. What needs a
memory or tools of the server's own is refused by name.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Literal

from pydantic import ConfigDict, Field

from pdserve.api.body import validated
from pdserve.api.openai.body_model import Items, Table
from pdserve.api.openai.schema import INT64_MAX, INT64_MIN, Body, ChatBody
from pdserve.api.openai.unserved import refuse_unserved_of_responses
from pdserve.core.errors import RequestError

_FIELDS_OF_CHAT = (
    *("model", "temperature", "top_p", "top_k", "min_p", "seed", "stream", "cache_salt", "user"),
    *("repetition_penalty", "presence_penalty", "frequency_penalty", "min_tokens", "ignore_eos"),
    *("stop", "stop_token_ids", "request_id"),
)
_NAMES_OF_CHAT = {
    "messages": "input",
    "max_completion_tokens": "max_output_tokens",
    "response_format": "text",
}


@contextmanager
def fields_of_responses() -> Iterator[None]:
    """Errors that name a field of chat name the one that it came from."""
    try:
        yield
    except RequestError as error:
        error.param = _NAMES_OF_CHAT.get(error.param or "", error.param)
        raise


class InputPart(Body):
    """A part of an item: text is served."""

    type: Literal["input_text", "output_text", "text"]
    text: str


class InputItem(Body):
    """A message of the conversation so far."""

    type: Literal["message"] = "message"
    role: Literal["system", "user", "assistant", "developer"]
    content: str | Items[InputPart]


class ResponsesBody(Body):
    """Body of ``POST /v1/responses``. Sampling fields beyond OpenAI's are those of chat."""

    model_config = ConfigDict(extra="allow", allow_inf_nan=False)

    model: str | None = Field(None, description="Name of the served model; may be left out.")
    input: str | Items[InputItem]
    instructions: str | None = Field(None, description="Put before the input, as the system.")
    max_output_tokens: int | None = Field(None, ge=1, le=INT64_MAX)
    temperature: float = Field(1.0, ge=0.0, le=100.0, description="0: greedy.")
    top_p: float = Field(1.0, gt=0.0, le=1.0)
    seed: int | None = Field(None, ge=INT64_MIN, le=INT64_MAX)
    stream: bool = False
    top_logprobs: int = Field(0, ge=0)
    include: Items[str] = Field(
        default_factory=list, description="message.output_text.logprobs is served."
    )
    text: dict[str, Any] = Field(default_factory=dict, description="format: as response_format.")
    metadata: Table[str, str] = Field(default_factory=dict, description="Given back as it is.")
    truncation: Literal["disabled"] = "disabled"

    def chat(self) -> ChatBody:
        """The chat that is asked for. Raises `RequestError`."""
        extras = self.model_extra or {}
        refuse_unserved_of_responses(extras)
        given = self.model_fields_set
        document = {name: value for name, value in extras.items() if name in _FIELDS_OF_CHAT}
        document |= {name: getattr(self, name) for name in _FIELDS_OF_CHAT if name in given}
        document["messages"] = self._messages()
        document["max_completion_tokens"] = self.max_output_tokens
        if self.top_logprobs or "message.output_text.logprobs" in self.include:
            document |= {"logprobs": True, "top_logprobs": self.top_logprobs}
        answer_format = self.text.get("format")
        if answer_format is not None:
            document["response_format"] = _response_format(answer_format)
        return validated(document, ChatBody)

    def _messages(self) -> list[dict[str, Any]]:
        system = [] if self.instructions is None else [_message("system", self.instructions)]
        if isinstance(self.input, str):
            return [*system, _message("user", self.input)]
        if not self.input:
            raise RequestError("input must not be empty", "input")
        return [*system, *(_message(item.role, _text(item.content)) for item in self.input)]


def _message(role: str, text: str) -> dict[str, Any]:
    return {"role": role, "content": text}


def _text(content: str | list[InputPart]) -> str:
    return content if isinstance(content, str) else "\n".join(part.text for part in content)


def _response_format(answer_format: Any) -> Any:
    """Chat's ``response_format`` has a schema's fields in an object of their own."""
    if isinstance(answer_format, dict) and answer_format.get("type") == "json_schema":
        fields = {name: value for name, value in answer_format.items() if name != "type"}
        return {"type": "json_schema", "json_schema": fields}
    return answer_format
