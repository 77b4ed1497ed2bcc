"""Answers of a given form at the edge: which fields ask for one, and which cannot be had."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import httpx2
import pytest
from fastapi import FastAPI

from pdserve.api.constraint_check import ConstraintCheck
from pdserve.api.fake import FakeGateway
from pdserve.api.gateway import ModelCard
from pdserve.api.openai.closed_schema import closed
from pdserve.core.errors import RequestError
from pdserve.core.request import Constraint, ConstraintKind
from pdserve.text.tokenizer import Tokenizer

pytestmark = pytest.mark.anyio

SCHEMA = {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]}
CLOSED = {**SCHEMA, "additionalProperties": False}
JSON = Constraint(ConstraintKind.JSON, json.dumps(CLOSED, separators=(",", ":")))
ANY_OBJECT = Constraint(ConstraintKind.JSON, '{"type":"object"}')


async def post(app: FastAPI, **fields: Any) -> httpx2.Response:
    """A chat, or with ``prompt`` a completion."""
    path = "/v1/completions" if "prompt" in fields else "/v1/chat/completions"
    document = fields if "prompt" in fields else {"messages": [{"role": "user", "content": "hi"}]}
    transport = httpx2.ASGITransport(app=app)
    async with httpx2.AsyncClient(transport=transport, base_url="http://test") as client:
        return await client.post(path, json={"max_tokens": 4, **document, **fields})


CASES = [
    ({"response_format": {"type": "text"}}, None),
    ({"response_format": {"type": "json_object"}}, ANY_OBJECT),
    (
        {
            "response_format": {
                "type": "json_schema",
                "json_schema": {"name": "x", "schema": SCHEMA, "strict": True},
            }
        },
        JSON,
    ),
    ({"structured_outputs": {"json": SCHEMA}}, JSON),
    ({"structured_outputs": {"json": json.dumps(SCHEMA)}}, JSON),
    ({"structured_outputs": {"json_object": True}}, ANY_OBJECT),
    (
        {"structured_outputs": {"json": {"type": "object"}, "disable_any_whitespace": True}},
        Constraint(
            ConstraintKind.JSON, '{"type":"object","x-guidance":{"whitespace_flexible":false}}'
        ),
    ),
    ({"structured_outputs": {"regex": "a+"}}, Constraint(ConstraintKind.REGEX, "a+")),
    (
        {"structured_outputs": {"choice": ["a", "\u00e9"]}},
        Constraint(ConstraintKind.CHOICE, '["a", "\u00e9"]'),
    ),
    (
        {"structured_outputs": {"grammar": 'root ::= "a"'}},
        Constraint(ConstraintKind.GRAMMAR, 'root ::= "a"'),
    ),
    ({"guided_json": SCHEMA}, JSON),
    ({"structured_outputs": {"json": SCHEMA, "disable_additional_properties": True}}, JSON),
    ({"guided_regex": "a+"}, Constraint(ConstraintKind.REGEX, "a+")),
    ({"guided_choice": ["a"]}, Constraint(ConstraintKind.CHOICE, '["a"]')),
    (
        {"guided_grammar": 'start: "a"'},
        Constraint(ConstraintKind.GRAMMAR, 'start: "a"'),
    ),
]


async def test_every_way_to_ask_for_a_form_reaches_the_workers(
    make_app: Callable[..., FastAPI], gateway: FakeGateway
) -> None:
    app = make_app(gateway)
    for prompt in ({}, {"prompt": ["one", "two"]}):
        for fields, expected in CASES:
            answer = await post(app, **prompt, **fields)
            assert answer.status_code == 200, answer.text
            assert gateway.submitted[-1].params.constraint == expected


def test_what_a_schema_does_not_list_is_not_made_up() -> None:
    nested = {
        "$defs": {"x": SCHEMA},
        "properties": {
            "properties": {"type": "array", "items": SCHEMA},
            "open": {"properties": {}, "additionalProperties": True},
            "any": {"type": "object"},
            "either": {"anyOf": [{"$ref": "#/$defs/x"}, {"type": "null"}]},
            "one": {"allOf": [{"$ref": "#/$defs/x"}], "default": {"properties": {}}},
        },
    }
    done = closed(nested)
    assert done["$defs"]["x"] == CLOSED
    assert done["additionalProperties"] is False
    assert done["properties"]["properties"]["items"] == CLOSED
    for name in ("open", "any", "either", "one"):
        assert done["properties"][name] == nested["properties"][name]
    assert "additionalProperties" not in SCHEMA  # the client's is left as it is
    for composed in (
        {"allOf": [SCHEMA, {"properties": {"b": {}}}]},
        {**SCHEMA, "anyOf": [{"properties": {"b": {}}}]},
        {**SCHEMA, "required": ["a", "b"]},
        {**SCHEMA, "patternProperties": {"^x": {}}},
        {"items": {**SCHEMA, "$ref": "#"}},
    ):
        assert closed(composed) == composed


REFUSED: list[tuple[dict[str, Any], str, str]] = [
    ({"response_format": {"type": "json_schema"}}, "response_format", "needs json_schema"),
    ({"response_format": {"type": "xml"}}, "response_format", "json_object"),
    ({"structured_outputs": {}}, "structured_outputs", "exactly one"),
    (
        {"structured_outputs": {"regex": "a", "choice": ["a"]}},
        "structured_outputs",
        "exactly one",
    ),
    ({"structured_outputs": {"choice": []}}, "structured_outputs", "choice"),
    ({"structured_outputs": {"json": "{"}}, "structured_outputs", "not JSON"),
    ({"structured_outputs": {"json": "3"}}, "structured_outputs", "object"),
    (
        {"structured_outputs": {"structural_tag": "{}"}},
        "structured_outputs",
        "structural_tag is not served",
    ),
    ({"guided_regex": "a", "guided_json": SCHEMA}, "guided_regex", "exclude each other"),
    ({"guided_regex": "(["}, "guided_regex", "unclosed character class"),
    ({"guided_regex": "a(?=b)"}, "guided_regex", "look-around"),
    ({"guided_grammar": "start: nothing_here"}, "guided_grammar", "nothing_here"),
    ({"guided_grammar": "a {{"}, "guided_grammar", "cannot be used"),
    (
        {"response_format": {"type": "json_schema", "json_schema": {"schema": {"not": {}}}}},
        "response_format",
        "not",
    ),
    ({"guided_json": {"type": "strang"}}, "guided_json", "strang"),
    ({"guided_json": {"allOf": [False, {}]}}, "guided_json", "Unsatisfiable"),
    ({"guided_regex": "a" * 300_000}, "guided_regex", "characters"),
]


async def test_a_form_that_cannot_be_had_is_refused_by_name(
    make_app: Callable[..., FastAPI], gateway: FakeGateway
) -> None:
    app = make_app(gateway)
    for fields, param, words in REFUSED:
        answer = await post(app, **fields)
        assert answer.status_code == 400, answer.text
        error = answer.json()["error"]
        assert error["param"] == param
        assert words in error["message"]
    assert not gateway.submitted


async def test_an_engine_that_cannot_follow_forms_says_so(
    make_app: Callable[..., FastAPI], card: ModelCard
) -> None:
    gateway = FakeGateway(replace(card, constrains=False))
    answer = await post(make_app(gateway), response_format={"type": "json_object"})
    assert answer.status_code == 400
    assert "response_format is not served" in answer.json()["error"]["message"]
    assert (await post(make_app(gateway))).status_code == 200


async def test_a_model_without_an_end_cannot_follow_forms(
    tokenizer: Tokenizer, card: ModelCard
) -> None:
    check = ConstraintCheck(tokenizer, replace(card, eos_token_ids=()))
    with pytest.raises(RequestError, match="no end-of-text token"):
        await check(ANY_OBJECT, "response_format")


async def test_a_form_that_takes_forever_to_compile_costs_its_budget_and_nothing_else(
    tokenizer: Tokenizer, card: ModelCard
) -> None:
    """This one takes half a minute and more than two gigabytes."""
    hostile = {
        "allOf": [
            {
                "anyOf": [
                    {"type": "string", "pattern": f".*{c}.{{20}}.*"},
                    {"type": "object", "properties": {f"k{c}": {"type": "string"}}},
                ]
            }
            for c in "abcdefghijklmnopqrst"
        ]
    }
    check = ConstraintCheck(tokenizer, card, cpu_budget_s=0.3)
    slow = Constraint(ConstraintKind.JSON, json.dumps(hostile))
    with pytest.raises(RequestError, match=r"guided_json cannot be used: .*0\.3 s to compile"):
        await check(slow, "guided_json")
    await asyncio.gather(*(check(JSON, "guided_json") for _ in range(3)))
