"""The body of ``POST /v1/responses``, and the chat that it stands for.

The route is a layer over chat: text and calls of the client's functions, nothing kept between
requests. What needs a memory or tools of the server's own is refused by name.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Annotated, Any, Literal

from pydantic import ConfigDict, Discriminator, Field, Tag, model_validator

from pdserve.api.body import validated
from pdserve.api.openai.body_model import Items, Table
from pdserve.api.openai.schema import INT64_MAX, INT64_MIN, Body, ChatBody
from pdserve.api.openai.unserved import refuse_unserved_of_responses
from pdserve.core.errors import RequestError

_FIELDS_OF_CHAT = (
    *("model", "temperature", "top_p", "top_k", "min_p", "seed", "stream", "cache_salt", "user"),
    *("repetition_penalty", "presence_penalty", "frequency_penalty", "min_tokens", "ignore_eos"),
    *("stop", "stop_token_ids", "request_id", "parallel_tool_calls", "chat_template_kwargs"),
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


class InputMessage(Body):
    """A message of the conversation so far."""

    type: Literal["message"] = "message"
    role: Literal["system", "user", "assistant", "developer"]
    content: str | Items[InputPart]


class InputCall(Body):
    """A call that the model has made."""

    type: Literal["function_call"]
    call_id: str
    name: str
    arguments: str = Field(description="A JSON object.")


class InputResult(Body):
    """What a call has given."""

    type: Literal["function_call_output"]
    call_id: str
    output: str | Items[InputPart]


def _kind_of_item(value: Any) -> str:
    kind = value.get("type") if isinstance(value, dict) else getattr(value, "type", None)
    return kind if isinstance(kind, str) else "message"


InputItem = Annotated[
    Annotated[InputMessage, Tag("message")]
    | Annotated[InputCall, Tag("function_call")]
    | Annotated[InputResult, Tag("function_call_output")],
    Discriminator(_kind_of_item),
]


class FunctionOffer(Body):
    """A function of the client's, as this route has it."""

    type: Literal["function"]
    name: str = Field(min_length=1, max_length=256)
    description: str | None = None
    parameters: dict[str, Any] = Field(default_factory=dict)
    strict: bool = False


class FunctionChoice(Body):
    type: Literal["function"]
    name: str


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
    tools: Items[FunctionOffer] = Field(
        default_factory=list, description="Functions of the client's; no others are served."
    )
    tool_choice: Literal["none", "auto", "required"] | FunctionChoice | None = None
    parallel_tool_calls: bool = Field(True, description="False: at most one call.")
    metadata: Table[str, str] = Field(default_factory=dict, description="Given back as it is.")
    truncation: Literal["disabled"] = "disabled"

    @model_validator(mode="before")
    @classmethod
    def _refuse(cls, document: Any) -> Any:
        if isinstance(document, dict):
            refuse_unserved_of_responses(document)
        return document

    def told_tools(self) -> list[dict[str, Any]]:
        """As the response repeats them."""
        return [tool.model_dump() for tool in self.tools]

    def told_tool_choice(self) -> str | dict[str, Any]:
        """The same of the choice among them, with its default."""
        choice = self.tool_choice
        if choice is None:
            return "auto" if self.tools else "none"
        return choice if isinstance(choice, str) else choice.model_dump()

    def chat(self) -> ChatBody:
        """The chat that is asked for. Raises `RequestError`."""
        extras = self.model_extra or {}
        given = self.model_fields_set
        document = {name: value for name, value in extras.items() if name in _FIELDS_OF_CHAT}
        document |= {name: getattr(self, name) for name in _FIELDS_OF_CHAT if name in given}
        document["messages"] = self._messages()
        document["max_completion_tokens"] = self.max_output_tokens
        if self.top_logprobs or "message.output_text.logprobs" in self.include:
            document |= {"logprobs": True, "top_logprobs": self.top_logprobs}
        if self.tools:
            document["tools"] = [_tool_of_chat(tool) for tool in self.tools]
        if isinstance(self.tool_choice, FunctionChoice):
            function = {"name": self.tool_choice.name}
            document["tool_choice"] = {"type": "function", "function": function}
        else:
            document["tool_choice"] = self.tool_choice
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
        return [*system, *_conversation(self.input)]


def _conversation(items: Sequence[InputMessage | InputCall | InputResult]) -> list[dict[str, Any]]:
    """Messages of a chat: calls in a row, with the text before them, are one message."""
    messages: list[dict[str, Any]] = []
    names: dict[str, str] = {}
    for item in items:
        if isinstance(item, InputMessage):
            messages.append(_message(item.role, _text(item.content)))
        elif isinstance(item, InputCall):
            if not messages or messages[-1]["role"] != "assistant":
                messages.append(_message("assistant", ""))
            names[item.call_id] = item.name
            function = {"name": item.name, "arguments": item.arguments}
            call = {"id": item.call_id, "type": "function", "function": function}
            messages[-1].setdefault("tool_calls", []).append(call)
        elif item.call_id in names:
            result = _message("tool", _text(item.output))
            messages.append({**result, "tool_call_id": item.call_id, "name": names[item.call_id]})
        else:
            raise RequestError(
                f"input: the function_call_output of {item.call_id!r} has no function_call before "
                "it; send the whole conversation",
                "input",
            )
    return messages


def _message(role: str, text: str) -> dict[str, Any]:
    return {"role": role, "content": text}


def _text(content: str | Items[InputPart]) -> str:
    return content if isinstance(content, str) else "\n".join(part.text for part in content)


def _tool_of_chat(tool: FunctionOffer) -> dict[str, Any]:
    """Chat has a function's fields in an object of their own."""
    return {"type": "function", "function": tool.model_dump(exclude={"type"}, exclude_unset=True)}


def _response_format(answer_format: Any) -> Any:
    """Chat's ``response_format`` has a schema's fields in an object of their own."""
    if isinstance(answer_format, dict) and answer_format.get("type") == "json_schema":
        fields = {name: value for name, value in answer_format.items() if name != "type"}
        return {"type": "json_schema", "json_schema": fields}
    return answer_format
