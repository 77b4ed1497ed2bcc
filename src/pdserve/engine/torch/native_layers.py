"""A model as programs of compiled kernels: one call from Python for all layers, one for the logits.

A `_Frame` is what a step with so many tokens needs: buffers for what goes from kernel to kernel,
and for each layer a program, the list of its kernels with their arguments. Frames of few tokens are
kept, so a steady decode step allocates nothing and builds nothing; it sets the step's rows and
tables, and where the pool lies. Where somebody waits for each layer, each is a call. A `_Head` is
the same for the logits of so many rows; all heads share one buffer for their results. The bits are
those of the same kernels called one by one.
"""

from __future__ import annotations

import ctypes
from collections import OrderedDict
from collections.abc import Callable, Iterator

import torch

from pdserve.engine.native import library
from pdserve.engine.native.structs import Kernel, Layers, Op, PlaceLayer, StepTable
from pdserve.engine.torch.attention import Attention
from pdserve.engine.torch.batch import StepBatch
from pdserve.engine.torch.native_attention import NativeAttention, read_from, step_table
from pdserve.engine.torch.native_linear import NativeLinear
from pdserve.engine.torch.pool import KvPool
from pdserve.engine.torch.rows import NativeRows, Rows
from pdserve.engine.torch.transformer_weights import MLP_ROWS, LayerWeights, TransformerWeights
from pdserve.weights.config import ModelConfig

KEPT_TOKENS = 64
"""Frames of at most so many tokens are kept."""
KEPT_FRAMES = 32
HEAD_ROWS = 64
"""Logits of at most so many rows are put into the buffer that steps share."""

Step = tuple[Kernel, ctypes.Structure]


class NativeLayers:
    """For a model all of whose kernels are compiled ones. The engine thread owns it."""

    def __init__(
        self,
        config: ModelConfig,
        weights: TransformerWeights,
        attention: NativeAttention,
        rows: NativeRows,
    ) -> None:
        loaded = library.load()
        assert loaded is not None, "a level was chosen without a library"
        self._run, self._run_layers = loaded.pdserve_run, loaded.pdserve_run_layers
        self._config = config
        self._weights = weights
        self._attention = attention
        self._rows = rows
        self._kept: OrderedDict[tuple[int, int], _Frame] = OrderedDict()
        self._heads: dict[tuple[int, int], _Head] = {}
        self._logits = torch.empty(HEAD_ROWS, config.vocab_size)  # pages come with the first use

    @classmethod
    def of(
        cls, config: ModelConfig, weights: TransformerWeights, attention: Attention, rows: Rows
    ) -> NativeLayers | None:
        """None where some kernel is not a compiled one, or wants its rows padded first."""
        if not isinstance(attention, NativeAttention) or not isinstance(rows, NativeRows):
            return None
        linears = [weights.output]
        for layer in weights.layers:
            linears += (layer.qkv, layer.attention_out, layer.gate_up, layer.down)
        for linear in linears:
            if not isinstance(linear, NativeLinear) or not linear.reads_in_place:
                return None
        return cls(config, weights, attention, rows)

    def forward(
        self, batch: StepBatch, pool: KvPool, on_layer: Callable[[int], None] | None
    ) -> torch.Tensor:
        """As `Transformer.forward`; the result is memory that a later step writes to."""
        frame = self._frame(batch.token_ids.shape[0])
        torch.index_select(self._weights.embedding, 0, batch.token_ids, out=frame.hidden)
        frame.begin(batch.num_tokens, step_table(batch), pool)
        num_layers = len(self._weights.layers)
        if on_layer is None:
            _check(self._run_layers(frame.argument, 0, num_layers))
            return frame.hidden
        for index in range(num_layers):
            _check(self._run_layers(frame.argument, index, 1))
            on_layer(index)
        return frame.hidden

    def holds_logits(self, num_rows: int) -> bool:
        """Whether `logits` has room for so many."""
        return num_rows <= HEAD_ROWS

    def logits(self, hidden: torch.Tensor, sampled: torch.Tensor) -> torch.Tensor:
        """As `Transformer.logits`; the result is memory that a later step writes to."""
        key = len(sampled), torch.get_num_threads()
        head = self._heads.get(key)
        if head is None:
            head = _Head(self._logits[: len(sampled)], self._config, self._weights, self._rows)
            self._heads[key] = head
        torch.index_select(hidden, 0, sampled, out=head.hidden)
        _check(self._run(head.program, len(head.program)))
        return head.logits

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


def _check(failed: int) -> None:
    if failed:
        raise MemoryError(f"a kernel failed ({failed}): no memory for its scratch space")


def _program(steps: list[Step], level: int) -> ctypes.Array[Op]:
    ops = [Op(args=ctypes.addressof(args), kernel=kernel, level=level) for kernel, args in steps]
    return (Op * len(ops))(*ops)


class _Head:
    """The program from the hidden states of some rows to ``logits [rows, vocab]``."""

    def __init__(
        self,
        logits: torch.Tensor,
        config: ModelConfig,
        weights: TransformerWeights,
        rows: NativeRows,
    ) -> None:
        assert isinstance(weights.output, NativeLinear)
        self.logits = logits
        shape = len(logits), config.hidden_size
        self.hidden = torch.empty(shape, dtype=weights.embedding.dtype)
        self._normed = torch.empty_like(self.hidden)
        self._steps: list[Step] = [  # what the program points to
            (Kernel.NORM, rows.norm_on(self.hidden, weights.norm, self._normed)),
            (Kernel.LINEAR, weights.output.call_on(self._normed, logits)),
        ]
        self.program = _program(self._steps, rows.level)


class _Frame:
    """Buffers and programs for steps of ``num_tokens``, padding included."""

    def __init__(
        self,
        num_tokens: int,
        config: ModelConfig,
        weights: TransformerWeights,
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
        self._place_layers = (PlaceLayer * config.num_layers)(
            *(rows.layer_args(n, layer.head_norms) for n, layer in enumerate(weights.layers))
        )
        self._rows = rows
        self._steps = [step for layer in weights.layers for step in self._layer(layer)]
        self._program = _program(self._steps, rows.level)
        self._layers = Layers(
            ops=ctypes.addressof(self._program),
            attention=ctypes.addressof(self.attention),
            place=ctypes.addressof(self.place),
            place_layers=ctypes.addressof(self._place_layers),
            ops_per_layer=len(self._steps) // config.num_layers,
        )
        self.argument = ctypes.byref(self._layers)

    def begin(self, num_tokens: int, table: StepTable, pool: KvPool) -> None:
        """Set what all layers of a step share."""
        self._table = table  # kept as long as its addresses are used
        kv = pool.layer(0)
        read_from(self.attention, self._queries, kv)
        self.place.block_size = self.attention.block_size
        self.place.kv_is_int8 = kv.dtype == torch.int8
        for args in (self.attention, self.place):
            args.rows, args.tables, args.num_rows = table.rows, table.tables, table.num_rows
        self._layers.kv = kv.data_ptr()
        self._layers.layer_bytes = pool.blocks.stride(0) * pool.blocks.element_size()
        if num_tokens < len(self._attended):
            self._attended[num_tokens:] = 0

    def _layer(self, layer: LayerWeights) -> Iterator[Step]:
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
