"""Machines without a model, and requests that have ended, for tests of what a simulation shows."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from pdserve.core.ids import RequestId, WorkerId
from pdserve.cost.machine import LinkSpec, MachineModel, Power, StepRange
from pdserve.cost.step import StepModel
from pdserve.sim.observe import Ended
from pdserve.sim.settings import SimSettings
from pdserve.sim.spec import parse_cluster

STEPS = StepModel(
    prompt_base_s=0.01,
    per_prompt_token_s=1e-4,
    per_pair_s=0.0,
    decode_base_s=0.02,
    per_sequence_s=1e-3,
    per_context_token_s=0.0,
)


@pytest.fixture(scope="session")
def a_machine() -> Callable[..., MachineModel]:
    """Of round numbers: 100 W idle, 400 W in prompts, 200 W in decodes, 36 an hour."""

    def make(**changes: object) -> MachineModel:
        values: dict[str, object] = {
            "name": "round-1",
            "model": "none",
            "steps": STEPS,
            "linear": STEPS,
            "num_layers": 4,
            "token_kv_bytes": 1024,
            "block_size": 16,
            "num_blocks": 1000,
            "max_model_tokens": 8192,
            "link": LinkSpec(bytes_per_s=1e9),
            "power": Power(idle_w=100.0, prompt_w=400.0, decode_w=200.0),
            "price_per_hour": 36.0,
            "measured": StepRange(prompt_tokens=2048, num_decoding=8, context_tokens=1000),
            "error": 0.05,
        }
        return MachineModel(**(values | changes))

    return make


@pytest.fixture(scope="session")
def some_settings(a_machine: Callable[..., MachineModel]) -> Callable[..., SimSettings]:
    """Of a cluster of such machines."""

    def make(cluster: str = "1xround:prefill,1xround:decode", **changes: object) -> SimSettings:
        spec = parse_cluster(cluster)
        machines = tuple(a_machine() for _ in spec.groups)
        return SimSettings(cluster=spec, machines=machines, **changes)

    return make


@pytest.fixture(scope="session")
def an_end() -> Callable[..., Ended]:
    """A completed request: sent at 1 s, tokens at 1.5, 1.7 and on until 2.5 s, 6 in all."""

    def make(**changes: object) -> Ended:
        values: dict[str, object] = {
            "index": 0,
            "request_id": RequestId("r0"),
            "arrived_s": 1.0,
            "first_s": 1.5,
            "second_s": 1.7,
            "last_s": 2.5,
            "prompt_tokens": 100,
            "cached_tokens": 20,
            "output_tokens": 6,
            "prefill": WorkerId("prefill-0"),
            "decode": WorkerId("decode-0"),
        }
        return Ended(**(values | changes))

    return make
