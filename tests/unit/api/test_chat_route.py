"""``/v1/chat/completions``: messages in, a message out."""

from __future__ import annotations

import pytest

from pdserve.api.fake import FakeGateway
from pdserve.api.openai.responses import ChatCompletion

pytestmark = pytest.mark.anyio
URL = "/v1/chat/completions"
HELLO = [{"role": "user", "content": "Hello?"}]


async def test_messages_are_rendered_and_answered(client_of, card, say, tokenizer, chat_template):
    gateway = FakeGateway(card, script=say("Hi there."))
    messages = [{"role": "system", "content": "Be brief."}, *HELLO]
    async with client_of(gateway) as client:
        response = await client.post(URL, json={"model": "tiny", "messages": messages})
    assert response.status_code == 200
    document = response.json()
    ChatCompletion.model_validate(document, strict=True)
    [choice] = document["choices"]
    assert choice["message"] == {"role": "assistant", "content": "Hi there.", "refusal": None}
    assert choice["finish_reason"] == "stop"
    rendered = chat_template.render(messages, add_generation_prompt=True)
    [request] = gateway.submitted
    assert list(request.prompt_token_ids) == tokenizer.encode(rendered, add_special_tokens=False)


async def test_text_parts_become_lines(client_of, gateway, tokenizer, chat_template):
    parts = [{"type": "text", "text": "one"}, {"type": "text", "text": "two"}]
    async with client_of(gateway) as client:
        body = {"messages": [{"role": "user", "content": parts}]}
        assert (await client.post(URL, json=body)).status_code == 200
    rendered = chat_template.render(
        [{"role": "user", "content": "one\ntwo"}], add_generation_prompt=True
    )
    assert list(gateway.submitted[0].prompt_token_ids) == tokenizer.encode(
        rendered, add_special_tokens=False
    )


async def test_a_chat_may_fill_the_rest_of_the_context(client_of, card):
    gateway = FakeGateway(card, script=lambda request, choice: [65] * 1000)
    async with client_of(gateway) as client:
        document = (await client.post(URL, json={"messages": HELLO})).json()
    [request] = gateway.submitted
    room = card.max_model_tokens - len(request.prompt_token_ids)
    assert request.params.max_tokens == room
    assert document["usage"]["total_tokens"] == card.max_model_tokens


async def test_max_completion_tokens_wins(client_of, gateway):
    async with client_of(gateway) as client:
        for body in ({"max_tokens": 3}, {"max_completion_tokens": 2, "max_tokens": 3}):
            await client.post(URL, json={"messages": HELLO, **body})
    assert [request.params.max_tokens for request in gateway.submitted] == [3, 2]


async def test_continue_final_message_leaves_it_open(client_of, card, say, chat_template):
    gateway = FakeGateway(card, script=say("def"))
    messages = [*HELLO, {"role": "assistant", "content": "abc"}]
    body = {"messages": messages, "continue_final_message": True}
    async with client_of(gateway) as client:
        document = (await client.post(URL, json=body)).json()
        tokens = (await client.post("/tokenize", json=body)).json()["tokens"]
        text = (await client.post("/detokenize", json={"tokens": tokens})).json()["prompt"]
    assert document["choices"][0]["message"]["role"] == "assistant"
    assert list(gateway.submitted[0].prompt_token_ids) == tokens
    assert text.endswith("abc")


async def test_a_message_that_is_written_on_keeps_its_role(client_of, gateway):
    body = {"messages": HELLO, "continue_final_message": True, "max_tokens": 1}
    async with client_of(gateway) as client:
        document = (await client.post(URL, json=body)).json()
    assert document["choices"][0]["message"]["role"] == "user"


async def test_stream_begins_with_roles_and_ends_with_done(client_of, card, say, events_of):
    gateway = FakeGateway(card, script=say("yes", "no, never"))
    body = {"messages": HELLO, "stream": True, "n": 2}
    async with client_of(gateway) as client:
        response = await client.post(URL, json=body)
    assert response.headers["content-type"] == "text/event-stream; charset=utf-8"
    assert response.headers["cache-control"] == "no-cache"
    *chunks, done = events_of(response.text)
    assert done == "[DONE]"
    assert {chunk["object"] for chunk in chunks} == {"chat.completion.chunk"}
    assert len({(chunk["id"], chunk["created"], chunk["model"]) for chunk in chunks}) == 1
    choices = [chunk["choices"][0] for chunk in chunks]
    opening = {"role": "assistant", "content": ""}
    assert [(c["index"], c["delta"]) for c in choices[:2]] == [(0, opening), (1, opening)]
    said = ["", ""]
    reasons = [[], []]
    for choice in choices[2:]:
        said[choice["index"]] += choice["delta"].get("content", "")
        reasons[choice["index"]].append(choice["finish_reason"])
    assert said == ["yes", "no, never"]
    for reason in reasons:
        assert reason[-1] == "stop"
        assert set(reason[:-1]) == {None}


async def test_continuous_usage_counts_from_nothing(client_of, card, say, events_of):
    gateway = FakeGateway(card, script=say("yes"))
    options = {"include_usage": True, "continuous_usage_stats": True}
    body = {"messages": HELLO, "stream": True, "stream_options": options}
    async with client_of(gateway) as client:
        *chunks, _ = events_of((await client.post(URL, json=body)).text)
    usages = [chunk["usage"] for chunk in chunks]
    assert usages[0]["completion_tokens"] == 0
    assert usages[0]["prompt_tokens"] == len(gateway.submitted[0].prompt_token_ids)
    assert usages[-1] == usages[-2]


async def test_logprobs_list_the_likely_tokens(client_of, card, say, tokenizer, events_of, joined):
    gateway = FakeGateway(card, script=say("ab"))
    body = {"messages": HELLO, "logprobs": True, "top_logprobs": 2}
    async with client_of(gateway) as client:
        document = (await client.post(URL, json=body)).json()
        stream = events_of((await client.post(URL, json={**body, "stream": True})).text)
        without_top = (await client.post(URL, json={**body, "top_logprobs": 0})).json()
    ChatCompletion.model_validate(document, strict=True)
    content = document["choices"][0]["logprobs"]["content"]
    assert len(content) == document["usage"]["completion_tokens"]
    for entry in content:
        assert len(entry["top_logprobs"]) == 2
        assert entry["top_logprobs"][0]["token"] == entry["token"]
        assert entry["logprob"] == -0.5
    assert bytes(byte for entry in content for byte in entry["bytes"]) == b"ab<|im_end|>"
    chunks = [chunk["choices"][0] for chunk in stream[1:-1]]
    assert joined(chunk["logprobs"]["content"] for chunk in chunks) == content
    plain = without_top["choices"][0]["logprobs"]["content"]
    assert [entry["top_logprobs"] for entry in plain] == [[]] * len(content)


async def test_token_ids_are_returned_when_asked(client_of, card, say, events_of, joined):
    gateway = FakeGateway(card, script=say("abc"))
    body = {"messages": HELLO, "return_token_ids": True}
    async with client_of(gateway) as client:
        document = (await client.post(URL, json=body)).json()
        stream = events_of((await client.post(URL, json={**body, "stream": True})).text)
    assert document["prompt_token_ids"] == list(gateway.submitted[0].prompt_token_ids)
    assert stream[0]["prompt_token_ids"] == document["prompt_token_ids"]
    streamed = joined(chunk["choices"][0]["token_ids"] for chunk in stream[1:-1])
    assert streamed == document["choices"][0]["token_ids"]


@pytest.mark.parametrize(
    "extra",
    [
        {"tools": [], "tool_choice": "auto"},
        {"tools": [{"type": "function", "function": {"name": "f"}}], "tool_choice": "none"},
        {"response_format": {"type": "text"}},
        {"modalities": ["text"]},
        {"reasoning_effort": "low", "store": False, "metadata": {}, "parallel_tool_calls": True},
    ],
)
async def test_harmless_fields_are_taken(client_of, gateway, extra):
    async with client_of(gateway) as client:
        response = await client.post(URL, json={"messages": HELLO, "max_tokens": 1, **extra})
    assert response.status_code == 200


async def test_a_model_without_template_says_what_to_do(client_of, gateway):
    async with client_of(gateway, has_template=False) as client:
        chat = await client.post(URL, json={"messages": HELLO})
        completion = await client.post("/v1/completions", json={"prompt": "a"})
    assert chat.status_code == 400
    assert "chat template" in chat.json()["error"]["message"]
    assert completion.status_code == 200
