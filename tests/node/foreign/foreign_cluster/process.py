"""One worker process: its node machine, and what lies below it."""

from __future__ import annotations

from collections import deque
from typing import Protocol

from foreign_cluster.answers import VOCAB_SIZE, WEIGHTS
from pdserve.core.effects import (
    Effect,
    Input,
    OpenTransfer,
    RunStep,
    StepDone,
    StopTransfer,
    TransferStopped,
)
from pdserve.core.engine_work import EngineAdopt
from pdserve.core.ids import BlockId, Epoch, WorkerId
from pdserve.core.messages import Message
from pdserve.core.step import SampledToken, StepPlan, StepResult, StepRow
from pdserve.engine.fake_payload import draw, next_state, root_state
from pdserve.engine.foreign import Engine
from pdserve.node.foreign import ForeignWorkerNode
from pdserve.node.settings import WorkerSettings
from pdserve.node.worker import WorkerNode
from pdserve.serve.engine_calls import call, is_engine_call, step


class Backend(Protocol):
    """What computes. ``can_act``: its thread has something to do; ``act`` does one thing."""

    @property
    def can_act(self) -> bool: ...

    def perform(self, effect: Effect) -> None: ...

    def act(self) -> Input | None: ...


class ForeignBackend:
    """An engine and its thread. ``damage_next``: the next payload to adopt changes on the way.
    ``hangs``: a call or a step does not come back."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self.damage_next = False
        self.hangs = False
        self._calls: deque[Effect] = deque()
        self._idle = True

    @property
    def can_act(self) -> bool:
        return not self.hangs and (bool(self._calls) or not self._idle)

    def perform(self, effect: Effect) -> None:
        assert is_engine_call(effect), effect
        if isinstance(effect, EngineAdopt) and self.damage_next:
            self.damage_next = False
            damaged = effect.payload[:-1] + b"?"
            effect = EngineAdopt(effect.work, effect.first_tokens, damaged, effect.digest)
        self._calls.append(effect)

    def act(self) -> Input | None:
        if self._calls:
            self._idle = False
            return call(self.engine, self._calls.popleft())
        stepped = step(self.engine)
        self._idle = stepped is None
        return stepped


class NativeBackend:
    """A model runner whose KV is the states of the foreign engine. It hands nothing over."""

    def __init__(self, block_size: int) -> None:
        self._block_size = block_size
        self._memory: dict[tuple[BlockId, int], bytes] = {}
        self._plan: StepPlan | None = None
        self._answers: deque[Input] = deque()

    @property
    def can_act(self) -> bool:
        return self._plan is not None or bool(self._answers)

    def perform(self, effect: Effect) -> None:
        match effect:
            case RunStep(plan):
                self._plan = plan
            case OpenTransfer():
                pass
            case StopTransfer(attempt):
                self._answers.append(TransferStopped(attempt))
            case _:
                raise AssertionError(f"a native worker next to foreign ones: {effect}")

    def act(self) -> Input | None:
        if self._answers:
            return self._answers.popleft()
        plan, self._plan = self._plan, None
        assert plan is not None
        for source, target in plan.copies:
            for offset in range(self._block_size):
                if (source, offset) in self._memory:
                    self._memory[target, offset] = self._memory[source, offset]
        tokens = tuple(self._run(row) for row in plan.rows)
        return StepDone(StepResult(step_id=plan.step_id, tokens=tokens), 0.001)

    def _run(self, row: StepRow) -> tuple[SampledToken, ...]:
        state = root_state(WEIGHTS)
        if row.start:
            state = self._memory[self._slot(row, row.start - 1)]
        for position, token_id in enumerate(row.token_ids, row.start):
            state = self._memory[self._slot(row, position)] = next_state(state, token_id)
        if row.sample is None:
            return ()
        sample = row.sample
        return tuple(
            draw(state, sample.params, choice, sample.index, VOCAB_SIZE)
            for choice in sample.choices
        )

    def _slot(self, row: StepRow, position: int) -> tuple[BlockId, int]:
        block, offset = divmod(position, self._block_size)
        return row.block_ids[block], offset


class Process:
    """``to_gateway`` and ``to_worker`` are the two directions of its link to the router; ``posted``
    holds what its engine has said and its machine has not heard."""

    def __init__(
        self, settings: WorkerSettings, node: WorkerNode | ForeignWorkerNode, backend: Backend
    ) -> None:
        self.settings = settings
        self.node = node
        self.backend = backend
        self.alive = True
        self.stopped = False
        self.timers: dict[str, float] = {}
        self.to_gateway: deque[Message] = deque()
        self.to_worker: deque[Message] = deque()
        self.posted: deque[Input] = deque()

    @property
    def worker(self) -> WorkerId:
        return self.settings.worker

    @property
    def epoch(self) -> Epoch:
        return self.settings.epoch

    @property
    def runs(self) -> bool:
        return self.alive and not self.stopped

    def __repr__(self) -> str:
        return f"{self.worker}.{self.epoch}"
