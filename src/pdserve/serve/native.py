"""The backend of a worker that batches by our policies: `WorkerNode`, `ModelRunner`, `Pusher`."""

from __future__ import annotations

import asyncio

from pdserve.core.effects import (
    BindTransfer,
    Effect,
    Input,
    OpenTransfer,
    RunStep,
    StopTransfer,
    TransferFailed,
    VerifyTransfer,
)
from pdserve.core.ids import WorkerId
from pdserve.core.messages import Ticket
from pdserve.engine.base import ModelRunner
from pdserve.node.settings import WorkerSettings
from pdserve.node.worker import WorkerNode
from pdserve.policy.registry import make_batching
from pdserve.serve.backend import Surroundings
from pdserve.serve.engine_thread import EngineThread, post_to_loop
from pdserve.serve.start import WorkerStart
from pdserve.transport.base import Pool, Transport
from pdserve.transport.progress import LayersWritten
from pdserve.transport.push import Pusher


class NativeBackend:
    """A loaded runner with its pool. Made on the engine thread; implements ``backend.Backend``."""

    def __init__(self, start: WorkerStart, runner: ModelRunner, transport: Transport) -> None:
        info = runner.info
        self.settings = WorkerSettings(
            worker=start.worker,
            epoch=start.epoch,
            role=start.role,
            layout=info.layout,
            num_blocks=start.num_blocks,
            max_model_tokens=min(start.max_model_tokens, info.max_model_tokens),
            max_step_tokens=start.max_step_tokens,
            mixed_chunk_tokens=start.mixed_chunk_tokens,
            one_shot_tokens=start.one_shot_tokens,
        )
        self.policy = start.batching
        self.device = info.device
        self.engine = info.engine
        self._runner = runner
        self._own_pool = transport.allocate(info.layout.pool_bytes(start.num_blocks))
        self.pool: Pool | None = self._own_pool
        runner.attach_pool(self._own_pool.memory, start.num_blocks)
        self._around: Surroundings | None = None
        self._pusher: Pusher | None = None
        self._engine: EngineThread | None = None

    def begin(self, surroundings: Surroundings) -> WorkerNode:
        self._around = surroundings
        loop = asyncio.get_running_loop()

        def post(event: Input) -> None:
            post_to_loop(loop, lambda: surroundings.feed(event))

        def announce(peer: WorkerId, news: LayersWritten) -> None:
            post_to_loop(loop, lambda: surroundings.tell(peer, news))

        self._pusher = Pusher(
            runner=self._runner,
            pool_memory=self._own_pool.memory,
            layout=self.settings.layout,
            num_blocks=self.settings.num_blocks,
            post=post,
            announce=announce,
            slowness=surroundings.slowness,
        )
        self._engine = EngineThread(
            surroundings.jobs, self._runner, self._pusher, surroundings.feed
        )
        return WorkerNode(self.settings, make_batching(self.policy))

    def perform(self, effect: Effect) -> None:
        assert self._engine is not None
        assert self._pusher is not None
        match effect:
            case RunStep(plan):
                self._engine.run_step(plan)
            case OpenTransfer():
                self._pusher.open(effect)
            case BindTransfer():
                self._bind(effect)
            case StopTransfer(attempt):
                self._pusher.stop(attempt)
            case VerifyTransfer():
                self._pusher.verify(effect)
            case _:
                raise TypeError(f"a native worker does not perform {type(effect).__name__}")

    def granting(self, ticket: Ticket) -> None:
        assert self._pusher is not None
        self._pusher.expect(ticket)

    def written(self, news: LayersWritten) -> None:
        assert self._pusher is not None
        self._pusher.written(news)

    def close(self) -> None:
        if self._pusher is not None:
            self._pusher.close()
        if self._around is not None:
            self._around.jobs.post(self._runner.close)
        self._own_pool.close()

    def _bind(self, effect: BindTransfer) -> None:
        assert self._around is not None
        assert self._pusher is not None
        found = self._around.remote(effect.peer, effect.peer_epoch)
        if found is None:
            detail = f"the KV pool of {effect.peer} (process {effect.peer_epoch}) is not attached"
            self._around.feed(TransferFailed(attempt=effect.ticket.attempt, detail=detail))
            return
        remote, num_bytes = found
        self._pusher.bind(effect, remote, num_bytes // self.settings.layout.pool_bytes(1))
