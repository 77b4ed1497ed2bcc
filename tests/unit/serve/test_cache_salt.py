"""One key's prompts are never found by another's, in any cache that could tell: without a clock.

A whole cluster behind the real HTTP application. Who finds what is read off the life events: what
the router believed (`routed`), what the worker had (`prefill_started`), which blocks the decode
worker had already (`handoff_granted`).
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx2
import pytest

from pdserve.api.app import create_app
from pdserve.api.settings import ApiSettings
from pdserve.core.ids import WorkerId
from pdserve.core.request import Role
from pdserve.serve.inproc import InprocCluster
from pdserve.text.chat import ChatTemplate
from pdserve.text.tokenizer import Tokenizer

WORKERS = ((WorkerId("prefill-0"), Role.PREFILL), (WorkerId("decode-0"), Role.DECODE))
PROMPT = [3 + (i * i) % 250 for i in range(100)]
OPERATOR = {"Authorization": "Bearer own"}


NOTHING, EVERYTHING = (False, False, False), (True, True, True)
TOLD = {"routed", "prefill_started", "handoff_granted", "finished"}


async def ask(
    client: httpx2.AsyncClient, name: str, salt: str = ""
) -> tuple[tuple[bool, bool, bool], str]:
    """Whether the router, the prefill worker and the decode worker had any of the prompt (the usage
    must say the same), and the answer."""
    body = {"prompt": PROMPT, "max_tokens": 4, "seed": 1, "cache_salt": salt, "ignore_eos": True}
    headers = {"Authorization": f"Bearer sk-{name}-0123456789"}
    response = await client.post("/v1/completions", json=body, headers=headers)
    assert response.status_code == 200, response.text
    document = response.json()
    details: dict[str, Any] = {}
    while not set(details) >= TOLD:  # a worker's events travel apart from its tokens
        path = f"/v1/requests/{document['id']}/timeline"
        events = (await client.get(path, headers=OPERATOR)).json()["events"]
        details = {event["name"]: event.get("detail", {}) for event in events}
    by_worker = details["prefill_started"]["cached_tokens"]
    assert document["usage"]["prompt_tokens_details"] == {"cached_tokens": by_worker}
    found = (
        details["routed"]["cached_tokens"] > 0,
        by_worker > 0,
        details["handoff_granted"]["reused_blocks"] > 0,
    )
    return found, document["choices"][0]["text"]


async def until_found(client: httpx2.AsyncClient, name: str) -> str:
    """Ask until the prompt is known everywhere: the router hears of it with the next report."""
    found, text = NOTHING, ""
    while found != EVERYTHING:
        found, text = await ask(client, name)
    return text


@pytest.mark.parametrize("per_key", [True, False])
def test_prefixes_are_found_by_their_own_key_alone(
    make_cluster: Callable[..., InprocCluster], tiny_model_path: Path, tmp_path: Path, per_key: bool
) -> None:
    file = tmp_path / "keys"
    file.write_text("alice sk-alice-0123456789\nbob sk-bob-0123456789\n")
    file.chmod(0o600)
    settings = ApiSettings(api_key="own", api_keys_file=file, salt_per_key=per_key)

    async def work() -> None:
        async with make_cluster(WORKERS) as running:
            app = create_app(
                running.gateway,
                Tokenizer.from_folder(tiny_model_path),
                ChatTemplate.from_folder(tiny_model_path),
                settings,
            )
            transport = httpx2.ASGITransport(app)
            async with httpx2.AsyncClient(transport=transport, base_url="http://edge") as client:
                first, text = await ask(client, "alice")
                assert first == NOTHING
                texts = {text, await until_found(client, "alice")}
                other, text = await ask(client, "bob")
                assert other == (NOTHING if per_key else EVERYTHING)
                texts |= {text, await until_found(client, "bob")}
                salted, text = await ask(client, "alice", "pepper")
                assert salted == NOTHING
                texts.add(text)
            assert len(texts) == 1  # a salt changes who finds what, never an answer

    asyncio.run(asyncio.wait_for(work(), 60))
