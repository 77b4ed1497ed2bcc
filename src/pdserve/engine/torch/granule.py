"""Measures, when a model is loaded, how rows must be padded for the numerics contract.

The smallest number of rows that a matrix library treats like many depends on its build, on the
processor, on the shape and on the thread count. So it is not believed but tried out: on the model's
own weights, with the threads that will run it, random rows are multiplied in batches of several
sizes and orders, and each row's bits compared with those of one large batch. It takes about a tenth
of a second for a small model.

The products are called exactly as the model calls them, strides and all: a transposed operand takes
other kernels than a contiguous one (MKL in a compatibility mode differs at 4 rows only then).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from pdserve.core.errors import ModelError
from pdserve.engine.torch.attention import (
    KV_TILE,
    QUERY_TILE,
    score_product,
    value_product,
)
from pdserve.engine.torch.numerics import FAST, Numerics
from pdserve.engine.torch.transformer_weights import TransformerWeights
from pdserve.weights.config import ModelConfig

GRANULES = (4, 8, 16, 32, 64)
UNMEASURED_GRANULE = 16
"""For devices on which nothing is promised."""

RowKernel = Callable[[torch.Tensor], torch.Tensor]
"""Maps rows to rows, ``[rows, width] -> [rows, other]``, each row for itself."""


@dataclass(frozen=True, slots=True)
class RowProbe:
    """Kernels that must all give a row the same bits, their input width, and their most rows."""

    kernels: tuple[RowKernel, ...]
    width: int
    dtype: torch.dtype
    max_rows: int


def choose_numerics(
    config: ModelConfig, weights: TransformerWeights, numerics: str, row_kernels: str = "torch"
) -> Numerics:
    """The numerics for a loaded model. Raises `ModelError` if exact ones cannot be had.

    ``row_kernels`` compute attention and what is done to each token by itself. With ``native`` ones
    only the projections can make padding necessary.
    """
    if numerics == "fast":
        return FAST
    if weights.embedding.device.type != "cpu":
        return Numerics(exact=True, granule=UNMEASURED_GRANULE)
    layer = weights.layers[0]
    probes = [
        RowProbe((linear,), linear.num_in, linear.dtype, linear.max_rows)
        for linear in (
            layer.qkv,
            layer.attention_out,
            layer.gate_up,
            layer.down,
            weights.output,
        )
    ]
    if row_kernels == "native":
        return Numerics(exact=True, granule=measure_granule(probes, (1, *GRANULES)))
    probes += attention_probes(config)
    return Numerics(exact=True, granule=measure_granule(probes))


def attention_probes(config: ModelConfig) -> tuple[RowProbe, RowProbe]:
    """The two products of `TiledAttention` as it calls them: strided, batched, of any width."""
    generator = torch.Generator().manual_seed(0)
    tile = torch.randn(KV_TILE, config.head_dim, generator=generator)
    rows = QUERY_TILE * (config.num_heads // config.num_kv_heads)
    variants = [(batch, num_tiles) for batch in (1, 2, 3) for num_tiles in (1, 2, 5)]
    scores = tuple(_score_kernel(tile, *variant) for variant in variants)
    values = tuple(_value_kernel(tile, *variant) for variant in variants)
    return (
        RowProbe(scores, config.head_dim, torch.float32, rows),
        RowProbe(values, KV_TILE, torch.float32, rows),
    )


def measure_granule(probes: Sequence[RowProbe], granules: Sequence[int] = GRANULES) -> int:
    """Smallest of ``granules`` under which all probes give a row the same bits in any batch.

    Raises `ModelError` if there is none; no such library build is known.
    """
    for granule in granules:
        if all(_holds(probe, granule) for probe in probes):
            return granule
    raise ModelError(
        "the matrix products of this torch build depend on the batch, so results would not be "
        "reproducible; run with --numerics fast, or with another torch build or thread count"
    )


def _holds(probe: RowProbe, granule: int) -> bool:
    generator = torch.Generator().manual_seed(granule)
    rows = torch.randn(probe.max_rows, probe.width, generator=generator).to(probe.dtype)
    expected = probe.kernels[0](rows)
    counts = {min(granule * i, probe.max_rows) for i in (1, 2, 3, 4, 5, 7, 9, 12)}
    for count in sorted(counts):
        picked = torch.randperm(probe.max_rows, generator=generator)[:count]
        for kernel in probe.kernels:
            if not torch.equal(kernel(rows[picked]), expected[picked]):
                return False
    return True


def _score_kernel(tile: torch.Tensor, batch: int, num_tiles: int) -> RowKernel:
    """Scores of a tile that is the first of several, in the last one of a batch."""
    keys = tile.repeat(num_tiles, 1).expand(batch, -1, -1).contiguous()

    def kernel(rows: torch.Tensor) -> torch.Tensor:
        queries = rows.expand(batch, -1, -1).contiguous()
        return score_product(queries, keys)[-1, :, :KV_TILE]

    return kernel


def _value_kernel(tile: torch.Tensor, batch: int, num_tiles: int) -> RowKernel:
    """Weighted values of a tile that is the last of several, in the last one of a batch."""
    values = tile.repeat(num_tiles, 1).expand(batch, -1, -1).contiguous()

    def kernel(rows: torch.Tensor) -> torch.Tensor:
        weights = rows.repeat(1, num_tiles).expand(batch, -1, -1).contiguous()
        return value_product(weights[..., -KV_TILE:], values[:, -KV_TILE:])[-1]

    return kernel
