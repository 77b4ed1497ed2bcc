"""What an engine that batches for itself holds of a worker: the counterpart of the batch machine.

A task is one attempt in the engine. It is *queued* when submitted and *started* when the engine has
begun with it. Then either it is *running* until its last choice has ended, or, if it is to be
handed off, it is *held* once the first token of each choice is there. An attempt that arrives by
hand-off is *adopting* until the engine has taken its payload, then running. A task that is to go
before its end is *ending* until the engine has said that it holds nothing of it.

What the engine says is checked against what it was asked: a token that does not follow the one
before is never passed on. An engine may draw the first token of an adopted attempt again; it counts
as drawn already, and if it is another one this time the choice goes back to the router, which
resumes it from the token that the client has.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from enum import Enum

from pdserve.core.engine_work import (
    EngineAbort,
    EngineAdopt,
    EngineLoad,
    EngineOutput,
    EnginePhase,
    EngineSubmit,
    EngineWork,
)
from pdserve.core.ids import AttemptId
from pdserve.core.messages import FailureKind, TokenDelta
from pdserve.core.request import Job
from pdserve.core.step import StepShape
from pdserve.node.outbox import Outbox
from pdserve.node.settings import WorkerSettings


class TaskState(Enum):
    QUEUED = "queued"
    STARTED = "started"
    HELD = "held"
    ADOPTING = "adopting"
    RUNNING = "running"
    ENDING = "ending"


@dataclass(slots=True, eq=False, kw_only=True)
class EngineTask:
    """One attempt in the engine. ``next_index``: of each choice that goes on, the index of its next
    token. ``job`` is given if it is to be handed off; ``first_tokens`` then collects the next token
    of each choice. ``redrawn``: tokens that the engine will draw although they are drawn."""

    attempt: AttemptId
    num_tokens: int
    num_prompt_tokens: int
    state: TaskState
    next_index: dict[int, int]
    job: Job | None = None
    cached_tokens: int = 0
    first_tokens: dict[int, TokenDelta] = field(default_factory=dict)
    redrawn: dict[int, int] = field(default_factory=dict)
    decode_started: bool = False

    @property
    def choices(self) -> tuple[int, ...]:
        return tuple(self.next_index)

    @property
    def computes_prompt(self) -> bool:
        return self.state in (TaskState.QUEUED, TaskState.STARTED)


@dataclass(frozen=True, slots=True)
class FailedChoices:
    """The engine goes on with these choices (None: with the task) no more."""

    task: EngineTask
    kind: FailureKind
    detail: str
    choices: tuple[int, ...] | None


@dataclass(slots=True)
class EngineOutcome:
    """What an iteration means to the worker node. ``decoding``: tasks that begin to wait for their
    second token here; ``decode_started``: tasks that got it."""

    deltas: list[TokenDelta] = field(default_factory=list)
    started: list[EngineTask] = field(default_factory=list)
    prefilled: list[EngineTask] = field(default_factory=list)
    held: list[EngineTask] = field(default_factory=list)
    decoding: list[EngineTask] = field(default_factory=list)
    decode_started: list[EngineTask] = field(default_factory=list)
    failed: list[FailedChoices] = field(default_factory=list)


class EngineTasks:
    """All that the engine holds, in order of arrival, and what it last said of its load."""

    def __init__(self, settings: WorkerSettings) -> None:
        assert settings.foreign is not None
        self._redraws = settings.foreign.recomputes_first_token
        self._block_size = settings.layout.block_size
        self.load = EngineLoad(free_tokens=settings.num_blocks * self._block_size)
        self._tasks: dict[AttemptId, EngineTask] = {}

    # --- in and out ---------------------------------------------------------------------------

    def submit(self, job: Job, *, hands_off: bool, out: Outbox) -> None:
        self._tasks[job.attempt] = EngineTask(
            attempt=job.attempt,
            num_tokens=len(job.token_ids),
            num_prompt_tokens=job.num_prompt_tokens,
            state=TaskState.QUEUED,
            next_index=dict.fromkeys(job.choices, job.next_index),
            job=job if hands_off else None,
        )
        work = EngineWork(
            attempt=job.attempt,
            choices=job.choices,
            token_ids=job.token_ids,
            num_prompt_tokens=job.num_prompt_tokens,
            params=job.params,
            cache_salt=job.cache_salt,
            trace_context=job.trace_context,
        )
        out.add(EngineSubmit(work, EnginePhase.PREFILL if hands_off else EnginePhase.WHOLE))

    def adopt(
        self,
        work: EngineWork,
        first_tokens: tuple[TokenDelta, ...],
        payload: bytes,
        digest: bytes,
        out: Outbox,
    ) -> None:
        """Give a payload that has arrived to the engine; `adopted` or `forget` must follow."""
        index = work.next_index if self._redraws else work.next_index + 1
        drawn = {delta.choice: delta.token_id for delta in first_tokens}
        self._tasks[work.attempt] = EngineTask(
            attempt=work.attempt,
            num_tokens=len(work.token_ids),
            num_prompt_tokens=work.num_prompt_tokens,
            state=TaskState.ADOPTING,
            next_index=dict.fromkeys(work.choices, index),
            redrawn=drawn if self._redraws else {},
        )
        out.add(EngineAdopt(work, first_tokens, payload, digest))

    def adopted(self, attempt: AttemptId) -> None:
        self._tasks[attempt].state = TaskState.RUNNING

    def forget(self, attempt: AttemptId) -> None:
        """The engine holds nothing of it."""
        self._tasks.pop(attempt, None)

    def end(self, attempt: AttemptId, out: Outbox, choices: tuple[int, ...] | None = None) -> None:
        """Let the engine drop these choices (None: all). No token of them is passed on any more."""
        task = self.get(attempt)
        if task is None:
            return
        gone = tuple(c for c in task.choices if choices is None or c in choices)
        for choice in gone:
            del task.next_index[choice]
        if not task.next_index:
            self.stop(attempt, out)
        elif gone:
            out.add(EngineAbort(attempt, gone))

    def stop(self, attempt: AttemptId, out: Outbox) -> None:
        """As `end`, and the engine answers whether it knows the attempt or not."""
        task = self._tasks.get(attempt)
        if task is not None:
            if task.state is TaskState.ENDING:
                return
            task.state = TaskState.ENDING
            task.next_index.clear()
        out.add(EngineAbort(attempt))

    # --- what the engine gives ----------------------------------------------------------------

    def stepped(self, output: EngineOutput, out: Outbox) -> EngineOutcome:
        outcome = EngineOutcome()
        for start in output.started:
            task = self.get(start.attempt)
            if task is not None and task.state is TaskState.QUEUED:
                task.cached_tokens = start.cached_tokens
                self._started(task, outcome)
        for delta in output.deltas:
            task = self.get(AttemptId(delta.request_id, delta.epoch))
            if task is not None and delta.choice in task.next_index:
                self._take(task, delta, outcome, out)
        for failure in output.failed:
            task = self.get(failure.attempt)
            if task is not None:
                detail = f"the engine failed: {failure.detail}"
                self._fail(task, FailureKind.ENGINE, detail, failure.choices, outcome, out)
        outcome.decoding = [t for t in outcome.prefilled if t.job is None and t.next_index]
        return outcome

    def _started(self, task: EngineTask, outcome: EngineOutcome) -> None:
        task.state = TaskState.STARTED
        outcome.started.append(task)

    def _take(
        self, task: EngineTask, delta: TokenDelta, outcome: EngineOutcome, out: Outbox
    ) -> None:
        wrong = self._wrong(task, delta)
        if wrong is not None:
            kind, detail = wrong
            self._fail(task, kind, detail, (delta.choice,), outcome, out)
            return
        task.next_index[delta.choice] += 1
        if task.redrawn.pop(delta.choice, None) is not None:
            return
        if task.state is TaskState.QUEUED:
            self._started(task, outcome)
        if task.job is not None:
            self._collect(task, delta, outcome)
            return
        if task.state is TaskState.STARTED:
            task.state = TaskState.RUNNING
            outcome.prefilled.append(task)
        elif not task.decode_started and task not in outcome.prefilled:
            task.decode_started = True
            outcome.decode_started.append(task)
        outcome.deltas.append(delta)
        if delta.finish is not None:
            del task.next_index[delta.choice]
            if not task.next_index:
                self.forget(task.attempt)

    def _collect(self, task: EngineTask, delta: TokenDelta, outcome: EngineOutcome) -> None:
        task.first_tokens[delta.choice] = delta
        if task.first_tokens.keys() >= task.next_index.keys():
            task.state = TaskState.HELD
            outcome.prefilled.append(task)
            outcome.held.append(task)

    def _wrong(self, task: EngineTask, delta: TokenDelta) -> tuple[FailureKind, str] | None:
        """Why the token must not be passed on."""
        due = task.next_index[delta.choice]
        if delta.index != due or task.state is TaskState.HELD or delta.choice in task.first_tokens:
            return FailureKind.ENGINE, f"the engine gave token {delta.index} where {due} was due"
        drawn = task.redrawn.get(delta.choice)
        if drawn is None or (delta.token_id == drawn and delta.finish is None):
            return None
        return (
            FailureKind.HANDOFF,
            f"the engine drew token {delta.index} again and found {delta.token_id}, not {drawn}",
        )

    def _fail(
        self,
        task: EngineTask,
        kind: FailureKind,
        detail: str,
        choices: tuple[int, ...] | None,
        outcome: EngineOutcome,
        out: Outbox,
    ) -> None:
        """The engine is to have nothing more of these choices; a hand-off fails as a whole."""
        if task.job is not None or (choices is not None and set(choices) >= set(task.choices)):
            choices = None
        outcome.failed.append(FailedChoices(task, kind, detail, choices))
        self.end(task.attempt, out, choices)

    # --- figures ------------------------------------------------------------------------------

    def shape_of(self, output: EngineOutput) -> StepShape:
        """What the engine computed in the iteration that gave this, before `stepped` hears of it.

        Empty if that cannot be told: of a prompt that it began earlier, or has not done, it may
        have computed any part.
        """
        cached = {start.attempt: start.cached_tokens for start in output.started}
        drew = {AttemptId(delta.request_id, delta.epoch) for delta in output.deltas}
        prompt_tokens = prompt_pairs = num_decoding = context_tokens = 0
        for task in self:
            begins, draws = task.attempt in cached, task.attempt in drew
            unsaid = task.state is TaskState.QUEUED and draws and not begins
            if task.state is TaskState.STARTED or unsaid or (begins and not draws):
                return StepShape()
            if begins:
                num_cached = cached[task.attempt]
                prompt_tokens += task.num_tokens - num_cached
                prompt_pairs += task.num_tokens**2 - num_cached**2
        for delta in output.deltas:
            drawn = self.get(AttemptId(delta.request_id, delta.epoch))
            if drawn is not None and drawn.state is TaskState.RUNNING:
                num_decoding += 1
                context_tokens += drawn.num_prompt_tokens + delta.index
        return StepShape(prompt_tokens, prompt_pairs, num_decoding, context_tokens)

    @property
    def num_staying(self) -> int:
        """Choices that decode here, or will when their prompt is done."""
        return sum(len(task.next_index) for task in self._staying())

    @property
    def context_tokens(self) -> int:
        """Length of these choices, all together."""
        return sum(
            task.num_prompt_tokens + index
            for task in self._staying()
            for index in task.next_index.values()
        )

    def _staying(self) -> Iterator[EngineTask]:
        for task in self:
            prompts = task.state is TaskState.STARTED and task.job is None
            if prompts or task.state is TaskState.RUNNING:
                yield task

    def get(self, attempt: AttemptId) -> EngineTask | None:
        """The task, unless it is ending."""
        task = self._tasks.get(attempt)
        return None if task is None or task.state is TaskState.ENDING else task

    def next_to_run(self) -> EngineTask | None:
        """The oldest task with which the engine has not begun."""
        return next((t for t in self._tasks.values() if t.state is TaskState.QUEUED), None)

    def __iter__(self) -> Iterator[EngineTask]:
        return iter(self._tasks.values())

    @property
    def is_empty(self) -> bool:
        return not self._tasks

    @property
    def num_waiting(self) -> int:
        return sum(task.state is TaskState.QUEUED for task in self)

    @property
    def num_decoding(self) -> int:
        return sum(len(task.next_index) for task in self if task.state is TaskState.RUNNING)

    @property
    def num_running(self) -> int:
        return self.num_decoding + sum(task.state is TaskState.STARTED for task in self)

    @property
    def pending_prefill_tokens(self) -> int:
        return sum(task.num_tokens for task in self if task.computes_prompt)

    @property
    def free_blocks(self) -> int:
        """Blocks that can be given away while each running choice can still grow by one."""
        return self.load.free_tokens // self._block_size - self.num_decoding

    @property
    def owes_a_sign(self) -> bool:
        """True if the engine must be at work. What is held may keep the rest out of its memory."""
        states = {task.state for task in self}
        return bool(states - {TaskState.HELD, TaskState.QUEUED}) or states == {TaskState.QUEUED}
