"""``/v1/responses`` as OpenAI's own client sees it, and what it refuses."""

from __future__ import annotations

import json

import pytest

from pdserve.core.errors import GenerationError

URL = "/v1/responses"
WEATHER = {
    "type": "function",
    "name": "weather",
    "parameters": {
        "type": "object",
        "properties": {"city": {"type": "string"}},
        "required": ["city"],
        "additionalProperties": False,
    },
}
NOW = {"type": "function", "name": "now", "parameters": {}}


def test_an_answer_in_one_piece(connect, tokenizer):
    with connect("Grüß Gott, 世界") as (client, gateway):
        response = client.responses.create(
            model="tiny",
            instructions="Be kind.",
            input="Hello?",
            max_output_tokens=50,
            temperature=0,
            metadata={"of": "mine"},
            extra_body={"top_k": 3},
        )
        as_messages = client.responses.create(
            model="tiny",
            input=[
                {"role": "system", "content": "Be kind."},
                {"role": "user", "content": [{"type": "input_text", "text": "Hello?"}]},
            ],
        )
    assert response.output_text == as_messages.output_text == "Grüß Gott, 世界"
    assert response.status == "completed"
    assert response.metadata == {"of": "mine"}
    assert response.id.startswith("resp-")
    asked, asked_again = gateway.submitted
    assert asked.prompt_token_ids == asked_again.prompt_token_ids
    text = tokenizer.decode(asked.prompt_token_ids, skip_special_tokens=False)
    assert "Be kind." in text
    assert (asked.params.temperature, asked.params.top_k, asked.params.max_tokens) == (0, 3, 50)
    assert response.usage.input_tokens == len(asked.prompt_token_ids)
    assert response.usage.input_tokens_details.cached_tokens == 0
    assert response.usage.output_tokens > 0


def test_an_answer_that_was_cut(connect):
    with connect("one two three four") as (client, _):
        response = client.responses.create(model="tiny", input="Hello?", max_output_tokens=2)
    assert response.status == "incomplete"
    assert response.incomplete_details.reason == "max_output_tokens"


def test_a_stream_ends_in_the_same_response(connect):
    with connect("Grüß Gott, 世界") as (client, _):
        whole = client.responses.create(model="tiny", input="Hello?", top_logprobs=2)
        with client.responses.stream(model="tiny", input="Hello?", top_logprobs=2) as stream:
            events = list(stream)
            final = stream.get_final_response()
    assert [event.sequence_number for event in events] == list(range(len(events)))
    names = [event.type for event in events]
    assert names[:4] == [
        "response.created",
        "response.in_progress",
        "response.output_item.added",
        "response.content_part.added",
    ]
    assert names[-4:] == [
        "response.output_text.done",
        "response.content_part.done",
        "response.output_item.done",
        "response.completed",
    ]
    deltas = [event for event in events if event.type == "response.output_text.delta"]
    assert "".join(event.delta for event in deltas) == "Grüß Gott, 世界"
    told, streamed = whole.model_dump(), final.model_dump()
    for document in (told, streamed):
        document["id"] = document["created_at"] = document["output"][0]["id"] = None
        document["output"][0]["content"][0].pop("parsed", None)
    assert told["output"] == streamed["output"]
    assert told["usage"] == streamed["usage"]


def test_a_stream_that_breaks_off(connect):
    with connect("one two three", fail_after=(2, GenerationError("no more"))) as (client, _):
        *_, last = client.responses.create(model="tiny", input="Hello?", stream=True)
    assert (last.type, last.message, last.code) == ("error", "no more", "generation_failed")


TEMPLATE = (
    "{% for m in messages %}{{ m.role }}:{{ m.content }}{% for c in m.tool_calls or [] %}"
    "[{{ c.function.name }} {{ c.function.arguments.city }}]{% endfor %}{{ '\n' }}{% endfor %}"
    "{% for t in tools or [] %}({{ t.function.name }}){% endfor %}{# <tool_call> #}"
)
CALL = '<tool_call>\n{"name": "weather", "arguments": {"city": "Ulm"}}\n</tool_call>'
OTHER = '<tool_call>\n{"name": "now", "arguments": {}}\n</tool_call>'


def plain(response):
    """The output without what differs between two responses."""
    output = response.model_dump()["output"]
    for item in output:
        item["id"] = item["call_id"] = None
        for part in item.get("content") or ():
            part.pop("parsed", None)
        item.pop("parsed_arguments", None)
    return output


@pytest.mark.parametrize("strict", [False, True])
def test_calls_of_functions(connect, strict):
    asked = {"model": "tiny", "input": "Hello?", "tools": [{**WEATHER, "strict": strict}, NOW]}
    with connect(f"I look.\n{CALL}\n{OTHER} Done", settings={"template_text": TEMPLATE}) as (
        client,
        gateway,
    ):
        whole = client.responses.create(**asked)
        with client.responses.stream(**asked) as stream:
            events = list(stream)
            final = stream.get_final_response()
    assert [item.type for item in whole.output] == [
        "message",
        "function_call",
        "function_call",
        "message",
    ]
    assert whole.output_text == "I look. Done"
    first, second = whole.output[1:3]
    assert (first.name, first.arguments) == ("weather", '{"city": "Ulm"}')
    assert (second.name, second.arguments) == ("now", "{}")
    assert first.call_id != second.call_id
    assert {item.status for item in whole.output} == {"completed"}
    assert plain(final) == plain(whole)
    names = [event.type for event in events]
    assert names.count("response.output_item.added") == 4
    assert names.count("response.output_item.done") == 4
    assert names.count("response.function_call_arguments.done") == 2
    deltas = [e for e in events if e.type == "response.function_call_arguments.delta"]
    assert "".join(e.delta for e in deltas if e.output_index == 1) == '{"city": "Ulm"}'
    assert (len(deltas) > 2) is strict  # what cannot break is told at once
    assert [event.sequence_number for event in events] == list(range(len(events)))
    assert (gateway.submitted[0].params.constraint is not None) is strict


def test_what_is_no_call_is_text_and_what_is_cut_is_incomplete(connect):
    tools = [{**WEATHER, "strict": False}]
    bad = CALL.replace('"Ulm"', "Ulm")
    asked = {"model": "tiny", "input": "Hello?"}
    for script, fields, types in (
        (bad, {"tools": tools}, ["message"]),
        (CALL, {"tools": tools, "tool_choice": "none"}, ["message"]),
        (CALL[:-20], {"tools": tools, "tool_choice": "required"}, ["function_call"]),
    ):
        with connect(script, settings={"template_text": TEMPLATE}) as (client, _):
            whole = client.responses.create(**asked, **fields)
            with client.responses.stream(**asked, **fields) as stream:
                final = stream.get_final_response()
        assert [item.type for item in whole.output] == types
        assert plain(final) == plain(whole)
        if types == ["message"]:
            assert whole.output_text == script
        else:
            assert whole.output[0].status == "incomplete"


def test_calls_and_their_results_go_back(connect, tokenizer):
    with connect("It is sunny.", settings={"template_text": TEMPLATE}) as (client, gateway):
        client.responses.create(
            model="tiny",
            tools=[WEATHER],
            tool_choice={"type": "function", "name": "weather"},
            parallel_tool_calls=False,
            input=[
                {"role": "user", "content": "Well?"},
                {"role": "assistant", "content": "I look."},
                {
                    "type": "function_call",
                    "call_id": "c1",
                    "name": "weather",
                    "arguments": '{"city": "Ulm"}',
                },
                {"type": "function_call_output", "call_id": "c1", "output": "sunny"},
            ],
        )
    text = tokenizer.decode(gateway.submitted[0].prompt_token_ids, skip_special_tokens=False)
    assert text.startswith("user:Well?\nassistant:I look.[weather Ulm]\ntool:sunny\n")
    assert text.endswith("(weather)")
    assert '\\"weather\\"' in gateway.submitted[0].params.constraint.text


@pytest.mark.anyio
@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({}, "input"),
        ({"input": []}, "input"),
        ({"input": [{"role": "robot", "content": "x"}]}, "input"),
        ({"input": [{"type": "function_call", "name": "f"}]}, "input"),
        ({"input": "x", "previous_response_id": "resp-1"}, "previous_response_id"),
        ({"input": "x", "background": True}, "background"),
        ({"input": "x", "tools": [{"type": "web_search"}]}, "tools"),
        ({"input": "x", "tools": [{"type": "function"}]}, "tools"),
        ({"input": "x", "tool_choice": "required"}, "tool_choice"),
        ({"input": "x", "tools": [WEATHER], "tool_choice": {"type": "mcp"}}, "tool_choice"),
        ({"input": "x", "tools": [WEATHER]}, "tools"),  # the template knows of none
        ({"input": [{"type": "function_call_output", "call_id": "a", "output": ""}]}, "input"),
        ({"input": [{"type": "function_call", "call_id": "a", "name": "f"}]}, "input"),
        ({"input": "x", "truncation": "auto"}, "truncation"),
        ({"input": "x", "max_output_tokens": 0}, "max_output_tokens"),
        ({"input": "x", "max_output_tokens": 10**6}, "input"),
        ({"input": "x", "top_logprobs": 21}, "top_logprobs"),
        ({"input": "x", "top_k": -5}, "top_k"),
        ({"input": "x", "text": {"format": {"type": "no"}}}, "text"),
    ],
)
async def test_what_is_refused(client_of, gateway, body, param):
    async with client_of(gateway) as client:
        response = await client.post(
            URL, content=json.dumps(body), headers={"Content-Type": "application/json"}
        )
    assert response.status_code == 400, response.text
    assert response.json()["error"]["param"].startswith(param)
    assert gateway.submitted == []
