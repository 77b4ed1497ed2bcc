"""What a machine asks of an engine, performed on one."""

from __future__ import annotations

import pytest

from pdserve.core.effects import Send
from pdserve.core.engine_work import (
    EngineAbort,
    EngineAborted,
    EngineAdopt,
    EngineAdopted,
    EngineExport,
    EngineExported,
    EngineFailed,
    EnginePhase,
    EngineStepped,
    EngineSubmit,
    EngineWork,
)
from pdserve.core.ids import AttemptId, Epoch, RequestId, WorkerId
from pdserve.core.messages import DrainWorker, TokenDelta
from pdserve.core.request import SamplingParams
from pdserve.engine.fake_foreign import FakeForeignEngine
from pdserve.serve.engine_calls import call, is_engine_call, payload_digest, step

WORK = EngineWork(
    attempt=AttemptId(RequestId("r"), Epoch(1)),
    choices=(0,),
    token_ids=tuple(range(9)),
    num_prompt_tokens=9,
    params=SamplingParams(max_tokens=4, seed=1),
)
SUBMIT = EngineSubmit(WORK, EnginePhase.PREFILL)


def prefilled() -> tuple[FakeForeignEngine, tuple[TokenDelta, ...]]:
    engine = FakeForeignEngine()
    assert call(engine, SUBMIT) is None
    stepped = step(engine)
    assert isinstance(stepped, EngineStepped)
    assert stepped.load == engine.load()
    assert stepped.elapsed_s >= 0
    assert step(engine) is None
    return engine, stepped.output.deltas


def test_an_export_is_answered_with_payload_and_digest() -> None:
    engine, _ = prefilled()
    payload = engine.export(WORK.attempt)
    exported = call(engine, EngineExport(WORK.attempt))
    assert exported == EngineExported(WORK.attempt, payload, payload_digest(payload), engine.load())
    assert len(payload_digest(payload)) == 16


def test_an_export_of_nothing_has_failed() -> None:
    failed = call(FakeForeignEngine(), EngineExport(WORK.attempt))
    assert isinstance(failed, EngineFailed)
    assert "nothing is held of r#1" in failed.detail


def test_an_abort_is_answered_with_what_is_free_then() -> None:
    engine, _ = prefilled()
    aborted = call(engine, EngineAbort(WORK.attempt))
    assert aborted == EngineAborted(WORK.attempt, None, engine.load())
    assert engine.load().free_tokens == engine.info.capacity_tokens
    assert call(engine, EngineAbort(WORK.attempt, (0,))) == EngineAborted(
        WORK.attempt, (0,), engine.load()
    )


def test_a_right_payload_is_adopted() -> None:
    prefiller, first = prefilled()
    payload, engine = prefiller.export(WORK.attempt), FakeForeignEngine()
    adopted = call(engine, EngineAdopt(WORK, first, payload, payload_digest(payload)))
    assert adopted == EngineAdopted(WORK.attempt, None, engine.load())
    stepped = step(engine)
    assert stepped is not None
    assert stepped.output.deltas[0].index == 1


def test_no_engine_is_shown_a_payload_of_another_digest() -> None:
    """Not all engines see by themselves that theirs has changed."""
    prefiller, first = prefilled()
    payload, engine = prefiller.export(WORK.attempt), FakeForeignEngine()
    adopted = call(engine, EngineAdopt(WORK, first, payload, payload_digest(payload + b"?")))
    assert isinstance(adopted, EngineAdopted)
    assert adopted.detail is not None
    assert "digest does not match" in adopted.detail
    assert step(engine) is None


def test_a_payload_that_the_engine_refuses_is_not_adopted() -> None:
    engine, payload = FakeForeignEngine(), b"no payload"
    adopted = call(engine, EngineAdopt(WORK, (), payload, payload_digest(payload)))
    assert isinstance(adopted, EngineAdopted)
    assert adopted.detail is not None
    assert "too short" in adopted.detail


def test_what_the_engine_does_not_take_has_failed() -> None:
    engine = FakeForeignEngine(max_model_tokens=9)
    failed = call(engine, SUBMIT)
    assert isinstance(failed, EngineFailed)
    assert failed.attempt == WORK.attempt
    assert "no room" in failed.detail


def test_other_effects_are_not_for_the_engine() -> None:
    send = Send(WorkerId("w"), DrainWorker())
    assert not is_engine_call(send)
    assert is_engine_call(SUBMIT)
    with pytest.raises(TypeError, match="not asked for a Send"):
        call(FakeForeignEngine(), send)
