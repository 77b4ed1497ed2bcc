"""The batch machine of a native worker: queues, and what the next step computes.

A sequence waits (`submit`), is admitted when blocks for all its known tokens can be had, is
prefilled in one or more chunks, and then either decodes here until it finishes, or is *held* for a
hand-off until the hand-off machine releases it. Sequences that arrive by hand-off start as running
(`adopt`).

When a running sequence cannot get its next block, the youngest running one gives up its blocks: on
a decode-role worker it goes back to the router, elsewhere it is *resuming*: it waits here to be
recomputed. On a mixed worker a batch policy may also preempt decodes for a prompt. `node.turns`
bounds how often that happens to a sequence. What a step computes is the batch policy's decision.

When a step breaks, its rows are suspects: each is run again in a step of its own, so that only the
one that breaks the engine is lost.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice

from pdserve.core.ids import AttemptId, StepId
from pdserve.core.messages import TokenDelta
from pdserve.core.request import Job, Role
from pdserve.core.step import BarePlan, StepPlan, StepResult, StepShape
from pdserve.kv.hashing import root_hash
from pdserve.node.batch_view import Lookout
from pdserve.node.planned import Planned, StepOutcome
from pdserve.node.queues import Queues
from pdserve.node.ride import Ride, rows_of, shape_of
from pdserve.node.sequence import Sequence, SequenceKey, untold
from pdserve.node.settings import WorkerSettings
from pdserve.node.standing import Standing
from pdserve.node.step_ends import StepEnds, fewest_steps_left
from pdserve.node.tables import BlockTables
from pdserve.node.turns import first_old, pass_by, set_back
from pdserve.policy.batch import BatchPlan, BatchPolicy

_NOTHING = BatchPlan(())


class BatchMachine:
    """Queues of one worker. One step is under way at a time: ``ride``."""

    def __init__(
        self, settings: WorkerSettings, policy: BatchPolicy, standing: Standing | None = None
    ) -> None:
        self.settings = settings
        self.standing = standing or Standing(settings.role)
        self.queues = Queues()
        self.tables = BlockTables(settings)
        self.num_preemptions = 0
        self.num_steps = 0
        self.ride: Ride | None = None
        self._last_ride: Ride | None = None
        self._idle_at: tuple[int, Role] | None = None
        """Changes and role when there was last nothing to compute: there is nothing yet."""
        self.reserves = policy.reserves  # see `BatchPolicy.reserves`
        self._policy = policy
        self._lookout = Lookout(settings, policy, self.queues, self.tables)
        self._ends = StepEnds(settings, self.queues, self.tables)
        self._suspects: list[Sequence] = []

    # --- arrivals and departures --------------------------------------------------------------

    def submit(self, job: Job, *, hands_off: bool) -> Sequence:
        """Queue an attempt."""
        sequence = Sequence(
            attempt=job.attempt,
            choices=job.choices,
            params=job.params,
            given=job.token_ids,
            num_prompt_tokens=job.num_prompt_tokens,
            root=root_hash(self.settings.layout, job.cache_salt),
            arrival=self.queues.next_arrival(),
            hands_off=hands_off,
            number=job.number,
            answer_tokens=job.answer_tokens or job.params.max_tokens,
            reserved_tokens=len(job.token_ids) + 1 if self.reserves else 0,
        )
        sequence.num_found = self.tables.cached_tokens(sequence)
        self.queues.enter(self.queues.waiting, sequence)
        return sequence

    def adopt(self, parent: Sequence, deltas: tuple[TokenDelta, ...]) -> list[Sequence]:
        """Take over a verified hand-off: one running sequence per choice that goes on.

        ``parent`` holds blocks with the KV of all of its tokens; this call owns their references.
        """
        parent.arrival = self.queues.next_arrival()
        parent.started = True
        self.tables.publish(parent)
        return self._ends.branches(parent, [delta for delta in deltas if delta.finish is None])

    def drop(self, attempt: AttemptId, choices: tuple[int, ...] | None = None) -> None:
        """Forget the attempt's sequences (those of ``choices``), and release their blocks, at the
        latest when the running step is done. Held sequences are the hand-off machine's: not here.
        """
        queues = self.queues
        for queue in (queues.waiting, queues.resuming, queues.admitted, queues.decoding):
            for sequence in [s for s in queue.values() if s.attempt == attempt]:
                left = () if choices is None else _without(sequence.choices, choices)
                if left == sequence.choices:
                    continue
                queues.leave(queue, sequence)
                if left:
                    sequence.choices = left
                    queues.enter(queue, sequence)
                else:
                    self.let_go(sequence)

    def detach(self, sequence: Sequence) -> None:
        """Take an outbound sequence out of all queues, but keep its blocks: a transfer may still
        read them. `let_go` gives them back."""
        sequence.detached = True
        for queue in (self.queues.waiting, self.queues.admitted, self.queues.held):
            if queue.get(sequence.key) is sequence:
                self.queues.leave(queue, sequence)
                self.queues.count_departure()

    def decoding_alone(self, attempt: AttemptId) -> Sequence | None:
        """The attempt's only sequence here, if it decodes."""
        own = [sequence for sequence in self.sequences() if sequence.attempt == attempt]
        return own[0] if len(own) == 1 and own[0].key in self.queues.decoding else None

    def hold(self, sequence: Sequence) -> None:
        """A running sequence is to be handed off: it runs no step until it is to `go_on`."""
        self.queues.leave(self.queues.decoding, sequence)
        self.queues.enter(self.queues.held, sequence)

    def go_on(self, sequence: Sequence) -> None:
        """The hand-off of a held sequence came to nothing."""
        self.queues.leave(self.queues.held, sequence)
        self.queues.enter(self.queues.decoding, sequence)

    def let_go(self, sequence: Sequence) -> None:
        """Release the blocks of a sequence that is in no queue (after the running step)."""
        if sequence.in_flight:
            sequence.doomed = True
        else:
            self.tables.release(sequence)

    # --- steps --------------------------------------------------------------------------------

    @property
    def is_riding(self) -> bool:
        return self.ride is not None  # a check in sight would hold for mypyc when it is over

    def plan(self) -> Planned:
        """The next step, if none is under way and there is something to compute."""
        planned, idle = Planned(), self._idle_at
        if self.is_riding or (idle and idle == (self.changes, self.standing.role)):
            return planned
        if self.queues.growing:
            self._make_room(planned)
        last, self._last_ride = self._last_ride, None
        if last is not None and self._is_settled(last):
            self._ride_again(last)
        elif not self._send_suspect():
            self._choose(planned)
        self._idle_at = None if self.ride else (self.changes, self.standing.role)
        if self.ride is not None:
            planned.plan = self.ride.plan
        return planned

    def _ride_again(self, last: Ride) -> None:
        """The same riders, each a token further."""
        before, riders = last.shape, last.riders
        context = sum([s.num_tokens for s in riders])
        shape = StepShape(0, 0, before.num_decoding, context)
        self._start(riders, len(riders), [], shape, last.settled)
        assert self.ride is not None
        self.ride.steps_left = last.steps_left

    def _ride_out(
        self, decodes: list[Sequence], prompts: list[tuple[Sequence, int]], *, settled: bool
    ) -> None:
        """These, and so many tokens of each prompt."""
        if not decodes and not prompts:
            return
        chunks = [chunk for _, chunk in prompts]
        riders = decodes + [sequence for sequence, _ in prompts]
        shape = shape_of(riders, len(decodes), chunks)
        until = (self.changes, self.standing.role) if settled else None
        self._start(riders, len(decodes), chunks, shape, until)

    def _start(
        self,
        riders: list[Sequence],
        num_decodes: int,
        chunks: list[int],
        shape: StepShape,
        settled: tuple[int, Role] | None,
    ) -> None:
        for sequence in riders:
            sequence.in_flight = True
        self.num_steps += 1
        step_id, copies = StepId(self.num_steps), self.tables.take_copies(riders)
        plan: StepPlan
        if self.settings.bare_plans and not (chunks and _any_shared(riders[num_decodes:])):
            plan = BarePlan(step_id=step_id, rows=(), copies=copies, size=shape)
        else:
            rows = rows_of(riders, num_decodes, chunks)
            plan = StepPlan(step_id=step_id, rows=rows, copies=copies)
        self.ride = Ride(plan, riders, num_decodes, chunks, shape, None if copies else settled)

    def _send_suspect(self) -> bool:
        """The next suspect that is still running, alone; False if there is none."""
        while self._suspects and self.ride is None:
            sequence = self._suspects.pop(0)
            if self.queues.decoding.get(sequence.key) is sequence:
                self._ride_out([sequence], [], settled=False)
            elif self.queues.admitted.get(sequence.key) is sequence:
                remaining = sequence.num_tokens - sequence.num_computed
                chunk = min(remaining, self.settings.max_step_tokens)
                self._ride_out([], [(sequence, chunk)], settled=False)
        return self.is_riding

    def _choose(self, planned: Planned) -> None:
        """Every running sequence's next token, and the prompt chunks that the policy grants."""
        queues = self.queues
        prompts: list[tuple[Sequence, int]] = []
        reserves = self.reserves
        batch = _NOTHING
        if reserves or queues.waiting or queues.resuming or queues.admitted:
            batch = self._policy.plan(self._lookout.view(self.standing.role, self.growth_headroom))
            self._lookout.memory = batch.memory
        waited = list(queues.resuming.values())
        for key in batch.preempts:
            self._preempt(queues.decoding[key], planned)
        decodes = queues.decoding_but(batch.pauses)[: self.settings.max_running]
        for sequence in decodes:
            if not sequence.decode_started:
                sequence.decode_started = True
                if reserves:
                    self.tables.reserve_answer(sequence)
                planned.started_decoding.append(sequence)
        num_new = len(queues.waiting)
        for grant in batch.grants:
            if grant.key not in queues.admitted and not self._admit(grant.key, planned):
                break
            sequence = queues.admitted[grant.key]
            remaining = sequence.num_tokens - sequence.num_computed
            prompts.append((sequence, min(grant.num_tokens, remaining)))
        if waited and len(queues.waiting) < num_new:
            pass_by(s for s in waited if s.key in queues.resuming)
        all_ride = len(decodes) + len(batch.pauses) == len(queues.decoding)
        settled = all_ride and not batch.grants and not batch.preempts
        self._ride_out(decodes, prompts, settled=settled)

    def _admit(self, key: SequenceKey, planned: Planned) -> bool:
        """Give a waiting sequence its blocks, if they can be had."""
        queues = self.queues
        queue = queues.waiting if key in queues.waiting else queues.resuming
        sequence = queue[key]
        if not self.tables.admit(sequence):
            return False
        queues.leave(queue, sequence)
        queues.enter(queues.admitted, sequence)
        if not sequence.started:
            sequence.started = True
            planned.admitted.append(sequence)
        return True

    def step_done(self, result: StepResult) -> StepOutcome:
        """Account for the step that has just ended."""
        ride = self._arrive()
        assert ride.plan.step_id == result.step_id, (ride.plan.step_id, result.step_id)
        if result.error is None:
            if result.failures:
                self._last_ride = None
            return self._ends.one(ride, result)
        outcome = self._ends.broken(ride)
        self._last_ride = None
        self._suspects += outcome.suspects
        return outcome

    def steps_done(self, num_steps: int, ended: tuple[tuple[int, int], ...]) -> StepOutcome:
        """Account for several steps that have just ended, as far as `steady_steps` allowed."""
        ride = self._arrive()
        outcome = self._ends.several(ride, num_steps, ended)
        self.num_steps += num_steps - 1
        if ride.steps_left is not None:
            ride.steps_left -= num_steps
        return outcome

    def _arrive(self) -> Ride:
        ride, self.ride = self.ride, None
        assert ride is not None, "a step has ended, and none was under way"
        self._last_ride = ride
        return ride

    def steady_steps(self) -> int:
        """See `WorkerNode.steady_steps`."""
        ride = self.ride
        if ride is None or (ride.chunks and _any_shared(ride.riders[ride.num_decodes :])):
            return 0
        if not self._is_settled(ride):
            return 1
        left = ride.steps_left
        if left is None:
            left = ride.steps_left = fewest_steps_left(ride.riders, self.settings.longest_tokens)
        if self.reserves:
            return left
        tables = self.tables
        return min(left, 1 + tables.pool.num_free // len(ride.riders) * tables.block_size)

    # --- figures ------------------------------------------------------------------------------

    @property
    def changes(self) -> int:
        """As long as it is the same, nobody who had to wait can be let in."""
        return self.queues.changes + self.tables.pool.num_releases

    @property
    def num_running(self) -> int:
        return len(self.queues.admitted) + len(self.queues.decoding)

    @property
    def num_waiting(self) -> int:
        return len(self.queues.waiting) + len(self.queues.resuming)

    @property
    def num_left_out(self) -> int:
        """Sequences that wait, or have no part in the running step though they decode."""
        riding = self.ride.num_decodes if self.ride else 0
        return max(0, self.num_waiting + len(self.queues.decoding) - riding)

    @property
    def growth_headroom(self) -> int:
        """Blocks that can be given away while each running sequence can still grow by one."""
        if self.reserves:
            return self.tables.pool.num_free
        headroom = self.tables.pool.num_free - len(self.queues.decoding)
        return headroom if headroom > 0 else 0

    @property
    def spare_blocks(self) -> int:
        """Blocks that hand-offs may have: what an old sequence waits for is kept for it."""
        old = first_old(self.queues.waiting, self.queues.resuming, self.settings)
        return self.growth_headroom - (0 if old is None else self.tables.missing_blocks(old))

    def let_past(self) -> None:
        """A hand-off is given blocks, before those who wait here."""
        if self.num_waiting:
            queues = self.queues
            queues.changes += 1
            pass_by([*queues.resuming.values(), *islice(queues.waiting.values(), 1)])

    @property
    def is_empty(self) -> bool:
        return not self.is_riding and self.queues.are_empty

    def sequences(self) -> Iterator[Sequence]:
        """Every sequence in a queue, each once."""
        return self.queues.sequences()

    def untold(self) -> list[TokenDelta]:
        """The tokens of which nobody has been told; from now on they count as told."""
        return [delta for delta in map(untold, self.sequences()) if delta is not None]

    # --- inside -------------------------------------------------------------------------------

    def _is_settled(self, ride: Ride) -> bool:
        """True if the step after this one has the same riders, unless one of them ends."""
        return ride.settled is not None and ride.settled == (self.changes, self.standing.role)

    def _make_room(self, planned: Planned) -> None:
        """A slot for the next token of each running sequence, oldest first."""
        decoding, tables = self.queues.decoding, self.tables
        growing, self.queues.growing = self.queues.growing, []
        if self.reserves:
            return  # each has room for its first token, or for all
        lacking = [s for s in growing if tables.lacks_slot(s) and decoding.get(s.key) is s]
        lacking.sort(key=lambda s: s.arrival)
        for sequence in lacking:
            while sequence.key in decoding and not tables.grow(sequence):
                able = (s for s in decoding.values() if not s.reserved_tokens)
                self._preempt(max(able, key=lambda s: s.arrival), planned)

    def _preempt(self, sequence: Sequence, planned: Planned) -> None:
        """Take a running sequence's blocks: it is done elsewhere, or here and later."""
        self.num_preemptions += 1
        sequence.num_preemptions += 1
        self.queues.leave(self.queues.decoding, sequence)
        self.tables.release(sequence)
        if self.standing.role is Role.DECODE:
            planned.handed_back.append(sequence)
            return
        planned.preempted.append(sequence)
        set_back(sequence, self.queues, self.settings)


def _any_shared(prompts: list[Sequence]) -> bool:
    """True if one of them stands for several choices."""
    return any(len(sequence.choices) > 1 for sequence in prompts)


def _without(choices: tuple[int, ...], gone: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(choice for choice in choices if choice not in gone)
