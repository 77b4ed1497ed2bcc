"""The engine thread: every step is answered, in order, whatever happens in it."""

from __future__ import annotations

import asyncio
import logging
import threading
from collections.abc import Awaitable, Callable, Sequence

import pytest

from pdserve.core.effects import Input, StepDone
from pdserve.core.ids import AttemptId, BlockId, Epoch, RequestId, StepId
from pdserve.core.step import SampledToken, StepPlan, StepResult, StepRow
from pdserve.engine.base import LayerSink, ModelRunner
from pdserve.serve.engine_thread import EngineThread, JobThread


class Runner(ModelRunner):
    """Says which thread it ran on by the token that it samples; step 13 is unlucky."""

    def __init__(self) -> None:
        self.threads: list[str] = []

    def attach_pool(self, memory: memoryview, num_blocks: int) -> None: ...

    def execute(self, plan: StepPlan, sink: LayerSink | None = None) -> StepResult:
        self.threads.append(threading.current_thread().name)
        if sink is not None:
            sink.layer_done(plan.step_id, 0)
        if plan.step_id == 13:
            raise ZeroDivisionError("of all numbers")
        return StepResult(step_id=plan.step_id, tokens=((SampledToken(7),),))

    def read_kv(self, layer: int, block_ids: Sequence[BlockId]) -> None: ...

    def write_kv(self, block_ids: Sequence[BlockId]) -> None: ...

    def close(self) -> None: ...


class Sink:
    def __init__(self) -> None:
        self.calls: list[str] = []

    def begin_step(self, plan: StepPlan) -> None:
        self.calls.append(f"begin {plan.step_id}")

    def layer_done(self, step_id: StepId, layer: int) -> None:
        self.calls.append(f"layer {layer} of {step_id}")

    def end_step(self, step_id: StepId, ok: bool) -> None:
        self.calls.append(f"end {step_id} {'well' if ok else 'badly'}")


def plan(number: int, *, pushes: bool = True) -> StepPlan:
    row = StepRow(
        attempt=AttemptId(RequestId(f"req-{number}"), Epoch(1)),
        token_ids=(1,),
        start=0,
        block_ids=(BlockId(0),),
        sample=None,
        pushes=pushes,
    )
    return StepPlan(step_id=StepId(number), rows=(row,))


def run(work: Callable[[], Awaitable[None]]) -> None:
    async def bounded() -> None:
        await asyncio.wait_for(work(), 10)

    asyncio.run(bounded())


def test_steps_are_answered_in_order_and_a_failed_one_with_its_error(
    caplog: pytest.LogCaptureFixture,
) -> None:
    async def work() -> None:
        answers: asyncio.Queue[Input] = asyncio.Queue()
        thread, runner, sink = JobThread("engine under test"), Runner(), Sink()
        engine = EngineThread(thread, runner, sink, answers.put_nowait)
        for number in (12, 13, 14):
            engine.run_step(plan(number))
        engine.run_step(plan(15, pushes=False))
        results = []
        for _ in range(4):
            answer = await answers.get()
            assert isinstance(answer, StepDone)
            assert answer.elapsed_s >= 0
            results.append((answer.result.step_id, answer.result.error))
        unlucky = (13, "ZeroDivisionError: of all numbers")
        assert results == [(12, None), unlucky, (14, None), (15, None)]
        assert sink.calls[3:6] == ["begin 13", "layer 0 of 13", "end 13 badly"]
        assert sink.calls[-3:] == ["end 14 well", "begin 15", "end 15 well"]
        assert set(runner.threads) == {"engine under test"}
        assert thread.close(10)

    with caplog.at_level(logging.ERROR):
        run(work)
    assert "req-13#1" in caplog.text  # the log says whose step it was


def test_a_call_gives_back_what_the_job_returns_or_raises() -> None:
    async def work() -> None:
        thread = JobThread("t")
        assert await thread.call(lambda: threading.current_thread().name) == "t"
        with pytest.raises(KeyError, match="missing"):
            await thread.call(lambda: {}["missing"])
        assert thread.close(10)

    run(work)


def test_closing_waits_no_longer_than_told_and_jobs_posted_before_still_run() -> None:
    async def work() -> None:
        gate, done = threading.Event(), threading.Event()
        thread = JobThread("t")
        thread.post(lambda: gate.wait(10) and None)  # type: ignore[func-returns-value]
        thread.post(done.set)
        assert not thread.close(0.01)
        gate.set()
        assert thread.close(10)
        assert done.is_set()

    run(work)


def test_an_answer_after_the_loop_has_closed_is_dropped() -> None:
    gate, ran = threading.Event(), threading.Event()
    threads: list[JobThread] = []

    async def work() -> None:
        answers: list[Input] = []
        thread = JobThread("t")
        threads.append(thread)
        engine = EngineThread(thread, Runner(), Sink(), answers.append)
        thread.post(lambda: gate.wait(10) and None)  # type: ignore[func-returns-value]
        engine.run_step(plan(1))
        thread.post(ran.set)

    run(work)
    gate.set()
    assert ran.wait(10)
    assert threads[0].close(10)
