"""What browsers are told, what a client cannot say to workers, and whose prefixes are whose."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx2
import pytest

from pdserve.api.fake import FakeGateway

pytestmark = pytest.mark.anyio

URL = "/v1/completions"
BODY = {"prompt": [5, 6, 7], "max_tokens": 2}
PAGE = "https://chat.example.org"
Clients = Callable[..., httpx2.AsyncClient]


@pytest.mark.parametrize("path", ["/health", "/v1/models", "/nothing", "/cluster"])
async def test_browsers_are_told_to_neither_guess_nor_keep(
    gateway: FakeGateway, client_of: Clients, path: str
) -> None:
    async with client_of(gateway, api_key="s3cret") as client:
        for headers in ({}, {"Authorization": "Bearer s3cret"}):
            fields = (await client.get(path, headers=headers)).headers
            assert fields["x-content-type-options"] == "nosniff"
            assert fields["cache-control"] == "no-store"
            assert fields["x-frame-options"] == "DENY"
            assert fields["content-security-policy"].startswith("default-src 'none'")
            assert "server" not in fields


async def test_a_routes_own_fields_stay(gateway: FakeGateway, client_of: Clients) -> None:
    async with client_of(gateway) as client:
        stream = await client.post(URL, json={**BODY, "stream": True})
        docs = await client.get("/docs")
    assert stream.headers.get_list("cache-control") == ["no-cache"]
    assert "content-security-policy" not in docs.headers  # its scripts are its own


async def test_without_the_flag_no_page_may_call(gateway: FakeGateway, client_of: Clients) -> None:
    asking = {
        "Origin": PAGE,
        "Access-Control-Request-Method": "POST",
        "Access-Control-Request-Headers": "content-type",
    }
    async with client_of(gateway) as client:
        preflight = await client.options(URL, headers=asking)
        response = await client.post(URL, json=BODY, headers={"Origin": PAGE})
        # What a page may send without a preflight is not JSON, and moves nothing.
        plain = {"Origin": PAGE, "Content-Type": "text/plain"}
        posted = [
            await client.post(path, content=b"{}", headers=plain)
            for path in (URL, *(f"/cluster/workers/fake-0/{x}" for x in ("undrain", "drain")))
        ]
    assert preflight.status_code == 405
    assert all(
        not name.startswith("access-control")
        for answer in (preflight, response, *posted)
        for name in answer.headers
    )
    assert [answer.status_code for answer in posted] == [415] * 3
    assert gateway.commands == []


async def test_the_page_that_is_named_may_call(gateway: FakeGateway, client_of: Clients) -> None:
    asking = {
        "Origin": PAGE,
        "Access-Control-Request-Method": "POST",
        "Access-Control-Request-Headers": "authorization, content-type",
    }
    async with client_of(gateway, cors_origins=(PAGE,), api_key="s3cret") as client:
        preflight = await client.options(URL, headers=asking)  # carries no key
        refused = await client.options(URL, headers=asking | {"Origin": "https://evil.example"})
        right = {"Origin": PAGE, "Authorization": "Bearer s3cret"}
        answer = await client.post(URL, json=BODY, headers=right)
        without = await client.post(URL, json=BODY, headers={"Origin": PAGE})
    assert preflight.status_code == 200
    assert preflight.headers["access-control-allow-origin"] == PAGE
    assert "authorization" in preflight.headers["access-control-allow-headers"]
    assert "access-control-allow-credentials" not in preflight.headers
    assert refused.status_code == 400
    assert answer.status_code == 200
    assert "x-ratelimit-limit-requests" in answer.headers["access-control-expose-headers"]
    assert without.status_code == 401  # and the page can read why
    assert without.headers["access-control-allow-origin"] == PAGE


@pytest.mark.parametrize("path", [URL, "/v1/chat/completions"])
async def test_what_only_workers_say_to_each_other_is_dropped(
    gateway: FakeGateway, client_of: Clients, path: str
) -> None:
    """The request that the gateway gets is the same, field by field, as without all of it."""
    inside: dict[str, Any] = {
        "kv_transfer_params": {"do_remote_prefill": True, "remote_host": "10.0.0.1"},
        "priority": -100,
        "session_id": "x",
        "tenant": "root",
        "service": {"name": "gold", "weight": 1e9},
        "trace_context": "x",
        "num_choices": 7,
        "eos_token_ids": [1],
        "oracle_output_tokens": 1,
        "route": "local",
        "epoch": 9,
        "data_parallel_rank": 3,
        "mm_processor_kwargs": {"a": 1},
    }
    body: dict[str, Any] = {"max_tokens": 2, "seed": 1}
    body |= {"prompt": [5, 6]} if path == URL else {"messages": [{"role": "user", "content": "hi"}]}
    async with client_of(gateway) as client:
        for document in (body, body | inside):
            assert (await client.post(path, json=document)).status_code == 200
    plain, dressed = gateway.submitted
    assert replace(dressed, request_id=plain.request_id) == plain


@pytest.fixture
def keys_file(tmp_path: Path) -> Path:
    file = tmp_path / "keys"
    file.write_text("a sk-a-0123456789abc\nab sk-ab-0123456789ab\n")
    file.chmod(0o600)
    return file


async def test_no_salt_of_one_key_can_be_that_of_another(
    gateway: FakeGateway, client_of: Clients, keys_file: Path
) -> None:
    keys = ("sk-a-0123456789abc", "sk-ab-0123456789ab")
    wanted = ("", "x", "b:", ":b", "2:ab:", "1:a:", "b:x", "2:ab:x")
    async with client_of(gateway, api_keys_file=keys_file) as client:
        for name in keys:
            for salt in wanted:
                body = {**BODY, "cache_salt": salt}
                response = await client.post(
                    URL, json=body, headers={"Authorization": f"Bearer {name}"}
                )
                assert response.status_code == 200
    salts = [request.cache_salt for request in gateway.submitted]
    assert len(set(salts)) == len(salts) == 2 * len(wanted)


async def test_keys_share_prefixes_if_so_wished(
    gateway: FakeGateway, client_of: Clients, keys_file: Path
) -> None:
    async with client_of(gateway, api_keys_file=keys_file, salt_per_key=False) as client:
        for name in ("sk-a-0123456789abc", "sk-ab-0123456789ab"):
            for salt in ("", "pepper"):
                await client.post(
                    URL,
                    json={**BODY, "cache_salt": salt},
                    headers={"Authorization": f"Bearer {name}"},
                )
    assert [request.cache_salt for request in gateway.submitted] == ["", "pepper"] * 2


async def test_without_keys_a_salt_is_what_the_client_says(
    gateway: FakeGateway, client_of: Clients
) -> None:
    async with client_of(gateway) as client:
        for salt in ("", "1:a:"):
            await client.post(URL, json={**BODY, "cache_salt": salt})
    assert [request.cache_salt for request in gateway.submitted] == ["", "1:a:"]
