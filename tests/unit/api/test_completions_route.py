"""``/v1/completions``: what is submitted for a body, and what is answered."""

from __future__ import annotations

import json

import pytest

from pdserve.api.fake import FakeGateway
from pdserve.api.openai.responses import Completion
from pdserve.core.request import RoutePreference

pytestmark = pytest.mark.anyio
URL = "/v1/completions"


async def test_text_prompt_is_tokenised_and_answered(client_of, card, say, tokenizer):
    gateway = FakeGateway(card, script=say("hello there"))
    async with client_of(gateway) as client:
        response = await client.post(URL, json={"model": "tiny", "prompt": "Hi"})
    assert response.status_code == 200
    document = response.json()
    Completion.model_validate(document, strict=True)
    assert document["object"] == "text_completion"
    assert document["model"] == "tiny"
    [choice] = document["choices"]
    assert choice["text"] == "hello there"
    assert (choice["finish_reason"], choice["stop_reason"]) == ("stop", None)
    [request] = gateway.submitted
    assert list(request.prompt_token_ids) == tokenizer.encode("Hi", add_special_tokens=True)
    num_answer = len(tokenizer.encode("hello there", add_special_tokens=False)) + 1
    assert document["usage"] == {
        "prompt_tokens": len(request.prompt_token_ids),
        "completion_tokens": num_answer,
        "total_tokens": len(request.prompt_token_ids) + num_answer,
        "prompt_tokens_details": {"cached_tokens": 0},
    }
    assert int(response.headers["content-length"]) == len(response.content)


async def test_defaults_are_openais(client_of, gateway, card):
    async with client_of(gateway) as client:
        await client.post(URL, json={"prompt": [5, 6]})
        await client.post(URL, json={"prompt": [5, 6]})
    first, second = (request.params for request in gateway.submitted)
    assert (first.max_tokens, first.temperature, first.top_p, first.top_k) == (16, 1.0, 1.0, 0)
    assert (first.min_p, first.repetition_penalty, first.logprobs) == (0.0, 1.0, None)
    assert (first.eos_token_ids, first.ignore_eos) == (card.eos_token_ids, False)
    assert 0 <= first.seed < 2**63
    assert first.seed != second.seed
    assert gateway.submitted[0].route is RoutePreference.AUTO


async def test_null_means_left_out(client_of, gateway):
    nulls = dict.fromkeys(
        ("temperature", "top_p", "max_tokens", "stop", "seed", "n", "stream", "logit_bias", "echo")
    )
    async with client_of(gateway) as client:
        response = await client.post(URL, json={"prompt": "a", "model": None, **nulls})
    assert response.status_code == 200
    assert gateway.submitted[0].params.max_tokens == 16


async def test_every_parameter_reaches_the_request(client_of, gateway, tokenizer):
    body = {
        "prompt": "a b",
        "max_tokens": 9,
        "min_tokens": 2,
        "temperature": 0.5,
        "top_p": 0.9,
        "top_k": 7,
        "min_p": 0.1,
        "presence_penalty": -1.5,
        "frequency_penalty": 1.5,
        "repetition_penalty": 1.2,
        "logit_bias": {"9": 3, "4": -100},
        "seed": -(2**63),
        "n": 2,
        "stop_token_ids": [12, 13, 12],
        "ignore_eos": True,
        "logprobs": 4,
        "cache_salt": "pepper",
        "user": "me",
    }
    traceparent = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"
    headers = {"X-Pdserve-Route": "split", "traceparent": traceparent}
    async with client_of(gateway) as client:
        assert (await client.post(URL, json=body, headers=headers)).status_code == 200
    [request] = gateway.submitted
    params = request.params
    assert (params.max_tokens, params.min_tokens, params.seed) == (9, 2, -(2**63))
    assert (params.temperature, params.top_p, params.top_k, params.min_p) == (0.5, 0.9, 7, 0.1)
    assert (params.presence_penalty, params.frequency_penalty) == (-1.5, 1.5)
    assert params.repetition_penalty == 1.2
    assert params.logit_bias == ((4, -100.0), (9, 3.0))
    assert (params.stop_token_ids, params.ignore_eos) == ((12, 13), True)
    assert params.logprobs == 4
    assert (request.num_choices, request.cache_salt) == (2, "pepper")
    assert request.route is RoutePreference.SPLIT
    assert request.trace_context == traceparent


@pytest.mark.parametrize("top_k", [-1, 0, 10**9])
async def test_top_k_that_excludes_nothing_is_off(client_of, gateway, top_k):
    async with client_of(gateway) as client:
        await client.post(URL, json={"prompt": "a", "top_k": top_k})
    assert gateway.submitted[0].params.top_k == 0


async def test_a_hair_above_greedy_is_greedy(client_of, gateway):
    async with client_of(gateway) as client:
        await client.post(URL, json={"prompt": "a", "temperature": 1e-30})
    assert gateway.submitted[0].params.temperature == 0.0


@pytest.mark.parametrize(
    ("prompt", "expected"),
    [
        ([7, 8, 9], [[7, 8, 9]]),
        ([[7, 8], [9]], [[7, 8], [9]]),
        (["ab", "c"], ["ab", "c"]),
        (["12", "34"], ["12", "34"]),
    ],
)
async def test_forms_of_prompt(client_of, gateway, tokenizer, prompt, expected):
    async with client_of(gateway) as client:
        response = await client.post(URL, json={"prompt": prompt, "max_tokens": 2})
    assert response.status_code == 200
    submitted = [list(request.prompt_token_ids) for request in gateway.submitted]
    assert submitted == [
        tokenizer.encode(p, add_special_tokens=True) if isinstance(p, str) else p for p in expected
    ]


async def test_choices_of_a_list_go_prompt_by_prompt(client_of, card, tokenizer, eos, joined):
    texts = {7: ["red", "green"], 8: ["blue", "black"], 9: ["white", "grey"]}

    def script(request, choice):
        text = texts[request.prompt_token_ids[0]][choice]
        return [*tokenizer.encode(text, add_special_tokens=False), eos]

    gateway = FakeGateway(card, script=script)
    body = {"prompt": [[7], [8], [9]], "n": 2, "max_tokens": 50}
    async with client_of(gateway) as client:
        document = (await client.post(URL, json=body)).json()
    assert [choice["index"] for choice in document["choices"]] == list(range(6))
    assert [choice["text"] for choice in document["choices"]] == joined(texts.values())
    assert document["usage"]["prompt_tokens"] == 3
    assert len({request.request_id for request in gateway.submitted}) == 3


async def test_stream_of_a_list_keeps_the_indices_apart(client_of, card, tokenizer, eos, events_of):
    texts = {7: ["red", "green"], 8: ["blue", "black"]}

    def script(request, choice):
        text = texts[request.prompt_token_ids[0]][choice]
        return [*tokenizer.encode(text, add_special_tokens=False), eos]

    gateway = FakeGateway(card, script=script)
    body = {"prompt": [[7], [8]], "n": 2, "max_tokens": 50, "stream": True}
    async with client_of(gateway) as client:
        *chunks, done = events_of((await client.post(URL, json=body)).text)
    assert done == "[DONE]"
    said = ["", "", "", ""]
    finished = []
    for chunk in chunks:
        [choice] = chunk["choices"]
        assert choice["index"] not in finished
        said[choice["index"]] += choice["text"]
        if choice["finish_reason"] is not None:
            finished.append(choice["index"])
    assert said == ["red", "green", "blue", "black"]
    assert sorted(finished) == [0, 1, 2, 3]


async def test_max_tokens_ends_with_length(client_of, gateway):
    async with client_of(gateway) as client:
        document = (await client.post(URL, json={"prompt": [65], "max_tokens": 3})).json()
    assert document["choices"][0]["finish_reason"] == "length"
    assert document["usage"]["completion_tokens"] == 3


async def test_default_max_tokens_shrinks_to_the_room_left(client_of, gateway, card):
    prompt = [65] * (card.max_model_tokens - 5)
    async with client_of(gateway) as client:
        assert (await client.post(URL, json={"prompt": prompt})).status_code == 200
    assert gateway.submitted[0].params.max_tokens == 5


async def test_stop_string_ends_the_choice_and_stays_out(client_of, card, say):
    gateway = FakeGateway(card, script=say("one two three four"))
    body = {"prompt": "x", "stop": ["three", "nine"], "max_tokens": 99}
    async with client_of(gateway) as client:
        document = (await client.post(URL, json=body)).json()
    [choice] = document["choices"]
    assert (choice["text"], choice["finish_reason"]) == ("one two ", "stop")
    assert choice["stop_reason"] == "three"
    [request] = gateway.submitted
    assert gateway.stopped == [(request.request_id, 0)]
    assert gateway.finished == [request.request_id]


async def test_a_stopped_choice_does_not_stop_the_others(client_of, card, say):
    gateway = FakeGateway(card, script=say("ab! and more", "cd and more"))
    body = {"prompt": "x", "stop": "!", "n": 2, "max_tokens": 99}
    async with client_of(gateway) as client:
        document = (await client.post(URL, json=body)).json()
    assert [choice["text"] for choice in document["choices"]] == ["ab", "cd and more"]
    assert [choice["stop_reason"] for choice in document["choices"]] == ["!", None]
    assert [choice for _, choice in gateway.stopped] == [0]


async def test_stop_string_can_be_included(client_of, card, say):
    gateway = FakeGateway(card, script=say("one two three four"))
    body = {"prompt": "x", "stop": "two", "include_stop_str_in_output": True, "max_tokens": 99}
    async with client_of(gateway) as client:
        document = (await client.post(URL, json=body)).json()
    assert document["choices"][0]["text"] == "one two"


async def test_stop_token_is_the_reason_and_eos_is_none(client_of, card, eos, tokenizer):
    [stop_id] = tokenizer.encode("!", add_special_tokens=False)
    text = tokenizer.encode("ab", add_special_tokens=False)
    gateway = FakeGateway(card, script=lambda request, choice: [*text, [stop_id, eos][choice]])
    body = {"prompt": "x", "stop_token_ids": [stop_id], "n": 2, "max_tokens": 99}
    async with client_of(gateway) as client:
        document = (await client.post(URL, json=body)).json()
    assert [choice["text"] for choice in document["choices"]] == ["ab", "ab"]
    assert [choice["stop_reason"] for choice in document["choices"]] == [stop_id, None]
    assert {choice["finish_reason"] for choice in document["choices"]} == {"stop"}


async def test_stop_token_text_can_be_included(client_of, card, tokenizer):
    [stop_id] = tokenizer.encode("!", add_special_tokens=False)
    text = tokenizer.encode("ab", add_special_tokens=False)
    gateway = FakeGateway(card, script=lambda request, choice: [*text, stop_id])
    body = {"prompt": "x", "stop_token_ids": [stop_id], "include_stop_str_in_output": True}
    async with client_of(gateway) as client:
        document = (await client.post(URL, json=body)).json()
    assert document["choices"][0]["text"] == "ab!"


async def test_special_tokens_show_when_asked(client_of, card, eos, tokenizer):
    script = [*tokenizer.encode("a", add_special_tokens=False), eos]
    gateway = FakeGateway(card, script=lambda request, choice: script * 2)
    body = {"prompt": "x", "ignore_eos": True, "max_tokens": len(script)}
    async with client_of(gateway) as client:
        hidden = (await client.post(URL, json=body)).json()
        shown = (await client.post(URL, json={**body, "skip_special_tokens": False})).json()
    assert hidden["choices"][0]["text"] == "a"
    assert shown["choices"][0]["text"] == "a<|im_end|>"


async def test_echo_puts_the_prompt_first(client_of, card, say, tokenizer, events_of):
    gateway = FakeGateway(card, script=say(" and so on"))
    ids = tokenizer.encode("given", add_special_tokens=False)
    body = {"prompt": "given", "echo": True, "max_tokens": 99}
    async with client_of(gateway) as client:
        text = (await client.post(URL, json=body)).json()
        from_ids = (await client.post(URL, json={**body, "prompt": ids})).json()
        stream = (await client.post(URL, json={**body, "stream": True, "n": 2})).text
    assert text["choices"][0]["text"] == "given and so on"
    assert from_ids["choices"][0]["text"] == "given and so on"
    said = ["", ""]
    for chunk in events_of(stream)[:-1]:
        said[chunk["choices"][0]["index"]] += chunk["choices"][0]["text"]
    assert said == ["given and so on"] * 2


async def test_logprobs_are_parallel_lists(client_of, card, say, tokenizer):
    gateway = FakeGateway(card, script=say("héllo"))
    body = {"prompt": "x", "logprobs": 2, "max_tokens": 99}
    async with client_of(gateway) as client:
        document = (await client.post(URL, json=body)).json()
    Completion.model_validate(document, strict=True)
    logprobs = document["choices"][0]["logprobs"]
    num_tokens = document["usage"]["completion_tokens"]
    assert {len(values) for values in logprobs.values()} == {num_tokens}
    assert logprobs["token_logprobs"] == [-0.5] * num_tokens
    assert logprobs["text_offset"][0] == 0
    assert logprobs["text_offset"] == sorted(logprobs["text_offset"])
    assert all(1 <= len(top) <= 3 for top in logprobs["top_logprobs"])
    for token, top in zip(logprobs["tokens"], logprobs["top_logprobs"], strict=True):
        assert top[token] == -0.5


async def test_logprobs_zero_names_the_chosen_token_only(client_of, card, say):
    gateway = FakeGateway(card, script=say("a"))
    async with client_of(gateway) as client:
        document = (await client.post(URL, json={"prompt": "x", "logprobs": 0})).json()
    logprobs = document["choices"][0]["logprobs"]
    assert [list(top) for top in logprobs["top_logprobs"]] == [[t] for t in logprobs["tokens"]]


async def test_logprobs_of_streamed_chunks_join_to_the_same(
    client_of, card, say, events_of, joined
):
    gateway = FakeGateway(card, script=say("héllo stop wörld"))
    body = {"prompt": "x", "logprobs": 1, "stop": "wör", "max_tokens": 99}
    async with client_of(gateway) as client:
        whole = (await client.post(URL, json=body)).json()["choices"][0]
        stream = events_of((await client.post(URL, json={**body, "stream": True})).text)
    choices = [chunk["choices"][0] for chunk in stream[:-1]]
    assert "".join(choice["text"] for choice in choices) == whole["text"]
    for key, values in whole["logprobs"].items():
        assert joined(choice["logprobs"][key] for choice in choices) == values


async def test_token_ids_are_returned_when_asked(
    client_of, card, say, tokenizer, eos, events_of, joined
):
    gateway = FakeGateway(card, script=say("abc"))
    body = {"prompt": [5, 6], "return_token_ids": True, "max_tokens": 99}
    async with client_of(gateway) as client:
        [whole] = (await client.post(URL, json=body)).json()["choices"]
        stream = events_of((await client.post(URL, json={**body, "stream": True})).text)
    expected = [*tokenizer.encode("abc", add_special_tokens=False), eos]
    assert (whole["prompt_token_ids"], whole["token_ids"]) == ([5, 6], expected)
    choices = [chunk["choices"][0] for chunk in stream[:-1]]
    assert choices[0]["prompt_token_ids"] == [5, 6]
    assert all("prompt_token_ids" not in choice for choice in choices[1:])
    assert joined(choice["token_ids"] for choice in choices) == expected


async def test_usage_in_a_stream(client_of, card, say, events_of):
    gateway = FakeGateway(card, script=say("abc"))
    body = {"prompt": [5, 6], "max_tokens": 99, "stream": True}
    with_usage = {**body, "stream_options": {"include_usage": True}}
    continuous = {
        **body,
        "stream_options": {"include_usage": True, "continuous_usage_stats": True},
    }
    async with client_of(gateway) as client:
        none = events_of((await client.post(URL, json=body)).text)[:-1]
        last = events_of((await client.post(URL, json=with_usage)).text)[:-1]
        all_along = events_of((await client.post(URL, json=continuous)).text)[:-1]
    assert all("usage" not in chunk for chunk in none)
    assert [chunk["usage"] for chunk in last[:-1]] == [None] * (len(last) - 1)
    assert last[-1]["choices"] == []
    counts = [chunk["usage"]["completion_tokens"] for chunk in all_along]
    assert counts == sorted(counts)
    assert last[-1]["usage"] == all_along[-1]["usage"]
    assert last[-1]["usage"]["prompt_tokens"] == 2


async def test_no_client_sees_a_line_end_inside_an_event(client_of, card, say):
    """Some split lines as Python's ``str.splitlines`` does, at more characters than SSE has."""
    text = "a\u2028b\u2029c\x85d\x0be\x0cf\r\ng\x1ch"
    gateway = FakeGateway(card, script=say(text))
    body = {"prompt": "x", "stream": True, "max_tokens": 99, "echo": True}
    async with client_of(gateway) as client:
        response = await client.post(URL, json=body)
    events = [line for line in response.text.splitlines() if line]
    assert all(event.startswith("data: ") for event in events)
    chunks = [json.loads(event.removeprefix("data: ")) for event in events[:-1]]
    assert "".join(chunk["choices"][0]["text"] for chunk in chunks) == f"x{text}"


async def test_many_prompts_keep_their_order(client_of, card, tokenizer):
    gateway = FakeGateway(card, script=lambda request, choice: [5])
    prompts = [f"prompt {number} and some more words" for number in range(200)]
    async with client_of(gateway) as client:
        await client.post(URL, json={"prompt": prompts, "max_tokens": 1})
    submitted = [list(request.prompt_token_ids) for request in gateway.submitted]
    assert submitted == [tokenizer.encode(prompt) for prompt in prompts]


async def test_unknown_and_internal_fields_are_dropped(client_of, gateway):
    body = {"prompt": "x", "kv_transfer_params": {"do_remote_decode": True}, "no_such_field": [1]}
    async with client_of(gateway) as client:
        response = await client.post(URL, json=body)
    assert response.status_code == 200
    assert "kv_transfer_params" not in response.json()


async def test_min_tokens_delays_stop_strings(client_of, card, say):
    gateway = FakeGateway(card, script=say("a.b.c.d"))
    body = {"prompt": "x", "stop": ".", "min_tokens": 3, "max_tokens": 99, "logprobs": 0}
    async with client_of(gateway) as client:
        [choice] = (await client.post(URL, json=body)).json()["choices"]
    tokens = choice["logprobs"]["tokens"]
    free = "".join(tokens[:3])
    assert choice["text"] == "a.b.c.d"[: "a.b.c.d".index(".", len(free))]
