"""Chat templates against transformers' rendering, and what happens when they cannot render."""

from __future__ import annotations

import json
import shutil
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest

from pdserve.core.errors import ModelError, RequestError
from pdserve.text.chat import ChatTemplate

CONVERSATIONS: list[list[dict[str, Any]]] = [
    [{"role": "user", "content": "Hello <b>&amp;</b> 'quoted'"}],
    [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "  spaced \n"}],
    [
        {"role": "user", "content": "日本語 🙂"},
        {"role": "assistant", "content": "はい {{ not a template }}"},
        {"role": "user", "content": "{% nor this %}"},
    ],
]

TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "weather",
            "description": "Wetter für <Ort>",
            "parameters": {"type": "object", "properties": {"ort": {"type": "string"}}},
        },
    }
]

# Written for this test: what templates in the wild do.
LARGE_TEMPLATE = """
{%- set ns = namespace(seen=0) -%}
{{- bos_token }}
{% if tools %}
    {%- for tool in tools %}
{{ tool | tojson(indent=2) }}
    {%- endfor %}
{% endif %}
{%- for message in messages %}
    {%- if message.role == "skip" %}{% continue %}{% endif %}
    {%- if message.role == "end" %}{% break %}{% endif %}
    {%- if message.role not in ["user", "assistant", "system"] %}
        {{- raise_exception("unknown role " ~ message.role) }}
    {%- endif %}
    {%- set ns.seen = ns.seen + 1 %}
    {% generation %}
[{{ message.role | upper }} {{ ns.seen }}] {{ message.content | trim }}
    {% endgeneration %}
{%- endfor %}
{%- if add_generation_prompt %}
>>> {{ mood | default("plain") }}
{%- endif %}
{{ eos_token }}
"""


def with_template(source: Path, target: Path, template: str | None, **config: Any) -> Path:
    """A tokenizer folder with another template (None: without one)."""
    target.mkdir()
    shutil.copy(source / "tokenizer.json", target)
    shutil.copy(source / "config.json", target)
    old = json.loads((source / "tokenizer_config.json").read_text())
    (target / "tokenizer_config.json").write_text(json.dumps({**old, **config}))
    if template is not None:
        (target / "chat_template.jinja").write_text(template)
    return target


def assert_agrees(folder: Path, conversations: list[list[dict[str, Any]]], **names: Any) -> None:
    from transformers import AutoTokenizer

    theirs = AutoTokenizer.from_pretrained(folder)
    ours = ChatTemplate.from_folder(folder)
    for messages in conversations:
        for prompt in (True, False):
            for tools in (None, TOOLS):
                expected = theirs.apply_chat_template(
                    messages, tokenize=False, add_generation_prompt=prompt, tools=tools, **names
                )
                rendered = ours.render(
                    messages, add_generation_prompt=prompt, tools=tools, template_arguments=names
                )
                assert rendered == expected
        continued = theirs.apply_chat_template(
            messages, tokenize=False, continue_final_message=True, **names
        )
        assert continued == ours.render(
            messages,
            add_generation_prompt=False,
            continue_final_message=True,
            template_arguments=names,
        )


def test_agrees_with_transformers_on_the_tiny_model(tiny_model_path: Path) -> None:
    assert_agrees(tiny_model_path, CONVERSATIONS)


@pytest.mark.model
def test_agrees_with_transformers_on_the_real_model(smollm_path: Path) -> None:
    assert_agrees(smollm_path, CONVERSATIONS)


def test_agrees_with_transformers_on_a_template_of_all_trades(
    tiny_model_path: Path, tmp_path: Path
) -> None:
    folder = with_template(
        tiny_model_path, tmp_path / "m", LARGE_TEMPLATE, bos_token="<|im_start|>"
    )
    skipping = [{"role": "skip", "content": "?"}, *CONVERSATIONS[1]]
    assert_agrees(folder, [*CONVERSATIONS, skipping], mood="bright")


def test_renders_what_it_should(tiny_model_path: Path) -> None:
    template = ChatTemplate.from_folder(tiny_model_path)
    messages = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "I am "}]
    assert template.render(messages) == (
        "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\nI am <|im_end|>\n"
        "<|im_start|>assistant\n"
    )
    assert template.render(
        messages, add_generation_prompt=False, continue_final_message=True
    ).endswith("<|im_start|>assistant\nI am ")


def test_text_parts_are_joined(tiny_model_path: Path) -> None:
    parts = [{"type": "text", "text": "one"}, {"type": "text", "text": "two"}, "three"]
    template = ChatTemplate.from_folder(tiny_model_path)
    assert "user\none\ntwo\nthree<|im_end|>" in template.render(
        [{"role": "user", "content": parts}]
    )


def test_messages_without_content_are_empty(tiny_model_path: Path) -> None:
    template = ChatTemplate.from_folder(tiny_model_path)
    messages = [{"role": "assistant", "content": None}, {"role": "user"}]
    assert template.render(messages, add_generation_prompt=False) == (
        "<|im_start|>assistant\n<|im_end|>\n<|im_start|>user\n<|im_end|>\n"
    )


@pytest.mark.parametrize(
    ("messages", "param", "named"),
    [
        ([], "messages", "empty"),
        ([{"content": "hi"}], "messages[0].role", "role"),
        ([{"role": "user", "content": 5}], "messages[0].content", "string or a list"),
        (
            [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}],
            "messages[0].content[0]",
            "image_url",
        ),
        ([{"role": "user", "content": [{"text": "x"}]}], "messages[0].content[0]", "type"),
        ([{"role": "user", "content": [{"type": "text"}]}], "messages[0].content[0]", "text"),
    ],
)
def test_messages_that_cannot_be_rendered_are_the_clients_mistake(
    tiny_model_path: Path, messages: list[dict[str, Any]], param: str, named: str
) -> None:
    with pytest.raises(RequestError, match=named) as caught:
        ChatTemplate.from_folder(tiny_model_path).render(messages)
    assert caught.value.param == param


@pytest.mark.parametrize(
    "source",
    [
        "{{ raise_exception('no such role') }}",
        "{{ messages[0].content + 1 }}",
        "{{ messages[7].content.strip() }}",
        "{{ messages.append(1) }}",
        "{{ ''.__class__.__mro__ }}",
        "{{ 1 // 0 }}",
        "{% for i in range(10**9) %}{% endfor %}",
    ],
)
def test_a_template_that_fails_is_a_request_error(source: str) -> None:
    with pytest.raises(RequestError, match="chat template refuses"):
        ChatTemplate(source).render(CONVERSATIONS[0])


def test_the_callers_messages_are_not_changed() -> None:
    messages = [{"role": "user", "content": "hi"}]
    template = ChatTemplate("{% for m in messages %}{{ m.content }}{% endfor %}")
    template.render(messages, add_generation_prompt=False, continue_final_message=True)
    assert messages == [{"role": "user", "content": "hi"}]


def test_the_clock_is_the_given_one() -> None:
    template = ChatTemplate("{{ strftime_now('%d %b %Y') }}", now=lambda: datetime(2026, 3, 1))
    assert template.render(CONVERSATIONS[0]) == "01 Mar 2026"


def test_continuing_needs_the_final_message_to_be_there() -> None:
    conversation = [*CONVERSATIONS[0], {"role": "assistant", "content": "and so"}]
    options = {"add_generation_prompt": False, "continue_final_message": True}
    with pytest.raises(RequestError, match="changes or drops"):
        ChatTemplate("{{ messages[0].content }}").render(conversation, **options)
    with pytest.raises(RequestError, match="add_generation_prompt"):
        ChatTemplate("{{ messages }}").render(conversation, continue_final_message=True)


def test_continuing_a_message_that_the_template_strips() -> None:
    template = ChatTemplate("{{ messages[0].content | trim }}<end>")
    rendered = template.render(
        [{"role": "assistant", "content": "so far  "}],
        add_generation_prompt=False,
        continue_final_message=True,
    )
    assert rendered == "so far"


def test_a_model_without_a_template_cannot_chat(tiny_model_path: Path, tmp_path: Path) -> None:
    template = ChatTemplate.from_folder(with_template(tiny_model_path, tmp_path / "m", None))
    assert not template.exists
    with pytest.raises(RequestError, match=r"no chat template.*/v1/completions"):
        template.render(CONVERSATIONS[0])


def test_templates_in_the_tokenizer_config(tiny_model_path: Path, tmp_path: Path) -> None:
    one = with_template(tiny_model_path, tmp_path / "one", None, chat_template="one")
    assert ChatTemplate.from_folder(one).render(CONVERSATIONS[0]) == "one"
    named = [{"name": "default", "template": "plain"}, {"name": "tool_use", "template": "tools"}]
    two = with_template(tiny_model_path, tmp_path / "two", None, chat_template=named)
    assert ChatTemplate.from_folder(two).render(CONVERSATIONS[0]) == "plain"
    assert ChatTemplate.from_folder(two).render(CONVERSATIONS[0], tools=TOOLS) == "tools"
    both = with_template(tiny_model_path, tmp_path / "both", "file", chat_template="config")
    assert ChatTemplate.from_folder(both).render(CONVERSATIONS[0]) == "file"


@pytest.mark.parametrize("template", ["{% if %}", "{{ unclosed"])
def test_a_template_that_does_not_compile_stops_the_start(
    tiny_model_path: Path, tmp_path: Path, template: str
) -> None:
    folder = with_template(tiny_model_path, tmp_path / "m", template)
    with pytest.raises(ModelError, match="does not compile"):
        ChatTemplate.from_folder(folder)


def test_a_malformed_template_list_is_refused(tiny_model_path: Path, tmp_path: Path) -> None:
    folder = with_template(tiny_model_path, tmp_path / "m", None, chat_template=[{"name": "x"}])
    with pytest.raises(ModelError, match="malformed"):
        ChatTemplate.from_folder(folder)
