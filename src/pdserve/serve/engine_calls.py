"""From what a `ForeignWorkerNode` asks of its engine to calls on the `Engine`, and back.

Everything here runs on the engine thread. Digests are made and checked here too: a payload is too
long to be hashed on the thread that sockets and timers share.
"""

from __future__ import annotations

import time

from pdserve.core.effects import Effect, Input
from pdserve.core.engine_work import (
    EngineAbort,
    EngineAborted,
    EngineAdopt,
    EngineAdopted,
    EngineExport,
    EngineExported,
    EngineFailed,
    EngineStepped,
    EngineSubmit,
)
from pdserve.core.errors import ContextLengthError, PayloadError
from pdserve.engine.foreign import Engine
from pdserve.transport.digest import DIGEST_ALGORITHM, DIGESTS


def is_engine_call(effect: Effect) -> bool:
    """True if the effect is one that `call` performs."""
    return isinstance(effect, EngineSubmit | EngineAbort | EngineExport | EngineAdopt)


def call(engine: Engine, effect: Effect) -> Input | None:
    """Perform the effect; gives the input that answers it, if one does at once.

    Any exception means that the engine is broken.
    """
    match effect:
        case EngineSubmit(work, phase):
            try:
                engine.submit(work, phase)
            except ContextLengthError as error:
                return EngineFailed(work.attempt, str(error), engine.load())
            return None
        case EngineAbort(attempt, choices):
            engine.abort(attempt, choices)
            return EngineAborted(attempt, choices, engine.load())
        case EngineExport(attempt):
            try:
                payload = engine.export(attempt)
            except PayloadError as error:
                return EngineFailed(attempt, str(error), engine.load())
            return EngineExported(attempt, payload, payload_digest(payload), engine.load())
        case EngineAdopt(work):
            return EngineAdopted(work.attempt, _adopt(engine, effect), engine.load())
        case _:
            raise TypeError(f"an engine is not asked for a {type(effect).__name__}")


def step(engine: Engine) -> EngineStepped | None:
    """One iteration; None if there is nothing to compute."""
    begun_s = time.monotonic()
    output = engine.step()
    if output is None:
        return None
    return EngineStepped(output, engine.load(), time.monotonic() - begun_s)


def payload_digest(payload: bytes) -> bytes:
    """What stands in the trailer of an opaque hand-off."""
    digest = DIGESTS[DIGEST_ALGORITHM]()
    digest.update(memoryview(payload))
    return digest.digest()


def _adopt(engine: Engine, effect: EngineAdopt) -> str | None:
    """Why the payload cannot be taken, or None if it is."""
    if payload_digest(effect.payload) != effect.digest:
        return "the payload's digest does not match: its bytes were changed on the way"
    try:
        engine.adopt(effect.work, effect.first_tokens, effect.payload)
    except PayloadError as error:
        return str(error)
    return None
