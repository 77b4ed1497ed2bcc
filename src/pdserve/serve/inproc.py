"""A whole cluster in one process: the same gateway, workers and links, without processes.

For tests, examples and notebooks. Every worker has its own engine and transfer threads; their
machines, the router and all sockets share one event loop. Links are the same abstract sockets with
the same proofs; KV moves through the ``inproc`` transport. `InprocCluster.kill` ends a worker
without a word, as ``kill -9`` would, and `InprocCluster.restart` starts the slot's next process.
"""

from __future__ import annotations

import asyncio
import os
import secrets
from collections.abc import Callable, Coroutine, Mapping, Sequence
from dataclasses import dataclass, replace
from types import TracebackType
from typing import Any

from pdserve.api.gateway import ModelCard
from pdserve.core.effects import Refusal
from pdserve.core.ids import GATEWAY, Epoch, WorkerId
from pdserve.core.request import Role
from pdserve.engine.base import ModelRunner
from pdserve.node.router import RouterNode
from pdserve.node.settings import RouterSettings
from pdserve.policy.registry import DEFAULT_POLICY, make_policy
from pdserve.serve.driver import Recorder
from pdserve.serve.gateway import LiveGateway
from pdserve.serve.greetings import Identity
from pdserve.serve.links import new_address
from pdserve.serve.recorder import recorder_of
from pdserve.serve.runners import build_runner, load_backend
from pdserve.serve.start import WorkerStart
from pdserve.serve.worker import Worker
from pdserve.transport.inproc import InprocHub, InprocTransport

RunnerBuilder = Callable[[WorkerStart], ModelRunner]


@dataclass(slots=True)
class _Slot:
    start: WorkerStart
    worker: Worker | None = None
    task: asyncio.Task[None] | None = None


class InprocCluster:
    """An async context manager; everything runs between enter and exit.

    ``template`` says what all workers have in common; its ids, addresses and secret are replaced.
    ``build`` makes a worker's runner, on that worker's engine thread. ``policy`` routes, written as
    `make_policy` takes it.
    """

    def __init__(
        self,
        card: ModelCard,
        workers: Sequence[tuple[WorkerId, Role]],
        template: WorkerStart,
        build: RunnerBuilder = build_runner,
        *,
        policy: str = DEFAULT_POLICY,
        router: RouterSettings | None = None,
        record: str | None = None,
    ) -> None:
        self._card = card
        self._roles: Mapping[WorkerId, Role] = dict(workers)
        self._build = build
        self._policy = policy
        self._router = router or RouterSettings()
        self._record = record
        self._hub = InprocHub()
        self._secret = secrets.token_bytes(32)
        self._gateway_address = new_address()
        self._failure: str | None = None
        self._tasks: set[asyncio.Task[None]] = set()
        self._slots = {
            worker: _Slot(
                replace(
                    template,
                    worker=worker,
                    epoch=Epoch(0),
                    role=role,
                    secret=self._secret,
                    gateway_address=self._gateway_address,
                    launcher_pid=os.getpid(),
                    transport=InprocTransport.name,
                    record=record,
                )
            )
            for worker, role in workers
        }
        self.gateway: LiveGateway
        self.router: RouterNode

    async def __aenter__(self) -> InprocCluster:
        self.router = RouterNode(self._router, make_policy(self._policy))
        recorder: Recorder | None = recorder_of(self._record, self._policy, router=self._router)
        self.gateway = LiveGateway(
            card=self._card,
            machine=self.router,
            address=self._gateway_address,
            identity=Identity(worker=GATEWAY, epoch=Epoch(0), role=None, secret=self._secret),
            roles=self._roles,
            supervisor=self,
            recorder=recorder,
            crashed=self._crashed,
            books=self.router.books,
            policy=self._policy,
        )
        for worker in self._slots:
            self.restart(worker)
        try:
            await asyncio.gather(*(slot.task for slot in self._slots.values() if slot.task))
            await self.gateway.until_ready()
        except BaseException as error:
            await self.__aexit__(type(error), error, None)
            raise
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.gateway.fail_all(Refusal.DRAINING, "the cluster is closed")
        self.gateway.close()
        await asyncio.gather(*(self._end(slot) for slot in self._slots.values()))
        if self._failure is not None and error is None:
            raise RuntimeError(self._failure)

    # --- what a test does to it ---------------------------------------------------------------

    def worker(self, worker: WorkerId) -> Worker:
        """The running worker of a slot, to look into."""
        found = self._slots[worker].worker
        assert found is not None, f"{worker} does not run"
        return found

    def restart(self, worker: WorkerId) -> None:
        """Start the next process of a slot that has none."""
        slot = self._slots[worker]
        assert slot.worker is None, f"{worker} runs"
        slot.start = replace(slot.start, epoch=Epoch(slot.start.epoch + 1), address=new_address())
        start, transport = slot.start, InprocTransport(self._hub)
        slot.worker = Worker(
            start,
            lambda: load_backend(start, transport, self._build),
            transport,
            ended=lambda reason: self._ended(start, reason),
        )
        slot.task = asyncio.get_running_loop().create_task(slot.worker.run())

    # --- Supervisor ---------------------------------------------------------------------------

    def expects(self, worker: WorkerId, epoch: Epoch) -> bool:
        slot = self._slots.get(worker)
        return slot is not None and slot.worker is not None and slot.start.epoch == epoch

    def ready(self, worker: WorkerId, epoch: Epoch) -> None:
        """Nothing depends on it here: there is no back-off."""

    def kill(self, worker: WorkerId, epoch: Epoch | None = None) -> None:
        """End the slot's process (this one of them) without a word."""
        slot = self._slots[worker]
        if slot.worker is not None and epoch in (None, slot.start.epoch):
            self._spawn(self._kill(slot))

    def hold(self, worker: WorkerId, for_s: float | None) -> None:
        """Nothing is started here by itself."""

    def release(self) -> None:
        """As `hold`."""

    def slots(self) -> Sequence[tuple[WorkerId, Epoch, int | None]]:
        return tuple(
            (worker, slot.start.epoch, None if slot.worker is None else os.getpid())
            for worker, slot in self._slots.items()
        )

    # --- inside -------------------------------------------------------------------------------

    async def _kill(self, slot: _Slot) -> None:
        start = slot.start
        if await self._end(slot):
            self.gateway.worker_ended(start.worker, start.epoch, "killed")

    async def _end(self, slot: _Slot) -> bool:
        """Close the slot's worker; True if there was one. Its threads have ended on return."""
        worker, slot.worker = slot.worker, None
        task, slot.task = slot.task, None
        if worker is None or task is None:
            return False
        task.cancel()
        await asyncio.wait((task,))
        if not task.cancelled() and task.exception() is not None:
            self._failure = self._failure or f"{slot.start.worker}: {task.exception()!r}"
        while not await worker.close():
            pass  # a step still runs: its end is what makes this worker dead
        return True

    def _ended(self, start: WorkerStart, reason: str) -> None:
        slot = self._slots[start.worker]
        if slot.worker is None or slot.start is not start:
            return
        if slot.worker.is_broken:
            self._crashed(f"{start.worker}: {reason}")
        self._spawn(self._kill(slot))

    def _crashed(self, reason: str) -> None:
        self._failure = self._failure or reason

    def _spawn(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
