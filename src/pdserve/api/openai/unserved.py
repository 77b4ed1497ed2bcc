"""Fields that clients know and this server does not serve.

Each is refused by name: an answer that silently ignores a constraint would be a wrong 200. Fields
that nobody knows are ignored, as OpenAI's clients expect of compatible servers; so are fields that
steer other servers' insides (``kv_transfer_params``, ``priority``, ``session_id`` and the like),
which never reach a worker.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from pdserve.core.errors import RequestError

_Harmless = Callable[[Any], bool]


def _is_empty(value: Any) -> bool:
    return not value


def _is_text_only(value: Any) -> bool:
    return not value or value == ["text"]


_TOOLS = "send tools and tool_choice, which took its place"
_STATELESS = "the server keeps no responses; send the whole conversation as input"
_VOCABULARY = "use logit_bias to steer single tokens"

_BOTH: dict[str, tuple[_Harmless, str]] = {
    "use_beam_search": (_is_empty, "the server samples; ask for n choices instead"),
    "allowed_token_ids": (_is_empty, _VOCABULARY),
    "bad_words": (_is_empty, _VOCABULARY),
    "logprob_token_ids": (_is_empty, "logprobs of chosen tokens are not served"),
    "lora_request": (_is_empty, "the server has one model and no adapters"),
    "truncate_prompt_tokens": (lambda value: value is None, "send a prompt that fits the model"),
}
_COMPLETIONS: dict[str, tuple[_Harmless, str]] = {
    "suffix": (_is_empty, "the server only writes on at the end of a prompt"),
    "best_of": (lambda value: value in (1, None), "ask for n choices and pick one"),
    "prompt_embeds": (_is_empty, "prompts are text or token ids"),
}
_CHAT: dict[str, tuple[_Harmless, str]] = {
    "functions": (_is_empty, _TOOLS),
    "function_call": (lambda value: value in ("none", None), _TOOLS),
    "modalities": (_is_text_only, "only text is served"),
    "audio": (_is_empty, "only text is served"),
    "echo": (_is_empty, "only /v1/completions can echo"),
    "documents": (_is_empty, "put the documents into the messages"),
    "chat_template": (_is_empty, "the model's own chat template is used"),
}
_RESPONSES: dict[str, tuple[_Harmless, str]] = {
    "previous_response_id": (_is_empty, _STATELESS),
    "conversation": (_is_empty, _STATELESS),
    "background": (_is_empty, "the server answers while the client waits"),
    "prompt": (_is_empty, "send the text itself as input"),
}


def refuse_unserved(document: Mapping[str, Any], *, is_chat: bool) -> None:
    """Raise `RequestError` naming the first field that asks for what is not served."""
    _refuse(document, {**_BOTH, **(_CHAT if is_chat else _COMPLETIONS)})


def refuse_unserved_of_responses(document: Mapping[str, Any]) -> None:
    """The same of what ``/v1/responses`` takes beyond a chat; tools of the server's own too."""
    _refuse(document, _RESPONSES)
    for field in ("tools", "tool_choice"):
        asked = document.get(field)
        for tool in asked if isinstance(asked, list) else [asked]:
            kind = tool.get("type") if isinstance(tool, Mapping) else None
            if isinstance(kind, str) and kind != "function":
                raise RequestError(
                    f"{field}: {kind!r} is not served: functions of the client's are", field
                )


def _refuse(document: Mapping[str, Any], fields: Mapping[str, tuple[_Harmless, str]]) -> None:
    for field, (is_harmless, remedy) in fields.items():
        if document.get(field) is not None and not is_harmless(document[field]):
            raise RequestError(f"{field} is not served: {remedy}", field)
