"""Bodies within the size limit that would cost much more to read than to send."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import httpx2
import pytest

from pdserve.api.body import MAX_CONTAINERS
from pdserve.api.fake import FakeGateway
from pdserve.api.gateway import ModelCard
from pdserve.api.openai.body_model import MAX_ITEMS
from pdserve.api.tokenization import MAX_TOKENS
from pdserve.text.tokenizer import Tokenizer

pytestmark = pytest.mark.anyio

Clients = Callable[..., httpx2.AsyncClient]
URLS = {"prompt": "/v1/completions", "messages": "/v1/chat/completions", "input": "/v1/responses"}
USER = {"role": "user", "content": "a"}
WRONG = [1] * 50_000
"""Whole, they would take gigabytes: each is an error of its own for every type that it is not."""


@pytest.mark.parametrize(
    "body",
    [
        {"messages": WRONG},
        {"messages": [{"role": "user", "content": WRONG}]},
        {"messages": [USER], "tools": WRONG},
        {"input": WRONG},
        {"input": "a", "include": WRONG},
        {"input": "a", "metadata": {str(n): 1 for n in range(50_000)}},
        {"prompt": "a", "stop": WRONG},
        {"prompt": "a", "stop_token_ids": ["a"] * 50_000},
        {"prompt": "a", "guided_choice": WRONG},
        {"prompt": "a", "logit_bias": {str(n): "a" for n in range(50_000)}},
    ],
    ids=lambda body: "-".join(body),
)
async def test_one_mistake_is_enough(
    gateway: FakeGateway,
    client_of: Clients,
    monkeypatch: pytest.MonkeyPatch,
    body: dict[str, Any],
) -> None:
    from pdserve.api import body as body_module

    told: list[int] = []
    tell = body_module._request_error
    monkeypatch.setattr(
        body_module,
        "_request_error",
        lambda details, document: told.append(len(details)) or tell(details, document),
    )
    async with client_of(gateway) as client:
        response = await client.post(URLS[next(iter(body))], json=body)
    assert response.status_code == 400
    assert told
    assert told[0] <= 4
    assert gateway.submitted == []


@pytest.mark.parametrize(
    "body",
    [
        {"messages": [USER] * (MAX_ITEMS + 1)},
        {"prompt": ["a"] * (MAX_ITEMS + 1)},
        {"prompt": "a", "logit_bias": {str(n): 1 for n in range(MAX_ITEMS + 1)}},
    ],
)
async def test_lists_have_an_end(
    gateway: FakeGateway, client_of: Clients, body: dict[str, Any]
) -> None:
    async with client_of(gateway) as client:
        response = await client.post(URLS[next(iter(body))], json=body)
    assert response.status_code == 400
    assert f"at most {MAX_ITEMS}" in response.json()["error"]["message"]


async def test_many_small_lists_are_refused_unread(
    gateway: FakeGateway, client_of: Clients
) -> None:
    body = b'{"prompt": "a", "unknown": [' + b"[]," * MAX_CONTAINERS + b"1]}"
    async with client_of(gateway) as client:
        response = await client.post(
            "/v1/completions", content=body, headers={"Content-Type": "application/json"}
        )
    assert response.status_code == 400
    assert "opening brackets" in response.json()["error"]["message"]


@pytest.mark.parametrize("path", [*list(URLS.values())[:2], "/tokenize"])
async def test_of_a_text_that_is_far_too_long_the_beginning_is_encoded(
    gateway: FakeGateway,
    client_of: Clients,
    tokenizer: Tokenizer,
    monkeypatch: pytest.MonkeyPatch,
    path: str,
) -> None:
    encoded: list[int] = []
    encode = Tokenizer.encode

    def counted(self: Tokenizer, text: str, **how: Any) -> list[int]:
        encoded.append(len(text))
        return encode(self, text, **how)

    monkeypatch.setattr(Tokenizer, "encode", counted)
    text = "word " * 200_000
    body = {"messages": [{**USER, "content": text}]} if "chat" in path else {"prompt": text}
    async with client_of(gateway) as client:
        response = await client.post(path, json=body)
    assert response.status_code == 400
    assert response.json()["error"]["code"] == "context_length_exceeded"
    assert "maximum context length is 256 tokens" in response.json()["error"]["message"]
    assert sum(encoded) < 10_000


async def test_a_token_that_the_model_does_not_have_goes_to_no_worker(
    card: ModelCard, client_of: Clients, tokenizer: Tokenizer
) -> None:
    """Tokenizers of fine-tuned models may have one more than their embeddings have rows."""
    last = tokenizer.token_text(tokenizer.vocab_size - 1)
    gateway = FakeGateway(replace(card, vocab_size=tokenizer.vocab_size - 1))
    async with client_of(gateway) as client:
        for body in ({"prompt": last}, {"messages": [{**USER, "content": last}]}):
            response = await client.post(URLS[next(iter(body))], json=body)
            assert response.status_code == 400
            assert "outside the vocabulary" in response.json()["error"]["message"]
    assert gateway.submitted == []


async def test_many_tokens_become_text_up_to_a_limit(
    gateway: FakeGateway, client_of: Clients, tokenizer: Tokenizer
) -> None:
    ids = tokenizer.encode("some words") * 2000
    async with client_of(gateway) as client:
        good = await client.post("/detokenize", json={"tokens": ids})
        bad = await client.post("/detokenize", json={"tokens": [5] * (MAX_TOKENS + 1)})
    assert good.json()["prompt"] == tokenizer.decode(ids, skip_special_tokens=False)
    assert bad.status_code == 400
    assert bad.json()["error"]["param"] == "tokens"
