"""A runner that can be held, or broken, at one moment of its worker's life."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from typing import Generic, TypeVar

from pdserve.core.ids import BlockId
from pdserve.core.step import StepPlan, StepResult
from pdserve.engine.base import LayerSink, ModelRunner

Thing = TypeVar("Thing")
HOLD_TIMEOUT_S = 120.0


class Gate(Generic[Thing]):
    """Where a thread of a worker waits. ``reached`` is called on that thread when it begins to."""

    def __init__(self, reached: Callable[[], None]) -> None:
        self.is_held = False
        self._reached = reached
        self.has_broken = False
        self._holds: Callable[[Thing], bool] | None = None
        self._breaks: Callable[[Thing], bool] | None = None
        self._open = threading.Event()

    def hold(self, holds: Callable[[Thing], bool]) -> None:
        """Hold the first thing of which this is true, until `release`."""
        self._open.clear()
        self._holds = holds

    def release(self) -> None:
        """Let the thread go on, and hold nothing any more."""
        self._holds = None
        self.is_held = False
        self._open.set()

    def break_once(self, breaks: Callable[[Thing], bool]) -> None:
        """Let the first thing of which this is true fail."""
        self.has_broken = False
        self._breaks = breaks

    def passes(self, thing: Thing) -> None:
        holds, breaks = self._holds, self._breaks
        if breaks is not None and breaks(thing):
            self._breaks = None
            self.has_broken = True
            raise RuntimeError("broken by a test")
        if holds is not None and holds(thing):
            self.is_held = True
            self._reached()
            assert self._open.wait(HOLD_TIMEOUT_S), "held, and never released"


class HeldRunner(ModelRunner):
    """``steps`` holds the engine thread before a step, ``pushes`` the transfer thread before it
    writes a layer."""

    def __init__(self, inner: ModelRunner, steps: Gate[StepPlan], pushes: Gate[int]) -> None:
        self.info = inner.info
        self._inner = inner
        self._steps = steps
        self._pushes = pushes

    def attach_pool(self, memory: memoryview, num_blocks: int) -> None:
        self._inner.attach_pool(memory, num_blocks)

    def execute(self, plan: StepPlan, sink: LayerSink | None = None) -> StepResult:
        self._steps.passes(plan)
        return self._inner.execute(plan, sink)

    def read_kv(self, layer: int, block_ids: Sequence[BlockId]) -> None:
        self._pushes.passes(layer)
        self._inner.read_kv(layer, block_ids)

    def write_kv(self, block_ids: Sequence[BlockId]) -> None:
        self._inner.write_kv(block_ids)

    def close(self) -> None:
        self._inner.close()
