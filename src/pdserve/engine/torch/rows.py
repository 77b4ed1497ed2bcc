"""What a layer does to each token by itself, behind a seam: norms, rotation, the write to the pool.

`TorchRows` is the reference, and what computes without compiled kernels; `NativeRows` fuses each of
them into one pass. Both give a token the same bits in any batch. Norms and rotations are computed
in fp32, the rotated keys and the values are rounded to the model's dtype, and then to the pool's.
"""

from __future__ import annotations

import ctypes
from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch

from pdserve.engine.native import library
from pdserve.engine.native.structs import BestArgs, NormArgs, PlaceArgs, PlaceLayer, StepTable
from pdserve.engine.torch.batch import StepBatch
from pdserve.engine.torch.native_attention import step_table
from pdserve.engine.torch.pool import KvPool
from pdserve.engine.torch.rope import rope_tables, rotate
from pdserve.engine.torch.sampler import first_best
from pdserve.weights.config import ModelConfig


@dataclass(frozen=True, slots=True)
class HeadNorms:
    """Weights of the norms that a layer's query and key heads pass before they are rotated."""

    queries: torch.Tensor  # [head_dim]
    keys: torch.Tensor  # [head_dim]


class Rows(ABC):
    """Made for one model; no state between steps."""

    @abstractmethod
    def prepare(self, batch: StepBatch) -> object:
        """What `place` needs of this step in every layer."""

    @abstractmethod
    def norm(self, rows: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        """``rows [..., width]`` over their root mean square, times ``weight [width]``."""

    @abstractmethod
    def place(
        self,
        heads: torch.Tensor,
        pool: KvPool,
        layer: int,
        norms: HeadNorms | None,
        prepared: object,
    ) -> torch.Tensor:
        """Write the step's keys and values into the pool; give back its queries. Queries and keys
        are normalised if there are ``norms``, and rotated where the layer does that.

        ``heads [padded tokens, query heads + key heads + value heads, head_dim]`` of the model's
        dtype, which may be overwritten. Returns ``[padded tokens, query heads, head_dim]``, fp32 or
        of the model's dtype, its heads side by side.
        """

    @abstractmethod
    def first_best(self, rows: torch.Tensor) -> torch.Tensor:
        """Index of the greatest value of each of ``rows [n, vocab]`` fp32, the first of several."""


@dataclass(frozen=True, slots=True)
class TorchPlace:
    """A step's angles and slots, made once."""

    cos: torch.Tensor  # [padded tokens, 1, rotary_dim / 2]
    sin: torch.Tensor  # the same
    blocks: torch.Tensor  # [tokens], int64: block of each token's KV
    offsets: torch.Tensor  # [tokens], int64: position in that block


class TorchRows(Rows):
    """By torch, op by op, on any device."""

    def __init__(self, config: ModelConfig, device: torch.device) -> None:
        self._counts = [config.num_heads, config.num_kv_heads, config.num_kv_heads]
        self._epsilon = config.rms_norm_eps
        self._unrotated = frozenset(config.unrotated_layers)
        self._cos, self._sin = rope_tables(config, device)

    def prepare(self, batch: StepBatch) -> TorchPlace:
        positions = batch.positions()
        blocks, offsets = batch.slots()
        return TorchPlace(
            self._cos[positions][:, None], self._sin[positions][:, None], blocks, offsets
        )

    def norm(self, rows: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        return rms_norm(rows, weight, self._epsilon)

    def place(
        self,
        heads: torch.Tensor,
        pool: KvPool,
        layer: int,
        norms: HeadNorms | None,
        prepared: object,
    ) -> torch.Tensor:
        assert isinstance(prepared, TorchPlace)
        queries, keys, values = torch.split(heads, self._counts, dim=1)
        if norms is not None:
            queries, keys = self.norm(queries, norms.queries), self.norm(keys, norms.keys)
        if layer not in self._unrotated:
            queries, keys = (rotate(part, prepared.cos, prepared.sin) for part in (queries, keys))
        new = slice(0, len(prepared.blocks))
        pool.write(
            layer, prepared.blocks, prepared.offsets, keys[new].to(values.dtype), values[new]
        )
        return queries.float().contiguous()

    def first_best(self, rows: torch.Tensor) -> torch.Tensor:
        return first_best(rows)


@dataclass(frozen=True, slots=True)
class NativePlace:
    """A step's arguments, made once."""

    args: PlaceArgs
    table: StepTable
    """What ``args`` points to."""


class NativeRows(Rows):
    """By compiled kernels (native/rows.cpp) on the CPU. The library is there."""

    def __init__(self, config: ModelConfig, dtype: torch.dtype, level: str) -> None:
        loaded = library.load()
        assert loaded is not None, "a level was chosen without a library"
        self._run_norm, self._run_place = loaded.pdserve_norm, loaded.pdserve_place
        self._run_best = loaded.pdserve_best
        self.level = library.LEVELS.index(level)
        self._config = config
        self._is_bf16 = dtype == torch.bfloat16
        self._cos, self._sin = rope_tables(config, torch.device("cpu"))

    def prepare(self, batch: StepBatch) -> NativePlace:
        return self.step_of(step_table(batch))

    def step_of(self, table: StepTable) -> NativePlace:
        """A step of these rows."""
        config = self._config
        args = PlaceArgs(
            cosines=self._cos.data_ptr(),
            sines=self._sin.data_ptr(),
            rows=table.rows,
            tables=table.tables,
            num_rows=table.num_rows,
            num_heads=config.num_heads,
            num_kv_heads=config.num_kv_heads,
            head_dim=config.head_dim,
            rotary_dim=config.rotary_dim,
            epsilon=config.rms_norm_eps,
            is_bf16=self._is_bf16,
            num_threads=torch.get_num_threads(),
        )
        return NativePlace(args, table)

    def layer_args(self, layer: int, norms: HeadNorms | None) -> PlaceLayer:
        """What is a layer's own; ``norms`` must outlive it."""
        return PlaceLayer(
            query_norm=None if norms is None else norms.queries.data_ptr(),
            key_norm=None if norms is None else norms.keys.data_ptr(),
            rotates=layer not in self._config.unrotated_layers,
        )

    def norm_on(self, rows: torch.Tensor, weight: torch.Tensor, out: torch.Tensor) -> NormArgs:
        """Arguments of a norm from ``rows`` into ``out``, contiguous; they must outlive it."""
        assert rows.is_contiguous(), "kernels read rows one after another"
        return NormArgs(
            rows=rows.data_ptr(),
            weight=weight.data_ptr(),
            out=out.data_ptr(),
            num_rows=rows.shape[0],
            width=rows.shape[1],
            is_bf16=self._is_bf16,
            num_threads=torch.get_num_threads(),
            epsilon=self._config.rms_norm_eps,
        )

    def norm(self, rows: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        out = torch.empty_like(rows)
        args = self.norm_on(rows, weight, out)
        failed = self._run_norm(self.level, ctypes.byref(args))
        assert not failed, "the level was checked when it was chosen"
        return out

    def place(
        self,
        heads: torch.Tensor,
        pool: KvPool,
        layer: int,
        norms: HeadNorms | None,
        prepared: object,
    ) -> torch.Tensor:
        assert isinstance(prepared, NativePlace)
        assert heads.is_contiguous(), "kernels read rows one after another"
        args = prepared.args
        args.heads = heads.data_ptr()
        args.layer = self.layer_args(layer, norms)
        args.kv = pool.layer(layer).data_ptr()
        args.block_size = pool.block_size
        args.kv_is_int8 = pool.blocks.dtype == torch.int8
        failed = self._run_place(self.level, ctypes.byref(args))
        assert not failed, "the level was checked when it was chosen"
        return heads[:, : self._config.num_heads]

    def first_best(self, rows: torch.Tensor) -> torch.Tensor:
        assert rows.is_contiguous(), "kernels read rows one after another"
        assert rows.dtype == torch.float32, "logits are fp32"
        out = torch.empty(rows.shape[0], dtype=torch.int64)
        args = BestArgs(
            rows=rows.data_ptr(),
            out=out.data_ptr(),
            num_rows=rows.shape[0],
            width=rows.shape[1],
            num_threads=torch.get_num_threads(),
        )
        failed = self._run_best(self.level, ctypes.byref(args))
        assert not failed, "the level was checked when it was chosen"
        return out


def rms_norm(rows: torch.Tensor, weight: torch.Tensor, epsilon: float) -> torch.Tensor:
    """Rows over their root mean square, times ``weight``; computed in fp32 (arXiv:1910.07467)."""
    wide = rows.float()
    scale = wide.square().mean(dim=-1, keepdim=True).add_(epsilon).rsqrt_()
    return (wide * scale).to(weight.dtype) * weight
