"""Chat messages to prompt text, with the template that the model brings.

A chat template is a Jinja program in the model folder. It is rendered as transformers'
`apply_chat_template` does: the same environment, the same names, the same way of continuing the
final message; it runs in Jinja's sandbox, which cannot change what it is given. The template is
compiled at start-up, so a broken one stops the start; what goes wrong in rendering is a property of
the messages, hence a `RequestError`. Rendering depends on the clock only if the template asks for
the date.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

import jinja2
import jinja2.ext
import jinja2.meta
from jinja2 import nodes
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from pdserve.core.errors import ModelError, RequestError
from pdserve.text.tokenizer import configured_token, read_tokenizer_config

Message = Mapping[str, Any]
"""``role`` and ``content``, as in OpenAI's API, plus whatever the template knows."""

# Put behind the final message to find its end in the rendered text. The space tells whether the
# template keeps white space at the end of a message.
_END_MARK = "@pdserve-continue-here@ "

_NAMED_TOKENS = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token")


class ChatTemplate:
    """Renders messages. Made once per server; rendering from several threads is safe.

    A model without a template has one of these too: its `render` raises.
    """

    def __init__(
        self,
        source: str | Mapping[str, str] | None,
        *,
        named_tokens: Mapping[str, str] | None = None,
        now: Callable[[], datetime] = datetime.now,
    ) -> None:
        """``source``: Jinja, or several by name (``default``, ``tool_use``); None: no template.

        ``named_tokens`` are what the template sees as ``bos_token`` and so on; ``now`` is the clock
        behind ``strftime_now``. ``source`` stays readable: the template for chats with tools.
        Raises `ModelError` if a template does not compile.
        """
        sources = {"default": source} if isinstance(source, str) else dict(source or {})
        environment = _environment(now)
        self.source = sources.get("tool_use", sources.get("default", ""))
        self._named_tokens = dict(named_tokens or {})
        self._templates: dict[str, jinja2.Template] = {}
        for name, text in sources.items():
            try:
                self._templates[name] = environment.from_string(text)
            except jinja2.TemplateError as error:
                raise ModelError(
                    f"the model's chat template does not compile: {error}; correct "
                    "chat_template.jinja or chat_template in tokenizer_config.json"
                ) from error
        names = jinja2.meta.find_undeclared_variables(environment.parse(self.source))
        self.takes_tools = "tools" in names
        """True if it tells the model of tools."""

    @classmethod
    def from_folder(cls, path: Path | str) -> ChatTemplate:
        """The template in ``chat_template.jinja``, else in ``tokenizer_config.json``."""
        folder = Path(path)
        config = read_tokenizer_config(folder)
        named_tokens = {
            name: text for name in _NAMED_TOKENS if (text := configured_token(config.get(name)))
        }
        file = folder / "chat_template.jinja"
        try:
            if file.exists():
                return cls(file.read_text(encoding="utf-8"), named_tokens=named_tokens)
            return cls(_configured(config.get("chat_template")), named_tokens=named_tokens)
        except (OSError, ValueError) as error:
            raise ModelError(f"cannot read {file}: {error}; copy it again") from error
        except ModelError as error:
            raise ModelError(f"cannot use the model in {folder}: {error}") from error

    @property
    def exists(self) -> bool:
        """True if the model can chat."""
        return bool(self._templates)

    def render(
        self,
        messages: Sequence[Message],
        *,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        tools: Sequence[Mapping[str, Any]] | None = None,
        template_arguments: Mapping[str, Any] | None = None,
    ) -> str:
        """The prompt. Encode it with ``add_special_tokens=False``: it has its own.

        ``continue_final_message`` leaves the last message open for the model to go on with, and
        needs ``add_generation_prompt=False``. Text parts of a content list are joined by line
        breaks. Raises `RequestError`.
        """
        template = self._choose(tools)
        if continue_final_message and add_generation_prompt:
            raise RequestError(
                "continue_final_message needs add_generation_prompt to be false: the model goes on "
                "with the last message, or begins a new one",
                param="continue_final_message",
            )
        plain = [_plain_message(message, index) for index, message in enumerate(messages)]
        if not plain:
            raise RequestError("messages must not be empty", param="messages")
        final_text = plain[-1].get("content")
        if continue_final_message:
            if not isinstance(final_text, str):
                raise RequestError(
                    "continue_final_message needs a final message with content", param="messages"
                )
            plain[-1]["content"] = final_text + _END_MARK
        values = {
            **self._named_tokens,
            **(template_arguments or {}),
            "messages": plain,
            "tools": list(tools) if tools else None,
            "documents": None,
            "add_generation_prompt": add_generation_prompt,
        }
        try:
            prompt = template.render(values)
        except Exception as error:  # A template can raise whatever a Python expression can.
            raise RequestError(
                f"the model's chat template refuses these messages: {error}", param="messages"
            ) from error
        if continue_final_message and isinstance(final_text, str):
            return _cut_after_final(prompt, final_text)
        return prompt

    def _choose(self, tools: Sequence[Mapping[str, Any]] | None) -> jinja2.Template:
        name = "tool_use" if tools and "tool_use" in self._templates else "default"
        if name not in self._templates:
            raise RequestError(
                "this model has no chat template, so it cannot chat; use /v1/completions, or put a "
                "chat_template.jinja into the model folder",
                param="messages",
            )
        return self._templates[name]


def _configured(value: Any) -> str | Mapping[str, str] | None:
    """``chat_template`` of tokenizer_config.json: a string, or a list of named ones."""
    if value is None or isinstance(value, str):
        return value
    try:
        return {str(entry["name"]): str(entry["template"]) for entry in value}
    except (KeyError, TypeError) as error:
        raise ModelError("chat_template in tokenizer_config.json is malformed") from error


def _plain_message(message: Message, index: int) -> dict[str, Any]:
    """A message as templates expect it: no nulls, content a string."""
    if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
        raise RequestError("a message needs a role", param=f"messages[{index}].role")
    plain = {key: value for key, value in message.items() if value is not None}
    content = plain.get("content")
    if isinstance(content, str):
        return plain
    if content is None:
        # Absent content (an assistant's tool call) is empty text; templates add it up.
        plain["content"] = ""
        return plain
    if not isinstance(content, Sequence):
        raise RequestError(
            "content must be a string or a list of parts", param=f"messages[{index}].content"
        )
    plain["content"] = "\n".join(
        _text_of_part(part, f"messages[{index}].content[{place}]")
        for place, part in enumerate(content)
    )
    return plain


def _text_of_part(part: Any, param: str) -> str:
    if isinstance(part, str):
        return part
    match part:
        case {"type": "text", "text": str(text)}:
            return text
        case {"type": str(kind)} if kind != "text":
            raise RequestError(f"this model reads text only, not {kind!r} parts", param=param)
    raise RequestError("a part of a message needs a type and a text", param=param)


def _cut_after_final(prompt: str, final_text: str) -> str:
    mark = _END_MARK.strip()
    place = prompt.rfind(mark)
    if place < 0 or final_text.strip() not in prompt:
        raise RequestError(
            "continue_final_message cannot work: the model's chat template changes or drops the "
            "final message",
            param="continue_final_message",
        )
    kept = prompt[:place]
    # A template that strips messages took the mark's space away: strip what is before it as well.
    return kept if prompt.startswith(_END_MARK, place) else kept.rstrip()


def _environment(now: Callable[[], datetime]) -> ImmutableSandboxedEnvironment:
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True,
        lstrip_blocks=True,
        extensions=[_GenerationTag, jinja2.ext.loopcontrols],
    )

    def raise_exception(message: str) -> None:
        raise jinja2.TemplateError(message)

    def strftime_now(form: str) -> str:
        return now().strftime(form)

    environment.filters["tojson"] = _to_json
    environment.globals["raise_exception"] = raise_exception
    environment.globals["strftime_now"] = strftime_now
    return environment


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """JSON as templates expect it; Jinja's own filter escapes for HTML."""
    return json.dumps(
        value,
        ensure_ascii=ensure_ascii,
        indent=indent,
        separators=separators,
        sort_keys=sort_keys,
    )


class _GenerationTag(jinja2.ext.Extension):
    """``{% generation %}``, which marks the assistant's part for training: its body, as it is."""

    tags = {"generation"}

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        # A call block gives the body a scope of its own, as it has in transformers.
        return nodes.CallBlock(self.call_method("_body"), [], [], body).set_lineno(line)

    def _body(self, caller: Callable[[], str]) -> str:
        return caller()
