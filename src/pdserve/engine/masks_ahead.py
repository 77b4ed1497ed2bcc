"""The masks of a step's constrained rows, computed beside its forward pass.

Which tokens a constraint allows depends on tokens that are known when the step begins, and not on
its logits. So a thread works it out while the engine thread computes; the matchers let go of the
interpreter meanwhile.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

from pdserve.core.step import StepPlan
from pdserve.text.structured.masks import Masks, TokenMasks


class MasksAhead:
    """Owned by one runner, whose thread makes all calls."""

    def __init__(self, masks: TokenMasks) -> None:
        self._masks = masks
        self._thread: ThreadPoolExecutor | None = None

    def get_ready(self) -> None:
        """Read the model's words meanwhile: no step is to wait for that. If it fails, the first
        step that needs them says so."""
        self._running().submit(self._masks.load)

    def begin(self, plan: StepPlan) -> Callable[[], Masks | None]:
        """Start on the masks of a step; what is returned waits for them."""
        if not any(row.sample and row.sample.params.constraint for row in plan.rows):
            return _none
        return self._running().submit(self._masks.of, plan).result

    def close(self) -> None:
        """End the thread. May be called again."""
        thread, self._thread = self._thread, None
        if thread is not None:
            thread.shutdown(cancel_futures=True)

    def _running(self) -> ThreadPoolExecutor:
        if self._thread is None:
            self._thread = ThreadPoolExecutor(1, "masks")
        return self._thread


def _none() -> None:
    return None
