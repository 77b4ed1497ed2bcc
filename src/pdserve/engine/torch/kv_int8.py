"""Keys and values as int8, by torch: the reference of native/kv_int8.hpp, which says how they lie.

Rounding is symmetric, with one fp32 scale for each token and kv head: the largest magnitude becomes
127. What is not a number gives a scale that is none either, so it shows in every later result. A
*run* is the keys, or the values, of a kv head in a block: ``block_size * (head_dim + 4)`` bytes.
"""

from __future__ import annotations

import torch

from pdserve.core.errors import ConfigError
from pdserve.core.layout import SCALE_BYTES

GROUP = 16
"""Positions of keys that lie together."""
QUAD = 4
"""Dimensions of a key, and positions of a value, that lie side by side."""
MAX_HEAD_DIM = 512
RANGE = 127.0
SMALLEST = 1e-30
"""A vector without a larger magnitude becomes zeros."""


def check_shape(head_dim: int, block_size: int) -> None:
    """Raise `ConfigError` for a model or block size that a pool of int8 cannot have."""
    if head_dim % QUAD or head_dim > MAX_HEAD_DIM:
        raise ConfigError(
            f"a KV pool of int8 takes heads of {QUAD}, {2 * QUAD}, ... or {MAX_HEAD_DIM} "
            f"dimensions, and this model's have {head_dim}: use --kv-dtype auto"
        )
    if block_size % GROUP:
        raise ConfigError(
            f"a KV pool of int8 takes blocks of a multiple of {GROUP} tokens, not of {block_size}: "
            "use --block-size 16, or --kv-dtype auto"
        )


def block_size_of(runs: torch.Tensor, head_dim: int) -> int:
    """Positions in each of ``runs [..., bytes]``."""
    return runs.shape[-1] // (head_dim + SCALE_BYTES)


def quantise(rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """``rows [..., head_dim]`` as int8 of that shape, and their scales ``[...]`` fp32."""
    wide = rows.float()
    ranges = wide.abs().amax(dim=-1)
    ranges = torch.where(ranges.isfinite(), ranges, float("nan"))
    # `127 / ranges` would be 127 times the reciprocal, which the kernels do not compute.
    inverse = torch.full_like(ranges, RANGE).div_(ranges).where(ranges > SMALLEST, 0.0)
    numbers = (wide * inverse[..., None]).round().nan_to_num(nan=0.0)
    return numbers.to(torch.int8), ranges / RANGE


def write(
    layer: torch.Tensor,  # [block, 2, kv head, bytes of a run]
    block_ids: torch.Tensor,  # [tokens], int64
    offsets: torch.Tensor,  # [tokens], int64: position in block
    keys: torch.Tensor,  # [tokens, kv head, head_dim]
    values: torch.Tensor,  # [tokens, kv head, head_dim]
) -> None:
    """Put one token's key and value into each named slot."""
    num_blocks, _, kv_heads, _ = layer.shape
    head_dim = keys.shape[-1]
    block_size = block_size_of(layer, head_dim)
    numbers, scales = layer[..., : block_size * head_dim], layer[..., block_size * head_dim :]
    quads = (len(keys), kv_heads, head_dim // QUAD, QUAD)
    quantised, key_scales = quantise(keys)
    key_slots = numbers[:, 0].view(num_blocks, kv_heads, -1, head_dim // QUAD, GROUP, QUAD)
    key_slots = key_slots.permute(0, 2, 4, 1, 3, 5)  # [block, group, in group, kv head, quad, 4]
    key_slots[block_ids, offsets // GROUP, offsets % GROUP] = quantised.view(quads)
    quantised, value_scales = quantise(values)
    value_slots = numbers[:, 1].view(num_blocks, kv_heads, -1, head_dim, QUAD)
    value_slots = value_slots.permute(0, 2, 4, 1, 3)  # [block, quad, in quad, kv head, head_dim]
    value_slots[block_ids, offsets // QUAD, offsets % QUAD] = quantised
    scale_slots = scales.view(num_blocks, 2, kv_heads, block_size, SCALE_BYTES)
    written = torch.stack((key_scales, value_scales), dim=1)  # [tokens, 2, kv head]
    scale_slots.permute(0, 3, 1, 2, 4)[block_ids, offsets] = written[..., None].view(torch.int8)


def read_keys(runs: torch.Tensor, head_dim: int) -> torch.Tensor:
    """``runs [n, bytes]`` of keys as ``[n, position in block, head_dim]`` fp32."""
    numbers, scales = _parts(runs, head_dim)
    grouped = numbers.view(len(runs), -1, head_dim // QUAD, GROUP, QUAD).transpose(2, 3)
    return grouped.reshape(*scales.shape, head_dim).float().mul_(scales[..., None])


def read_values(runs: torch.Tensor, head_dim: int) -> torch.Tensor:
    """``runs [n, bytes]`` of values as ``[n, position in block, head_dim]`` fp32."""
    numbers, scales = _parts(runs, head_dim)
    grouped = numbers.view(len(runs), -1, head_dim, QUAD).transpose(2, 3)
    return grouped.reshape(*scales.shape, head_dim).float().mul_(scales[..., None])


def _parts(runs: torch.Tensor, head_dim: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The numbers of runs, as they lie, and the scales ``[n, position in block]``."""
    count = block_size_of(runs, head_dim) * head_dim
    return runs[:, :count].contiguous(), runs[:, count:].contiguous().view(torch.float32)
