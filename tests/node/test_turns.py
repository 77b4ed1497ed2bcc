"""Nobody waits for ever on a mixed worker: preemption and overtaking are bounded."""

from __future__ import annotations

from dataclasses import dataclass, field

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pdserve.core.ids import AttemptId, Epoch, RequestId, WorkerId
from pdserve.core.layout import KvLayout
from pdserve.core.request import Job, Role, SamplingParams
from pdserve.core.step import SampledToken, StepPlan, StepResult
from pdserve.node.batch import BatchMachine
from pdserve.node.sequence import SequenceKey
from pdserve.node.settings import WorkerSettings
from pdserve.policy.registry import BATCH_POLICIES, make_batching

WORKER = WorkerId("mixed-0")
BLOCK_SIZE = 4
LAYOUT = KvLayout(
    num_layers=1,
    num_kv_heads=1,
    head_dim=4,
    block_size=BLOCK_SIZE,
    dtype="fp32",
    numerics="class a",
    weights_digest="w",
)


@dataclass
class Batcher:
    """A batch machine whose steps end at once. ``overtaken``: by how many steps that admitted a new
    sequence each waiting one was passed; ``answers``: tokens of each attempt."""

    batching: str = "splitwise"
    num_blocks: int = 12
    max_running: int = 8
    max_step_tokens: int = 32
    role: Role = Role.MIXED
    num_steps: int = 0
    answers: dict[str, list[int]] = field(default_factory=dict)
    wanted: dict[str, int] = field(default_factory=dict)
    preempted: dict[SequenceKey, int] = field(default_factory=dict)
    overtaken: dict[SequenceKey, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.settings = WorkerSettings(
            worker=WORKER,
            epoch=Epoch(1),
            role=self.role,
            layout=LAYOUT,
            num_blocks=self.num_blocks,
            max_model_tokens=4096,
            max_step_tokens=self.max_step_tokens,
            mixed_chunk_tokens=8,
            max_running=self.max_running,
        )
        self.machine = BatchMachine(self.settings, make_batching(self.batching))

    def submit(self, name: str, prompt_tokens: int, max_tokens: int) -> None:
        seed = sum(map(ord, name))
        job = Job(
            request_id=RequestId(name),
            epoch=Epoch(1),
            choices=(0,),
            token_ids=tuple((seed * 31 + n) % 997 for n in range(prompt_tokens)),
            num_prompt_tokens=prompt_tokens,
            params=SamplingParams(max_tokens=max_tokens, seed=0),
            prefill_worker=WORKER,
            decode_worker=WORKER,
        )
        assert self.settings.misfit(job) is None
        self.machine.submit(job, hands_off=False)
        self.wanted[name] = max_tokens
        self.answers[name] = []

    def step(self) -> bool:
        """One step; False if there was nothing to do."""
        waited = {s.key for s in self.machine.queues.resuming.values()}
        planned = self.machine.plan()
        for sequence in planned.preempted:
            self.preempted[sequence.key] = self.preempted.get(sequence.key, 0) + 1
        if planned.admitted:
            for key in waited & set(self.machine.queues.resuming):
                self.overtaken[key] = self.overtaken.get(key, 0) + 1
        if planned.plan is None:
            assert self.machine.is_empty, "nothing is computed, and somebody waits"
            return False
        self.num_steps += 1
        self.machine.tables.pool.check()
        for delta in self.machine.step_done(_result(planned.plan)).deltas:
            answer = self.answers[delta.request_id]
            assert delta.index == len(answer)
            answer.append(delta.token_id)
        return True

    def run(self, most_steps: int) -> None:
        for _ in range(most_steps):
            if not self.step():
                break
        assert self.machine.is_empty, f"not done after {most_steps} steps"
        assert {name: len(answer) for name, answer in self.answers.items()} == self.wanted
        assert self.machine.tables.pool.num_free == self.num_blocks


def _result(plan: StepPlan) -> StepResult:
    """Each row draws the number of its position: a resumed answer goes on where it was."""
    return StepResult(
        step_id=plan.step_id,
        tokens=tuple(() if row.sample is None else (SampledToken(row.end),) for row in plan.rows),
    )


def test_a_new_prompt_runs_at_once_and_the_youngest_decode_waits() -> None:
    batcher = Batcher(num_blocks=8)
    batcher.submit("old", 9, 20)
    batcher.submit("young", 9, 20)
    batcher.step()
    batcher.submit("new", 8, 2)
    batcher.step()
    assert batcher.preempted == {_key("young"): 1}
    assert len(batcher.answers["new"]) == 1
    batcher.run(60)


def test_first_come_first_served_lets_the_prompt_wait() -> None:
    batcher = Batcher(num_blocks=8, batching="fcfs")
    batcher.submit("old", 9, 20)
    batcher.submit("young", 9, 7)
    batcher.step()
    batcher.submit("new", 8, 2)
    batcher.step()
    assert not batcher.answers["new"]
    assert not batcher.preempted


@pytest.mark.parametrize("role", [Role.PREFILL, Role.DECODE])
def test_only_a_mixed_worker_preempts_for_prompts(role: Role) -> None:
    batcher = Batcher(num_blocks=8, role=role)
    batcher.submit("old", 9, 20)
    batcher.submit("young", 9, 7)
    batcher.step()
    batcher.submit("new", 8, 2)
    batcher.step()
    assert not batcher.preempted
    assert not batcher.answers["new"]


def test_a_resumed_answer_goes_on_where_it_was() -> None:
    batcher = Batcher(num_blocks=8)
    batcher.submit("old", 9, 15)
    batcher.step()
    for number in range(3):
        batcher.submit(f"new{number}", 24, 3)
        batcher.step()
    assert batcher.preempted[_key("old")] >= 1
    batcher.run(100)
    assert batcher.answers["old"] == list(range(9, 24))


def test_a_stream_of_prompts_does_not_starve_a_decode() -> None:
    """There is always a new prompt that wants the blocks of the one long answer."""
    batcher = Batcher(num_blocks=8)
    batcher.submit("long", 9, 20)
    for number in range(400):
        if len(batcher.answers["long"]) == 20:
            break
        batcher.submit(f"p{number}", 20, 2)
        batcher.step()
    assert len(batcher.answers["long"]) == 20
    assert batcher.num_steps < 80
    assert batcher.preempted[_key("long")] <= 4
    assert batcher.preempted[_key("long")] + batcher.overtaken[_key("long")] == 4


def test_after_its_last_preemption_a_sequence_has_room_for_its_answer() -> None:
    batcher = Batcher(num_blocks=8)
    batcher.submit("long", 9, 20)
    for number in range(100):
        if batcher.preempted.get(_key("long"), 0) == 4:
            break
        if not batcher.machine.queues.waiting:
            batcher.submit(f"p{number}", 24, 1)
        batcher.step()
    else:
        pytest.fail("never preempted four times")
    while _key("long") not in batcher.machine.queues.decoding:
        batcher.step()
    (long,) = (s for s in batcher.machine.sequences() if s.key == _key("long"))
    assert len(long.block_ids) == LAYOUT.num_blocks_for(29)
    batcher.submit("late", 24, 1)
    batcher.run(60)
    assert batcher.preempted[_key("long")] == 4


def test_hand_offs_do_not_take_what_an_old_sequence_waits_for() -> None:
    batcher = Batcher(num_blocks=8)
    machine = batcher.machine
    batcher.submit("running", 12, 8)
    batcher.step()
    batcher.submit("waiting", 20, 8)
    assert machine.spare_blocks == machine.growth_headroom == 4
    for _ in range(4):
        machine.let_past()
    assert machine.spare_blocks == -1, "it needs 5 blocks"
    batcher.run(60)
    assert machine.spare_blocks == 8


arrivals = st.lists(
    st.tuples(st.integers(0, 6), st.integers(1, 30), st.integers(1, 16)), min_size=1, max_size=14
)


@pytest.mark.parametrize("batching", sorted(BATCH_POLICIES))
@settings(max_examples=60)
@given(
    arrivals=arrivals,
    num_blocks=st.integers(12, 20),
    max_running=st.integers(1, 8),
    max_step_tokens=st.sampled_from([4, 16, 64]),
)
def test_waiting_is_bounded_in_any_order_of_arrival(
    batching: str,
    arrivals: list[tuple[int, int, int]],
    num_blocks: int,
    max_running: int,
    max_step_tokens: int,
) -> None:
    """Whoever comes when: everybody is answered, in a number of steps that the work bounds."""
    batcher = Batcher(
        batching=batching,
        num_blocks=num_blocks,
        max_running=max_running,
        max_step_tokens=max_step_tokens,
    )
    work = 0
    for number, (pause, prompt_tokens, max_tokens) in enumerate(arrivals):
        for _ in range(pause):
            batcher.step()
        batcher.submit(f"r{number}", prompt_tokens, max_tokens)
        # A step computes a block of somebody's prompt or a token of somebody's answer; a prompt is
        # computed once, and once more after each preemption.
        steps_of_prompt = -(-(prompt_tokens + max_tokens) // BLOCK_SIZE) + 1
        work += max_tokens + 5 * steps_of_prompt
    batcher.run(work)
    assert all(count <= 4 for count in batcher.preempted.values())
    assert all(count <= 4 for count in batcher.overtaken.values())


def _key(name: str) -> SequenceKey:
    return (AttemptId(RequestId(name), Epoch(1)), 0)
