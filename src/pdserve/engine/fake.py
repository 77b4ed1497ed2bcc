"""`FakeRunner`: a model runner without a model, for tests of everything around one.

It is deterministic and instant, and it cannot be fooled. What it writes for a token is a hash of
the token, its position, and the bytes that it *reads* in the slot before; and the token that it
draws is a hash of the bytes in all slots of the sequence. So a wrong block, a lost transfer, a
stale copy or a token out of place changes every token from there on, while chunking, caching,
hand-off and recomputing change none, as the numerics contract wants it of a real runner.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray

from pdserve.core.ids import BlockId
from pdserve.core.layout import KvLayout
from pdserve.core.request import SamplingParams
from pdserve.core.step import (
    SampledToken,
    SampleSpec,
    StepPlan,
    StepResult,
    StepRow,
    TokenLogprobs,
)
from pdserve.engine.base import LayerSink, ModelRunner, RunnerInfo
from pdserve.text.structured.masks import TokenMasks

Bytes = NDArray[np.uint8]
Allowed = NDArray[np.intp]
"""Token ids that a constrained row may draw, in order."""


class FakeRunner(ModelRunner):
    """Computes in the attached memory, or with ``staged`` in a pool of its own as a device does."""

    def __init__(
        self,
        *,
        num_layers: int = 2,
        num_kv_heads: int = 1,
        head_dim: int = 4,
        block_size: int = 16,
        dtype: str = "bf16",
        vocab_size: int = 256,
        max_model_tokens: int = 4096,
        weights_digest: str = "fake",
        numerics: str = "fake",
        staged: bool = False,
        step_s: float = 0.0,
        before_step: Callable[[StepPlan], None] | None = None,
        masks: TokenMasks | None = None,
    ) -> None:
        """``step_s`` is how long a step takes at least, for tests that must hit one in its middle;
        ``before_step`` is called on the engine thread and may raise, as a failing device does.
        Without ``masks`` no row may have a constraint."""
        self.info = RunnerInfo(
            layout=KvLayout(
                num_layers=num_layers,
                num_kv_heads=num_kv_heads,
                head_dim=head_dim,
                block_size=block_size,
                dtype=dtype,
                numerics=numerics,
                weights_digest=weights_digest,
            ),
            vocab_size=vocab_size,
            max_model_tokens=max_model_tokens,
            device="cpu",
            engine="fake",
        )
        self._staged = staged
        self._step_s = step_s
        self._before_step = before_step
        self._masks = masks
        self._memory: Bytes | None = None
        self._pool: Bytes | None = None

    def attach_pool(self, memory: memoryview, num_blocks: int) -> None:
        self._memory = bytes_of_pool(memory, self.info.layout, num_blocks)
        self._pool = np.zeros_like(self._memory) if self._staged else self._memory

    def execute(self, plan: StepPlan, sink: LayerSink | None = None) -> StepResult:
        if self._before_step is not None:
            self._before_step(plan)
        pool = self._attached()
        for source, destination in plan.copies:
            pool[:, destination] = pool[:, source]
        layers = self.info.layout.num_layers
        for layer in range(layers):
            if self._step_s:
                time.sleep(self._step_s / layers)
            for row in plan.rows:
                self._write_row(pool[layer], layer, row)
            if sink is not None:
                sink.layer_done(plan.step_id, layer)
        allowed, failures = allowed_tokens(self._masks, plan)
        return StepResult(
            step_id=plan.step_id,
            tokens=tuple(self._draw(pool, row, allowed.get(i)) for i, row in enumerate(plan.rows)),
            scores=tuple(scores_of(row, self.info.vocab_size) for row in plan.rows),
            failures=failures,
        )

    def read_kv(self, layer: int, block_ids: Sequence[BlockId]) -> None:
        assert self._memory is not None
        if self._staged:
            self._memory[layer, block_ids] = self._attached()[layer, block_ids]

    def write_kv(self, block_ids: Sequence[BlockId]) -> None:
        assert self._memory is not None
        if self._staged:
            self._attached()[:, block_ids] = self._memory[:, block_ids]

    def close(self) -> None:
        self._memory = None
        self._pool = None

    def _attached(self) -> Bytes:
        assert self._pool is not None, "attach_pool comes first, and nothing after close"
        return self._pool

    def _write_row(self, layer_blocks: Bytes, layer: int, row: StepRow) -> None:
        size = self.info.layout.block_size
        previous = b""
        if row.start:
            block, offset = divmod(row.start - 1, size)
            previous = layer_blocks[row.block_ids[block], :, :, offset].tobytes()
        for position, token in enumerate(row.token_ids, row.start):
            block, offset = divmod(position, size)
            slot = layer_blocks[row.block_ids[block], :, :, offset]
            written = _hash(slot.size, previous, token, position, layer)
            slot[:] = np.frombuffer(written, dtype=np.uint8).reshape(slot.shape)
            previous = written

    def _draw(self, pool: Bytes, row: StepRow, allowed: Allowed | None) -> tuple[SampledToken, ...]:
        if row.sample is None:
            return ()
        blocks = pool[:, list(row.block_ids[: self.info.layout.num_blocks_for(row.end)])]
        slots = np.moveaxis(blocks, 4, 2)  # [layer, block, position, 2, head, byte]
        in_order = slots.reshape(blocks.shape[0], -1, blocks[0, 0, :, :, 0].size)
        context = in_order[:, : row.end].tobytes()
        sample, vocab_size = row.sample, self.info.vocab_size
        hashes = (_hash(8, context, *draw_numbers(sample, choice)) for choice in sample.choices)
        return tuple(
            token_of(int.from_bytes(drawn, "little"), sample, vocab_size, allowed)
            for drawn in hashes
        )


def bytes_of_pool(memory: memoryview, layout: KvLayout, num_blocks: int) -> Bytes:
    """The pool as ``[layer, block, key/value, head, position in block, byte]``."""
    shape = (
        layout.num_layers,
        num_blocks,
        2,
        layout.num_kv_heads,
        layout.block_size,
        layout.slot_bytes,
    )
    flat = np.frombuffer(memory[: layout.pool_bytes(num_blocks)], dtype=np.uint8)
    return flat.reshape(shape)


def draw_numbers(sample: SampleSpec, choice: int) -> tuple[int, ...]:
    """What a token depends on besides its context: nothing, if it is greedy."""
    params = sample.params
    return (params.seed, choice, sample.index) if params.temperature > 0 else ()


def allowed_tokens(
    masks: TokenMasks | None, plan: StepPlan
) -> tuple[dict[int, Allowed], tuple[tuple[int, str], ...]]:
    """Of each constrained row the tokens that it may draw, and the rows that can draw none."""
    of_step = None if masks is None else masks.of(plan)
    if of_step is None:
        return {}, ()
    places = [place for place, row in enumerate(plan.rows) if row.sample is not None]
    allowed = {
        places[index]: np.flatnonzero(mask)
        for index, mask in zip(of_step.rows, of_step.allowed, strict=True)
    }
    return allowed, tuple((places[index], why) for index, why in of_step.failed.items())


def token_of(
    drawn: int, sample: SampleSpec, vocab_size: int, allowed: Allowed | None = None
) -> SampledToken:
    """The token of a hash: one of the ``allowed`` ones of a constrained row; of others no ending
    one before ``min_tokens``."""
    params = sample.params
    assert allowed is not None or params.constraint is None, "a constraint needs masks"
    if allowed is not None:
        token = int(allowed[drawn % len(allowed)])
        return SampledToken(token, _logprobs(token, params, vocab_size))
    token = drawn % vocab_size
    if sample.index < params.min_tokens:
        while token in params.ending_token_ids:
            token = (token + 1) % vocab_size
    return SampledToken(token, _logprobs(token, params, vocab_size))


def scores_of(row: StepRow, vocab_size: int) -> tuple[TokenLogprobs, ...]:
    """Log-probabilities of the prompt that the row is to tell."""
    if row.score is None:
        return ()
    num_top = row.score.num_top
    return tuple(_logprobs_of(token, num_top, vocab_size) for token in row.score.targets)


def _logprobs(token: int, params: SamplingParams, vocab_size: int) -> TokenLogprobs | None:
    if params.logprobs is None:
        return None
    return _logprobs_of(token, params.logprobs, vocab_size)


def _logprobs_of(token: int, num_top: int, vocab_size: int) -> TokenLogprobs:
    """Of a made-up distribution, in which the next ids follow the chosen one in rank."""
    num_top = min(num_top, vocab_size)
    top = tuple(((token + i) % vocab_size, -0.5 - i) for i in range(num_top))
    return TokenLogprobs(logprob=-0.5, rank=1, top=top)


def _hash(num_bytes: int, data: bytes, *numbers: int) -> bytes:
    digest = hashlib.shake_128(data)
    for number in numbers:
        digest.update((number & 0xFFFFFFFFFFFFFFFF).to_bytes(8, "little"))
    return digest.digest(num_bytes)
