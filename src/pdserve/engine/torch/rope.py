"""Rotary embeddings: the angle of each pair of dimensions at each position, plain or scaled.

Computed once, when a model is loaded, in fp32 and in the order of operations of transformers: an
inverse frequency that is off by its last bit turns a key at position 100 000 by a hundredth of a
radian. What the scalings mean is said in `weights.rope`.
"""

from __future__ import annotations

import math

import torch

from pdserve.weights.config import ModelConfig
from pdserve.weights.rope import LinearScaling, Llama3Scaling, LongScaling, YarnScaling


def rope_tables(config: ModelConfig, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Cosine and sine of every position's angles, each ``[position, rotary_dim / 2]`` fp32."""
    frequencies, factor = inverse_frequencies(config)
    positions = torch.arange(config.max_model_tokens, dtype=torch.float32)
    angles = positions[:, None] * frequencies
    return (angles.cos() * factor).to(device), (angles.sin() * factor).to(device)


def inverse_frequencies(config: ModelConfig) -> tuple[torch.Tensor, float]:
    """Radians per position ``[rotary_dim / 2]`` fp32, and the factor of cosines and sines."""
    exponents = torch.arange(0, config.rotary_dim, 2, dtype=torch.float32) / config.rotary_dim
    wavelengths = config.rope_theta**exponents  # over 2 pi
    match config.rope_scaling:
        case None:
            return 1.0 / wavelengths, 1.0
        case LinearScaling(factor):
            return 1.0 / wavelengths / factor, 1.0
        case Llama3Scaling() as scaling:
            return _llama3(1.0 / wavelengths, scaling), 1.0
        case YarnScaling() as scaling:
            return _yarn(config, wavelengths, scaling), scaling.attention_factor
        case LongScaling(divisors, attention_factor):
            return 1.0 / (torch.tensor(divisors) * wavelengths), attention_factor


def _llama3(frequencies: torch.Tensor, scaling: Llama3Scaling) -> torch.Tensor:
    wavelengths = 2 * math.pi / frequencies
    low, high = scaling.low_turns, scaling.high_turns
    slow = wavelengths > scaling.original_tokens / low
    fast = wavelengths < scaling.original_tokens / high
    scaled = torch.where(slow, frequencies / scaling.factor, frequencies)
    share = (scaling.original_tokens / wavelengths - low) / (high - low)
    mixed = (1 - share) * scaled / scaling.factor + share * scaled
    return torch.where(slow | fast, scaled, mixed)


def _yarn(config: ModelConfig, wavelengths: torch.Tensor, scaling: YarnScaling) -> torch.Tensor:
    """The paper's "NTK-by-parts": section 3.2, equations 17 to 20."""
    dim = config.rotary_dim

    def dimension(turns: float) -> float:
        """That which turns so often within the original length."""
        ratio = scaling.original_tokens / (turns * 2 * math.pi)
        return dim * math.log(ratio) / (2 * math.log(config.rope_theta))

    first, last = dimension(scaling.fast_turns), dimension(scaling.slow_turns)
    if scaling.rounded:
        first, last = math.floor(first), math.ceil(last)
    first, last = max(first, 0), min(last, dim - 1)
    if first == last:
        last += 0.001
    ramp = ((torch.arange(dim // 2, dtype=torch.float32) - first) / (last - first)).clamp(0, 1)
    kept = 1 - ramp
    return (1.0 / (scaling.factor * wavelengths)) * (1 - kept) + (1.0 / wavelengths) * kept


def rotate(heads: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Rotary embedding of ``heads [token, head, head_dim]``, in fp32 (arXiv:2104.09864).

    ``cos`` and ``sin`` are ``[token, 1, rotary_dim / 2]``. Of the first ``rotary_dim`` dimensions,
    i is paired with i + rotary_dim / 2, as in Hugging Face's checkpoints; the others stay.
    """
    rotary_dim = 2 * cos.shape[-1]
    wide = heads.float()
    first, second = wide[..., :rotary_dim].chunk(2, dim=-1)
    turned = (first * cos - second * sin, second * cos + first * sin)
    return torch.cat((*turned, wide[..., rotary_dim:]), dim=-1)
