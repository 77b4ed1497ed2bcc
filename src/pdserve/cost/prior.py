"""What steps and transfers should take, before any was seen.

Arithmetic and bytes of a model over a device's data sheet, with stated efficiencies: a prompt token
costs its FLOPs, a decode step reads all weights once and the KV of every sequence (the roofline of
both phases; Splitwise, sec. III). It is meant to be right within a factor of a few, and above all
in its proportions: the fits correct its level after a few steps.
"""

from __future__ import annotations

from dataclasses import dataclass

from pdserve.cost.link import LinkModel
from pdserve.cost.step import StepModel


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelShape:
    """A Llama-family model, in elements; ``weight_bytes`` and ``kv_bytes`` of one of them."""

    num_layers: int
    hidden_size: int
    intermediate_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    vocab_size: int
    weight_bytes: float = 2.0
    kv_bytes: float = 2.0

    @property
    def layer_weights(self) -> int:
        """Weights of all layers: four projections of attention, three of the feed-forward part."""
        heads = 2 * self.num_heads + 2 * self.num_kv_heads
        attention = self.hidden_size * self.head_dim * heads
        return self.num_layers * (attention + 3 * self.hidden_size * self.intermediate_size)

    @property
    def head_weights(self) -> int:
        """Weights of the projection to logits, which only sampled tokens pass."""
        return self.hidden_size * self.vocab_size

    @property
    def token_kv_bytes(self) -> float:
        """KV of one token, in all layers."""
        return 2.0 * self.num_layers * self.num_kv_heads * self.head_dim * self.kv_bytes

    @property
    def pair_flops(self) -> float:
        """FLOPs of attention for a query and a key: a product and a sum each for score and value,
        in every head of every layer."""
        return 4.0 * self.num_layers * self.num_heads * self.head_dim


@dataclass(frozen=True, slots=True, kw_only=True)
class Device:
    """Peak rates, and the shares of them that a step reaches. ``step_s``: what a step costs beside
    its work (launches, sampling, the host)."""

    flops: float
    bytes_per_s: float
    step_s: float
    compute_share: float = 0.5
    memory_share: float = 0.6


CPU_CORE = Device(flops=3.84e11, bytes_per_s=2.0e10, step_s=1e-3)
"""One core: 2 fused products of 32 pairs of bf16 (AVX-512) at 3 GHz are 384 GFLOP/s; of the rate of
memory a core alone draws some 20 GB/s. benchmarks/engine.py measures both (docs/performance.md)."""

DEVICES = {
    "cpu": CPU_CORE,
    "a100": Device(flops=3.12e14, bytes_per_s=2.039e12, step_s=2e-3),
    "h100": Device(flops=9.89e14, bytes_per_s=3.35e12, step_s=2e-3),
    "h200": Device(flops=9.89e14, bytes_per_s=4.8e12, step_s=2e-3),
}
"""Dense bf16 tensor FLOP/s and memory bytes/s of the SXM boards with 80 GB (A100, H100) and 141 GB
(H200), from NVIDIA's data sheets. The shares: Splitwise's A100 reads BLOOM-176B's 352 GB over 8
boards in 48.8 ms, 0.44 of the sheet with its tensor parallelism; one board alone does better."""

DEFAULT_SHAPE = ModelShape(
    num_layers=30,
    hidden_size=576,
    intermediate_size=1536,
    num_heads=9,
    num_kv_heads=3,
    head_dim=64,
    vocab_size=49152,
)
"""Of a server that was not told its model: SmolLM2-135M, which ``pdserve serve`` has by default."""

LINKS = {
    "shm": LinkModel(fixed_s=3e-3, per_byte_s=1 / 5e9, hidden_share=0.9),
    "inproc": LinkModel(fixed_s=3e-3, per_byte_s=1 / 5e9, hidden_share=0.9),
    "tcp": LinkModel(fixed_s=5e-3, per_byte_s=1 / 1e9, hidden_share=0.9),
    "rdma": LinkModel(fixed_s=5e-3, per_byte_s=1 / 20e9, hidden_share=0.95),
}
"""By transport. ``fixed_s`` of rdma: Splitwise measured 5 ms (400 Gbit/s) to 8 ms that its
layer-wise transfer leaves visible (sec. V-A); ``per_byte_s`` 0.4 of 400 Gbit/s, between what
Mooncake (FAST 2025, fig. 12) and vLLM's users measured. shm copies and checks some 5 GB/s beside a
core that computes; tcp on one host a fifth of that."""

DEFAULT_LINK = LINKS["tcp"]


def device_of(kind: str, num_cores: int = 1) -> Device:
    """The device of that kind (its name holds one of ours); of a CPU, ``num_cores`` together, whose
    memory rate grows to that of 8. An unknown one counts as an A100 if it is a GPU by name."""
    name = kind.lower()
    for known, device in DEVICES.items():
        if known in name and known != "cpu":
            return device
    if "cuda" in name or "nvidia" in name:
        return DEVICES["a100"]
    return Device(
        flops=CPU_CORE.flops * num_cores,
        bytes_per_s=CPU_CORE.bytes_per_s * min(num_cores, 8),
        step_s=CPU_CORE.step_s,
    )


def step_prior(shape: ModelShape, device: Device) -> StepModel:
    """The step model of a model on a device.

    ``per_pair_s``: a prompt of n tokens has n²/2 pairs of a query and a key before it, and
    `StepShape.prompt_pairs` counts n².
    """
    flops = device.flops * device.compute_share
    bytes_per_s = device.bytes_per_s * device.memory_share
    weights_s = (shape.layer_weights + shape.head_weights) * shape.weight_bytes / bytes_per_s
    return StepModel(
        prompt_base_s=device.step_s + weights_s,
        per_prompt_token_s=2.0 * shape.layer_weights / flops,
        per_pair_s=0.5 * shape.pair_flops / flops,
        decode_base_s=device.step_s + weights_s,
        per_sequence_s=2.0 * (shape.layer_weights + shape.head_weights) / flops,
        per_context_token_s=shape.token_kv_bytes / bytes_per_s,
    )


def link_prior(transport: str) -> LinkModel:
    """The link model of a transport."""
    return LINKS.get(transport, DEFAULT_LINK)
