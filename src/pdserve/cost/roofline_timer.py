"""Step times from data sheets: of each part of a step, what takes longer, arithmetic or memory.

A step passes all its tokens through the weights, which are read once. Attention of prompts is
arithmetic, that of decoding sequences reads their KV. With tensor parallelism the devices share all
that evenly, and twice in each layer they add up their parts: a ring all-reduce of the step's
activations. Meanwhile the host prepares and launches the layers, and a step costs a constant more.

Two that run at a time never hide each other wholly, or no point where they meet would be slower
than either: of the shorter one a share remains (`UNHIDDEN` of arithmetic and reading, `UNMET` of
device and host).

Rates are the data sheet's times the shares in `cost.hardware`. What depends on the software is a
`Runtime`:

===========  ===================================================================================
``eager``    Python launches every operation: vLLM as Splitwise measured it (2023)
``native``   C++ launches every operation: SwiftTransformer, as DistServe measured it
``graphs``   a decode step is launched as one graph: today's engines on GPUs
``kernels``  pdserve's compiled kernels on CPUs
===========  ===================================================================================

All constants are fitted at once to Splitwise's table (prompts of at most 2048 tokens) and to
DistServe's curves, one value for all models, devices and degrees of parallelism unless said
otherwise; ``benchmarks/roofline.py`` prints the error. Beyond 2048 tokens in a step, Splitwise's
prompts take up to twice as long a token as below, on 8 devices more than on 2: that is its software
(sec. III-C), and is not modelled. Left out as well: reading a cached prefix's KV in a prompt's
step, uneven lengths in a batch, tiles that are half full, experts.
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
UNHIDDEN = 0.5
UNMET = 0.3


@dataclass(frozen=True, slots=True, kw_only=True)
class Runtime:
    """What the software around the products costs, in seconds on the host of an A100's machine.

    ``prompt_launch_s``, ``decode_launch_s``: to launch one layer of a step with prompts, or of one
    that only decodes. ``sequence_s``: for each sequence that decodes (inputs, sampling, text).
    ``step_s``: of a step beside all that. ``reduce_s``: of an all-reduce however small.
    ``attention_share``: what attention over prompts reaches of the rate of large products;
    ``kv_share``: what reading KV reaches of the rate of reading weights.
    """

    prompt_launch_s: float
    decode_launch_s: float
    sequence_s: float
    step_s: float
    reduce_s: float
    attention_share: float
    kv_share: float
    source: str


RUNTIMES: Mapping[str, Runtime] = {
    "eager": Runtime(
        prompt_launch_s=0.7e-3,
        decode_launch_s=0.43e-3,
        sequence_s=0.38e-3,
        step_s=2e-3,
        reduce_s=34e-6,
        attention_share=0.6,
        kv_share=0.28,
        source="fitted to Splitwise's perf_model.csv: Llama-2-70B decodes in 43 ms on 4 A100 and "
        "on 8, and computes a prompt of 128 tokens in 65 ms, which is the host",
    ),
    "native": Runtime(
        prompt_launch_s=0.27e-3,
        decode_launch_s=0.05e-3,
        sequence_s=0.05e-3,
        step_s=3e-3,
        reduce_s=34e-6,
        attention_share=0.6,
        kv_share=0.8,
        source="fitted to DistServe's curves of OPT-13B and OPT-66B",
    ),
    "graphs": Runtime(
        prompt_launch_s=0.15e-3,
        decode_launch_s=0.005e-3,
        sequence_s=0.01e-3,
        step_s=1e-3,
        reduce_s=15e-6,
        attention_share=0.6,
        kv_share=0.85,
        source="assumed: half of native's launches, and hardly any of a graph; vLLM 0.23 gives one "
        "sequence of Llama-3.1-8B 75 tokens/s on an A100 of 1.555 TB/s (J. Musgrave, a sweep of "
        "2026), which leaves 1 ms beside the memory's 12",
    ),
    "kernels": Runtime(
        prompt_launch_s=0.0,
        decode_launch_s=0.0,
        sequence_s=0.0,
        step_s=0.6e-3,
        reduce_s=0.0,
        attention_share=1.0,
        kv_share=0.5,
        source="docs/performance.md, the engine against its ceilings",
    ),
}


class RooflineTimer:
    """A `StepTimer` of a model on ``num_devices`` devices. See the head of this module."""

    __slots__ = (
        "_context_token_s",
        "_decode_launch_s",
        "_head_token_s",
        "_pair_s",
        "_prompt_launch_s",
        "_reduce_fixed_s",
        "_reduce_token_s",
        "_sequence_s",
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
        pair_s = shape.pair_flops / (flops * runtime.attention_share)
        self._pair_s = 0.5 * pair_s  # of n^2, half are a query and a key before it
        copies = max(1.0, num_devices / shape.num_kv_heads)
        read_s = copies * shape.token_kv_bytes / (bytes_per_s * runtime.kv_share)
        self._context_token_s = max(read_s, pair_s)
        self._reduce_fixed_s = self._reduce_token_s = 0.0
        if num_devices > 1:
            reductions = 2.0 * shape.num_layers
            ring = 2.0 * (num_devices - 1) / num_devices
            peer_bytes_per_s = hardware.peer_bytes_per_s * hardware.peer_share
            token_bytes = ring * shape.hidden_size * ACTIVATION_BYTES
            self._reduce_fixed_s = reductions * runtime.reduce_s
            self._reduce_token_s = reductions * token_bytes / peer_bytes_per_s
        host = hardware.host_speed
        self._prompt_launch_s = shape.num_layers * runtime.prompt_launch_s / host
        self._decode_launch_s = shape.num_layers * runtime.decode_launch_s / host
        self._sequence_s = runtime.sequence_s / host
        self._step_s = runtime.step_s / host

    def step_s(self, shape: StepShape) -> float:
        """Seconds; 0 for an empty step."""
        prompt_tokens, sequences = shape.prompt_tokens, shape.num_decoding
        tokens = prompt_tokens + sequences
        if not tokens:
            return 0.0
        device_s = self._products_s(tokens, sequences)
        device_s += self._context_token_s * shape.context_tokens
        if prompt_tokens:
            device_s += self._pair_s * shape.prompt_pairs
            host_s = self._prompt_launch_s + self._sequence_s * sequences
        else:
            host_s = self._decode_launch_s + self._sequence_s * sequences
        if device_s > host_s:
            return self._step_s + device_s + UNMET * host_s
        return self._step_s + host_s + UNMET * device_s

    def decodes_s(self, sequences: int, lengths: range) -> list[float]:
        """`step_s` of steps that decode so many sequences, of these lengths together."""
        products_s = self._products_s(sequences, sequences)
        host_s = self._decode_launch_s + self._sequence_s * sequences
        fixed_s, each_s = self._step_s, self._context_token_s
        unmet_s = UNMET * host_s
        return [
            fixed_s + device_s + unmet_s
            if (device_s := products_s + each_s * context) > host_s
            else fixed_s + host_s + UNMET * device_s
            for context in lengths
        ]

    def _products_s(self, tokens: int, sequences: int) -> float:
        """Seconds of the device for all but attention."""
        products_s = self._token_s * tokens + self._head_token_s * (sequences or 1)
        weights_s = self._weights_s
        if products_s > weights_s:
            device_s = products_s + UNHIDDEN * weights_s
        else:
            device_s = weights_s + UNHIDDEN * products_s
        return device_s + (self._reduce_fixed_s + self._reduce_token_s * tokens)


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
