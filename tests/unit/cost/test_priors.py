"""The prior of a model on a device: arithmetic that can be done by hand."""

from __future__ import annotations

import pytest

from pdserve.cost.link import LinkModel
from pdserve.cost.prior import (
    CPU_CORE,
    DEFAULT_SHAPE,
    DEVICES,
    LINKS,
    Device,
    ModelShape,
    device_of,
    link_prior,
    step_prior,
)

LLAMA_70B = ModelShape(
    num_layers=80,
    hidden_size=8192,
    intermediate_size=28672,
    num_heads=64,
    num_kv_heads=8,
    head_dim=128,
    vocab_size=32000,
)


def test_a_shape_has_the_weights_and_the_kv_that_everybody_knows() -> None:
    """Llama 2 70B: 69 billion weights, its embedding apart, and 320 KiB of KV a token."""
    weights = LLAMA_70B.layer_weights + LLAMA_70B.head_weights
    assert weights == pytest.approx(68.7e9, rel=0.01)
    assert LLAMA_70B.token_kv_bytes == 320 * 1024


def test_the_prior_is_work_over_rates() -> None:
    device = Device(flops=1e12, bytes_per_s=1e9, step_s=0.5, compute_share=1.0, memory_share=1.0)
    shape = ModelShape(
        num_layers=1,
        hidden_size=10,
        intermediate_size=20,
        num_heads=2,
        num_kv_heads=1,
        head_dim=5,
        vocab_size=100,
    )
    model = step_prior(shape, device)
    layer_weights = 10 * 5 * (2 * 2 + 2 * 1) + 3 * 10 * 20
    assert model.decode_base_s == pytest.approx(0.5 + (layer_weights + 1000) * 2 / 1e9)
    assert model.per_prompt_token_s == pytest.approx(2 * layer_weights / 1e12)
    assert model.per_sequence_s == pytest.approx(2 * (layer_weights + 1000) / 1e12)
    assert model.per_context_token_s == pytest.approx(2 * 5 * 2 / 1e9)
    assert model.per_pair_s == pytest.approx(4 * 2 * 5 / 2 / 1e12)


def test_the_prior_of_one_core_is_near_what_was_measured() -> None:
    """docs/performance.md, one core, bf16: within a factor of three before any step is seen."""
    model = step_prior(DEFAULT_SHAPE, CPU_CORE)
    measured = ((model.prefill_s(512), 0.316), (model.prefill_s(2048), 1.586))
    measured += ((model.decode_s(1, 256), 0.011), (model.decode_s(16, 16 * 1024), 0.0417))
    for predicted_s, seconds in measured:
        assert 1 / 3 < predicted_s / seconds < 3


def test_devices_are_known_by_name_and_cores_by_number() -> None:
    assert device_of("NVIDIA H100 80GB HBM3") is DEVICES["h100"]
    assert device_of("h200") is DEVICES["h200"]
    assert device_of("cuda:0") is DEVICES["a100"]
    four = device_of("cpu", 4)
    assert (four.flops, four.bytes_per_s) == (4 * CPU_CORE.flops, 4 * CPU_CORE.bytes_per_s)
    assert device_of("cpu", 64).bytes_per_s == 8 * CPU_CORE.bytes_per_s
    newer = step_prior(LLAMA_70B, DEVICES["h200"])
    older = step_prior(LLAMA_70B, DEVICES["h100"])
    assert newer.decode_base_s < older.decode_base_s
    assert newer.per_prompt_token_s == older.per_prompt_token_s


def test_an_unknown_transport_counts_as_a_slow_one() -> None:
    known: LinkModel = link_prior("shm")
    assert known is LINKS["shm"]
    assert link_prior("pigeon") is LINKS["tcp"]
