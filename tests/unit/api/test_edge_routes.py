"""Ids, keys, probes, tokenisation, timelines and the published schema."""

from __future__ import annotations

import asyncio
import threading
from dataclasses import replace

import pytest

from pdserve.api.constraint_check import ConstraintCheck
from pdserve.api.edge import Edge
from pdserve.api.fake import FakeGateway
from pdserve.api.middleware import EdgeMiddleware
from pdserve.api.request_ids import RequestDirectory
from pdserve.api.settings import ApiSettings

pytestmark = pytest.mark.anyio
URL = "/v1/completions"
KEY = {"Authorization": "Bearer s3cret"}


async def test_request_id_goes_in_and_comes_out(client_of, gateway):
    headers = {"X-Request-Id": "order-66"}
    async with client_of(gateway) as client:
        response = await client.post(URL, json={"prompt": "a"}, headers=headers)
        chat = await client.post(
            "/v1/chat/completions",
            json={"messages": [{"role": "user", "content": "a"}], "request_id": "from-body"},
        )
        both = await client.post(URL, json={"prompt": "a", "request_id": "b"}, headers=headers)
        neither = await client.post(URL, json={"prompt": "a"})
    assert response.headers["x-request-id"] == "order-66"
    assert response.json()["id"] == "cmpl-order-66"
    assert chat.headers["x-request-id"] == "from-body"
    assert chat.json()["id"] == "chatcmpl-from-body"
    assert both.headers["x-request-id"] == "order-66"
    assert neither.json()["id"] == f"cmpl-{neither.headers['x-request-id']}"


async def test_one_id_may_be_used_twice_at_once(client_of, card):
    gateway = FakeGateway(card, permits=0)
    headers = {"X-Request-Id": "twin"}
    async with client_of(gateway) as client:
        posts = [
            asyncio.create_task(client.post(URL, json={"prompt": "a"}, headers=headers))
            for _ in range(2)
        ]
        await gateway.until(lambda: len(gateway.submitted) == 2)
        gateway.allow(99)
        responses = await asyncio.gather(*posts)
    assert [response.json()["id"] for response in responses] == ["cmpl-twin"] * 2
    first, second = (request.request_id for request in gateway.submitted)
    assert first != second
    assert first.startswith("cmpl-twin")


async def test_prompts_of_a_list_are_numbered(client_of, gateway):
    async with client_of(gateway) as client:
        await client.post(URL, json={"prompt": [[5], [6]]}, headers={"X-Request-Id": "pair"})
    ids = [request.request_id for request in gateway.submitted]
    assert [request_id.rpartition("-")[2] for request_id in ids] == ["0", "1"]


@pytest.mark.parametrize("bad", ["two words", "a/b", "x" * 129, "tilde~", ""])
async def test_bad_request_id_is_refused(client_of, gateway, bad):
    async with client_of(gateway) as client:
        response = await client.get("/health", headers={"X-Request-Id": bad})
    assert response.status_code == 400
    assert response.json()["error"]["param"] == "X-Request-Id"
    assert response.headers["x-request-id"] != bad


async def test_every_response_has_an_id(client_of, gateway):
    gateway.fail_before = ZeroDivisionError()
    async with client_of(gateway, api_key="s3cret") as client:
        responses = [
            await client.get("/health"),
            await client.get("/nothing", headers=KEY),
            await client.get("/cluster"),
            await client.post(URL, json={"prompt": "a"}, headers=KEY),
        ]
    assert [response.status_code for response in responses] == [200, 404, 401, 500]
    assert all(response.headers["x-request-id"] for response in responses)


@pytest.mark.parametrize(
    ("method", "path"),
    [
        ("POST", "/v1/completions"),
        ("POST", "/v1/chat/completions"),
        ("GET", "/v1/models"),
        ("POST", "/tokenize"),
        ("POST", "/detokenize"),
        ("GET", "/cluster"),
        ("GET", "/cluster/traffic"),
        ("GET", "/v1/requests/x/timeline"),
        ("GET", "/v1/anything"),
    ],
)
async def test_key_is_asked_for(client_of, gateway, method, path):
    wrong = [
        {},
        {"Authorization": "Bearer wrong"},
        {"Authorization": "Bearer"},
        {"Authorization": "Basic s3cret"},
        {"Authorization": "s3cret"},
        {"Authorization": "Bearer s3cret2"},
        {"Authorization": b"Bearer \xff\xfe"},
    ]
    async with client_of(gateway, api_key="s3cret") as client:
        for headers in wrong:
            response = await client.request(method, path, headers=headers)
            assert response.status_code == 401
            assert response.json()["error"]["code"] == "invalid_api_key"
            assert response.headers["www-authenticate"] == "Bearer"
        for right in ("bearer s3cret", "Bearer  s3cret"):
            response = await client.request(method, path, headers={"authorization": right})
            assert response.status_code != 401


@pytest.mark.parametrize("path", ["/health", "/ping", "/metrics", "/version", "/openapi.json"])
async def test_probes_need_no_key(client_of, gateway, path):
    async with client_of(gateway, api_key="s3cret") as client:
        assert (await client.get(path)).status_code == 200


async def test_an_error_after_the_response_began_cannot_become_another_one():
    async def app(scope, receive, send):
        await send({"type": "http.response.start", "status": 200, "headers": []})
        raise ZeroDivisionError

    sent = []

    async def send(message):
        sent.append(message["type"])

    scope = {"type": "http", "method": "GET", "path": "/", "headers": []}
    with pytest.raises(ZeroDivisionError):
        await EdgeMiddleware(app)(scope, None, send)
    assert sent == ["http.response.start"]


async def test_without_a_key_nobody_is_asked(client_of, gateway):
    async with client_of(gateway) as client:
        assert (await client.get("/v1/models")).status_code == 200


async def test_unknown_route_and_wrong_method(client_of, gateway):
    async with client_of(gateway) as client:
        unknown = await client.get("/v2/models")
        wrong = await client.get(URL)
    assert (unknown.status_code, wrong.status_code) == (404, 405)
    assert unknown.json()["error"]["code"] == "not_found"
    assert wrong.json()["error"]["code"] == "method_not_allowed"
    assert wrong.headers["allow"] == "POST"


async def test_models(client_of, gateway, card):
    async with client_of(gateway) as client:
        listed = (await client.get("/v1/models")).json()
        one = await client.get("/v1/models/tiny")
        other = await client.get("/v1/models/org/huge")
    assert listed == {"object": "list", "data": [one.json()]}
    assert one.json()["id"] == "tiny"
    assert one.json()["created"] == card.created
    assert one.json()["max_model_len"] == card.max_model_tokens
    assert other.status_code == 404
    assert other.json()["error"]["code"] == "model_not_found"


@pytest.mark.parametrize(
    ("method", "path"), [("GET", "/health"), ("GET", "/ping"), ("POST", "/ping")]
)
async def test_health_follows_the_gateway(client_of, gateway, method, path):
    async with client_of(gateway) as client:
        assert (await client.request(method, path)).status_code == 200
        gateway.ready = False
        down = await client.request(method, path)
    assert down.status_code == 503
    assert down.json()["error"]["code"] == "unavailable"


async def test_metrics_cluster_and_version(client_of, gateway):
    async with client_of(gateway) as client:
        metrics = await client.get("/metrics")
        cluster = await client.get("/cluster")
        traffic = await client.get("/cluster/traffic")
        version = await client.get("/version")
    assert traffic.json() == gateway.traffic()
    assert metrics.content == gateway.metrics_text()
    assert metrics.headers["content-type"].startswith("text/plain; version=0.0.4")
    assert cluster.json() == gateway.cluster()
    assert list(version.json()) == ["version"]


async def test_timeline_by_any_of_its_names(client_of, gateway):
    async with client_of(gateway) as client:
        headers = {"X-Request-Id": "traced"}
        await client.post(URL, json={"prompt": "a"}, headers=headers)
        own = gateway.submitted[0].request_id
        found = [
            (await client.get(f"/v1/requests/{name}/timeline")).json()
            for name in ("traced", "cmpl-traced", own)
        ]
        unknown = await client.get("/v1/requests/nobody/timeline")
    assert [document["request_id"] for document in found] == [own] * 3
    assert found[0]["status"] == "finished"
    assert [event["name"] for event in found[0]["events"]] == [
        "submitted",
        "first_token",
        "finished",
    ]
    assert unknown.status_code == 404
    assert unknown.json()["error"]["param"] == "request_id"


async def test_timeline_of_a_list(client_of, gateway):
    async with client_of(gateway) as client:
        await client.post(URL, json={"prompt": [[5], [6]]}, headers={"X-Request-Id": "pair"})
        both = (await client.get("/v1/requests/pair/timeline")).json()
        second = (await client.get("/v1/requests/cmpl-pair-1/timeline")).json()
    ids = [request.request_id for request in gateway.submitted]
    assert [document["request_id"] for document in both["requests"]] == ids
    assert second["request_id"] == ids[1]


async def test_tokenize_and_back(client_of, gateway, card, tokenizer):
    text = "Grüße, 世界 \U0001f600!"
    async with client_of(gateway) as client:
        plain = (await client.post("/tokenize", json={"prompt": text})).json()
        bare = {"prompt": text, "add_special_tokens": False, "return_token_strs": True}
        strings = (await client.post("/tokenize", json=bare)).json()
        back = (await client.post("/detokenize", json={"tokens": strings["tokens"]})).json()
    assert plain == {
        "count": len(plain["tokens"]),
        "max_model_len": card.max_model_tokens,
        "tokens": tokenizer.encode(text, add_special_tokens=True),
        "token_strs": None,
    }
    assert strings["tokens"] == tokenizer.encode(text, add_special_tokens=False)
    assert len(strings["token_strs"]) == strings["count"]
    assert back == {"prompt": text}


async def test_tokenize_chat_is_what_the_model_reads(client_of, gateway):
    body = {"messages": [{"role": "user", "content": "Hi"}]}
    async with client_of(gateway) as client:
        tokens = (await client.post("/tokenize", json=body)).json()["tokens"]
        await client.post("/v1/chat/completions", json=body)
        closed = {**body, "add_generation_prompt": False}
        shorter = (await client.post("/tokenize", json=closed)).json()["tokens"]
    assert tuple(tokens) == gateway.submitted[0].prompt_token_ids
    assert tokens[: len(shorter)] == shorter
    assert len(shorter) < len(tokens)


@pytest.mark.parametrize(
    ("path", "body", "param"),
    [
        ("/tokenize", {}, "prompt"),
        ("/tokenize", {"prompt": 5}, "prompt"),
        ("/tokenize", {"messages": []}, "messages"),
        ("/detokenize", {}, "tokens"),
        ("/detokenize", {"tokens": [99_999_999]}, "tokens"),
        ("/detokenize", {"tokens": [-1]}, "tokens"),
        ("/detokenize", {"tokens": "abc"}, "tokens"),
    ],
)
async def test_tokenisation_refuses(client_of, gateway, path, body, param):
    async with client_of(gateway) as client:
        response = await client.post(path, json=body)
    assert response.status_code == 400
    assert response.json()["error"]["param"] == param


@pytest.mark.parametrize(
    ("texts", "is_inline"),
    [(["short"], True), (["many words " * 2000], False), (["some words"] * 1000, False)],
)
async def test_much_text_is_tokenised_off_the_loop(
    gateway, tokenizer, chat_template, texts, is_inline
):
    gateway = FakeGateway(replace(gateway.card, max_model_tokens=100_000))
    threads = set()

    class Watched:
        def encode(self, text, *, add_special_tokens):
            threads.add(threading.get_ident())
            return tokenizer.encode(text, add_special_tokens=add_special_tokens)

    edge = Edge(
        gateway=gateway,
        tokenizer=Watched(),
        chat_template=chat_template,
        settings=ApiSettings(),
        directory=RequestDirectory(1),
        check_constraint=ConstraintCheck(tokenizer, gateway.card),
    )
    ids = await edge.encode(texts, "prompt", add_special_tokens=False)
    assert ids == [tokenizer.encode(text, add_special_tokens=False) for text in texts]
    assert (threads == {threading.get_ident()}) is is_inline


async def test_schema_is_published_without_422(client_of, gateway):
    async with client_of(gateway) as client:
        schema = (await client.get("/openapi.json")).json()
    assert {"/v1/completions", "/v1/chat/completions", "/tokenize", "/health"} <= set(
        schema["paths"]
    )
    components = schema["components"]["schemas"]
    assert "temperature" in components["CompletionBody"]["properties"]
    assert "messages" in components["ChatBody"]["properties"]

    def references(node):
        if isinstance(node, dict):
            if "$ref" in node:
                yield node["$ref"]
            for value in node.values():
                yield from references(value)
        elif isinstance(node, list):
            for value in node:
                yield from references(value)

    names = {reference.removeprefix("#/components/schemas/") for reference in references(schema)}
    assert names <= set(components)
    for operations in schema["paths"].values():
        assert all("422" not in operation["responses"] for operation in operations.values())
