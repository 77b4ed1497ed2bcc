"""The running step, as the batch machine remembers it: who rides in it, and how far each goes.

Decoding sequences sit in front, one token each; behind them prompts, a chunk each. As long as
nothing changes but that the decoding ones grow, the next step has the same riders, and then this is
known without asking anybody: that is what lets many steps pass in one go.
"""

from __future__ import annotations

from dataclasses import dataclass

from pdserve.core.request import Role
from pdserve.core.step import StepPlan, StepRow, StepShape
from pdserve.node.sequence import Sequence, prompt_score, sample_spec


@dataclass(slots=True)
class Ride:
    """``riders``: the same list as in the step before if they are certain to be the same.
    ``chunks``: tokens of each prompt behind the first ``num_decodes``.

    ``settled``: the changes that had been counted when the riders were chosen, and the role then,
    if the step takes everybody who decodes and nobody else: until there is another change, the next
    step will be so too. ``steps_left``: steps from this one on until the first rider reaches its
    limit, once somebody has asked.
    """

    plan: StepPlan
    riders: list[Sequence]
    num_decodes: int
    chunks: list[int]
    shape: StepShape
    settled: tuple[int, Role] | None
    steps_left: int | None = None

    def reaches(self, rider: Sequence) -> int:
        """Tokens of the rider that are computed when the step is done."""
        for sequence, chunk in zip(self.riders[self.num_decodes :], self.chunks, strict=True):
            if sequence is rider:
                return sequence.num_computed + chunk
        return rider.num_computed + 1

    def steps_within(self, num_blocks: int, block_size: int, most: int) -> int:
        """Of ``most`` steps like this one, how many can end before more than so many blocks have
        been taken; at the end of the last one it may be more."""
        rounds, few = divmod(num_blocks, len(self.riders))
        steps = 1 + rounds * block_size
        if steps >= most:
            return most
        # Each rider takes one every so many steps, the first when there is no room in its last.
        room = sorted([len(s.block_ids) * block_size - s.num_tokens for s in self.riders])
        return min(most, steps + max(0, room[few]))


def shape_of(riders: list[Sequence], num_decodes: int, chunks: list[int]) -> StepShape:
    """What the duration of a step with these riders depends on."""
    context = sum([sequence.num_tokens for sequence in riders[:num_decodes]])
    prompt_tokens = prompt_pairs = 0
    for sequence, chunk in zip(riders[num_decodes:], chunks, strict=True):
        start = sequence.num_computed
        end = start + chunk
        if chunk == 1 and start > 0:
            num_decodes += 1
            context += end
        else:
            prompt_tokens += chunk
            prompt_pairs += end * end - start * start
    return StepShape(prompt_tokens, prompt_pairs, num_decodes, context)


def rows_of(riders: list[Sequence], num_decodes: int, chunks: list[int]) -> tuple[StepRow, ...]:
    """The riders as a model runner sees them."""
    return tuple(map(_row, riders, [*([1] * num_decodes), *chunks]))


def _row(sequence: Sequence, num_tokens: int) -> StepRow:
    start = sequence.num_computed
    end = start + num_tokens
    return StepRow(
        attempt=sequence.attempt,
        token_ids=sequence.tokens(start, end),
        start=start,
        block_ids=tuple(sequence.block_ids),
        sample=sample_spec(sequence) if end == sequence.num_tokens else None,
        pushes=sequence.hands_off,
        score=prompt_score(sequence, start, end),
    )
