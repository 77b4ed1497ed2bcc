"""The two compute seams.

`ModelRunner` lies below our batching: it runs one `StepPlan` and knows nothing of requests, queues
or hand-offs. `Engine` (see ``engine.foreign``) lies above batching, for engines that batch for
themselves.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from pdserve.core.ids import BlockId, StepId
from pdserve.core.layout import KvLayout
from pdserve.core.step import StepPlan, StepResult


@dataclass(frozen=True, slots=True, kw_only=True)
class RunnerInfo:
    """What a loaded runner is. ``device`` as torch names it; ``vocab_size`` in tokens."""

    layout: KvLayout
    vocab_size: int
    max_model_tokens: int
    device: str
    engine: str


class LayerSink(Protocol):
    """Told by the runner, on the engine thread, that a layer's KV of a step is written.

    On a device that computes asynchronously the runner makes the layer's KV readable through
    `ModelRunner.read_kv` before it calls (an event is recorded and waited for by the reader).
    """

    def layer_done(self, step_id: StepId, layer: int) -> None: ...


class ModelRunner(ABC):
    """Owns the weights and computes on a KV pool. All calls but `read_kv` come from one thread.

    The pool's bytes are laid out as `KvLayout` says. A CPU runner computes directly in the memory
    that `attach_pool` gives it, which the transport may share with other processes. A device
    runner keeps a pool of its own and treats that memory as landing zone and staging area:
    `read_kv` copies device -> memory, `write_kv` memory -> device.
    """

    info: RunnerInfo

    @abstractmethod
    def attach_pool(self, memory: memoryview, num_blocks: int) -> None:
        """Use ``memory`` (``layout.pool_bytes(num_blocks)`` writable bytes) as the pool."""

    @abstractmethod
    def execute(self, plan: StepPlan, sink: LayerSink | None = None) -> StepResult:
        """Run one step. Errors that concern the step are raised; the caller fails its rows."""

    @abstractmethod
    def read_kv(self, layer: int, block_ids: Sequence[BlockId]) -> None:
        """Make these blocks of a finished layer current in the attached memory. Any thread,
        several at a time."""

    @abstractmethod
    def write_kv(self, block_ids: Sequence[BlockId]) -> None:
        """Take these blocks of all layers from the attached memory into the pool."""

    @abstractmethod
    def close(self) -> None:
        """Let go of weights and pool."""
