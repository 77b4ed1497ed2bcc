"""Classes of service and tenants: chosen by header or key, and what a refusal looks like."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import httpx2
import pytest

from pdserve.api.fake import FakeGateway
from pdserve.core.errors import OverloadedError
from pdserve.core.request import DEFAULT_SERVICE, ServiceClass

pytestmark = pytest.mark.anyio

QUICK = ServiceClass(name="quick", ttft_s=0.5, tpot_s=0.05, weight=4.0)
CLASSES = {"quick": QUICK, "default": DEFAULT_SERVICE}
BODY = {"prompt": "one two", "max_tokens": 2}
CHAT = {"messages": [{"role": "user", "content": "one"}], "max_tokens": 2}

Clients = Callable[..., httpx2.AsyncClient]


def key(text: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {text}"}


@pytest.mark.parametrize(
    ("path", "body"), [("/v1/completions", BODY), ("/v1/chat/completions", CHAT)]
)
async def test_the_header_chooses_the_class(
    gateway: FakeGateway, client_of: Clients, path: str, body: dict[str, Any]
) -> None:
    async with client_of(gateway, classes=CLASSES) as client:
        for header in ({"X-Pdserve-Class": " quick "}, {}, {"X-Pdserve-Class": "default"}):
            response = await client.post(path, json=body, headers=header)
            assert response.status_code == 200, response.text
    assert [request.service for request in gateway.submitted] == [
        QUICK,
        DEFAULT_SERVICE,
        DEFAULT_SERVICE,
    ]
    assert {request.tenant for request in gateway.submitted} == {""}


@pytest.mark.parametrize(
    ("path", "body"), [("/v1/completions", BODY), ("/v1/chat/completions", CHAT)]
)
async def test_an_unknown_class_is_a_400_that_lists_the_classes(
    gateway: FakeGateway, client_of: Clients, path: str, body: dict[str, Any]
) -> None:
    async with client_of(gateway, classes=CLASSES) as client:
        response = await client.post(path, json=body, headers={"X-Pdserve-Class": "fast"})
    assert response.status_code == 400
    error = response.json()["error"]
    assert error["param"] == "X-Pdserve-Class"
    assert error["message"] == (
        "the header X-Pdserve-Class is 'fast'; the classes here are: quick, default"
    )
    assert gateway.submitted == []


@pytest.mark.parametrize(("wait_s", "header"), [(3.2, "4"), (0.1, "1")])
async def test_a_refusal_for_lack_of_room_says_when_to_come_again(
    client_of: Clients, card: Any, wait_s: float, header: str
) -> None:
    refusal = OverloadedError("class quick promises 500 ms to the first token", wait_s)
    gateway = FakeGateway(card, fail_before=refusal)
    async with client_of(gateway, classes=CLASSES) as client:
        response = await client.post(
            "/v1/completions", json=BODY, headers={"X-Pdserve-Class": "quick"}
        )
    assert response.status_code == 429
    assert response.headers["Retry-After"] == header == str(max(1, math.ceil(wait_s)))
    assert "class quick promises" in response.json()["error"]["message"]


async def test_a_tenant_is_a_short_digest_of_the_key(
    gateway: FakeGateway, client_of: Clients
) -> None:
    bound = {"first-secret": "quick", "second-secret": "quick"}
    settings = {"api_key": "own-secret", "classes": CLASSES, "class_of_key": bound}
    async with client_of(gateway, **settings) as client:
        for text in ("own-secret", "first-secret", "second-secret", "first-secret"):
            body = {**BODY, "user": "whoever"}
            response = await client.post("/v1/completions", json=body, headers=key(text))
            assert response.status_code == 200
        for headers in ({}, key("third-secret"), {"Authorization": "Basic own-secret"}):
            response = await client.post("/v1/completions", json=BODY, headers=headers)
            assert response.status_code == 401
    tenants = [request.tenant for request in gateway.submitted]
    assert len(set(tenants[:3])) == 3
    assert tenants[3] == tenants[1]
    assert all(len(tenant) == 12 and "secret" not in tenant for tenant in tenants)


async def test_a_key_that_is_bound_to_a_class_gets_that_class_and_no_other(
    gateway: FakeGateway, client_of: Clients
) -> None:
    settings = {"classes": CLASSES, "class_of_key": {"bound": "quick"}}
    async with client_of(gateway, **settings) as client:
        for headers in ({}, {"X-Pdserve-Class": "quick"}):
            response = await client.post(
                "/v1/completions", json=BODY, headers=headers | key("bound")
            )
            assert response.status_code == 200
        response = await client.post(
            "/v1/completions", json=BODY, headers={"X-Pdserve-Class": "default"} | key("bound")
        )
        assert response.status_code == 400
        assert "bound to class 'quick'" in response.json()["error"]["message"]
        response = await client.post("/v1/completions", json=BODY)
        assert response.status_code == 401
    assert [request.service for request in gateway.submitted] == [QUICK, QUICK]


async def test_a_key_of_a_class_moves_no_workers(gateway: FakeGateway, client_of: Clients) -> None:
    settings = {"api_key": "own", "classes": CLASSES, "class_of_key": {"bound": "quick"}}
    async with client_of(gateway, **settings) as client:
        path = "/cluster/workers/fake-0/role"
        refused = await client.post(path, json={"role": "mixed"}, headers=key("bound"))
        assert refused.status_code == 403
        assert "--api-key" in refused.json()["error"]["message"]
        assert (await client.get("/cluster", headers=key("bound"))).status_code == 200
        allowed = await client.post(path, json={"role": "mixed"}, headers=key("own"))
        assert allowed.status_code == 200
