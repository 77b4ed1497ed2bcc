"""The threads of a worker beside its node thread: one job at a time, asleep between jobs.

A `JobThread` runs what it is given in order and posts nothing by itself: a job that has an answer
hands it to the event loop. The engine thread is a `JobThread` on which the runner is built, steps
and is closed, so that everything the runner keeps per thread (a CUDA stream, a pool of OpenMP
threads) is made once.
"""

from __future__ import annotations

import asyncio
import logging
import threading
import time
from collections.abc import Callable
from queue import SimpleQueue
from typing import Protocol, TypeVar

from pdserve.core.effects import Input, StepDone
from pdserve.core.ids import StepId
from pdserve.core.step import StepPlan, StepResult
from pdserve.engine.base import LayerSink, ModelRunner

log = logging.getLogger(__name__)

Answer = TypeVar("Answer")


class StepSink(LayerSink, Protocol):
    """A layer sink that also hears where a step begins and ends; engine thread only."""

    def begin_step(self, plan: StepPlan) -> None: ...

    def end_step(self, step_id: StepId, ok: bool) -> None: ...


class JobThread:
    """A named thread that runs jobs in the order in which they are posted."""

    def __init__(self, name: str) -> None:
        self._jobs: SimpleQueue[Callable[[], None] | None] = SimpleQueue()
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)
        self._thread.start()

    def post(self, job: Callable[[], None]) -> None:
        """Run the job after those posted before it. It must catch its own errors."""
        self._jobs.put(job)

    async def call(self, job: Callable[[], Answer]) -> Answer:
        """Run the job there, and wait for what it returns or raises without blocking the loop."""
        loop = asyncio.get_running_loop()
        answer: asyncio.Future[Answer] = loop.create_future()

        def settle(value: Answer | None, error: BaseException | None) -> None:
            if answer.cancelled():
                return
            if error is not None:
                answer.set_exception(error)
            else:
                answer.set_result(value)  # type: ignore[arg-type]

        def run() -> None:
            try:
                value, error = job(), None
            except Exception as caught:
                value, error = None, caught
            post_to_loop(loop, lambda: settle(value, error))

        self.post(run)
        return await answer

    def close(self, timeout_s: float | None = None) -> bool:
        """End after the jobs already posted; False if they take longer than ``timeout_s``."""
        self._jobs.put(None)
        self._thread.join(timeout_s)
        return not self._thread.is_alive()

    def _run(self) -> None:
        while (job := self._jobs.get()) is not None:
            job()
            del job  # what it refers to must not live until the next one


def post_to_loop(loop: asyncio.AbstractEventLoop, callback: Callable[[], None]) -> None:
    """Run on the loop's thread. Silent if the loop has been closed: nobody is left to hear."""
    try:
        loop.call_soon_threadsafe(callback)
    except RuntimeError:
        log.debug("the event loop is closed; an answer is dropped")


class EngineThread:
    """Runs the steps of one runner and posts a `StepDone` for each, whatever happens in it."""

    def __init__(
        self,
        thread: JobThread,
        runner: ModelRunner,
        sink: StepSink,
        feed: Callable[[Input], None],
    ) -> None:
        self._thread = thread
        self._runner = runner
        self._sink = sink
        self._feed = feed
        self._loop = asyncio.get_running_loop()

    def run_step(self, plan: StepPlan) -> None:
        """Start a step; the machine sees to it that only one is under way."""
        self._thread.post(lambda: self._step(plan))

    def _step(self, plan: StepPlan) -> None:
        begun_s = time.monotonic()
        self._sink.begin_step(plan)
        try:
            # Nobody listens to the layers of a step that pushes nothing: they run in one call.
            pushes = any(row.pushes for row in plan.rows)
            result = self._runner.execute(plan, self._sink if pushes else None)
        except Exception as error:
            requests = ",".join(sorted({str(row.attempt) for row in plan.rows}))
            log.exception("step failed: step=%d attempts=%s", plan.step_id, requests)
            result = StepResult(
                step_id=plan.step_id, tokens=(), error=f"{type(error).__name__}: {error}"
            )
        self._sink.end_step(plan.step_id, result.error is None)
        done = StepDone(result, time.monotonic() - begun_s)
        post_to_loop(self._loop, lambda: self._feed(done))
