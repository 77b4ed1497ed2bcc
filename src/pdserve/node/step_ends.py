"""What becomes of the riders of a step that has ended.

A row that has reached the end of its known tokens drew one for each choice: the choice ends, or
goes on decoding here, or waits for its hand-off; a prompt of several choices is forked. When a step
breaks, its rows are suspects.

A driver that computes nothing may let several steps pass in one go (`StepEnds.several`). What that
leaves behind is what as many single steps would have left: sequences grow, and full blocks are
published and new ones taken in the order in which the steps would have done so.
"""

from __future__ import annotations

from pdserve.core.errors import OutOfBlocksError
from pdserve.core.messages import TokenDelta
from pdserve.core.step import SILENT_TOKEN, SampledToken, StepResult
from pdserve.node.planned import StepOutcome
from pdserve.node.queues import Queues
from pdserve.node.ride import Ride
from pdserve.node.sequence import Sequence, token_deltas, with_prompt
from pdserve.node.settings import WorkerSettings
from pdserve.node.tables import BlockTables
from pdserve.node.turns import set_back

_Event = tuple[int, int, int, Sequence]
"""Step, publication (0) or growth (1), turn among those of the same step, whose."""


class StepEnds:
    """Owned by the batch machine, whose queues and tables it works on."""

    def __init__(self, settings: WorkerSettings, queues: Queues, tables: BlockTables) -> None:
        self._settings = settings
        self._queues = queues
        self._tables = tables
        self._block_size = settings.layout.block_size
        self._longest_tokens = settings.longest_tokens

    def one(self, ride: Ride, result: StepResult) -> StepOutcome:
        """The step is done, and this is what was drawn."""
        outcome = StepOutcome()
        self._tables.copies_done()
        rows, failed = ride.plan.rows, dict(result.failures)
        for index, sequence in enumerate(ride.riders):
            sequence.in_flight = False
            if sequence.doomed:
                self._tables.release(sequence)
                continue
            if index in failed and not sequence.detached:
                self._failed(sequence, outcome)
                continue
            row = rows[index]
            decodes = index < ride.num_decodes
            self._computed(sequence, row.end, decodes=decodes)
            if row.score is not None:
                sequence.scores.extend(result.scores[index])
            if row.sample is not None and not sequence.detached:
                choices, sampled = row.sample.choices, result.tokens[index]
                self._take(sequence, choices, sampled, outcome, decodes=decodes)
        return outcome

    def several(
        self, ride: Ride, num_steps: int, ended: tuple[tuple[int, int], ...]
    ) -> StepOutcome:
        """So many steps like this one are done; see `StepsDone`."""
        outcome = StepOutcome()
        self._tables.copies_done()
        told = self._told(ride, num_steps, ended)
        self._grow(ride, num_steps, told)
        for index in sorted(told):
            sequence = ride.riders[index]
            if sequence.doomed:
                self._tables.release(sequence)
            else:
                sampled = (SampledToken(told[index]),)
                self._take(sequence, sequence.choices, sampled, outcome, decodes=True)
        if ride.chunks:
            self._chunks_done(ride, dict(ended), outcome)
        return outcome

    def _chunks_done(self, ride: Ride, ended: dict[int, int], outcome: StepOutcome) -> None:
        """The prompts among the riders of one step that nobody computed."""
        prompts = enumerate(ride.riders[ride.num_decodes :], ride.num_decodes)
        for (row, sequence), chunk in zip(prompts, ride.chunks, strict=True):
            sequence.in_flight = False
            if sequence.doomed:
                self._tables.release(sequence)
                continue
            self._computed(sequence, sequence.num_computed + chunk, decodes=False)
            if sequence.num_computed == sequence.num_tokens and not sequence.detached:
                sampled = (SampledToken(ended.get(row, SILENT_TOKEN)),)
                self._take(sequence, sequence.choices, sampled, outcome, decodes=False)

    def broken(self, ride: Ride) -> StepOutcome:
        """What the step wrote is not to be trusted; nothing counts as computed, so it is redone."""
        outcome = StepOutcome()
        riders = ride.riders
        self._tables.copies_failed()
        for sequence in riders:
            sequence.in_flight = False
            if sequence.doomed:
                self._tables.release(sequence)
            elif sequence.detached:
                continue
            elif len(riders) > 1:
                outcome.suspects.append(sequence)
            else:
                self._failed(sequence, outcome)
        return outcome

    def branches(self, parent: Sequence, live: list[TokenDelta]) -> list[Sequence]:
        """A running sequence per choice that goes on; the last takes over the parent's table."""
        if not live:
            self._tables.release(parent)
            return []
        branches = [self._fork(parent, delta) for delta in live[:-1]]
        parent.choices = (live[-1].choice,)
        parent.append(live[-1].token_id)
        self._queues.enter(self._queues.decoding, parent)
        return [*branches, parent]

    # --- one row ------------------------------------------------------------------------------

    def _failed(self, sequence: Sequence, outcome: StepOutcome) -> None:
        """It is to blame itself, and is run no more."""
        queue = self._queues.find(sequence)
        if queue is not None:
            self._queues.leave(queue, sequence)
        outcome.failed.append(sequence)

    def _computed(self, sequence: Sequence, end: int, *, decodes: bool) -> None:
        if decodes or sequence.detached:
            sequence.num_computed = end
        else:
            self._queues.computed(sequence, end)
        self._tables.publish(sequence)

    def _take(
        self,
        sequence: Sequence,
        choices: tuple[int, ...],
        sampled: tuple[SampledToken, ...],
        outcome: StepOutcome,
        *,
        decodes: bool,
    ) -> None:
        """A row drew tokens: finish, go on, fork, or wait for the hand-off."""
        deltas = token_deltas(sequence, choices, sampled, self._longest_tokens)
        if not decodes and deltas and sequence.next_index == 0:
            cached_tokens = sequence.num_cached_blocks * self._block_size
            deltas = with_prompt(sequence, deltas, cached_tokens)
        outcome.deltas.extend(() if sequence.hands_off else deltas)
        queues = self._queues
        if decodes:
            [delta] = deltas
            if delta.finish is not None:
                queues.leave(queues.decoding, sequence)
                self._tables.release(sequence)
            else:
                sequence.append(delta.token_id)
                queues.context_tokens += 1
                queues.growing.append(sequence)
                self._let_others_ride(sequence)
            return
        queues.leave(queues.admitted, sequence)
        outcome.prefilled.append(sequence)
        if sequence.hands_off:
            queues.enter(queues.held, sequence)
            outcome.held.append((sequence, deltas))
        else:
            live = [delta for delta in deltas if delta.finish is None]
            outcome.decoding.extend(self.branches(sequence, live))

    def _let_others_ride(self, sequence: Sequence) -> None:
        """With more decoding than can ride in a step, whoever rode goes behind the others."""
        decoding = self._queues.decoding
        if len(decoding) > self._settings.max_running:
            decoding[sequence.key] = decoding.pop(sequence.key)
            self._queues.changes += 1

    def _fork(self, parent: Sequence, delta: TokenDelta) -> Sequence:
        child = Sequence(
            attempt=parent.attempt,
            choices=(delta.choice,),
            params=parent.params,
            given=parent.given,
            drawn=[*parent.drawn, delta.token_id],
            num_prompt_tokens=parent.num_prompt_tokens,
            root=parent.root,
            arrival=self._queues.next_arrival(),
            extends_hashes=parent.extends_hashes,
            hashes=list(parent.hashes),
            started=True,
        )
        if self._tables.fork(parent, child):
            self._queues.enter(self._queues.decoding, child)
        else:  # recomputed later, most of it from the prefix cache
            set_back(child, self._queues, self._settings)
        return child

    # --- several steps ------------------------------------------------------------------------

    def _told(
        self, ride: Ride, num_steps: int, ended: tuple[tuple[int, int], ...]
    ) -> dict[int, int]:
        """Decode rows that do not just grow, with what they draw last: those that ``ended`` names,
        and those that reach their limit."""
        if not ride.num_decodes:
            return {}
        told = {row: token_id for row, token_id in ended if row < ride.num_decodes}
        longest_tokens = self._longest_tokens
        if ride.steps_left is None:
            decodes = ride.riders[: ride.num_decodes]
            ride.steps_left = fewest_steps_left(decodes, longest_tokens)
        if num_steps >= ride.steps_left:
            for row, s in enumerate(ride.riders[: ride.num_decodes]):
                left = s.params.max_tokens - s.num_tokens + s.num_prompt_tokens
                if left <= num_steps or longest_tokens - s.num_tokens <= num_steps:
                    told.setdefault(row, SILENT_TOKEN)
        return told

    def _grow(self, ride: Ride, num_steps: int, told: dict[int, int]) -> None:
        """Every decode row's KV grows by as many tokens, and its known tokens too, but for the last
        one of those that are told. Rows that were dropped are added to these."""
        if not ride.num_decodes:
            return
        size, silent = self._block_size, [SILENT_TOKEN] * num_steps
        events: list[_Event] = []
        indexes = self._tables.pool.prefix_cache
        grown = 0
        only_decodes = ride.num_decodes == len(ride.riders)
        decodes = ride.riders if only_decodes else ride.riders[: ride.num_decodes]
        for row, sequence in enumerate(decodes):
            sequence.in_flight = False
            if sequence.doomed:
                told[row] = SILENT_TOKEN
                continue
            if row in told:
                sequence.num_tokens += num_steps - 1
                sequence.drawn += silent[1:]
                grown -= 1
            else:
                sequence.num_tokens += num_steps
                sequence.drawn += silent
            grown += num_steps
            sequence.num_computed = num_computed = sequence.num_computed + num_steps
            if (
                num_computed >= (sequence.num_published + 1) * size
                if indexes
                else sequence.num_tokens > len(sequence.block_ids) * size
            ):
                self._crossings(events, row, sequence, num_steps)
        self._queues.context_tokens += grown
        if not events:
            return
        events.sort()
        for _, grows, _, sequence in events:
            if not grows:
                self._tables.publish(sequence, sequence.num_published + 1)
            elif not self._tables.grow(sequence):
                raise OutOfBlocksError("steps were let pass for which there were no blocks")

    def _crossings(
        self, events: list[_Event], row: int, sequence: Sequence, num_steps: int
    ) -> None:
        """When in these steps a block of the row is full, and when it needs another one (which the
        last step does not: the next plan does)."""
        size, before = self._block_size, sequence.num_computed - num_steps
        self._queues.growing.append(sequence)
        for number in range(before // size + 1, sequence.num_computed // size + 1):
            step = number * size - before
            events.append((step, 0, row, sequence))
            if number >= len(sequence.block_ids) and step < num_steps:
                events.append((step, 1, sequence.arrival, sequence))


def fewest_steps_left(riders: list[Sequence], longest_tokens: int) -> int:
    """Steps until the first of these reaches the end that its client or the model sets it."""
    left = min([s.params.max_tokens - s.num_tokens + s.num_prompt_tokens for s in riders])
    longest = max([s.num_tokens for s in riders])
    return max(1, min(left, longest_tokens - longest))
