"""Answers of a given form from the real model, through the whole split server."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.model

PERSON = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 20},
        "age": {"type": "integer", "minimum": 0, "maximum": 120},
        "colour": {"enum": ["red", "green", "blue"]},
    },
    "required": ["name", "age", "colour"],
    "additionalProperties": False,
}
TOOLS: list[Any] = [
    {
        "type": "function",
        "function": {
            "name": "get_weather",
            "parameters": {
                "type": "object",
                "properties": {
                    "city": {"type": "string", "maxLength": 16},
                    "unit": {"enum": ["C", "F"]},
                },
                "required": ["city", "unit"],
            },
        },
    },
    {"type": "function", "function": {"name": "stop"}},
]
ASKED: list[Any] = [{"role": "user", "content": "What is the weather like in Paris?"}]


def test_answers_of_a_form(start_server: Callable[..., Any], smollm_path: Path) -> None:
    server = start_server(
        "--model", str(smollm_path), "--prefill", "1", "--decode", "1", "--threads", "1"
    )
    with server.client(default_headers={"X-Pdserve-Route": "split"}) as client:
        json_fits_its_schema_split_as_local(server, client)
        patterns_and_choices_end_by_themselves(client)
        for stream in (False, True):
            a_small_model_makes_valid_calls_when_it_must(client, stream)


def json_fits_its_schema_split_as_local(server: Any, client: Any) -> None:
    asked: dict[str, Any] = {
        "model": client.models.list().data[0].id,
        "messages": [{"role": "user", "content": "Describe a person as JSON."}],
        "max_tokens": 80,
        "n": 2,
        "seed": 7,
        "logprobs": True,
        "response_format": {
            "type": "json_schema",
            "json_schema": {"name": "person", "schema": PERSON},
        },
    }
    split = client.chat.completions.create(**asked)
    local = client.chat.completions.create(**asked, extra_headers={"X-Pdserve-Route": "local"})
    for choice in split.choices:
        assert choice.finish_reason == "stop"
        person = json.loads(choice.message.content)
        assert list(person) == ["name", "age", "colour"]
        assert 0 <= person["age"] <= 120
        assert person["colour"] in ("red", "green", "blue")
    assert split.choices == local.choices  # to the last bit of every log-probability
    (attempt,) = server.get(f"/v1/requests/{split.id}/timeline")["attempts"]
    assert attempt["route"] == "split"


def patterns_and_choices_end_by_themselves(client: Any) -> None:
    model = client.models.list().data[0].id
    for form, pattern in (
        ({"regex": r"\d{3}-\d{2}"}, r"\d{3}-\d{2}"),
        ({"choice": ["Paris", "Rome"]}, "Paris|Rome"),
        ({"grammar": 'root ::= ("ab" | "cd") "!"'}, "(ab|cd)!"),
    ):
        answer = client.completions.create(
            model=model,
            prompt="The answer is",
            max_tokens=20,
            temperature=0,
            extra_body={"structured_outputs": form, "min_tokens": 15},
        )
        assert answer.choices[0].finish_reason == "stop"
        assert re.fullmatch(pattern, answer.choices[0].text)


def a_small_model_makes_valid_calls_when_it_must(client: Any, stream: bool) -> None:
    asked: dict[str, Any] = {
        "model": client.models.list().data[0].id,
        "messages": ASKED,
        "tools": TOOLS,
        "max_tokens": 120,
        "temperature": 0,
    }
    named = {"type": "function", "function": {"name": "get_weather"}}
    for tool_choice, reason in (("required", "tool_calls"), (named, "stop")):
        one: dict[str, Any] = {**asked, "tool_choice": tool_choice, "parallel_tool_calls": False}
        if stream:
            with client.chat.completions.stream(**one) as events:
                choice = events.get_final_completion().choices[0]
        else:
            choice = client.chat.completions.create(**one).choices[0]
        assert choice.finish_reason == reason
        assert not choice.message.content
        (call,) = choice.message.tool_calls
        arguments = json.loads(call.function.arguments)
        if call.function.name == "get_weather":
            assert list(arguments) == ["city", "unit"]
            assert arguments["unit"] in ("C", "F")
        else:
            assert arguments == {}
        assert tool_choice == "required" or call.function.name == "get_weather"
