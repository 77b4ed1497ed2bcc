"""What a running server tells a planner."""

from __future__ import annotations

import asyncio

from pdserve.core.ids import RequestId, WorkerId
from pdserve.core.request import Request, Role, SamplingParams

PROMPT = tuple(3 + i for i in range(40))
SPLIT = ((WorkerId("prefill-0"), Role.PREFILL), (WorkerId("decode-0"), Role.DECODE))


async def served(cluster):
    """The document after three answers of five tokens."""
    async with cluster as running:
        for number in range(3):
            params = SamplingParams(max_tokens=5, seed=1, temperature=1.0, ignore_eos=True)
            asked = Request(
                request_id=RequestId(f"r{number}"), prompt_token_ids=PROMPT, params=params
            )
            async for _ in running.gateway.submit(asked):
                pass
        return running.gateway.traffic()


def test_a_cluster_tells_its_traffic_its_workers_and_what_it_has_learned(make_cluster):
    document = asyncio.run(served(make_cluster(SPLIT, engine="fake")))
    assert (document["model"], document["policy"]) == ("tiny", "shortest_queue")
    assert [(r["prompt_tokens"], r["output_tokens"]) for r in document["requests"]] == [(40, 5)] * 3
    assert document["requests"][2]["cached_tokens"] == 32
    decode, prefill = document["workers"]
    assert (decode["role"], prefill["role"]) == ("decode", "prefill")
    assert prefill["num_blocks"] > 0
    assert prefill["token_kv_bytes"] * prefill["block_size"] > 0
    assert set(prefill["steps"]) >= {"prompt_base_s", "per_prompt_token_s", "decode_base_s"}
    assert document["link"]["per_byte_s"] >= 0
