"""What the bodies of the generating routes may hold.

These models are the published schema, so ranges that do not depend on the model or on the settings
stand here; the others are checked in ``requests``. A field that is null counts as left out.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import ConfigDict, Discriminator, Field, StrictInt, Tag, model_validator

from pdserve.api.openai.body_model import Body as Body
from pdserve.api.openai.body_model import Items, Table
from pdserve.api.openai.formats import FormatFields
from pdserve.api.openai.tools import OfferFields, ToolBody, calls_for_template
from pdserve.api.openai.unserved import refuse_unserved
from pdserve.core.errors import RequestError

INT64_MIN, INT64_MAX = -(2**63), 2**63 - 1

# A long list that is wrong from the start is not searched for further errors.
TokenIds = Annotated[list[Annotated[StrictInt, Field(ge=0, le=INT64_MAX)]], Field(fail_fast=True)]


def _kind_of_prompt(value: Any) -> str:
    if isinstance(value, str):
        return "text"
    first = value[0] if isinstance(value, list) and value else None
    if isinstance(first, str):
        return "texts"
    return "batch" if isinstance(first, list) else "ids"


Prompt = Annotated[
    Annotated[str, Tag("text")]
    | Annotated[Items[str], Tag("texts")]
    | Annotated[TokenIds, Tag("ids")]
    | Annotated[Items[TokenIds], Tag("batch")],
    Discriminator(_kind_of_prompt),
]


class StreamOptions(Body):
    include_usage: bool = False
    continuous_usage_stats: bool = False


class GenerationBody(FormatFields):
    """What both endpoints take. Defaults are OpenAI's."""

    model: str | None = Field(None, description="Name of the served model; may be left out.")
    max_tokens: int | None = Field(None, ge=1, le=INT64_MAX)
    min_tokens: int = Field(0, ge=0, le=INT64_MAX)
    temperature: float = Field(1.0, ge=0.0, le=100.0, description="0: greedy.")
    top_p: float = Field(1.0, gt=0.0, le=1.0)
    top_k: int = Field(0, ge=-1, le=INT64_MAX, description="0 and -1: off.")
    min_p: float = Field(0.0, ge=0.0, le=1.0)
    presence_penalty: float = Field(0.0, ge=-2.0, le=2.0)
    frequency_penalty: float = Field(0.0, ge=-2.0, le=2.0)
    repetition_penalty: float = Field(1.0, ge=0.01, le=100.0, description="1: off.")
    logit_bias: Table[int, Annotated[float, Field(ge=-100.0, le=100.0)]] = Field(
        default_factory=dict, description="Token id to what is added to its logit."
    )
    prompt_logprobs: int | None = Field(
        None,
        ge=0,
        description="Report the log-probability of each token of the prompt and the most likely N "
        "in its place. Such a prompt is computed in full, whatever is cached. Not with stream.",
    )
    seed: int | None = Field(None, ge=INT64_MIN, le=INT64_MAX)
    n: int = Field(1, ge=1, le=INT64_MAX, description="Choices per prompt.")
    stop: str | Items[str] = Field(default_factory=list)
    stop_token_ids: Items[int] = Field(default_factory=list)
    ignore_eos: bool = False
    include_stop_str_in_output: bool = False
    skip_special_tokens: bool = True
    stream: bool = False
    stream_options: StreamOptions | None = None
    return_token_ids: bool = False
    cache_salt: str = Field(
        "",
        max_length=1024,
        description="Prefixes are shared only between requests with the same salt.",
    )
    user: str | None = None
    request_id: str | None = Field(None, description="Used if there is no X-Request-Id header.")

    @model_validator(mode="after")
    def _check_stream_options(self) -> GenerationBody:
        if self.stream_options is not None and not self.stream:
            raise RequestError("stream_options needs stream to be true", "stream_options")
        return self

    @model_validator(mode="after")
    def _check_prompt_logprobs(self) -> GenerationBody:
        if self.stream and self.prompt_logprobs is not None:
            raise RequestError(
                "prompt_logprobs is not served with stream: send stream false", "prompt_logprobs"
            )
        return self


class CompletionBody(GenerationBody):
    """Body of ``POST /v1/completions``."""

    prompt: Prompt
    max_tokens: int | None = Field(
        None, ge=0, le=INT64_MAX, description="0 with echo: only the prompt comes back."
    )
    logprobs: int | None = Field(
        None, ge=0, description="Report each token's log-probability and the most likely N."
    )
    echo: bool = Field(
        False,
        description="Put the prompt's text before the answer, and with logprobs its tokens' before "
        "those of the answer.",
    )
    add_special_tokens: bool = Field(
        True, description="Let the tokenizer add tokens such as a beginning-of-text."
    )

    @model_validator(mode="before")
    @classmethod
    def _refuse(cls, document: Any) -> Any:
        if isinstance(document, dict):
            refuse_unserved(document, is_chat=False)
        return document

    @model_validator(mode="after")
    def _check_echo(self) -> CompletionBody:
        if self.max_tokens == 0 and not self.echo:
            raise RequestError("max_tokens is 0, which leaves nothing without echo", "max_tokens")
        return self


class TextPart(Body):
    type: Literal["text"]
    text: str


class ChatMessage(Body):
    """One message. Other fields (``name``, ``tool_calls``, ...) are the template's business."""

    model_config = ConfigDict(extra="allow", allow_inf_nan=False)

    role: Literal["system", "user", "assistant", "tool", "developer"]
    content: str | Items[TextPart] = ""

    @model_validator(mode="after")
    def _check_content(self) -> ChatMessage:
        if self.role != "assistant" and "content" not in self.model_fields_set:
            raise RequestError(f"a message of role {self.role!r} needs content", "messages")
        return self

    def for_template(self) -> dict[str, Any]:
        """As chat templates expect it: text parts become one text, a line each."""
        content = self.content
        if not isinstance(content, str):
            content = "\n".join(part.text for part in content)
        extra = dict(self.model_extra or {})
        if extra.get("tool_calls"):
            extra["tool_calls"] = calls_for_template(extra["tool_calls"])
        return {**extra, "role": self.role, "content": content}


class ChatFields(OfferFields):
    """How messages become a prompt; shared with ``/tokenize``."""

    messages: Items[ChatMessage] = Field(min_length=1)
    add_generation_prompt: bool | None = Field(
        None, description="End the prompt with the start of an answer (default: yes)."
    )
    continue_final_message: bool = Field(
        False, description="Leave the last message open, for the model to write on."
    )
    chat_template_kwargs: dict[str, Any] = Field(
        default_factory=dict,
        description="What the chat template is told besides, as enable_thinking.",
    )

    @model_validator(mode="after")
    def _check_ending(self) -> ChatFields:
        if self.continue_final_message and self.add_generation_prompt:
            raise RequestError(
                "continue_final_message and add_generation_prompt exclude each other",
                "continue_final_message",
            )
        return self

    @property
    def opens_answer(self) -> bool:
        """True if the prompt ends with the start of an answer."""
        if self.add_generation_prompt is None:
            return not self.continue_final_message
        return self.add_generation_prompt


class ChatBody(ChatFields, ToolBody, GenerationBody):
    """Body of ``POST /v1/chat/completions``."""

    max_completion_tokens: int | None = Field(
        None, ge=1, le=INT64_MAX, description="Wins over max_tokens."
    )
    logprobs: bool = False
    top_logprobs: int = Field(0, ge=0, description="Needs logprobs.")
    add_special_tokens: bool = Field(False, description="On top of what the template adds.")

    @model_validator(mode="before")
    @classmethod
    def _refuse(cls, document: Any) -> Any:
        if isinstance(document, dict):
            refuse_unserved(document, is_chat=True)
        return document

    @model_validator(mode="after")
    def _check_logprobs(self) -> ChatBody:
        if self.top_logprobs and not self.logprobs:
            raise RequestError("top_logprobs needs logprobs to be true", "top_logprobs")
        return self
