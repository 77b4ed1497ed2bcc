"""The layers of a model as programs of compiled kernels: one call from Python for each layer.

A `_Frame` is what a step with so many tokens needs: buffers for what goes from kernel to kernel,
and for each layer a program, the list of its kernels with their arguments. Frames of few tokens are
kept, so a steady decode step allocates nothing and builds nothing; it sets the step's rows and
tables, and for each layer where its part of the pool lies. The bits are those of the same kernels
called one by one.
"""

from __future__ import annotations

import ctypes
from collections import OrderedDict
from collections.abc import Callable, Iterator

import torch

from pdserve.engine.native import library
from pdserve.engine.native.structs import Kernel, Op, StepTable
from pdserve.engine.torch.attention import Attention
from pdserve.engine.torch.batch import StepBatch
from pdserve.engine.torch.llama_weights import MLP_ROWS, LayerWeights, LlamaWeights
from pdserve.engine.torch.native_attention import NativeAttention, read_from, step_table
from pdserve.engine.torch.native_linear import NativeLinear
from pdserve.engine.torch.pool import KvPool
from pdserve.engine.torch.rows import NativeRows, Rows
from pdserve.weights.config import ModelConfig

KEPT_TOKENS = 64
"""Frames of at most so many tokens are kept."""
KEPT_FRAMES = 32


class NativeLayers:
    """For a model all of whose kernels are compiled ones. The engine thread owns it."""

    def __init__(
        self,
        config: ModelConfig,
        weights: LlamaWeights,
        attention: NativeAttention,
        rows: NativeRows,
    ) -> None:
        loaded = library.load()
        assert loaded is not None, "a level was chosen without a library"
        self._run = loaded.pdserve_run
        self._config = config
        self._weights = weights
        self._attention = attention
        self._rows = rows
        self._kept: OrderedDict[tuple[int, int], _Frame] = OrderedDict()

    @classmethod
    def of(
        cls, config: ModelConfig, weights: LlamaWeights, attention: Attention, rows: Rows
    ) -> NativeLayers | None:
        """None where some kernel is not a compiled one, or wants its rows padded first."""
        if not isinstance(attention, NativeAttention) or not isinstance(rows, NativeRows):
            return None
        for layer in weights.layers:
            for linear in (layer.qkv, layer.attention_out, layer.gate_up, layer.down):
                if not isinstance(linear, NativeLinear) or not linear.reads_in_place:
                    return None
        return cls(config, weights, attention, rows)

    def forward(
        self, batch: StepBatch, pool: KvPool, on_layer: Callable[[int], None]
    ) -> torch.Tensor:
        """As `Llama.forward`; the result is memory that a later step writes to."""
        frame = self._frame(batch.token_ids.shape[0])
        torch.index_select(self._weights.embedding, 0, batch.token_ids, out=frame.hidden)
        frame.begin(batch.num_tokens, step_table(batch), pool.layer(0))
        first = pool.layer(0).data_ptr()
        layer_bytes = pool.blocks.stride(0) * pool.blocks.element_size()
        for index, program in enumerate(frame.programs):
            frame.attention.kv = frame.place.kv = first + index * layer_bytes
            if failed := self._run(program, len(program)):
                raise MemoryError(f"a layer failed ({failed}): no memory for its scratch space")
            on_layer(index)
        return frame.hidden

    def _frame(self, num_tokens: int) -> _Frame:
        key = num_tokens, torch.get_num_threads()
        frame = self._kept.pop(key, None)
        if frame is None:
            frame = _Frame(num_tokens, self._config, self._weights, self._attention, self._rows)
        if num_tokens <= KEPT_TOKENS:
            self._kept[key] = frame
            if len(self._kept) > KEPT_FRAMES:
                self._kept.popitem(last=False)
        return frame


class _Frame:
    """Buffers and programs for steps of ``num_tokens``, padding included."""

    def __init__(
        self,
        num_tokens: int,
        config: ModelConfig,
        weights: LlamaWeights,
        attention: NativeAttention,
        rows: NativeRows,
    ) -> None:
        def buffer(*shape: int) -> torch.Tensor:
            return torch.empty(*shape, dtype=weights.embedding.dtype)

        num_heads = config.num_heads + 2 * config.num_kv_heads
        self.hidden = buffer(num_tokens, config.hidden_size)
        self._normed = buffer(num_tokens, config.hidden_size)
        self._heads = buffer(num_tokens, num_heads, config.head_dim)
        self._queries = self._heads[:, : config.num_heads]
        self._attended = buffer(num_tokens, config.num_heads, config.head_dim)
        self._gated = buffer(min(num_tokens, MLP_ROWS), config.intermediate_size)
        self._table = StepTable(())
        self.attention = attention.step_into(self._attended, self._table).args
        self.place = rows.step_of(self._table).args
        self.place.heads = self._heads.data_ptr()
        self._rows = rows
        self._kept: list[ctypes.Structure] = []  # what the programs point to
        self.programs = [self._program(layer) for layer in weights.layers]

    def begin(self, num_tokens: int, table: StepTable, kv: torch.Tensor) -> None:
        """Set what all layers of a step share; ``kv`` is any layer of its pool."""
        self._table = table  # kept as long as its addresses are used
        read_from(self.attention, self._queries, kv)
        self.place.block_size = self.attention.block_size
        self.place.kv_is_int8 = kv.dtype == torch.int8
        for args in (self.attention, self.place):
            args.rows, args.tables, args.num_rows = table.rows, table.tables, table.num_rows
        self._attended[num_tokens:] = 0

    def _program(self, layer: LayerWeights) -> ctypes.Array[Op]:
        level = self._rows.level
        steps = list(self._steps(layer))
        self._kept.extend(args for _, args in steps)
        ops = [
            Op(args=ctypes.addressof(args), kernel=kernel, level=level) for kernel, args in steps
        ]
        return (Op * len(ops))(*ops)

    def _steps(self, layer: LayerWeights) -> Iterator[tuple[Kernel, ctypes.Structure]]:
        assert isinstance(layer.qkv, NativeLinear)
        assert isinstance(layer.attention_out, NativeLinear)
        assert isinstance(layer.gate_up, NativeLinear)
        assert isinstance(layer.down, NativeLinear)
        hidden, normed, attended = self.hidden, self._normed, self._attended.flatten(1)
        yield Kernel.NORM, self._rows.norm_on(hidden, layer.attention_norm, normed)
        yield Kernel.LINEAR, layer.qkv.call_on(normed, self._heads.flatten(1))
        yield Kernel.PLACE, self.place
        yield Kernel.ATTENTION, self.attention
        yield Kernel.LINEAR, layer.attention_out.call_on(attended, hidden, add=True)
        yield Kernel.NORM, self._rows.norm_on(hidden, layer.mlp_norm, normed)
        parts = zip(torch.split(normed, MLP_ROWS), torch.split(hidden, MLP_ROWS), strict=True)
        for part, residual in parts:
            gated = self._gated[: part.shape[0]]
            yield Kernel.LINEAR, layer.gate_up.call_on(part, gated)
            yield Kernel.LINEAR, layer.down.call_on(gated, residual, add=True)
