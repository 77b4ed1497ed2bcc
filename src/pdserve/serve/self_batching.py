"""The backend of a worker whose engine batches for itself: `ForeignWorkerNode` and an `Engine`.

All calls to the engine come from the engine thread, in the order of the effects. While the engine
has something to compute, a step follows each call, and each step posts the next one behind the
calls that have come meanwhile; when it has nothing, the thread sleeps until a call comes.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from functools import partial

from pdserve.core.effects import Effect, Input
from pdserve.core.layout import KvLayout
from pdserve.core.messages import Ticket
from pdserve.engine.foreign import Engine
from pdserve.node.foreign import ForeignWorkerNode
from pdserve.node.settings import ForeignSettings, WorkerSettings
from pdserve.serve.backend import Surroundings
from pdserve.serve.engine_calls import call, is_engine_call, step
from pdserve.serve.engine_thread import post_to_loop
from pdserve.serve.start import WorkerStart
from pdserve.transport.base import Pool
from pdserve.transport.progress import LayersWritten

log = logging.getLogger(__name__)


class SelfBatchingBackend:
    """A loaded engine. Implements ``backend.Backend``."""

    policy = ""
    pool: Pool | None = None

    def __init__(self, start: WorkerStart, engine: Engine) -> None:
        info = engine.info
        self.settings = WorkerSettings(
            worker=start.worker,
            epoch=start.epoch,
            role=start.role,
            layout=KvLayout(
                num_layers=0,
                num_kv_heads=0,
                head_dim=0,
                block_size=start.block_size,
                dtype="opaque",
                numerics=info.numerics,
                weights_digest=info.weights_digest,
            ),
            num_blocks=info.capacity_tokens // start.block_size,
            max_model_tokens=min(start.max_model_tokens, info.max_model_tokens),
            max_step_tokens=start.max_step_tokens,
            foreign=ForeignSettings(
                payload_format=info.capabilities.payload_format,
                recomputes_first_token=info.capabilities.recomputes_first_token,
            ),
        )
        self.device = info.device
        self.engine = info.engine
        self._calls = engine
        self._around: Surroundings | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        # Of the engine thread: whether a step is posted, and whether the engine may be called.
        self._stepping = False
        self._open = True

    def begin(self, surroundings: Surroundings) -> ForeignWorkerNode:
        self._around = surroundings
        self._loop = asyncio.get_running_loop()
        return ForeignWorkerNode(self.settings)

    def perform(self, effect: Effect) -> None:
        if not is_engine_call(effect):
            raise TypeError(f"a self-batching worker does not perform {type(effect).__name__}")
        self._post(partial(self._call, effect))

    def granting(self, ticket: Ticket) -> None:
        """Payloads come in messages: nothing is written anywhere."""

    def written(self, news: LayersWritten) -> None:
        """As above."""

    def close(self) -> None:
        if self._around is not None:
            self._post(self._close)

    # --- engine thread ------------------------------------------------------------------------

    def _call(self, effect: Effect) -> None:
        self._ask(lambda: call(self._calls, effect))
        if not self._stepping:
            self._stepping = True
            self._post(self._step)

    def _step(self) -> None:
        if self._ask(lambda: step(self._calls)):
            self._post(self._step)
        else:
            self._stepping = False

    def _ask(self, ask: Callable[[], Input | None]) -> bool:
        """Ask the engine and pass on what it says; False if that is nothing."""
        if not self._open:
            return False
        try:
            answer = ask()
        except Exception as error:
            broken = error
            log.exception("the engine is broken")
            self._open = False
            self._tell(lambda around: around.broken(broken))
            return False
        if answer is None:
            return False
        said = answer
        self._tell(lambda around: around.feed(said))
        return True

    def _close(self) -> None:
        self._open = False
        self._calls.close()

    # --- any thread ---------------------------------------------------------------------------

    def _post(self, job: Callable[[], None]) -> None:
        assert self._around is not None
        self._around.jobs.post(job)

    def _tell(self, tell: Callable[[Surroundings], None]) -> None:
        around, loop = self._around, self._loop
        assert around is not None
        assert loop is not None
        post_to_loop(loop, lambda: tell(around))
