"""What the client sees of its prompt: log-probabilities, an echo with them, and cached tokens."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace

import pytest

from pdserve.api.fake import FakeGateway
from pdserve.api.openai.responses import ChatCompletion, Completion
from pdserve.core.messages import TokenDelta
from pdserve.core.request import Request
from pdserve.core.step import PromptNews

pytestmark = pytest.mark.anyio

COMPLETIONS, CHAT = "/v1/completions", "/v1/chat/completions"


async def test_prompt_logprobs_by_token_id(client_of, card, say, tokenizer):
    gateway = FakeGateway(card, script=say("so"))
    body = {"prompt": "given text", "prompt_logprobs": 2, "n": 2, "logprobs": 0}
    async with client_of(gateway) as client:
        document = (await client.post(COMPLETIONS, json=body)).json()
    Completion.model_validate(document, strict=True)
    ids = tokenizer.encode("given text", add_special_tokens=True)
    for choice in document["choices"]:
        told = choice["prompt_logprobs"]
        assert told[0] is None
        assert len(told) == len(ids)
        for token_id, entry in zip(ids[1:], told[1:], strict=True):
            assert entry[str(token_id)]["rank"] == 1
            assert entry[str(token_id)]["logprob"] == -0.5
            assert len(entry) == 2
    assert gateway.submitted[0].params.prompt_logprobs == 2


async def test_prompt_logprobs_of_a_chat(client_of, card, say):
    gateway = FakeGateway(card, script=say("so"))
    body = {"messages": [{"role": "user", "content": "Hello"}], "prompt_logprobs": 0}
    async with client_of(gateway) as client:
        document = (await client.post(CHAT, json=body)).json()
    ChatCompletion.model_validate(document, strict=True)
    told = document["prompt_logprobs"]
    assert told[0] is None
    assert len(told) == document["usage"]["prompt_tokens"]


async def test_echo_with_logprobs_covers_prompt_and_answer(client_of, card, say, events_of):
    gateway = FakeGateway(card, script=say(" and so on"))
    body = {"prompt": ["given", "another one"], "echo": True, "logprobs": 1, "max_tokens": 99}
    async with client_of(gateway) as client:
        whole = (await client.post(COMPLETIONS, json=body)).json()
        stream = (await client.post(COMPLETIONS, json={**body, "stream": True})).text
    Completion.model_validate(whole, strict=True)
    for choice, prompt in zip(whole["choices"], body["prompt"], strict=True):
        logprobs = choice["logprobs"]
        assert choice["text"] == prompt + " and so on"
        assert "".join(logprobs["tokens"]).startswith(choice["text"])
        assert logprobs["token_logprobs"][0] is logprobs["top_logprobs"][0] is None
        assert all(value == -0.5 for value in logprobs["token_logprobs"][1:])
        for token, offset in zip(logprobs["tokens"][:-1], logprobs["text_offset"], strict=False):
            assert choice["text"][offset:].startswith(token)
        assert len({len(entries) for entries in logprobs.values()}) == 1
    streamed: list[dict[str, list[object]]] = [{}, {}]
    for chunk in events_of(stream)[:-1]:
        [choice] = chunk["choices"]
        for key, values in choice["logprobs"].items():
            streamed[choice["index"]].setdefault(key, []).extend(values)
    assert streamed == [choice["logprobs"] for choice in whole["choices"]]


async def test_an_echo_alone(client_of, card, say, tokenizer):
    """How likely a given text is: what evaluation harnesses ask for."""
    gateway = FakeGateway(card, script=say("never seen"))
    body = {"prompt": "given text", "echo": True, "logprobs": 1, "max_tokens": 0}
    async with client_of(gateway) as client:
        document = (await client.post(COMPLETIONS, json=body)).json()
    Completion.model_validate(document, strict=True)
    [choice] = document["choices"]
    assert choice["text"] == "given text"
    assert choice["finish_reason"] == "length"
    num_tokens = len(tokenizer.encode("given text", add_special_tokens=True))
    assert len(choice["logprobs"]["tokens"]) == num_tokens
    assert document["usage"]["completion_tokens"] == 0
    assert math.isclose(sum(choice["logprobs"]["token_logprobs"][1:]), -0.5 * (num_tokens - 1))


class CachingGateway(FakeGateway):
    """Four tokens of every prompt were cached."""

    def _choice(self, request: Request, choice: int) -> Iterator[TokenDelta]:
        for delta in super()._choice(request, choice):
            first = choice == delta.index == 0
            yield replace(delta, prompt=PromptNews(cached_tokens=4)) if first else delta


async def test_cached_tokens_count_once_per_prompt(client_of, card, say, events_of):
    gateway = CachingGateway(card, script=say("so"))
    body = {"prompt": ["one of two prompts", "the other of them"], "n": 3}
    stream = {"stream": True, "stream_options": {"include_usage": True}}
    async with client_of(gateway) as client:
        whole = (await client.post(COMPLETIONS, json=body)).json()
        told = events_of((await client.post(COMPLETIONS, json={**body, **stream})).text)
    assert whole["usage"]["prompt_tokens_details"] == {"cached_tokens": 8}
    assert told[-2]["usage"] == whole["usage"]
