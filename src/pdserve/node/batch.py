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

from collections.abc import Collection, Iterator
from itertools import chain, islice

from pdserve.core.ids import AttemptId, StepId
from pdserve.core.messages import TokenDelta
from pdserve.core.request import Job, Role
from pdserve.core.step import SampledToken, SampleSpec, StepPlan, StepResult, StepRow
from pdserve.kv.hashing import root_hash
from pdserve.node.planned import Planned, StepOutcome
from pdserve.node.sequence import Sequence, SequenceKey, sample_spec, token_deltas
from pdserve.node.settings import WorkerSettings
from pdserve.node.standing import Standing
from pdserve.node.tables import BlockTables
from pdserve.node.turns import first_old, in_turn, pass_by, reserve_answer
from pdserve.policy.batch import BatchPolicy, BatchView, DecodeView, PromptView


class BatchMachine:
    """Queues of one worker. One step is under way at a time."""

    def __init__(
        self, settings: WorkerSettings, policy: BatchPolicy, standing: Standing | None = None
    ) -> None:
        self.settings = settings
        self.standing = standing or Standing(settings.role)
        self.tables = BlockTables(settings)
        self.num_preemptions = 0
        self.num_steps = 0
        self.running_step: StepPlan | None = None
        self._policy = policy
        self._arrivals = 0
        self._waiting: dict[SequenceKey, Sequence] = {}
        self._resuming: dict[SequenceKey, Sequence] = {}
        self._admitted: dict[SequenceKey, Sequence] = {}
        self._decoding: dict[SequenceKey, Sequence] = {}
        self._held: dict[SequenceKey, Sequence] = {}
        self._in_flight: list[Sequence] = []
        self._suspects: list[Sequence] = []

    # --- arrivals and departures --------------------------------------------------------------

    def submit(self, job: Job, *, hands_off: bool) -> Sequence:
        """Queue an attempt."""
        sequence = Sequence(
            attempt=job.attempt,
            choices=job.choices,
            params=job.params,
            token_ids=list(job.token_ids),
            num_prompt_tokens=job.num_prompt_tokens,
            root=root_hash(self.settings.layout, job.cache_salt),
            arrival=self._next_arrival(),
            hands_off=hands_off,
        )
        self._waiting[sequence.key] = sequence
        return sequence

    def adopt(self, parent: Sequence, deltas: tuple[TokenDelta, ...]) -> list[Sequence]:
        """Take over a verified hand-off: one running sequence per choice that goes on.

        ``parent`` holds blocks with the KV of all of its tokens; this call owns their references.
        """
        parent.arrival = self._next_arrival()
        parent.started = True
        self.tables.publish(parent)
        return self._branches(parent, [delta for delta in deltas if delta.finish is None])

    def drop(self, attempt: AttemptId, choices: tuple[int, ...] | None = None) -> None:
        """Forget the attempt's sequences (those of ``choices``), and release their blocks, at the
        latest when the running step is done. Held sequences are the hand-off machine's: not here.
        """
        for queue in (self._waiting, self._resuming, self._admitted, self._decoding):
            for sequence in [s for s in queue.values() if s.attempt == attempt]:
                left = () if choices is None else _without(sequence.choices, choices)
                if left == sequence.choices:
                    continue
                del queue[sequence.key]
                if left:
                    sequence.choices = left
                    queue[sequence.key] = sequence
                else:
                    self.let_go(sequence)

    def detach(self, sequence: Sequence) -> None:
        """Take an outbound sequence out of all queues, but keep its blocks: a transfer may still
        read them. `let_go` gives them back."""
        sequence.detached = True
        for queue in (self._waiting, self._admitted, self._held):
            if queue.get(sequence.key) is sequence:
                del queue[sequence.key]

    def decoding_alone(self, attempt: AttemptId) -> Sequence | None:
        """The attempt's only sequence here, if it decodes."""
        own = [sequence for sequence in self.sequences() if sequence.attempt == attempt]
        return own[0] if len(own) == 1 and own[0].key in self._decoding else None

    def hold(self, sequence: Sequence) -> None:
        """A running sequence is to be handed off: it runs no step until it is to `go_on`."""
        self._held[sequence.key] = self._decoding.pop(sequence.key)

    def go_on(self, sequence: Sequence) -> None:
        """The hand-off of a held sequence came to nothing."""
        self._decoding[sequence.key] = self._held.pop(sequence.key)

    def let_go(self, sequence: Sequence) -> None:
        """Release the blocks of a sequence that is in no queue (after the running step)."""
        if sequence.in_flight:
            sequence.doomed = True
        else:
            self.tables.release(sequence)

    # --- steps --------------------------------------------------------------------------------

    def plan(self) -> Planned:
        """The next step, if none is under way and there is something to compute."""
        planned = Planned()
        if self.running_step is not None:
            return planned
        self._make_room(planned)
        rows = self._suspect_row() or self._rows(planned)
        if rows:
            self.num_steps += 1
            planned.plan = self.running_step = StepPlan(
                step_id=StepId(self.num_steps),
                rows=tuple(rows),
                copies=self.tables.take_copies(self._in_flight),
            )
        return planned

    def _suspect_row(self) -> list[StepRow]:
        """The next suspect that is still running, alone."""
        while self._suspects:
            sequence = self._suspects.pop(0)
            queues = (self._admitted, self._decoding)
            if any(queue.get(sequence.key) is sequence for queue in queues):
                remaining = len(sequence.token_ids) - sequence.num_computed
                return [self._row(sequence, min(remaining, self.settings.max_step_tokens))]
        return []

    def _rows(self, planned: Planned) -> list[StepRow]:
        """Every running sequence's next token, and the prompt chunks that the policy grants."""
        batch = self._policy.plan(self._view())
        waited = list(self._resuming.values())
        for key in batch.preempts:
            self._preempt(self._decoding[key], planned)
        rows: list[StepRow] = []
        for sequence in list(self._decoding.values())[: self.settings.max_running]:
            rows.append(self._row(sequence, 1))
            if not sequence.decode_started:
                sequence.decode_started = True
                planned.started_decoding.append(sequence)
        num_new = len(self._waiting)
        for grant in batch.grants:
            if grant.key not in self._admitted and not self._admit(grant.key, planned):
                break
            sequence = self._admitted[grant.key]
            remaining = len(sequence.token_ids) - sequence.num_computed
            rows.append(self._row(sequence, min(grant.num_tokens, remaining)))
        if len(self._waiting) < num_new:
            pass_by(s for s in waited if s.key in self._resuming)
        return rows

    def _admit(self, key: SequenceKey, planned: Planned) -> bool:
        """Give a waiting sequence its blocks, if they can be had."""
        queue = self._waiting if key in self._waiting else self._resuming
        sequence = queue[key]
        if not self.tables.admit(sequence):
            return False
        self._admitted[key] = queue.pop(key)
        if not sequence.started:
            sequence.started = True
            planned.admitted.append(sequence)
        return True

    def step_done(self, result: StepResult) -> StepOutcome:
        """Account for the step that has just ended."""
        plan, self.running_step = self.running_step, None
        assert plan is not None
        assert plan.step_id == result.step_id, (plan.step_id, result.step_id)
        in_flight, self._in_flight = self._in_flight, []
        outcome = StepOutcome()
        if result.error is not None:
            self._step_broke(in_flight, outcome)
            return outcome
        self.tables.copies_done()
        for index, (sequence, row) in enumerate(zip(in_flight, plan.rows, strict=True)):
            sequence.in_flight = False
            if sequence.doomed:
                self.tables.release(sequence)
            else:
                sequence.num_computed = row.end
                self.tables.publish(sequence)
                if row.sample is not None and not sequence.detached:
                    self._take(sequence, row.sample, result.tokens[index], outcome)
        return outcome

    # --- figures ------------------------------------------------------------------------------

    @property
    def num_running(self) -> int:
        return len(self._admitted) + len(self._decoding)

    def queues(self) -> tuple[Collection[Sequence], ...]:
        """Sequences that wait, whose prompt is being computed, and that decode."""
        waits = [*self._waiting.values(), *self._resuming.values()]
        return waits, self._admitted.values(), self._decoding.values()

    @property
    def growth_headroom(self) -> int:
        """Blocks that can be given away while each running sequence can still grow by one."""
        return max(0, self.tables.pool.num_free - len(self._decoding))

    @property
    def spare_blocks(self) -> int:
        """Blocks that hand-offs may have: what an old sequence waits for is kept for it."""
        old = first_old(self._waiting, self._resuming, self.settings)
        return self.growth_headroom - (0 if old is None else self.tables.missing_blocks(old))

    def let_past(self) -> None:
        """A hand-off is given blocks, before those who wait here."""
        pass_by([*self._resuming.values(), *islice(self._waiting.values(), 1)])

    @property
    def is_empty(self) -> bool:
        return next(self.sequences(), None) is None and self.running_step is None

    def sequences(self) -> Iterator[Sequence]:
        """Every sequence in a queue, each once."""
        yield from chain(self._waiting.values(), self._resuming.values(), self._admitted.values())
        yield from chain(self._decoding.values(), self._held.values())

    # --- inside -------------------------------------------------------------------------------

    def _next_arrival(self) -> int:
        self._arrivals += 1
        return self._arrivals

    def _view(self) -> BatchView:
        is_mixed = self.standing.role is Role.MIXED
        new_first = self._policy.new_first and is_mixed
        turns = in_turn(self._waiting, self._resuming, self.settings, new_first=new_first)
        return BatchView(
            num_decoding=min(len(self._decoding), self.settings.max_running),
            prompts=map(self._prompt_view, chain(list(self._admitted.values()), turns)),
            num_admitted=len(self._admitted),
            free_blocks=self.growth_headroom,
            block_size=self.settings.layout.block_size,
            max_step_tokens=self.settings.max_step_tokens,
            mixed_chunk_tokens=self.settings.mixed_chunk_tokens,
            max_running=self.settings.max_running,
            preemptible=self._preemptible() if is_mixed else (),
        )

    def _prompt_view(self, sequence: Sequence) -> PromptView:
        waits = sequence.key not in self._admitted
        return PromptView(
            key=sequence.key,
            num_computed=sequence.num_computed,
            num_tokens=len(sequence.token_ids),
            blocks_missing=self.tables.missing_blocks(sequence) if waits else 0,
            is_new=sequence.key in self._waiting,
        )

    def _preemptible(self) -> Iterator[DecodeView]:
        for sequence in sorted(self._decoding.values(), key=lambda s: -s.arrival):
            if not sequence.reserved_tokens:
                yield DecodeView(key=sequence.key, blocks_freed=self.tables.freed_by(sequence))

    def _make_room(self, planned: Planned) -> None:
        """A slot for the next token of each running sequence, oldest first."""
        for sequence in sorted(self._decoding.values(), key=lambda s: s.arrival):
            while sequence.key in self._decoding and not self.tables.grow(sequence):
                able = (s for s in self._decoding.values() if not s.reserved_tokens)
                self._preempt(max(able, key=lambda s: s.arrival), planned)

    def _preempt(self, sequence: Sequence, planned: Planned) -> None:
        """Take a running sequence's blocks: it is done elsewhere, or here and later."""
        self.num_preemptions += 1
        sequence.num_preemptions += 1
        del self._decoding[sequence.key]
        self.tables.release(sequence)
        if self.standing.role is Role.DECODE:
            planned.handed_back.append(sequence)
        else:
            planned.preempted.append(sequence)
            self._requeue(sequence)

    def _requeue(self, sequence: Sequence) -> None:
        """To be recomputed here; all of it is then of our own class."""
        sequence.num_computed = sequence.num_cached_blocks = sequence.num_published = 0
        if not sequence.extends_hashes:
            sequence.extends_hashes, sequence.hashes = True, []
        reserve_answer(sequence, self.settings)
        self._resuming[sequence.key] = sequence

    def _row(self, sequence: Sequence, num_tokens: int) -> StepRow:
        start = sequence.num_computed
        end = start + num_tokens
        sequence.in_flight = True
        self._in_flight.append(sequence)
        return StepRow(
            attempt=sequence.attempt,
            token_ids=tuple(sequence.token_ids[start:end]),
            start=start,
            block_ids=tuple(sequence.block_ids),
            sample=sample_spec(sequence) if end == len(sequence.token_ids) else None,
            pushes=sequence.hands_off,
        )

    def _take(
        self,
        sequence: Sequence,
        spec: SampleSpec,
        sampled: tuple[SampledToken, ...],
        outcome: StepOutcome,
    ) -> None:
        """A row drew tokens: finish, go on, fork, or wait for the hand-off."""
        was_decoding = self._decoding.pop(sequence.key, None) is not None
        if not was_decoding:
            del self._admitted[sequence.key]
            outcome.prefilled.append(sequence)
        room_tokens = self.settings.longest_tokens - len(sequence.token_ids) - 1
        deltas = token_deltas(sequence, spec, sampled, room_tokens)
        if sequence.hands_off:
            self._held[sequence.key] = sequence
            outcome.held.append((sequence, deltas))
            return
        outcome.deltas.extend(deltas)
        branches = self._branches(sequence, [delta for delta in deltas if delta.finish is None])
        if not was_decoding:
            outcome.decoding.extend(branches)

    def _branches(self, parent: Sequence, live: list[TokenDelta]) -> list[Sequence]:
        """A running sequence per choice that goes on; the last takes over the parent's table."""
        if not live:
            self.tables.release(parent)
            return []
        branches = [self._fork(parent, delta) for delta in live[:-1]]
        parent.choices = (live[-1].choice,)
        parent.token_ids.append(live[-1].token_id)
        self._decoding[parent.key] = parent
        return [*branches, parent]

    def _fork(self, parent: Sequence, delta: TokenDelta) -> Sequence:
        child = Sequence(
            attempt=parent.attempt,
            choices=(delta.choice,),
            params=parent.params,
            token_ids=[*parent.token_ids, delta.token_id],
            num_prompt_tokens=parent.num_prompt_tokens,
            root=parent.root,
            arrival=self._next_arrival(),
            extends_hashes=parent.extends_hashes,
            hashes=list(parent.hashes),
            started=True,
        )
        if self.tables.fork(parent, child):
            self._decoding[child.key] = child
        else:  # recomputed later, most of it from the prefix cache
            self._requeue(child)
        return child

    def _step_broke(self, in_flight: list[Sequence], outcome: StepOutcome) -> None:
        """What the step wrote is not to be trusted; nothing counts as computed, so it is redone."""
        self.tables.copies_failed()
        for sequence in in_flight:
            sequence.in_flight = False
            if sequence.doomed:
                self.tables.release(sequence)
            elif sequence.detached:
                continue
            elif len(in_flight) > 1:
                outcome.suspects.append(sequence)
            else:
                self._decoding.pop(sequence.key, None)
                self._admitted.pop(sequence.key, None)
                outcome.failed.append(sequence)
        self._suspects += outcome.suspects


def _without(choices: tuple[int, ...], gone: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(choice for choice in choices if choice not in gone)
