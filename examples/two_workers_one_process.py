"""A prefill and a decode worker in one process, a request, and the story of its life.

The gateway, the workers, their links and the hand-off are the server's own; only the processes are
missing. The model is random, so the answer is noise, but it is the same noise each time.

    python examples/two_workers_one_process.py
"""

from __future__ import annotations

import asyncio
import tempfile
from pathlib import Path

from pdserve.api.gateway import ModelCard
from pdserve.core.ids import Epoch, RequestId, WorkerId
from pdserve.core.request import Request, Role, RoutePreference, SamplingParams
from pdserve.serve.inproc import InprocCluster
from pdserve.serve.start import WorkerStart
from pdserve.weights.random_model import write_random_model

WORKERS = ((WorkerId("prefill-0"), Role.PREFILL), (WorkerId("decode-0"), Role.DECODE))


def cluster(model: Path, vocab_size: int) -> InprocCluster:
    """Two workers that share what this says; ids, addresses and the secret are filled in."""
    template = WorkerStart(
        worker=WorkerId(""), epoch=Epoch(0), role=Role.MIXED, secret=b"", gateway_address="",
        address="", launcher_pid=0, model_path=str(model), engine="torch", device="cpu",
        dtype="fp32", numerics="exact", threads=1, transport="inproc", block_size=16,
        num_blocks=64, max_model_tokens=1024, max_step_tokens=2048, record=None, log_format="text",
    )  # fmt: skip
    card = ModelCard(
        name="random", max_model_tokens=1024, vocab_size=vocab_size, eos_token_ids=(), created=0
    )
    return InprocCluster(card, WORKERS, template)


async def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        model = Path(folder) / "random"
        config = write_random_model(model, seed=0)
        request = Request(
            request_id=RequestId("example"),
            prompt_token_ids=tuple(range(3, 103)),
            params=SamplingParams(max_tokens=8, seed=1, temperature=0.0),
            route=RoutePreference.SPLIT,
        )
        async with cluster(model, config.vocab_size) as running:
            tokens = [delta.token_id async for delta in running.gateway.submit(request)]
            print("tokens:", tokens)
            life = running.gateway.timeline(request.request_id) or ()
        for event in sorted(life, key=lambda event: event.at_s):
            after_ms = 1000 * (event.at_s - life[0].at_s)
            print(f"{after_ms:8.2f} ms  {event.node:<10} {event.name:<16} {dict(event.detail)}")


if __name__ == "__main__":
    asyncio.run(main())
