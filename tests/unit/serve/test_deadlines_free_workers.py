"""When a deadline comes, or a client goes, nothing of the request is left on any worker."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from pathlib import Path

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


@pytest.mark.parametrize("stream", [False, True])
def test_a_deadline_frees_both_workers(
    make_cluster: Callable[..., InprocCluster], tiny_model_path: Path, stream: bool
) -> None:
    body = {
        "prompt": [3 + (i * i) % 250 for i in range(60)],
        "max_tokens": 960,
        "n": 4,
        "ignore_eos": True,
        "stream": stream,
    }

    async def work() -> None:
        async with make_cluster(WORKERS) as running:
            app = create_app(
                running.gateway,
                Tokenizer.from_folder(tiny_model_path),
                ChatTemplate.from_folder(tiny_model_path),
                ApiSettings(request_timeout_s=0.3),
            )
            transport = httpx2.ASGITransport(app)
            async with httpx2.AsyncClient(transport=transport, base_url="http://edge") as client:
                response = await client.post("/v1/completions", json=body)
            if stream and response.status_code == 200:
                last = response.text.removesuffix("\n\ndata: [DONE]\n\n").rpartition("data: ")[2]
                error = json.loads(last)["error"]
            else:
                assert response.status_code == 504
                error = response.json()["error"]
            assert error["code"] == "deadline_exceeded"
            assert running.gateway.cluster()["open_requests"] == 0
            machines = [running.worker(worker).machine for worker, _ in WORKERS]
            while not all(machine is not None and machine.is_empty for machine in machines):
                await asyncio.to_thread(lambda: None)  # the abort is on its way

    asyncio.run(asyncio.wait_for(work(), 60))
