"""Keys of a file at the edge: their names, rights and limits, as a client meets them."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx2
import openai
import pytest

from pdserve.api.fake import FakeGateway

pytestmark = pytest.mark.anyio

BODY = {"prompt": [5, 6, 7], "max_tokens": 7}
CHAT = {"messages": [{"role": "user", "content": "one"}], "max_tokens": 2}
URL = "/v1/completions"
NAMES = ("alice", "bob", "prom", "root")

Clients = Callable[..., httpx2.AsyncClient]


def key(name: str) -> dict[str, str]:
    return {"Authorization": f"Bearer sk-{name}-0123456789"}


@pytest.fixture
def keys_file(tmp_path: Path) -> Callable[..., Path]:
    """A file with a key for each name; ``fields`` are those of alice."""

    def write(fields: str = "") -> Path:
        file = tmp_path / "keys"
        own = {"alice": fields, "prom": "rights=watch", "root": "rights=operate"}
        file.write_text(
            "".join(f"{name} sk-{name}-0123456789 {own.get(name, '')}\n" for name in NAMES)
        )
        file.chmod(0o600)
        return file

    return write


async def test_a_tenant_is_the_name_of_its_key(
    gateway: FakeGateway, client_of: Clients, keys_file: Callable[..., Path]
) -> None:
    async with client_of(gateway, api_keys_file=keys_file()) as client:
        for name in ("alice", "bob"):
            assert (await client.post(URL, json=BODY, headers=key(name))).status_code == 200
        assert (await client.post(URL, json=BODY, headers=key("eve"))).status_code == 401
    assert [request.tenant for request in gateway.submitted] == ["alice", "bob"]


async def test_a_rate_is_a_429_as_openai_has_it(
    gateway: FakeGateway, client_of: Clients, keys_file: Callable[..., Path]
) -> None:
    async with client_of(gateway, api_keys_file=keys_file("requests_per_minute=2")) as client:
        first = await client.post(URL, json=BODY, headers=key("alice"))
        chat = await client.post("/v1/chat/completions", json=CHAT, headers=key("alice"))
        third = await client.post(URL, json=BODY, headers=key("alice"))
        looks = await client.get("/v1/models", headers=key("alice"))
        other = await client.post(URL, json=BODY, headers=key("bob"))
    assert [first.status_code, chat.status_code, third.status_code] == [200, 200, 429]
    assert first.headers["x-ratelimit-limit-requests"] == "2"
    assert first.headers["x-ratelimit-remaining-requests"] == "1"
    assert first.headers["x-ratelimit-reset-requests"] in ("30s", "29s")
    assert third.headers["x-ratelimit-remaining-requests"] == "0"
    assert 1 <= int(third.headers["retry-after"]) <= 30
    error = third.json()["error"]
    assert (error["type"], error["code"], error["param"]) == (
        "requests",
        "rate_limit_exceeded",
        None,
    )
    assert "'alice' may send 2 requests a minute" in error["message"]
    assert looks.status_code == 200  # looking costs nothing
    assert other.status_code == 200
    assert "x-ratelimit-limit-requests" not in other.headers


@pytest.mark.parametrize("stream", [False, True])
async def test_tokens_in_flight_are_reserved_and_given_back(
    card: Any, client_of: Clients, keys_file: Callable[..., Path], stream: bool
) -> None:
    gateway = FakeGateway(card, permits=0)
    body = {"prompt": [[5, 6, 7], [8]], "max_tokens": 8, "n": 2, "stream": stream}  # 36 tokens
    async with client_of(gateway, api_keys_file=keys_file("concurrent_tokens=40")) as client:
        running = asyncio.create_task(client.post(URL, json=body, headers=key("alice")))
        await gateway.until(lambda: len(gateway.submitted) == 2)
        refused = await client.post(URL, json=BODY, headers=key("alice"))
        assert refused.status_code == 429
        error = refused.json()["error"]
        assert (error["type"], error["code"]) == ("tokens", "rate_limit_exceeded")
        assert "40 tokens in flight: 36 are" in error["message"]
        assert refused.headers["x-ratelimit-remaining-tokens"] == "4"
        assert int(refused.headers["retry-after"]) >= 1
        metrics = (await client.get("/metrics", headers=key("prom"))).text
        assert 'pdserve:api_key_tokens_in_flight{api_key="alice"} 36.0' in metrics
        assert 'pdserve:api_key_refusals_total{api_key="alice",limit="tokens"} 1.0' in metrics
        small = asyncio.create_task(
            client.post(URL, json={"prompt": [5], "max_tokens": 3}, headers=key("alice"))
        )
        await gateway.until(lambda: len(gateway.submitted) == 3)
        gateway.allow(99)
        assert (await running).status_code == (await small).status_code == 200
        after = await client.post(URL, json=BODY, headers=key("alice"))
    assert after.status_code == 200
    assert after.headers["x-ratelimit-limit-tokens"] == "40"


async def test_a_request_that_can_never_fit_is_not_told_to_wait(
    gateway: FakeGateway, client_of: Clients, keys_file: Callable[..., Path]
) -> None:
    async with client_of(gateway, api_keys_file=keys_file("concurrent_tokens=9")) as client:
        response = await client.post(URL, json=BODY, headers=key("alice"))
    assert response.status_code == 400
    assert response.json()["error"]["param"] == "max_tokens"
    assert gateway.submitted == []


async def test_what_is_wrong_or_fails_gives_its_tokens_back(
    card: Any, client_of: Clients, keys_file: Callable[..., Path]
) -> None:
    gateway = FakeGateway(card, fail_before=ZeroDivisionError())
    async with client_of(gateway, api_keys_file=keys_file("concurrent_tokens=10")) as client:
        broken = [await client.post(URL, json=BODY, headers=key("alice")) for _ in range(2)]
        wrong = await client.post(URL, json={"prompt": 5}, headers=key("alice"))
        gateway.fail_before = None
        right = await client.post(URL, json=BODY, headers=key("alice"))
    assert [response.status_code for response in broken] == [500, 500]
    assert (wrong.status_code, right.status_code) == (400, 200)


async def test_a_client_that_leaves_gives_its_tokens_back(
    card: Any,
    make_app: Callable[..., Any],
    serving: Callable[..., Any],
    keys_file: Callable[..., Path],
) -> None:
    gateway = FakeGateway(card, permits=0)
    app = make_app(gateway, api_keys_file=keys_file("concurrent_tokens=10"))
    async with serving(app) as url, httpx2.AsyncClient(base_url=url) as client:
        leaving = asyncio.create_task(client.post(URL, json=BODY, headers=key("alice")))
        await gateway.until(lambda: len(gateway.submitted) == 1)
        leaving.cancel()
        async with asyncio.timeout(20):
            await gateway.until(lambda: len(gateway.aborted) == 1)
        gateway.allow(99)
        response = await client.post(URL, json=BODY, headers=key("alice"))
    assert response.status_code == 200


async def test_openais_client_understands_the_refusal(
    card: Any,
    make_app: Callable[..., Any],
    serving: Callable[..., Any],
    keys_file: Callable[..., Path],
) -> None:
    app = make_app(FakeGateway(card), api_keys_file=keys_file("requests_per_minute=1"))
    async with (
        serving(app) as url,
        openai.AsyncOpenAI(
            base_url=f"{url}/v1", api_key="sk-alice-0123456789", max_retries=0
        ) as client,
    ):
        await client.completions.create(model="tiny", prompt="a", max_tokens=1)
        with pytest.raises(openai.RateLimitError) as caught:
            await client.completions.create(model="tiny", prompt="a", max_tokens=1)
    assert caught.value.code == "rate_limit_exceeded"
    assert caught.value.response.headers["x-ratelimit-remaining-requests"] == "0"


@pytest.mark.parametrize(
    ("name", "statuses"),
    [("alice", [200, 403, 403, 403]), ("prom", [200, 200, 403, 403]), ("root", [200] * 3 + [409])],
)
async def test_rights(
    gateway: FakeGateway,
    client_of: Clients,
    keys_file: Callable[..., Path],
    name: str,
    statuses: list[int],
) -> None:
    asked = [
        ("GET", "/cluster"),
        ("GET", "/cluster/traffic"),
        ("POST", "/cluster/workers/fake-0/undrain"),
        ("DELETE", "/cluster/faults"),
    ]
    async with client_of(gateway, api_keys_file=keys_file()) as client:
        responses = [
            await client.request(
                method, path, headers=key(name), json={} if method == "POST" else None
            )
            for method, path in asked
        ]
    assert [response.status_code for response in responses] == statuses
    refused = [response.json()["error"] for response in responses if response.status_code == 403]
    assert all(error["code"] == "forbidden" for error in refused)


async def test_a_timeline_is_for_its_owner_and_for_those_who_may_watch(
    gateway: FakeGateway, client_of: Clients, keys_file: Callable[..., Path]
) -> None:
    async with client_of(gateway, api_keys_file=keys_file(), api_key="own") as client:
        headers = key("alice") | {"X-Request-Id": "mine"}
        await client.post(URL, json=BODY, headers=headers)
        own = gateway.submitted[0].request_id
        statuses = {
            name: [
                (await client.get(f"/v1/requests/{each}/timeline", headers=who)).status_code
                for each in ("mine", own)
            ]
            for name, who in [(name, key(name)) for name in NAMES]
            + [("own", {"Authorization": "Bearer own"})]
        }
        unknown = await client.get("/v1/requests/nobody/timeline", headers=key("bob"))
        foreign = await client.get("/v1/requests/mine/timeline", headers=key("bob"))
    assert statuses == {
        "alice": [200, 200],
        "bob": [404, 404],
        "prom": [200, 200],
        "root": [200, 200],
        "own": [200, 200],
    }
    assert unknown.json()["error"]["code"] == foreign.json()["error"]["code"] == "not_found"


async def test_names_of_keys_are_in_the_metrics_for_those_who_may_watch(
    gateway: FakeGateway, client_of: Clients, keys_file: Callable[..., Path]
) -> None:
    async with client_of(gateway, api_keys_file=keys_file("requests_per_minute=1")) as client:
        for _ in range(3):
            await client.post(URL, json=BODY, headers=key("alice"))
        await client.post(URL, json=BODY, headers=key("eve"))
        shown = {
            name: (await client.get("/metrics", headers=headers)).text
            for name, headers in {**{n: key(n) for n in NAMES}, "": {}, "eve": key("eve")}.items()
        }
    assert all("alice" not in shown[name] for name in ("alice", "bob", "", "eve"))
    assert shown["prom"] == shown["root"]
    assert 'pdserve:api_key_requests_total{api_key="alice"} 3.0' in shown["prom"]
    assert 'pdserve:api_key_refusals_total{api_key="alice",limit="requests"} 2.0' in shown["prom"]
    assert "pdserve:unauthorized_requests_total 1.0" in shown["prom"]
    assert "0123456789" not in shown["prom"]
