"""Bodies and headers that must not be served, each with its status and the field at fault."""

from __future__ import annotations

import json

import pytest

from pdserve.core.errors import GenerationError, OverloadedError, UnavailableError

pytestmark = pytest.mark.anyio
COMPLETIONS, CHAT = "/v1/completions", "/v1/chat/completions"
HELLO = [{"role": "user", "content": "Hello?"}]
TOOL = {"type": "function", "function": {"name": "f", "parameters": {}}}


def _check(response, status, param):
    assert response.status_code == status, response.text
    assert list(response.json()) == ["error"]
    error = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert error["param"] == param, error
    assert error["message"]
    return error


BOTH = [
    ("temperature", -0.1),
    ("temperature", "hot"),
    ("top_p", 0.0),
    ("top_p", 1.01),
    ("top_k", -2),
    ("top_k", 1.5),
    ("min_p", -0.1),
    ("min_p", 1.1),
    ("presence_penalty", 2.1),
    ("frequency_penalty", -2.1),
    ("repetition_penalty", 0),
    ("logit_bias", {"x": 1}),
    ("logit_bias", {"5": 101}),
    ("logit_bias", {"99999999": 1}),
    ("logit_bias", {"-1": 1}),
    ("seed", 2**63),
    ("seed", -(2**63) - 1),
    ("seed", "abc"),
    ("n", 0),
    ("n", 100_000),
    ("max_tokens", 0),
    ("min_tokens", -1),
    ("min_tokens", 255),
    ("stop", ""),
    ("stop", ["ok", ""]),
    ("stop", ["x"] * 65),
    ("stop", "x" * 1025),
    ("stop", [1]),
    ("stop", {"a": 1}),
    ("stop_token_ids", [99_999_999]),
    ("stop_token_ids", [-1]),
    ("stop_token_ids", "5"),
    ("stream", "perhaps"),
    ("stream_options", {"include_usage": True}),
    ("cache_salt", "x" * 1025),
    ("request_id", "no spaces"),
    ("request_id", "x" * 129),
    ("request_id", ""),
    ("response_format", {"type": "json_schema", "json_schema": {}}),
    ("structured_outputs", {"regex": 5}),
    ("guided_regex", 5),
    ("use_beam_search", True),
    ("prompt_logprobs", -1),
    ("prompt_logprobs", 21),
    ("allowed_token_ids", [1]),
    ("bad_words", ["x"]),
    ("truncate_prompt_tokens", 5),
]


@pytest.mark.parametrize("url", [COMPLETIONS, CHAT])
@pytest.mark.parametrize(("field", "value"), BOTH)
async def test_bad_value_on_either_endpoint(client_of, gateway, url, field, value):
    prompt = {"prompt": "Hello?"} if url == COMPLETIONS else {"messages": HELLO}
    async with client_of(gateway) as client:
        response = await client.post(url, json={**prompt, field: value})
    error = _check(response, 400, field)
    assert error["type"] == "invalid_request_error"
    assert gateway.submitted == []


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({}, "prompt"),
        ({"prompt": None}, "prompt"),
        ({"prompt": ""}, "prompt"),
        ({"prompt": []}, "prompt"),
        ({"prompt": [""]}, "prompt"),
        ({"prompt": ["a", ""]}, "prompt"),
        ({"prompt": [[5], []]}, "prompt"),
        ({"prompt": [5, "a"]}, "prompt"),
        ({"prompt": ["a", 5]}, "prompt"),
        ({"prompt": [5.5]}, "prompt"),
        ({"prompt": [True]}, "prompt"),
        ({"prompt": [-1]}, "prompt"),
        ({"prompt": [99_999_999]}, "prompt"),
        ({"prompt": [2**70]}, "prompt"),
        ({"prompt": {"text": "a"}}, "prompt"),
        ({"prompt": 5}, "prompt"),
        ({"prompt": [[5]] * 600, "n": 2}, "n"),
        ({"prompt": "a", "logprobs": -1}, "logprobs"),
        ({"prompt": "a", "logprobs": 21}, "logprobs"),
        ({"prompt": "a", "max_tokens": 0}, "max_tokens"),
        ({"prompt": "a", "prompt_logprobs": 1, "stream": True}, "prompt_logprobs"),
        ({"prompt": "a", "suffix": "b"}, "suffix"),
        ({"prompt": "a", "best_of": 2}, "best_of"),
        ({"prompt": "a", "prompt_embeds": "AAAA"}, "prompt_embeds"),
    ],
)
async def test_bad_completion(client_of, gateway, body, param):
    async with client_of(gateway) as client:
        _check(await client.post(COMPLETIONS, json=body), 400, param)
    assert gateway.submitted == []


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"messages": []}, "messages"),
        ({"messages": "Hello"}, "messages"),
        ({"messages": [{"content": "Hello"}]}, "messages"),
        ({"messages": [{"role": "wizard", "content": "Hello"}]}, "messages"),
        ({"messages": [{"role": "user"}]}, "messages"),
        ({"messages": [{"role": "user", "content": None}]}, "messages"),
        ({"messages": [{"role": "user", "content": 5}]}, "messages"),
        (
            {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}]},
            "messages",
        ),
        ({"messages": HELLO, "max_completion_tokens": 0}, "max_completion_tokens"),
        ({"messages": HELLO, "logprobs": 5}, "logprobs"),
        ({"messages": HELLO, "logprobs": True, "top_logprobs": 21}, "top_logprobs"),
        ({"messages": HELLO, "top_logprobs": 2}, "top_logprobs"),
        ({"messages": HELLO, "tools": [TOOL]}, "tools"),
        ({"messages": HELLO, "tools": [TOOL], "tool_choice": "auto"}, "tools"),
        ({"messages": HELLO, "tool_choice": "required"}, "tool_choice"),
        ({"messages": HELLO, "functions": [{"name": "f"}]}, "functions"),
        ({"messages": HELLO, "modalities": ["audio"]}, "modalities"),
        ({"messages": HELLO, "echo": True}, "echo"),
        ({"messages": HELLO, "chat_template": "{{ x }}"}, "chat_template"),
        (
            {"messages": HELLO, "add_generation_prompt": True, "continue_final_message": True},
            "continue_final_message",
        ),
    ],
)
async def test_bad_chat(client_of, gateway, body, param):
    async with client_of(gateway) as client:
        _check(await client.post(CHAT, json=body), 400, param)
    assert gateway.submitted == []


async def test_the_message_names_the_place(client_of, gateway):
    parts = [{"type": "text", "text": "a"}, {"type": "image_url"}]
    body = {"messages": [*HELLO, {"role": "user", "content": parts}]}
    async with client_of(gateway) as client:
        error = _check(await client.post(CHAT, json=body), 400, "messages")
    assert error["message"].startswith("messages[1].content[1].type: ")


@pytest.mark.parametrize(
    "raw",
    [
        b"",
        b"{",
        b"[1]",
        b'"text"',
        b'{"prompt": "a", "temperature": NaN}',
        b'{"prompt": "a", "temperature": Infinity}',
        b'{"prompt": "a", "temperature": 1e999}',
        b'{"prompt": "\\ud800"}',
        b'{"prompt": "\xff"}',
        b'{"prompt": ' + b"[" * 100_000,
        b'{"prompt": "a", "seed": ' + b"9" * 10_000 + b"}",
    ],
)
async def test_what_is_no_json_object_is_refused(client_of, gateway, raw):
    async with client_of(gateway) as client:
        response = await client.post(
            COMPLETIONS, content=raw, headers={"Content-Type": "application/json"}
        )
    assert response.status_code == 400
    assert response.json()["error"]["type"] == "invalid_request_error"
    assert gateway.submitted == []


@pytest.mark.parametrize("content_type", [None, "text/plain", "application/x-www-form-urlencoded"])
async def test_other_content_types_are_refused(client_of, gateway, content_type):
    headers = {} if content_type is None else {"Content-Type": content_type}
    async with client_of(gateway) as client:
        response = await client.post(COMPLETIONS, content=b'{"prompt": "a"}', headers=headers)
    assert _check(response, 415, None)["code"] == "unsupported_media_type"


async def test_content_type_may_carry_a_charset(client_of, gateway):
    headers = {"Content-Type": "application/json; charset=utf-8"}
    async with client_of(gateway) as client:
        response = await client.post(COMPLETIONS, content=b'{"prompt": "a"}', headers=headers)
    assert response.status_code == 200


async def test_body_beyond_the_limit_is_refused_declared_or_not(client_of, gateway):
    body = json.dumps({"prompt": "a" * 2000}).encode()
    sent = 0

    async def chunks():
        nonlocal sent
        for start in range(0, len(body), 100):
            sent += 1
            yield body[start : start + 100]

    headers = {"Content-Type": "application/json"}
    async with client_of(gateway, max_body_bytes=1000) as client:
        declared = await client.post(COMPLETIONS, content=body, headers=headers)
        too_long = {**headers, "Content-Length": str(len(body))}
        unread = await client.post(COMPLETIONS, content=chunks(), headers=too_long)
        assert sent == 0, "the header alone was enough"
        streamed = await client.post(COMPLETIONS, content=chunks(), headers=headers)
    for response in (declared, unread, streamed):
        assert _check(response, 413, None)["code"] == "request_too_large"
    assert sent < 20, "the rest of the body must not be read"
    assert gateway.submitted == []


async def test_unknown_model_is_not_found(client_of, gateway):
    async with client_of(gateway) as client:
        for url, prompt in ((COMPLETIONS, {"prompt": "a"}), (CHAT, {"messages": HELLO})):
            response = await client.post(url, json={"model": "huge", **prompt})
            error = _check(response, 404, "model")
            assert error["code"] == "model_not_found"
            assert "'tiny'" in error["message"]


@pytest.mark.parametrize("num_prompt_tokens", [256, 300])
async def test_prompt_that_fills_the_context(client_of, gateway, num_prompt_tokens):
    async with client_of(gateway) as client:
        response = await client.post(COMPLETIONS, json={"prompt": [5] * num_prompt_tokens})
    error = _check(response, 400, "prompt")
    assert error["code"] == "context_length_exceeded"
    assert "256" in error["message"]
    assert str(num_prompt_tokens) in error["message"]


async def test_answer_that_does_not_fit_says_what_would(client_of, gateway):
    body = {"prompt": [5] * 200, "max_tokens": 57}
    async with client_of(gateway) as client:
        error = _check(await client.post(COMPLETIONS, json=body), 400, "prompt")
        assert (await client.post(COMPLETIONS, json={**body, "max_tokens": 56})).status_code == 200
    assert error["code"] == "context_length_exceeded"
    for number in ("256", "200", "57", "257", "56"):
        assert number in error["message"]


async def test_route_header_must_be_known(client_of, gateway):
    headers = {"X-Pdserve-Route": "sideways"}
    async with client_of(gateway) as client:
        response = await client.post(COMPLETIONS, json={"prompt": "a"}, headers=headers)
    assert "split" in _check(response, 400, "X-Pdserve-Route")["message"]


async def test_a_broken_traceparent_counts_as_none(client_of, gateway):
    headers = {"traceparent": "00-xyz"}
    async with client_of(gateway) as client:
        response = await client.post(COMPLETIONS, json={"prompt": "a"}, headers=headers)
    assert response.status_code == 200
    assert gateway.submitted[0].trace_context == ""


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("url", [COMPLETIONS, CHAT])
@pytest.mark.parametrize(
    ("error", "status", "code"),
    [
        (OverloadedError("no room", 2.2), 429, "overloaded"),
        (UnavailableError("draining"), 503, "unavailable"),
        (GenerationError("broke off"), 500, "generation_failed"),
        (ZeroDivisionError("secret"), 500, "internal_error"),
    ],
)
async def test_before_the_first_token_an_error_is_a_status(
    client_of, gateway, url, stream, error, status, code
):
    gateway.fail_before = error
    prompt = {"prompt": "Hello?"} if url == COMPLETIONS else {"messages": HELLO}
    async with client_of(gateway) as client:
        response = await client.post(url, json={**prompt, "stream": stream})
    assert _check(response, status, None)["code"] == code
    assert response.headers["content-type"] == "application/json"
    assert response.headers.get("retry-after") == ("3" if status == 429 else None)
    assert "secret" not in response.text


@pytest.mark.parametrize("url", [COMPLETIONS, CHAT])
@pytest.mark.parametrize("error", [GenerationError("lost"), ZeroDivisionError("secret")])
async def test_after_the_first_token_an_error_is_an_event(
    client_of, gateway, events_of, url, error
):
    gateway.fail_after = (2, error)
    prompt = {"prompt": "Hello?"} if url == COMPLETIONS else {"messages": HELLO}
    async with client_of(gateway) as client:
        stream = await client.post(url, json={**prompt, "stream": True, "max_tokens": 9})
        whole = await client.post(url, json={**prompt, "max_tokens": 9})
    assert stream.status_code == 200
    *chunks, failure, done = events_of(stream.text)
    assert chunks
    assert all("choices" in chunk for chunk in chunks)
    assert list(failure) == ["error"]
    assert failure["error"] == whole.json()["error"]
    assert done == "[DONE]"
    assert whole.status_code == 500
    assert "secret" not in stream.text


async def test_a_stream_that_ends_too_early_is_an_error(client_of, gateway, events_of):
    gateway.script = lambda request, choice: [5, 6]
    async with client_of(gateway) as client:
        whole = await client.post(COMPLETIONS, json={"prompt": "a"})
        stream = await client.post(COMPLETIONS, json={"prompt": "a", "stream": True})
        gateway.script = lambda request, choice: []
        empty = await client.post(COMPLETIONS, json={"prompt": "a", "stream": True})
    assert whole.status_code == 500
    assert events_of(stream.text)[-2]["error"]["code"] == "generation_failed"
    assert empty.status_code == 500


async def test_one_failing_prompt_of_a_list_ends_all(client_of, gateway):
    def script(request, choice):
        if request.prompt_token_ids[0] == 8:
            raise OverloadedError("no room", 1.0)
        return [5] * 1000

    gateway.script = script
    body = {"prompt": [[7], [8], [9]], "max_tokens": 200}
    async with client_of(gateway) as client:
        response = await client.post(COMPLETIONS, json=body)
    assert response.status_code == 429
    assert gateway.num_running == 0
