"""One sequence on one worker: the tokens of a choice and the blocks that hold their KV.

Until token 0 of an attempt with several choices is drawn, one sequence stands for all of them; then
it is forked, and each choice has a sequence of its own.

Who owns its blocks: the sequence, from admission until it is released. ``in_flight`` says that the
running step reads or writes them; a sequence that is dropped meanwhile is only ``doomed``, and its
blocks are released when the step is done. ``detached``: a hand-off that ended early holds the
blocks; the sequence runs no more steps.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from pdserve.core.ids import AttemptId, BlockHash, BlockId
from pdserve.core.messages import TokenDelta
from pdserve.core.request import FinishReason, SamplingParams
from pdserve.core.step import SampledToken, SampleSpec
from pdserve.kv.hashing import extend_hash

SequenceKey = tuple[AttemptId, int]
"""Attempt and first choice."""
NO_CHOICE = -1
"""Of a prefix that is only sent: nobody draws its tokens."""


@dataclass(slots=True, kw_only=True)
class Sequence:
    """``token_ids`` are all known tokens; KV is valid for the first ``num_computed`` of them.

    ``hashes[i]`` is the chained hash of full block i; as many are kept as are known. ``arrival``
    orders sequences of a worker by age. ``hands_off``: leaves for a decode worker after prefill.
    ``extends_hashes`` is False if its KV mixes numerics classes: what it adds is not indexed.
    ``num_found``: tokens that were cached when it came. ``num_preemptions`` and ``num_passed`` are
    its setbacks (`node.turns`); it is admitted with blocks for ``reserved_tokens`` if these are
    more than it has.
    """

    attempt: AttemptId
    choices: tuple[int, ...]
    params: SamplingParams
    token_ids: list[int]
    num_prompt_tokens: int
    root: BlockHash
    arrival: int
    hands_off: bool = False
    extends_hashes: bool = True
    num_computed: int = 0
    num_found: int = 0
    num_cached_blocks: int = 0
    num_published: int = 0
    block_ids: list[BlockId] = field(default_factory=list)
    hashes: list[BlockHash] = field(default_factory=list)
    in_flight: bool = False
    doomed: bool = False
    detached: bool = False
    num_preemptions: int = 0
    num_passed: int = 0
    reserved_tokens: int = 0
    started: bool = False
    decode_started: bool = False

    @property
    def key(self) -> SequenceKey:
        return (self.attempt, self.choices[0] if self.choices else NO_CHOICE)

    @property
    def next_index(self) -> int:
        """Index of the next output token."""
        return len(self.token_ids) - self.num_prompt_tokens

    def extend_hashes_to(self, num_blocks: int, block_size: int) -> None:
        """Know the hashes of the first ``num_blocks`` full blocks."""
        for index in range(len(self.hashes), num_blocks):
            parent = self.hashes[-1] if self.hashes else self.root
            tokens = self.token_ids[index * block_size : (index + 1) * block_size]
            self.hashes.append(extend_hash(parent, tokens))


def finish_reason(
    params: SamplingParams, index: int, sampled: SampledToken, room_tokens: int
) -> FinishReason | None:
    """Whether output token ``index`` ends its choice; ``room_tokens`` more would fit the model."""
    if index >= params.min_tokens and sampled.token_id in params.ending_token_ids:
        return FinishReason.STOP
    if index + 1 >= params.max_tokens or room_tokens <= 0:
        return FinishReason.LENGTH
    return None


def sample_spec(sequence: Sequence) -> SampleSpec:
    """What a row that reaches the end of the known tokens is to draw."""
    needs_history = sequence.params.needs_history
    return SampleSpec(
        params=sequence.params,
        choices=sequence.choices,
        index=sequence.next_index,
        history=tuple(sequence.token_ids) if needs_history else None,
        num_prompt_tokens=sequence.num_prompt_tokens if needs_history else 0,
    )


def token_deltas(
    sequence: Sequence, spec: SampleSpec, sampled: tuple[SampledToken, ...], room_tokens: int
) -> tuple[TokenDelta, ...]:
    """What a row has drawn for the choices that are still wanted."""
    return tuple(
        TokenDelta(
            request_id=sequence.attempt.request_id,
            epoch=sequence.attempt.epoch,
            choice=choice,
            index=spec.index,
            token_id=token.token_id,
            finish=finish_reason(sequence.params, spec.index, token, room_tokens),
            logprobs=token.logprobs,
        )
        for choice, token in zip(spec.choices, sampled, strict=True)
        if choice in sequence.choices
    )
