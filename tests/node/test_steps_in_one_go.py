"""`StepsDone` leaves a worker as it would be if each of the steps had been answered alone.

Two machines hear the same; one has its steps answered one by one, by `StepDone` with rows and
tokens, the other by `StepsDone`, as many at a time as it allows. Blocks, queues, what they plan
next and what the router knows of tokens and caches must be the same whenever both have got as far.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from hypothesis import given, settings
from hypothesis import strategies as st

from pdserve.core.effects import (
    Effect,
    Log,
    Received,
    Send,
    Started,
    StepDone,
    StepsDone,
    TimerFired,
)
from pdserve.core.ids import GATEWAY, AttemptId, BlockHash, Epoch, RequestId, WorkerId
from pdserve.core.layout import KvLayout
from pdserve.core.messages import AbortAttempt, CacheChanged, LoadReport, StartJob, Tokens
from pdserve.core.request import Job, Request, Role, SamplingParams
from pdserve.core.step import SILENT_TOKEN, SampledToken, StepResult
from pdserve.core.token_ids import NamedTokens
from pdserve.node.lives import Life
from pdserve.node.sequence import Sequence
from pdserve.node.settings import WorkerSettings
from pdserve.node.worker import WorkerNode
from pdserve.policy.registry import make_batching

HERE = WorkerId("mixed-0")
END = 7
LAYOUT = KvLayout(
    num_layers=1, num_kv_heads=1, head_dim=4, block_size=4, dtype="bf16",
    numerics="n", weights_digest="w",
)  # fmt: skip


@dataclass
class Side:
    """A machine, and what the router knows of it. ``seen``: its life events."""

    node: WorkerNode
    now: float = 0.0
    lives: dict[RequestId, Life] = field(default_factory=dict)
    cached: set[BlockHash] = field(default_factory=set)
    seen: list[object] = field(default_factory=list)

    def hear(self, event: object) -> None:
        for effect in self.node.handle(event, self.now):  # type: ignore[arg-type]
            self._perform(effect)
        self.node.batch.queues.check()
        self.node.batch.tables.pool.check()

    def _perform(self, effect: Effect) -> None:
        match effect:
            case Send(_, Tokens(deltas)):
                for delta in deltas:
                    assert self.lives[delta.request_id].take(delta), f"{delta} cannot be taken"
            case Send(_, CacheChanged() | LoadReport()):
                stored, evicted = effect.message.stored, effect.message.evicted
                self.cached = (self.cached | set(stored)) - set(evicted)
            case Log():
                self.seen.append(effect)

    def submit(self, job: Job, request: Request) -> None:
        life = self.lives[request.request_id] = Life.of(request, 0.0)
        life.choices[0].epoch = job.epoch
        self.hear(Received(GATEWAY, Epoch(0), StartJob(job)))

    def beat(self) -> None:
        """From here on the router knows all."""
        self.hear(TimerFired("heartbeat"))

    def step(self, ends: dict[int, int]) -> None:
        """One step, as a runner answers it."""
        ride = self.node.batch.ride
        assert ride is not None
        tokens = tuple(
            () if row.sample is None else (SampledToken(ends.get(index, SILENT_TOKEN)),)
            for index, row in enumerate(ride.plan.rows)
        )
        self.now += 1
        self.hear(StepDone(StepResult(step_id=ride.plan.step_id, tokens=tokens), 1.0))

    def steps(self, count: int, ends: dict[int, int]) -> None:
        """So many at a time."""
        self.now += count
        self.hear(StepsDone(count, float(count), tuple(sorted(ends.items()))))

    def state(self) -> tuple[object, ...]:
        batch, pool = self.node.batch, self.node.batch.tables.pool
        queues = batch.queues
        ride = batch.ride
        return (
            [
                [_state(sequence) for sequence in queue.values()]
                for queue in (queues.waiting, queues.resuming, queues.admitted, queues.decoding)
            ],
            (pool._free, list(pool._cached), pool._block_of, pool._references),
            (batch.num_steps, batch.num_preemptions, self.node.load.figures()),
            None if ride is None else ([s.key for s in ride.riders], ride.chunks, ride.shape),
            {request: life.choices[0].taken for request, life in self.lives.items()},
            {request: life.choices[0].finish for request, life in self.lives.items()},
            self.cached,
            self.seen,
        )


def _state(sequence: Sequence) -> object:
    return (
        sequence.key,
        list(sequence.tokens(0, sequence.num_tokens)),
        (sequence.num_computed, sequence.num_published, sequence.num_preemptions),
        (sequence.block_ids, sequence.hashes, sequence.in_flight, sequence.arrival),
    )


def side(role: Role, num_blocks: int, batching: str, *, alone: bool) -> Side:
    settings = WorkerSettings(
        worker=HERE, epoch=Epoch(1), role=role, layout=LAYOUT, num_blocks=num_blocks,
        max_model_tokens=200, max_step_tokens=32, mixed_chunk_tokens=8, max_running=5,
        heartbeat_s=1e9, report_interval_s=0.0, bare_plans=not alone, report_samples=False,
    )  # fmt: skip
    found = Side(WorkerNode(settings, make_batching(batching)))
    found.hear(Started())
    return found


@st.composite
def requests(draw: st.DrawFn, number: int) -> Request:
    """Some of them begin alike, and some prompts are only named."""
    size = draw(st.integers(1, 40))
    common = draw(st.sampled_from([0, 8, 13]))
    named = draw(st.booleans())
    own = range(1000 * number, 1000 * number + size)
    pieces = [("common", common), (f"own {number}", size)]
    return Request(
        request_id=RequestId(f"r{number}"),
        prompt_token_ids=NamedTokens.of(pieces) if named else (*range(common), *own),
        params=SamplingParams(max_tokens=draw(st.integers(1, 60)), seed=0, stop_token_ids=(END,)),
    )


def job_of(request: Request) -> Job:
    return Job(
        request_id=request.request_id,
        epoch=Epoch(1),
        choices=(0,),
        token_ids=request.prompt_token_ids,
        num_prompt_tokens=len(request.prompt_token_ids),
        params=request.params,
        prefill_worker=HERE,
        decode_worker=HERE,
    )


def pass_steps(one_by_one: Side, in_one_go: Side, data: st.DataObject) -> int:
    """As many steps as may pass, or fewer; in the last one some rows may end, or be told at
    least."""
    ride, limit = in_one_go.node.batch.ride, in_one_go.node.steady_steps()
    assert ride is not None
    count = data.draw(st.integers(1, limit), label="steps")
    drawing = [row for row, rider in enumerate(ride.riders) if in_one_go.node.draws(rider)]
    rows = data.draw(st.lists(st.sampled_from(drawing), unique=True) if drawing else st.just([]))
    ends = {row: data.draw(st.sampled_from([END, 5])) for row in rows}
    for number in range(count):
        one_by_one.step(ends if number == count - 1 else {})
    in_one_go.steps(count, ends)
    return count


@settings(max_examples=150, derandomize=True)
@given(
    role=st.sampled_from([Role.MIXED, Role.DECODE]),
    num_blocks=st.sampled_from([26, 40, 200]),
    batching=st.sampled_from(["fcfs", "splitwise"]),
    data=st.data(),
)
def test_steps_in_one_go_are_as_those_one_by_one(
    role: Role, num_blocks: int, batching: str, data: st.DataObject
) -> None:
    both = [side(role, num_blocks, batching, alone=alone) for alone in (True, False)]
    number = 0
    for _ in range(data.draw(st.integers(3, 14), label="actions")):
        action = data.draw(st.sampled_from(["submit", "submit", "steps", "steps", "abort"]))
        if action == "submit" and number < 8:
            number += 1
            request = data.draw(requests(number))
            for each in both:
                each.submit(job_of(request), request)
        elif action == "abort" and number:
            gone = RequestId(f"r{data.draw(st.integers(1, number))}")
            for each in both:
                each.hear(Received(GATEWAY, Epoch(0), AbortAttempt(AttemptId(gone, Epoch(1)))))
        elif both[1].node.batch.ride is not None:
            pass_steps(*both, data)
        for each in both:
            each.beat()
        for mine, theirs in zip(both[0].state(), both[1].state(), strict=True):
            assert mine == theirs


def test_long_stretches_pass_at_once() -> None:
    """Else nothing would be gained by them. (A hundredth of the blocks would be worth a report.)"""
    found = side(Role.MIXED, 8000, "fcfs", alone=False)
    for number in range(3):
        request = Request(
            request_id=RequestId(f"r{number}"),
            prompt_token_ids=tuple(range(100 * number, 100 * number + 9)),
            params=SamplingParams(max_tokens=50, seed=0),
        )
        found.submit(job_of(request), request)
    counts = []
    while found.node.batch.ride is not None:
        counts.append(found.node.steady_steps())
        found.steps(counts[-1], {})
    assert max(counts) >= 45, counts
    assert len(counts) <= 8, counts
    assert all(len(life.choices[0].taken) == 50 for life in found.lives.values())
    assert found.node.is_empty


def test_the_router_hears_of_silent_tokens_before_a_sequence_is_handed_back() -> None:
    found = side(Role.DECODE, 8, "fcfs", alone=False)
    for number in range(2):
        request = Request(
            request_id=RequestId(f"r{number}"),
            prompt_token_ids=tuple(range(100 * number, 100 * number + 8)),
            params=SamplingParams(max_tokens=20, seed=0),
        )
        found.submit(job_of(request), request)
    while found.node.batch.num_preemptions == 0:
        found.steps(found.node.steady_steps(), {})
    lengths = [len(life.choices[0].taken) for life in found.lives.values()]
    [left] = found.node.batch.queues.decoding.values()
    assert left.next_index == 9, "the older one needs a block, and the younger one gives way"
    assert lengths == [1, 8], "of the older one it is enough to hear later"
