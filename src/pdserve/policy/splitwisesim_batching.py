"""The batches of SplitwiseSim (Mutinifni/splitwise-sim, 8f99e7d), which differ from the paper's.

It is here to repeat that simulator's results with our machines; it expects a worker that reserves
answers (`BatchPolicy.reserves`), so that memory is counted as there: a prompt and one token from
its start, the whole answer from the first step that decodes it.

A prompt and its answer are two *tasks*, the second one for as long as the answer is decoded here.
When a batch is put together anew, these come, while there are places, tokens and memory: of the
*line* those in front that have been left out four times or more; prompts, as they came; decodes
that were paused, as they were paused; those of the last batch; and everybody else, oldest request
first. A prompt costs its tokens of the budget, a decode one; the first task may exceed it. Decodes
that are left over are paused: they keep their memory. Everybody who waits is left out once more.

The line is kept in order only as far as insertion sort by (times left out, age of the request) goes
while the keys of those in it grow: as in SplitwiseSim, whoever comes last usually stands in front
and hides the patience of all others.

A batch of decodes runs on until one of them ends or it is *cut*: by a decode or a prompt that comes
and fits beside it, or would in its place; or by the end of a hand-off, if somebody waits. A prompt
of more than the budget cuts nothing, and waits. While nothing is cut, nobody is left out again.
"""

from __future__ import annotations

from bisect import insort
from dataclasses import dataclass, field
from enum import Enum
from itertools import islice

from pdserve.policy.batch import BatchPlan, BatchView, Grant, Resident, SequenceKey


class _State(Enum):
    WAITS = 0
    RUNS = 1
    PAUSED = 2


@dataclass(slots=True, eq=False)
class _Task:
    """``size``: of the budget. ``blocks``: what it takes when it first runs."""

    key: SequenceKey
    number: int
    is_prompt: bool
    size: int
    blocks: int
    state: _State = _State.WAITS
    times_left_out: int = 0


@dataclass(slots=True, eq=False)
class _Request:
    """``tasks``: those not done, of which only the first can run."""

    key: SequenceKey
    number: int
    tasks: list[_Task]


@dataclass(slots=True)
class _Memory:
    """What was so when the last plan was made, with what has come since. ``known``: the arrivals
    and departures that are in it."""

    requests: dict[SequenceKey, _Request] = field(default_factory=dict)
    oldest: list[_Request] = field(default_factory=list)
    line: list[_Task] = field(default_factory=list)
    prompts: list[_Task] = field(default_factory=list)
    paused: list[_Task] = field(default_factory=list)
    batch: list[_Task] = field(default_factory=list)
    batch_tokens: int = 0
    num_prompts: int = 0
    cut: bool = False
    known: tuple[int, int] = (0, 0)


@dataclass(frozen=True, slots=True, kw_only=True)
class SplitwiseSimBatching:
    """Limits as in ``max_batch_size``, ``max_batch_tokens`` and ``max_preemptions``. ``whole`` 1: a
    prompt that is to be decoded here begins only if its answer has room too, beside those that are
    to come. SplitwiseSim does not ask for that: prompts can fill a machine's memory so that no
    answer ever fits. With the lengths of answers known that hardly happens."""

    max_tasks: int = 512
    max_tokens: int = 2048
    max_left_out: int = 4
    whole: int = 0

    @property
    def new_first(self) -> bool:
        return False

    @property
    def reserves(self) -> bool:
        return True

    def plan(self, view: BatchView) -> BatchPlan:
        memory = view.memory if isinstance(view.memory, _Memory) else _Memory()
        was_running = bool(memory.batch)
        if not was_running:
            _forget_the_gone(memory, view)
        if memory.known != (view.num_arrivals, view.num_departures):
            self._take_news(memory, view)
        if was_running:
            ended = self._end(memory, view)
            _forget_the_gone(memory, view)
            if ended or memory.cut:
                self._start(memory, view)
        return _plan(memory, view)

    # --- what has happened --------------------------------------------------------------------

    def _take_news(self, memory: _Memory, view: BatchView) -> None:
        """Whoever has come, in order; and hand-offs that have ended, in between."""
        known_arrivals, known_departures = memory.known
        num_new = view.num_arrivals - known_arrivals
        memory.known = (view.num_arrivals, view.num_departures)
        departed = view.num_departures != known_departures
        for resident in _new_ones(memory, view, num_new):
            if departed and resident.arrival > view.departed_at:
                departed = False
                self._departed(memory, view)
            self._arrived(memory, view, resident)
        if departed:
            self._departed(memory, view)

    def _arrived(self, memory: _Memory, view: BatchView, resident: Resident) -> None:
        key, number = resident.key, resident.number
        prompt, answer = resident.num_prompt_tokens, resident.answer_tokens
        first = view.blocks(prompt + 1)
        token = _Task(key, number, False, 1, view.blocks(prompt + max(1, answer)) - first)
        tasks = [token]
        if key not in view.decodes:
            tasks = [_Task(key, number, True, prompt, first)]
            if not resident.hands_off:
                tasks.append(token)
        memory.requests[key] = request = _Request(key, number, [])
        insort(memory.oldest, request, key=lambda each: each.number)
        for task in tasks:
            request.tasks.append(task)
            insort(memory.line, task, key=_turn)
            if task.is_prompt:
                memory.prompts.append(task)
            if memory.batch:
                memory.cut = memory.cut or self._cuts(memory, task)
            elif task.blocks <= view.unused_blocks:
                self._start(memory, view)

    def _cuts(self, memory: _Memory, task: _Task) -> bool:
        """Whether a task that comes ends the running batch after its next step."""
        if len(memory.batch) < self.max_tasks and (
            memory.batch_tokens + task.size <= self.max_tokens
        ):
            return True
        num_decodes = len(memory.batch) - memory.num_prompts
        prompt_tokens = memory.batch_tokens - num_decodes
        return task.is_prompt and num_decodes > 0 and prompt_tokens + task.size <= self.max_tokens

    def _departed(self, memory: _Memory, view: BatchView) -> None:
        """A hand-off from here has ended."""
        if not memory.line:
            return
        if not memory.batch:
            if memory.line[0].blocks <= view.unused_blocks:
                self._start(memory, view)
        elif len(memory.batch) < self.max_tasks and memory.batch_tokens < self.max_tokens:
            memory.cut = True

    def _end(self, memory: _Memory, view: BatchView) -> bool:
        """The step is over; whether a task of it is done."""
        decodes = view.decodes
        if not memory.num_prompts and len(memory.requests) == len(view.waiting) + len(decodes):
            return False
        done = [task for task in memory.batch if task.is_prompt or task.key not in decodes]
        for task in done:
            memory.batch.remove(task)
            memory.batch_tokens -= task.size
            request = memory.requests[task.key]
            request.tasks.remove(task)
            if not request.tasks:
                memory.oldest.remove(request)
                del memory.requests[task.key]
        memory.num_prompts = 0
        return bool(done)

    # --- the next batch -----------------------------------------------------------------------

    def _start(self, memory: _Memory, view: BatchView) -> None:
        """Put the batch together anew."""
        memory.cut = False
        if not memory.line or self._all_join(memory, view):
            return
        old, new = memory.batch, self._chosen(memory, view)
        chosen = set(map(id, new))
        kept = [task for task in old if id(task) in chosen]
        before = set(map(id, kept))
        for task in old:
            if id(task) not in chosen:
                task.state = _State.PAUSED
                insort(memory.line, task, key=_turn)
                memory.paused.append(task)
        for task in new:
            if id(task) not in before:
                memory.line.remove(task)
                if task.is_prompt:
                    memory.prompts.remove(task)
                elif task.state is _State.PAUSED:
                    memory.paused.remove(task)
                kept.append(task)
            task.state = _State.RUNS
        memory.batch = kept
        memory.batch_tokens = sum(task.size for task in kept)
        memory.num_prompts = sum(task.is_prompt for task in kept)
        for request in memory.oldest:
            first = request.tasks[0]
            if first.state is not _State.RUNS:
                first.times_left_out += 1

    def _all_join(self, memory: _Memory, view: BatchView) -> bool:
        """The usual case: there is room for everybody who waits beside those who run, in the order
        that `_chosen` would find; or a single prompt waits, and nobody runs."""
        line, batch = memory.line, memory.batch
        if memory.prompts:
            alone = (
                not self.whole
                and not batch
                and len(line) == 1
                and line[0].blocks <= view.unused_blocks
            )
            if not alone:
                return False
        elif (
            memory.paused
            or line[0].times_left_out >= self.max_left_out
            or len(batch) + len(line) > min(self.max_tasks, self.max_tokens)
            or sum([task.blocks for task in line]) > view.unused_blocks
        ):
            return False
        elif len(line) > 1:
            line.sort(key=lambda task: task.number)
        for task in line:
            task.state = _State.RUNS
            batch.append(task)
            memory.batch_tokens += task.size
        memory.num_prompts = len(memory.prompts)
        line.clear()
        memory.prompts.clear()
        return True

    def _chosen(self, memory: _Memory, view: BatchView) -> list[_Task]:
        choice = _Choice(self, memory, view.unused_blocks)
        for task in memory.line:
            if task.times_left_out < self.max_left_out or choice.is_full_for(task):
                break
            choice.take(task)
        for tasks in (memory.prompts, memory.paused, memory.batch):
            for task in tasks:
                if choice.is_full_for(task) or not choice.take(task):
                    break
        for request in memory.oldest:
            task = request.tasks[0]
            if choice.has(task) or (self.whole and task.is_prompt):
                continue
            if choice.is_full_for(task) or not choice.take(task):
                break
        return choice.tasks


class _Choice:
    """A batch while it is put together. Where prompts look at answers, ``promised`` blocks are of
    answers that have not begun though their prompts have; ``answers`` are those of prompts that
    wait."""

    def __init__(self, limits: SplitwiseSimBatching, memory: _Memory, free_blocks: int) -> None:
        self.tasks: list[_Task] = []
        self._limits = limits
        self._free_blocks = free_blocks
        self._keys: set[SequenceKey] = set()
        self._tokens = 0
        self._promised = 0
        self._answers: dict[SequenceKey, int] = {}
        for request in memory.oldest if limits.whole else ():
            first, last = request.tasks[0], request.tasks[-1]
            if last.is_prompt or last.state is not _State.WAITS:
                continue
            if first is last or first.state is _State.RUNS:
                self._promised += last.blocks
            else:
                self._answers[request.key] = last.blocks

    def is_full_for(self, task: _Task) -> bool:
        if not self.tasks:
            return False
        limits = self._limits
        return len(self.tasks) == limits.max_tasks or self._tokens + task.size > limits.max_tokens

    def has(self, task: _Task) -> bool:
        """A task of its request has a place."""
        return task.key in self._keys

    def take(self, task: _Task) -> bool:
        """Give it a place, unless its request has one; False if there is no memory for it."""
        if task.key in self._keys:
            return True
        if task.state is _State.WAITS:
            answer = self._answers.get(task.key, 0) if task.is_prompt else -task.blocks
            left_over = self._promised + answer if task.is_prompt and self._limits.whole else 0
            if task.blocks + left_over > self._free_blocks:
                return False
            self._free_blocks -= task.blocks
            self._promised += answer
        self.tasks.append(task)
        self._keys.add(task.key)
        self._tokens += task.size
        return True


def _turn(task: _Task) -> tuple[int, int]:
    return task.times_left_out, task.number


def _new_ones(memory: _Memory, view: BatchView, num_new: int) -> list[Resident]:
    """Those that have come, in order. They stand at the ends of their queues; behind them may be
    decodes whose prompt was in the last batch."""
    known, found = memory.requests, []
    for residents, others in ((view.waiting, 0), (view.decodes, memory.num_prompts)):
        first = max(0, len(residents) - num_new - others)
        for key, resident in islice(residents.items(), first, None):
            if key not in known:
                found.append(resident)
    if len(found) > 1:
        found.sort(key=lambda each: each.arrival)
    return found


def _plan(memory: _Memory, view: BatchView) -> BatchPlan:
    prompts = [task for task in memory.batch if task.is_prompt] if memory.num_prompts else []
    pauses: tuple[SequenceKey, ...] = ()
    if len(memory.batch) - len(prompts) < len(view.decodes):
        runs = {task.key for task in memory.batch}
        pauses = tuple(key for key in view.decodes if key not in runs)
    grants = tuple(Grant(task.key, task.size) for task in prompts)
    return BatchPlan(grants, pauses=pauses, memory=memory)


def _forget_the_gone(memory: _Memory, view: BatchView) -> None:
    """Requests that were aborted."""
    if len(memory.requests) == len(view.waiting) + len(view.decodes):
        return
    gone = [
        request
        for key, request in memory.requests.items()
        if key not in view.waiting and key not in view.decodes
    ]
    for request in gone:
        _forget(memory, request)


def _forget(memory: _Memory, request: _Request) -> None:
    """Nothing of it is here any more."""
    memory.oldest.remove(request)
    for tasks in (memory.line, memory.prompts, memory.paused, memory.batch):
        tasks[:] = [task for task in tasks if task.key != request.key]
    del memory.requests[request.key]
