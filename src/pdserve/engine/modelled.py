"""`ModelledRunner`: a model runner without a model that takes the time which one would take.

For scheduling at scale: a step waits for as long as a step model says, and computes next to
nothing, so that many workers run on few cores. It spreads a step over its layers as a real engine
does, so a push overlaps with the prefill; and `read_kv`, with which the transfer thread asks for
blocks to send, takes what the link would need for them.

Its tokens still prove the KV. The slot of a token holds a rolling hash of the slot before, the
token and its position; the token that is drawn is a hash of the last slot in use of every block of
the sequence. So a lost transfer, a wrong block or a token out of place changes the next token and
all later ones, while chunking, caching, hand-off and recomputing change none. (`FakeRunner` reads
every byte of every slot, and is the one for tests of a transport.)
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from pdserve.core.errors import ConfigError
from pdserve.core.ids import BlockId
from pdserve.core.layout import KvLayout
from pdserve.core.step import SampledToken, SampleSpec, StepPlan, StepResult, StepRow
from pdserve.cost.step_times import INSTANT, StepTimes
from pdserve.engine.base import LayerSink, ModelRunner, RunnerInfo
from pdserve.engine.fake import (
    Allowed,
    allowed_tokens,
    bytes_of_pool,
    draw_numbers,
    token_of,
)
from pdserve.text.structured.masks import TokenMasks

Words = NDArray[np.uint64]

_MASK = (1 << 64) - 1
_STEP = 0x9E3779B97F4A7C15
_FACTORS = (0xBF58476D1CE4E5B9, 0x94D049BB133111EB)
_SLOT_BYTES = 8


class ModelledRunner(ModelRunner):
    """Computes in the attached memory. ``times`` says how long; the default is no time at all."""

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
        times: StepTimes = INSTANT,
        masks: TokenMasks | None = None,
    ) -> None:
        """Raises `ConfigError` for keys too short to hold a hash."""
        layout = KvLayout(
            num_layers=num_layers,
            num_kv_heads=num_kv_heads,
            head_dim=head_dim,
            block_size=block_size,
            dtype=dtype,
            numerics="modelled",
            weights_digest="modelled " + _name_of(times),
        )
        if layout.slot_bytes < _SLOT_BYTES:
            raise ConfigError(
                f"the engine modelled needs {_SLOT_BYTES} bytes a key, and {head_dim} numbers in "
                f"{dtype} are fewer; choose a model with longer heads"
            )
        self.info = RunnerInfo(
            layout=layout,
            vocab_size=vocab_size,
            max_model_tokens=max_model_tokens,
            device=f"modelled x{times.speed:g}",
            engine="modelled",
        )
        self._times = times
        self._masks = masks
        self._memory: memoryview | None = None
        self._slots: Words | None = None

    def attach_pool(self, memory: memoryview, num_blocks: int) -> None:
        self._memory = memory
        # The first bytes of the first head's key: [layer, block, position in block].
        pool = bytes_of_pool(memory, self.info.layout, num_blocks)
        keys = pool[:, :, 0, 0, :, :_SLOT_BYTES]
        self._slots = keys.view(np.uint64)[..., 0]

    def execute(self, plan: StepPlan, sink: LayerSink | None = None) -> StepResult:
        begun_s = time.monotonic()
        slots = self._attached()
        for source, destination in plan.copies:
            self._copy(source, destination)
        step_s = self._times.step_s(plan.shape)
        for row in plan.rows:
            self._write(slots, row)
        allowed, failures = allowed_tokens(self._masks, plan)
        tokens = tuple(self._draw(slots, row, allowed.get(i)) for i, row in enumerate(plan.rows))
        layers = self.info.layout.num_layers
        # Who pushes nothing has nobody who listens to its layers: it wakes up once.
        pushes = sink is not None and any(row.pushes for row in plan.rows)
        for layer in range(layers):
            if pushes or layer == layers - 1:
                _wait_until(begun_s + step_s * (layer + 1) / layers)
            if sink is not None:
                sink.layer_done(plan.step_id, layer)
        return StepResult(step_id=plan.step_id, tokens=tokens, failures=failures)

    def read_kv(self, layer: int, block_ids: Sequence[BlockId]) -> None:
        """Nothing is to be copied; the link takes its time."""
        layout = self.info.layout
        tokens = len(block_ids) * layout.block_size
        _wait_until(time.monotonic() + tokens * self._times.transfer_s / layout.num_layers)

    def write_kv(self, block_ids: Sequence[BlockId]) -> None:
        """What arrives lies where it is read."""

    def close(self) -> None:
        self._memory = None
        self._slots = None

    def _attached(self) -> Words:
        assert self._slots is not None, "attach_pool comes first, and nothing after close"
        return self._slots

    def _copy(self, source: BlockId, destination: BlockId) -> None:
        slots = self._attached()
        slots[:, destination] = slots[:, source]

    def _write(self, slots: Words, row: StepRow) -> None:
        """The slot at position p is the sum of the hashes of (token, position) up to p, and of the
        layer: a sum that runs on from the slot before, so that a chunk is one cumulative sum."""
        size = self.info.layout.block_size
        layers = np.arange(1, len(slots) + 1, dtype=np.uint64)
        before = layers
        if row.start:
            before = slots[:, row.block_ids[(row.start - 1) // size], (row.start - 1) % size]
        if len(row.token_ids) == 1:
            word = np.uint64(_mixed(row.token_ids[0] ^ (row.start + 1) << 32))
            with np.errstate(over="ignore"):
                slots[:, row.block_ids[row.start // size], row.start % size] = before + word
            return
        positions = np.arange(row.start, row.end, dtype=np.uint64)
        tokens = np.array(row.token_ids, dtype=np.uint64)
        sums = np.cumsum(_all_mixed(tokens ^ (positions + np.uint64(1)) << np.uint64(32)))
        first = row.start // size
        table = row.block_ids[first : -(-row.end // size)]
        if len(table) < -(-row.end // size) - first:
            raise IndexError(f"{len(row.block_ids)} blocks do not hold {row.end} tokens")
        blocks = np.array(table, dtype=np.int64)[positions.astype(np.int64) // size - first]
        slots[:, blocks, positions.astype(np.int64) % size] = before[:, None] + sums

    def _draw(
        self, slots: Words, row: StepRow, allowed: Allowed | None
    ) -> tuple[SampledToken, ...]:
        if row.sample is None:
            return ()
        size = self.info.layout.block_size
        last_block, last = divmod(row.end - 1, size)
        whole = slots[:, row.block_ids[:last_block], size - 1]
        seen = whole.tobytes() + slots[:, row.block_ids[last_block], last].tobytes()
        return tuple(
            self._token(seen, row.sample, choice, allowed) for choice in row.sample.choices
        )

    def _token(
        self, seen: bytes, sample: SampleSpec, choice: int, allowed: Allowed | None
    ) -> SampledToken:
        digest = hashlib.blake2b(seen, digest_size=8)
        for number in draw_numbers(sample, choice):
            digest.update((number & _MASK).to_bytes(8, "little"))
        drawn = int.from_bytes(digest.digest(), "little")
        return token_of(drawn, sample, self.info.vocab_size, allowed)


def _wait_until(at_s: float) -> None:
    wait_s = at_s - time.monotonic()
    if wait_s > 0:
        time.sleep(wait_s)


def _name_of(times: StepTimes) -> str:
    """The same for workers that differ in nothing but their speed: their KV is alike."""
    return hashlib.blake2b(str(times).encode(), digest_size=8).hexdigest()


def _mixed(word: int) -> int:
    """A word of 64 bits that looks like any other (SplitMix64; Steele, Lea and Flood 2014)."""
    word = (word + _STEP) & _MASK
    word = ((word ^ word >> 30) * _FACTORS[0]) & _MASK
    word = ((word ^ word >> 27) * _FACTORS[1]) & _MASK
    return word ^ word >> 31


def _all_mixed(words: Words) -> Words:
    """`_mixed` of each."""
    words = words + np.uint64(_STEP)
    words = (words ^ words >> np.uint64(30)) * np.uint64(_FACTORS[0])
    words = (words ^ words >> np.uint64(27)) * np.uint64(_FACTORS[1])
    return words ^ words >> np.uint64(31)
