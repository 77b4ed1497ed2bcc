"""Attention in compiled kernels, straight from the pool's blocks; see native/attention.cpp.

Promises what `TiledAttention` does, with other bits: a query's result depends on its own vector and
on the keys and values before it, and on nothing else of the step. With a bf16 pool and AVX512-BF16,
queries and softmax weights are rounded to bf16 for the products, as fused kernels on GPUs do it;
scores and sums are fp32. With a pool of int8 they are rounded to 16 bits with a scale, and products
are exact; see native/attention_int8.cpp.
"""

from __future__ import annotations

import ctypes
from dataclasses import dataclass

import torch

from pdserve.engine.native import library
from pdserve.engine.native.structs import AttentionArgs, KvKind, StepTable
from pdserve.engine.torch import kv_int8
from pdserve.engine.torch.attention import Attention
from pdserve.engine.torch.batch import StepBatch

_KV_KINDS = {torch.float32: KvKind.FP32, torch.bfloat16: KvKind.BF16, torch.int8: KvKind.INT8}


def step_table(batch: StepBatch) -> StepTable:
    """A step's rows as the kernels read them."""
    return StepTable((row.first, row.num_tokens, row.start, row.block_ids) for row in batch.rows)


@dataclass(frozen=True, slots=True)
class NativeStep:
    """A step's arguments, made once; `attend` fills in the pointers of a layer."""

    args: AttentionArgs
    out: torch.Tensor  # [padded tokens, head, head_dim]: of one layer after another
    table: StepTable
    """What `args` points to."""


class NativeAttention(Attention):
    """For one model on the CPU. ``level`` is one of `library.levels`; the library is there."""

    def __init__(
        self,
        num_heads: int,
        num_kv_heads: int,
        head_dim: int,
        dtype: torch.dtype,
        level: str,
    ) -> None:
        loaded = library.load()
        assert loaded is not None, "a level was chosen without a library"
        self._call = loaded.pdserve_attention
        self._call.argtypes = [ctypes.c_int, ctypes.c_void_p]
        self._level = library.LEVELS.index(level)
        self._heads = (num_heads, num_kv_heads, head_dim)
        self._dtype = dtype

    def prepare(self, batch: StepBatch, device: torch.device) -> NativeStep:
        num_heads, _, head_dim = self._heads
        out = torch.empty(len(batch.token_ids), num_heads, head_dim, dtype=self._dtype)
        out[batch.num_tokens :] = 0
        return self.step_into(out, step_table(batch))

    def step_into(self, out: torch.Tensor, table: StepTable) -> NativeStep:
        """A step whose results go to ``out [padded tokens, head, head_dim]``."""
        num_heads, num_kv_heads, head_dim = self._heads
        args = AttentionArgs(
            out=out.data_ptr(),
            rows=table.rows,
            tables=table.tables,
            out_stride=num_heads * head_dim,
            num_rows=table.num_rows,
            num_heads=num_heads,
            num_kv_heads=num_kv_heads,
            head_dim=head_dim,
            out_is_bf16=self._dtype == torch.bfloat16,
            num_threads=torch.get_num_threads(),
            scale=head_dim**-0.5,
        )
        return NativeStep(args, out, table)

    def attend(self, queries: torch.Tensor, kv: torch.Tensor, prepared: object) -> torch.Tensor:
        """As the seam says; the result has the model's dtype and holds until the next layer's."""
        assert isinstance(prepared, NativeStep)
        args = prepared.args
        read_from(args, queries, kv)
        if failed := self._call(self._level, ctypes.byref(args)):
            raise MemoryError(f"attention failed ({failed}): no memory for its scratch space")
        return prepared.out


def read_from(args: AttentionArgs, queries: torch.Tensor, kv: torch.Tensor) -> None:
    """Point ``args`` to a layer's queries and pool, of the shapes that `Attention.attend` says."""
    assert queries.stride()[1:] == (args.head_dim, 1), "heads lie side by side"
    args.queries = queries.data_ptr()
    args.query_stride = queries.stride(0)
    args.queries_are_bf16 = queries.dtype == torch.bfloat16
    args.kv = kv.data_ptr()
    args.kv_kind = _KV_KINDS[kv.dtype]
    is_int8 = kv.dtype == torch.int8
    args.block_size = kv_int8.block_size_of(kv, args.head_dim) if is_int8 else kv.shape[3]
