"""Step times from data sheets: of each part of a step, what takes longer, arithmetic or memory.

A step passes all its tokens through the weights, which are read once: ``max(FLOPs / rate, bytes /
rate)``. Attention of prompts is arithmetic, that of decoding sequences reads their KV. With tensor
parallelism the devices share all that evenly, and twice in each layer they add up their parts: a
ring all-reduce of the step's activations. Beside it a host prepares and launches the layers: a step
takes at least as long as that, and a constant more.

The rates are the data sheet's times the shares in `cost.hardware`. What depends on the software is
a `Runtime`, of which three have been measured by others:

==========  ====================================================================================
``eager``   Python launches every operation: vLLM as Splitwise measured it (2023)
``native``  C++ launches every operation: SwiftTransformer, as DistServe measured it
``graphs``  a decode step is launched as one graph, a prompt's by operations: today's engines
==========  ====================================================================================

Attention over prompts reaches `ATTENTION_SHARE` of the rate of large products. Left out: the first
read of a cached prefix's KV, uneven batches, quantisation of tiles, experts.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from pdserve.core.step import StepShape
from pdserve.cost.hardware import Hardware
from pdserve.cost.regression import Features, Regression
from pdserve.cost.shape import ModelShape
from pdserve.cost.step import StepModel

ACTIVATION_BYTES = 2
ATTENTION_SHARE = 0.6
"""Of the compute share: FlashAttention-2 reaches 0.5 to 0.6 of the peak where products reach 0.8
(Dao 2023, sec. 4.1)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Runtime:
    """What the software around the products costs, in seconds on the host of an A100's machine.

    ``prompt_launch_s``, ``decode_launch_s``: to launch one layer of a step with prompts, or of one
    that only decodes; the device computes meanwhile. ``step_s``: of a step beside its layers
    (schedule, inputs, sampling). ``reduce_s``: of an all-reduce however small.
    """

    prompt_launch_s: float
    decode_launch_s: float
    step_s: float
    reduce_s: float
    source: str


RUNTIMES: Mapping[str, Runtime] = {
    "eager": Runtime(
        prompt_launch_s=0.75e-3,
        decode_launch_s=0.45e-3,
        step_s=5e-3,
        reduce_s=20e-6,
        source="Splitwise's perf_model.csv: Llama-2-70B on 4 and on 8 A100 alike decodes in 43 ms, "
        "and computes prompts of 128 in 65 ms: that is the host",
    ),
    "native": Runtime(
        prompt_launch_s=0.1e-3,
        decode_launch_s=0.1e-3,
        step_s=4e-3,
        reduce_s=20e-6,
        source="DistServe's fits on A100",
    ),
    "graphs": Runtime(
        prompt_launch_s=0.2e-3,
        decode_launch_s=0.02e-3,
        step_s=2e-3,
        reduce_s=12e-6,
        source="assumed: vLLM's decode of an 8B model takes 1.5 to 2 ms beside the memory's time",
    ),
}


class RooflineTimer:
    """A `StepTimer` of a model on ``num_devices`` devices. See the head of this module."""

    __slots__ = (
        "_decode_launch_s",
        "_head_flop_s",
        "_head_token_s",
        "_kv_token_s",
        "_pair_s",
        "_prompt_launch_s",
        "_reduce_fixed_s",
        "_reduce_token_s",
        "_step_s",
        "_token_s",
        "_weights_s",
    )

    def __init__(
        self, shape: ModelShape, hardware: Hardware, num_devices: int, runtime: Runtime
    ) -> None:
        flops = hardware.flops * hardware.compute_share * num_devices
        bytes_per_s = hardware.bytes_per_s * hardware.memory_share * num_devices
        weights = shape.layer_weights + shape.head_weights
        self._token_s = 2.0 * shape.layer_weights / flops
        self._head_token_s = 2.0 * shape.head_weights / flops
        self._weights_s = weights * shape.weight_bytes / bytes_per_s
        self._pair_s = shape.pair_flops / (flops * ATTENTION_SHARE)
        copies = max(1.0, num_devices / shape.num_kv_heads)
        self._kv_token_s = copies * shape.token_kv_bytes / bytes_per_s
        reductions = 2.0 * shape.num_layers if num_devices > 1 else 0.0
        self._reduce_fixed_s = reductions * runtime.reduce_s
        self._reduce_token_s = 0.0
        if num_devices > 1:
            ring = 2.0 * (num_devices - 1) / num_devices
            rate = hardware.peer_bytes_per_s * hardware.peer_share
            self._reduce_token_s = reductions * ring * shape.hidden_size * ACTIVATION_BYTES / rate
        host = hardware.host_speed
        self._prompt_launch_s = shape.num_layers * runtime.prompt_launch_s / host
        self._decode_launch_s = shape.num_layers * runtime.decode_launch_s / host
        self._step_s = runtime.step_s / host

    def step_s(self, shape: StepShape) -> float:
        """Seconds; 0 for an empty step."""
        prompt_tokens, sequences = shape.prompt_tokens, shape.num_decoding
        tokens = prompt_tokens + sequences
        if not tokens:
            return 0.0
        products_s = self._token_s * tokens + self._head_token_s * (sequences or 1)
        if products_s < self._weights_s:
            products_s = self._weights_s
        pairs_s = self._pair_s * shape.context_tokens
        reads_s = self._kv_token_s * shape.context_tokens
        device_s = (
            products_s
            + (reads_s if reads_s > pairs_s else pairs_s)
            + 0.5 * self._pair_s * shape.prompt_pairs
            + self._reduce_fixed_s
            + self._reduce_token_s * tokens
        )
        launch_s = self._prompt_launch_s if prompt_tokens else self._decode_launch_s
        return self._step_s + (device_s if device_s > launch_s else launch_s)


GRID_PROMPTS = (64, 128, 256, 512, 1024, 2048, 4096, 8192)
"""Prompt tokens of the steps that `nearest` fits."""
GRID_CACHED = (0, 1, 4)
"""Tokens before them, in multiples of them."""
GRID_BATCHES = (1, 2, 4, 8, 16, 32, 64, 128, 256)
GRID_LENGTHS = (128, 512, 2048, 8192, 32768)
"""Sequences and their lengths, of the steps that only decode."""


def nearest(timer: RooflineTimer, max_context_tokens: int) -> StepModel:
    """The `StepModel` whose steps are nearest to the timer's, in proportion: least squares of the
    relative error over the grid above, no coefficient below 0. Of decode steps those count whose
    context is at most ``max_context_tokens`` (the least one always)."""
    prompts: list[tuple[Features, float]] = []
    for tokens in GRID_PROMPTS:
        for multiple in GRID_CACHED:
            before = multiple * tokens
            pairs = (before + tokens) ** 2 - before**2
            features = (1.0, float(tokens), float(pairs))
            prompts.append((features, timer.step_s(StepShape(tokens, pairs))))
    decodes: list[tuple[Features, float]] = []
    for batch in GRID_BATCHES:
        for length in GRID_LENGTHS:
            context = batch * length
            if context <= max_context_tokens or not decodes:
                features = (1.0, float(batch), float(context))
                seconds = timer.step_s(StepShape(num_decoding=batch, context_tokens=context))
                decodes.append((features, seconds))
    prompt = Regression(prompts, (1.0, 1e3, 1e6)).coefficients
    decode = Regression(decodes, (1.0, 1e1, 1e4)).coefficients
    return StepModel(
        prompt_base_s=prompt[0],
        per_prompt_token_s=prompt[1],
        per_pair_s=prompt[2],
        decode_base_s=decode[0],
        per_sequence_s=decode[1],
        per_context_token_s=decode[2],
    )
