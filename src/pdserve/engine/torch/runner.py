"""`TorchRunner`: a transformer in torch behind the `ModelRunner` seam.

Made once per worker: weights are packed, the row granule is measured, the pool is attached. Then it
turns step plans into tokens; everything that a step needs is in its plan and in the pool. The
thread count of torch belongs to the whole process: all runners of a process must be given the same.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

from pdserve.core.ids import BlockId
from pdserve.core.layout import KvLayout, pool_dtype
from pdserve.core.step import StepPlan, StepResult
from pdserve.engine.base import LayerSink, ModelRunner, RunnerInfo
from pdserve.engine.masks_ahead import MasksAhead
from pdserve.engine.native.library import choose_level
from pdserve.engine.torch.attention_registry import choose_attention
from pdserve.engine.torch.batch import Bounds, StepBatch, build_batch, padded_indexes
from pdserve.engine.torch.granule import choose_numerics
from pdserve.engine.torch.linear_registry import choose_linear
from pdserve.engine.torch.numerics import DTYPES, check_choice, numerics_class
from pdserve.engine.torch.pool import DevicePool, HostPool, KvPool
from pdserve.engine.torch.prompt_scores import scores_of
from pdserve.engine.torch.sampler import sample
from pdserve.engine.torch.transformer import Transformer
from pdserve.engine.torch.transformer_weights import pack_weights
from pdserve.text.structured.masks import TokenMasks
from pdserve.weights.config import ModelConfig


class TorchRunner(ModelRunner):
    """One model on one device. ``dtype`` is that of weights, KV and products, where
    ``weight_dtype`` and ``kv_dtype`` do not say otherwise."""

    def __init__(
        self,
        config: ModelConfig,
        weights: Mapping[str, torch.Tensor],
        *,
        weights_digest: str,
        device: str,
        dtype: str,
        block_size: int,
        num_threads: int,
        numerics: str = "exact",
        weight_dtype: str = "auto",
        kv_dtype: str = "auto",
        masks: TokenMasks | None = None,
    ) -> None:
        """``weights`` are copied, and rounded if ``weight_dtype`` is int8. Without ``masks`` no row
        may have a constraint. Raises `ConfigError` for arguments that cannot work here,
        `ModelError` for weights that do not fit ``config``."""
        check_choice(device, dtype, numerics)
        self._num_threads = num_threads
        self._use_threads()
        self._device = torch.device(device)
        level = choose_level()
        linear = choose_linear(device, dtype, weight_dtype, level)
        attention = choose_attention(device, numerics, level, kv_dtype)
        with torch.inference_mode():
            packed = pack_weights(config, weights, self._device, DTYPES[dtype], linear)
            self._numerics = choose_numerics(config, packed, numerics, attention.kernels)
            attends = attention.make(config, dtype, block_size, self._numerics)
            rows = attention.rows(config, dtype, self._device)
            self._model: Transformer | None = Transformer(config, packed, attends, rows)
        self._pool: KvPool | None = None
        self._masks = None if masks is None else MasksAhead(masks)
        self.info = RunnerInfo(
            layout=KvLayout(
                num_layers=config.num_layers,
                num_kv_heads=config.num_kv_heads,
                head_dim=config.head_dim,
                block_size=block_size,
                dtype=pool_dtype(dtype, kv_dtype),
                numerics=numerics_class(
                    device, dtype, num_threads, numerics, f"{linear.name}-{attention.name}"
                ),
                weights_digest=weights_digest,
            ),
            vocab_size=config.vocab_size,
            max_model_tokens=config.max_model_tokens,
            device=device,
            engine="torch",
        )

    def attach_pool(self, memory: memoryview, num_blocks: int) -> None:
        if self._device.type == "cpu":
            self._pool = HostPool(memory, self.info.layout, num_blocks)
        else:
            self._pool = DevicePool(memory, self.info.layout, num_blocks, self._device)
        if self._masks is not None:
            self._masks.get_ready()

    def execute(self, plan: StepPlan, sink: LayerSink | None = None) -> StepResult:
        places = [place for place, row in enumerate(plan.rows) if row.sample is not None]
        specs = [row.sample for row in plan.rows if row.sample is not None]
        masks_of_step = None if self._masks is None else self._masks.begin(plan)
        with torch.inference_mode():
            hidden, batch = self._hidden(plan, sink)
            masks = None if masks_of_step is None else masks_of_step()
            find_best = self._loaded().rows.first_best
            logits = self._logits(hidden, batch)
            sampled = iter(sample(logits, specs, find_best, masks) if specs else ())
            scores = scores_of(plan, lambda places: self._logits_at(hidden, places))
        failed = {} if masks is None else masks.failed
        return StepResult(
            step_id=plan.step_id,
            tokens=tuple(() if row.sample is None else next(sampled) for row in plan.rows),
            scores=scores,
            failures=tuple((places[index], why) for index, why in failed.items()),
        )

    def logits(self, plan: StepPlan, sink: LayerSink | None = None) -> torch.Tensor:
        """Run a step up to the raw next-token logits: ``[sampling rows, vocab]`` fp32.

        Rows are in the plan's order, in memory of their own. `execute` is this and the sampler.
        """
        with torch.inference_mode():
            return self._logits(*self._hidden(plan, sink)).clone()

    def read_kv(self, layer: int, block_ids: Sequence[BlockId]) -> None:
        self._attached().publish(layer, block_ids)

    def write_kv(self, block_ids: Sequence[BlockId]) -> None:
        self._attached().absorb(block_ids)

    def close(self) -> None:
        self._pool = None
        self._model = None
        if self._masks is not None:
            self._masks.close()

    def _hidden(self, plan: StepPlan, sink: LayerSink | None) -> tuple[torch.Tensor, StepBatch]:
        """All layers of a step: what `Llama.forward` gives, and the step as tensors."""
        self._use_threads()
        pool, model = self._attached(), self._loaded()
        bounds = Bounds(
            vocab_size=self.info.vocab_size,
            max_model_tokens=self.info.max_model_tokens,
            num_blocks=pool.num_blocks,
            block_size=pool.block_size,
        )

        def layer_done(layer: int) -> None:
            pool.layer_written(layer)
            if sink is not None:
                sink.layer_done(plan.step_id, layer)

        batch = build_batch(plan, bounds, self._numerics, self._device)
        pool.copy(plan.copies)
        waited_for = sink is not None or self._device.type != "cpu"
        if not batch.num_tokens:
            return torch.empty(0, self.info.vocab_size, device=self._device), batch
        return model.forward(batch, pool, layer_done if waited_for else None), batch

    def _logits(self, hidden: torch.Tensor, batch: StepBatch) -> torch.Tensor:
        """As `logits`, but good only until the next call of this or step."""
        if not batch.num_sampled:
            return torch.empty(0, self.info.vocab_size, device=self._device)
        return self._loaded().logits(hidden, batch.sampled)[: batch.num_sampled]

    def _logits_at(self, hidden: torch.Tensor, places: list[int]) -> torch.Tensor:
        """The same of the step's tokens of these indexes."""
        padded = padded_indexes(places, self._numerics, self._device)
        return self._loaded().logits(hidden, padded)[: len(places)]

    def _attached(self) -> KvPool:
        assert self._pool is not None, "attach_pool comes first, and nothing after close"
        return self._pool

    def _loaded(self) -> Transformer:
        assert self._model is not None, "the runner is closed"
        return self._model

    def _use_threads(self) -> None:
        """OpenMP keeps the count per thread: set it on whichever thread runs the step."""
        if torch.get_num_threads() != self._num_threads:
            torch.set_num_threads(self._num_threads)
