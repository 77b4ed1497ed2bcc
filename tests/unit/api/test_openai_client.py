"""The real ``openai`` package against the edge over TCP: blocking, asynchronous and streaming."""

from __future__ import annotations

import openai
import pytest

from pdserve.api.fake import FakeGateway
from pdserve.core.errors import GenerationError, OverloadedError

HELLO = [{"role": "user", "content": "Hello?"}]


def test_completion_and_chat(connect):
    with connect("Grüß Gott, 世界 \U0001f600") as (client, _):
        completion = client.completions.create(model="tiny", prompt="Hello?", max_tokens=99)
        chat = client.chat.completions.create(model="tiny", messages=HELLO)
    assert completion.choices[0].text == "Grüß Gott, 世界 \U0001f600"
    assert completion.choices[0].finish_reason == "stop"
    assert chat.choices[0].message.content == "Grüß Gott, 世界 \U0001f600"
    assert chat.usage.total_tokens == chat.usage.prompt_tokens + chat.usage.completion_tokens


def test_streams(connect):
    with connect("Grüß Gott, 世界 \U0001f600", "no") as (client, _):
        texts = ["", ""]
        for chunk in client.completions.create(
            model="tiny", prompt="Hello?", max_tokens=99, n=2, stream=True
        ):
            texts[chunk.choices[0].index] += chunk.choices[0].text
        chunks = list(
            client.chat.completions.create(
                model="tiny",
                messages=HELLO,
                stream=True,
                stream_options={"include_usage": True},
            )
        )
    assert texts == ["Grüß Gott, 世界 \U0001f600", "no"]
    assert chunks[0].choices[0].delta.role == "assistant"
    text = "".join(c.choices[0].delta.content or "" for c in chunks if c.choices)
    assert text == "Grüß Gott, 世界 \U0001f600"
    assert not any("\ufffd" in (c.choices[0].delta.content or "") for c in chunks if c.choices)
    assert [c.choices[0].finish_reason for c in chunks if c.choices][-1] == "stop"
    assert chunks[-1].usage.completion_tokens > 0


def test_extensions_and_logprobs(connect):
    with connect("one two three") as (client, gateway):
        chat = client.chat.completions.create(
            model="tiny",
            messages=HELLO,
            logprobs=True,
            top_logprobs=1,
            stop=["three"],
            extra_body={"top_k": 3, "ignore_eos": True, "return_token_ids": True},
            extra_headers={"X-Request-Id": "named", "X-Pdserve-Route": "local"},
        )
    assert chat.id == "chatcmpl-named"
    assert chat.choices[0].message.content == "one two "
    assert chat.choices[0].stop_reason == "three"
    assert len(chat.choices[0].logprobs.content) == chat.usage.completion_tokens
    assert gateway.submitted[0].params.top_k == 3
    assert gateway.submitted[0].route == "local"


def test_models_and_lists_of_prompts(connect):
    with connect("yes", "no") as (client, _):
        assert [model.id for model in client.models.list()] == ["tiny"]
        assert client.models.retrieve("tiny").id == "tiny"
        answer = client.completions.create(model="tiny", prompt=["a", "b"], n=2, max_tokens=9)
    assert [choice.text for choice in answer.choices] == ["yes", "no", "yes", "no"]


def test_errors_have_the_clients_classes(connect):
    with connect("yes") as (client, gateway):
        with pytest.raises(openai.BadRequestError) as bad:
            client.completions.create(model="tiny", prompt="a", temperature=-1)
        with pytest.raises(openai.NotFoundError):
            client.completions.create(model="huge", prompt="a")
        gateway.fail_before = OverloadedError("no room", 7)
        with pytest.raises(openai.RateLimitError) as busy:
            client.chat.completions.create(model="tiny", messages=HELLO, stream=True)
        gateway.fail_before = GenerationError("broke off")
        with pytest.raises(openai.InternalServerError):
            client.chat.completions.create(model="tiny", messages=HELLO)
    assert (bad.value.param, bad.value.type) == ("temperature", "invalid_request_error")
    assert busy.value.response.headers["retry-after"] == "7"


def test_an_error_in_mid_stream_is_raised(connect):
    options = {"fail_after": (3, GenerationError("all workers are gone"))}
    with connect(**options) as (client, _):
        received = []
        stream = client.chat.completions.create(model="tiny", messages=HELLO, stream=True)
        with pytest.raises(openai.APIError, match="all workers are gone"):
            received.extend(stream)
    assert received


def test_key(connect):
    with (
        connect("yes", settings={"api_key": "s3cret"}) as (wrong, _),
        wrong.with_options(api_key="s3cret") as right,
    ):
        with pytest.raises(openai.AuthenticationError):
            wrong.models.list()
        assert right.completions.create(model="tiny", prompt="a").choices[0].text == "yes"


@pytest.mark.anyio
async def test_asynchronous_client(serving, make_app, card, say):
    gateway = FakeGateway(card, script=say("hello there"))
    async with (
        serving(make_app(gateway)) as url,
        openai.AsyncOpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0) as client,
    ):
        whole = await client.chat.completions.create(model="tiny", messages=HELLO)
        stream = await client.chat.completions.create(model="tiny", messages=HELLO, stream=True)
        text = "".join([chunk.choices[0].delta.content or "" async for chunk in stream])
    assert text == whole.choices[0].message.content == "hello there"


@pytest.mark.anyio
async def test_closing_a_stream_early_aborts(serving, make_app, card):
    gateway = FakeGateway(card, permits=4)
    async with (
        serving(make_app(gateway)) as url,
        openai.AsyncOpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0) as client,
    ):
        stream = await client.chat.completions.create(model="tiny", messages=HELLO, stream=True)
        async for _ in stream:
            break
        await stream.close()
        await gateway.until(lambda: gateway.num_running == 0)
    assert len(gateway.aborted) == 1
