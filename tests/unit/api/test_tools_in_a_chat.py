"""Tools in a chat: what reaches the template and the workers, and what the client is told."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import httpx2
import pytest
from fastapi import FastAPI

from pdserve.api.app import create_app
from pdserve.api.fake import FakeGateway
from pdserve.api.gateway import ModelCard
from pdserve.api.openai.responses import ChatCompletion
from pdserve.api.settings import ApiSettings
from pdserve.core.request import ConstraintKind
from pdserve.text.chat import ChatTemplate
from pdserve.text.tokenizer import Tokenizer

pytestmark = pytest.mark.anyio

URL = "/v1/chat/completions"
HELLO = [{"role": "user", "content": "hi"}]
CITY = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}
TOOLS = [
    {"type": "function", "function": {"name": "weather", "description": "w", "parameters": CITY}},
    {"type": "function", "function": {"name": "now"}},
]
TEMPLATE = (
    "{% for m in messages %}{{ m.role }}:{{ m.content }}"
    "{% for c in m.tool_calls or [] %}[{{ c.function.name }} {{ c.function.arguments.city }}]"
    "{% endfor %}{{ '\n' }}{% endfor %}{{ tools | tojson if tools }}{# <tool_call> #}"
)
CALL = '<tool_call>\n{"name": "weather", "arguments": {"city": "Ulm"}}\n</tool_call>'
NOW = '<tool_call>\n{"name": "now", "arguments": {}}\n</tool_call>'


@pytest.fixture(scope="module")
def card(tokenizer: Tokenizer, eos: int) -> ModelCard:
    return ModelCard(
        name="tiny",
        max_model_tokens=4096,
        vocab_size=tokenizer.vocab_size,
        eos_token_ids=(eos,),
        created=1_700_000_000,
    )


@pytest.fixture
def app_of(tokenizer: Tokenizer) -> Callable[..., FastAPI]:
    """With a template that knows of tools, or ``template``."""

    def make(gateway: FakeGateway, template: str = TEMPLATE, **settings: Any) -> FastAPI:
        return create_app(gateway, tokenizer, ChatTemplate(template), ApiSettings(**settings))

    return make


async def post(app: FastAPI, **fields: Any) -> httpx2.Response:
    transport = httpx2.ASGITransport(app=app)
    async with httpx2.AsyncClient(transport=transport, base_url="http://test") as client:
        return await client.post(URL, json={"messages": HELLO, "tools": TOOLS, **fields})


async def choice_of(app: FastAPI, **fields: Any) -> dict[str, Any]:
    """The choice of an answer, which fits the published schema."""
    answer = await post(app, **fields)
    assert answer.status_code == 200, answer.text
    ChatCompletion.model_validate(answer.json())
    choice: dict[str, Any] = answer.json()["choices"][0]
    return choice


async def streamed(app: FastAPI, **fields: Any) -> list[dict[str, Any]]:
    """The chunks' choices."""
    answer = await post(app, stream=True, **fields)
    lines = [line[6:] for line in answer.text.splitlines() if line.startswith("data: {")]
    return [choice for line in lines for choice in json.loads(line)["choices"]]


async def test_calls_come_as_openai_has_them(
    app_of: Callable[..., FastAPI], card: ModelCard, say: Callable[..., Any]
) -> None:
    app = app_of(FakeGateway(card, script=say(f"I look.\n{CALL}\n{NOW}")))
    choice = await choice_of(app)
    assert choice["finish_reason"] == "tool_calls"
    assert choice["message"]["content"] == "I look."
    first, second = choice["message"]["tool_calls"]
    assert first["function"] == {"name": "weather", "arguments": '{"city": "Ulm"}'}
    assert second["function"] == {"name": "now", "arguments": "{}"}
    assert first["type"] == "function"
    assert first["id"] != second["id"]

    chunks = await streamed(app)
    assert chunks[-1]["finish_reason"] == "tool_calls"
    deltas = [call for chunk in chunks for call in chunk["delta"].get("tool_calls", ())]
    assert [call["function"]["name"] for call in deltas if "id" in call] == ["weather", "now"]
    assert all("name" not in call["function"] for call in deltas if "id" not in call)
    for index, arguments in ((0, '{"city": "Ulm"}'), (1, "{}")):
        pieces = [call["function"]["arguments"] for call in deltas if call["index"] == index]
        assert "".join(pieces) == arguments
    assert len([call for call in deltas if call["index"] == 0]) > 2
    assert "".join(chunk["delta"].get("content", "") for chunk in chunks) == "I look."


async def test_only_calls_have_no_content_and_bad_calls_are_content(
    app_of: Callable[..., FastAPI], card: ModelCard, say: Callable[..., Any]
) -> None:
    choice = await choice_of(app_of(FakeGateway(card, script=say(CALL))))
    assert choice["message"]["content"] is None
    for bad in (CALL.replace("weather", "wether"), CALL.replace('"Ulm"', "Ulm"), CALL[:-25]):
        app = app_of(FakeGateway(card, script=say(bad)))
        choice = await choice_of(app)
        assert choice["message"]["content"] == bad
        assert "tool_calls" not in choice["message"]
        assert choice["finish_reason"] == "stop"
        chunks = await streamed(app)
        assert "".join(chunk["delta"].get("content", "") for chunk in chunks) == bad
        assert chunks[-1]["finish_reason"] == "stop"


async def test_one_call_at_most_if_the_client_says_so(
    app_of: Callable[..., FastAPI], card: ModelCard, say: Callable[..., Any]
) -> None:
    app = app_of(FakeGateway(card, script=say(CALL + NOW)))
    choice = await choice_of(app, parallel_tool_calls=False)
    assert [call["function"]["name"] for call in choice["message"]["tool_calls"]] == ["weather"]
    choice = await choice_of(app, tool_choice="none")
    assert choice["message"]["content"] == CALL + NOW


async def test_forced_calls_are_held_to_a_grammar_of_them(
    app_of: Callable[..., FastAPI], card: ModelCard, say: Callable[..., Any]
) -> None:
    gateway = FakeGateway(card, script=say(CALL))
    app = app_of(gateway)
    named = {"type": "function", "function": {"name": "weather"}}
    reasons = []
    for tool_choice in ("required", named, "auto"):
        reasons.append((await choice_of(app, tool_choice=tool_choice))["finish_reason"])
    assert reasons == ["tool_calls", "stop", "tool_calls"]  # as OpenAI: a named one stops
    required, of_one, free = (request.params.constraint for request in gateway.submitted)
    assert free is None
    assert required.kind is of_one.kind is ConstraintKind.GRAMMAR
    assert '\\"now\\"' in required.text
    assert '\\"now\\"' not in of_one.text
    strict = [{**TOOLS[0], "function": {**TOOLS[0]["function"], "strict": True}}, TOOLS[1]]
    await choice_of(app, tools=strict)
    assert "opened[lazy]: " in gateway.submitted[-1].params.constraint.text
    either = {"type": "json_schema", "json_schema": {"name": "x", "schema": CITY}}
    await choice_of(app, response_format=either)
    assert "answer: %json" in gateway.submitted[-1].params.constraint.text
    await choice_of(app, response_format=either, tool_choice="none")
    assert gateway.submitted[-1].params.constraint.kind is ConstraintKind.JSON


async def test_templates_read_tools_calls_and_their_results(
    app_of: Callable[..., FastAPI], card: ModelCard, tokenizer: Tokenizer
) -> None:
    gateway = FakeGateway(card)
    call = {
        "id": "call_1",
        "type": "function",
        "function": {"name": "weather", "arguments": '{"city": "Ulm"}'},
    }
    messages = [
        *HELLO,
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "call_1", "content": "sunny"},
    ]
    await post(app_of(gateway), messages=messages, tools=TOOLS[:1], max_tokens=1)
    text = tokenizer.decode(gateway.submitted[0].prompt_token_ids, skip_special_tokens=False)
    lines = "user:hi\nassistant:[weather Ulm]\ntool:sunny\n"
    assert text == lines + json.dumps([TOOLS[0] | {"type": "function"}])


async def test_templates_are_told_what_the_client_adds(
    app_of: Callable[..., FastAPI], card: ModelCard, tokenizer: Tokenizer
) -> None:
    gateway = FakeGateway(card)
    template = "{{ messages[0].content }} {{ 'thinks' if enable_thinking else 'does' }}"
    app = app_of(gateway, template)
    kwargs = {"enable_thinking": True, "messages": []}
    for fields in ({}, {"chat_template_kwargs": kwargs}):
        await post(app, tools=[], max_tokens=1, **fields)
    does, thinks = (tokenizer.decode(request.prompt_token_ids) for request in gateway.submitted)
    assert (does, thinks) == ("hi does", "hi thinks")


REFUSED: list[tuple[dict[str, Any], str, str]] = [
    ({"tools": [], "tool_choice": "required"}, "tool_choice", "send tools"),
    (
        {"tool_choice": {"type": "function", "function": {"name": "other"}}},
        "tool_choice",
        "'other', which is not among",
    ),
    ({"tool_choice": "always"}, "tool_choice", "tool_choice"),
    ({"tools": [{"type": "function", "function": {}}]}, "tools", "name"),
    ({"tools": [{"type": "web_search"}]}, "tools", "type"),
    ({"structured_outputs": {"regex": "a"}}, "structured_outputs", "exclude each other"),
    (
        {"structured_outputs": {"regex": "a"}, "tool_choice": "required"},
        "structured_outputs",
        "exclude each other",
    ),
    (
        {
            "tools": [
                {"type": "function", "function": {"name": "f", "parameters": {"type": "strang"}}}
            ],
            "tool_choice": "required",
        },
        "tools",
        "strang",
    ),
    (
        {
            "tools": [
                {"function": {"name": "f", "parameters": {"not": {}}, "strict": True}},
                {"function": {"name": "g"}},
            ]
        },
        "tools",
        "not",
    ),
    (
        {
            "messages": [
                {"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": "{"}}]}
            ]
        },
        "messages",
        "must be a JSON object",
    ),
    ({"messages": [{"role": "assistant", "tool_calls": ["x"]}]}, "messages", "needs a function"),
]


async def test_what_cannot_be_done_is_refused_by_name(
    app_of: Callable[..., FastAPI], gateway: FakeGateway
) -> None:
    app = app_of(gateway)
    for fields, param, words in REFUSED:
        answer = await post(app, **fields)
        assert answer.status_code == 400, answer.text
        error = answer.json()["error"]
        assert error["param"] == param, error
        assert words in error["message"], error
    assert not gateway.submitted


async def test_a_model_that_knows_of_no_tools_can_be_forced_but_not_asked(
    app_of: Callable[..., FastAPI], card: ModelCard, say: Callable[..., Any]
) -> None:
    plain = "{% for m in messages %}{{ m.content }}{% endfor %}"
    app = app_of(FakeGateway(card, script=say(CALL)), plain)
    answer = await post(app)
    assert answer.status_code == 400
    assert "does not tell it of tools" in answer.json()["error"]["message"]
    choice = await choice_of(app, tool_choice="required")
    assert choice["message"]["tool_calls"][0]["function"]["name"] == "weather"

    unknown = "{{ tools }}" + plain
    answer = await post(app_of(FakeGateway(card), unknown))
    assert "--tool-call-parser (hermes or llama3_json)" in answer.json()["error"]["message"]
    llama = '{"name": "weather", "parameters": {"city": "Ulm"}}'
    app = app_of(FakeGateway(card, script=say(llama)), unknown, tool_call_parser="llama3_json")
    assert (await choice_of(app))["finish_reason"] == "tool_calls"
