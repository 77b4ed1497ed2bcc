"""The prior of a model on a device, before any step was seen."""

from __future__ import annotations

import pytest

from pdserve.cost.hardware import HARDWARE
from pdserve.cost.link import LinkModel
from pdserve.cost.models import MODELS
from pdserve.cost.prior import DEFAULT_SHAPE, device_of, link_prior, step_prior

LLAMA_70B = MODELS["llama-2-70b"].shape


def test_the_prior_of_one_core_is_near_what_was_measured() -> None:
    """docs/performance.md, one core, bf16: within a fifth before any step is seen."""
    model = step_prior(DEFAULT_SHAPE, device_of("cpu"))
    measured = ((model.prefill_s(512), 0.316), (model.prefill_s(2048), 1.566))
    measured += ((model.decode_s(1, 256), 0.0101), (model.decode_s(16, 16 * 1024), 0.0385))
    for predicted_s, seconds in measured:
        assert predicted_s == pytest.approx(seconds, rel=0.2)


def test_devices_are_known_by_name_and_cores_by_number() -> None:
    assert device_of("NVIDIA H100 80GB HBM3") is HARDWARE["h100"]
    assert device_of("h200") is HARDWARE["h200"]
    assert device_of("cuda:0") is HARDWARE["a100"]
    core, four = device_of("cpu"), device_of("cpu", 4)
    assert (four.flops, four.bytes_per_s) == (4 * core.flops, 4 * core.bytes_per_s)
    assert device_of("cpu", 64).bytes_per_s == 8 * core.bytes_per_s
    newer = step_prior(LLAMA_70B, HARDWARE["h200"])
    older = step_prior(LLAMA_70B, HARDWARE["h100"])
    assert newer.decode_base_s < older.decode_base_s
    assert newer.per_prompt_token_s == pytest.approx(older.per_prompt_token_s, rel=0.1)


def test_an_unknown_transport_counts_as_tcp() -> None:
    known = link_prior("shm")
    assert known == LinkModel(fixed_s=3e-3, per_byte_s=1 / 5e9, hidden_share=0.9)
    assert link_prior("pigeon") == link_prior("tcp")
    assert link_prior("rdma").per_byte_s < known.per_byte_s
