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
from pdserve.core.step import (
    SILENT_TOKEN,
    PromptNews,
    PromptScore,
    SampledToken,
    SampleSpec,
    TokenLogprobs,
)
from pdserve.core.token_ids import NamedTokens, TokenIds
from pdserve.kv.hashing import block_hashes, extend_hash

SequenceKey = tuple[AttemptId, int]
"""Attempt and first choice."""
NO_CHOICE = -1
"""Of a prefix that is only sent: nobody draws its tokens."""


@dataclass(slots=True, kw_only=True)
class Sequence:
    """``given`` are the tokens that it came with, ``drawn`` those that were drawn here: together
    the ``num_tokens`` known ones. KV is valid for the first ``num_computed`` of them.

    ``hashes[i]`` is the chained hash of full block i; as many are kept as are known. ``arrival``
    orders sequences of a worker by age. ``hands_off``: leaves for a decode worker after prefill.
    ``extends_hashes`` is False if its KV mixes numerics classes: what it adds is not indexed.
    ``num_found``: tokens that were cached when it came. ``num_preemptions`` and ``num_passed`` are
    its setbacks (`node.turns`); it is admitted with blocks for ``reserved_tokens`` if these are
    more than it has. ``num_told``: index of the first output token of which the router has not
    been told. ``counted_tokens``: its share in the sum of its queue (`node.queues`). ``number`` and
    ``answer_tokens`` are its job's. ``scores``: log-probabilities of the prompt's tokens from the
    second on, as far as it is computed, if it `is_scored`.
    """

    attempt: AttemptId
    choices: tuple[int, ...]
    params: SamplingParams
    given: TokenIds
    num_prompt_tokens: int
    root: BlockHash
    arrival: int
    drawn: list[int] = field(default_factory=list)
    num_tokens: int = 0
    num_told: int = 0
    counted_tokens: int = 0
    number: int = 0
    answer_tokens: int = 0
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
    scores: list[TokenLogprobs] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.num_tokens = len(self.given) + len(self.drawn)
        self.num_told = self.num_tokens - self.num_prompt_tokens

    @property
    def key(self) -> SequenceKey:
        return (self.attempt, self.choices[0] if self.choices else NO_CHOICE)

    @property
    def next_index(self) -> int:
        """Index of the next output token."""
        return self.num_tokens - self.num_prompt_tokens

    @property
    def is_scored(self) -> bool:
        """True if log-probabilities of its prompt are wanted, and were not told before."""
        return self.params.prompt_logprobs is not None and self.num_tokens == self.num_prompt_tokens

    @property
    def pending_tokens(self) -> int:
        """Tokens to be computed before it decodes, but for those that were cached when it came."""
        return self.num_tokens - max(self.num_computed, self.num_found)

    def append(self, token_id: int) -> None:
        """One more token is known, here and (soon) by the router."""
        self.drawn.append(token_id)
        self.num_tokens += 1
        self.num_told = self.num_tokens - self.num_prompt_tokens

    def tokens(self, start: int, end: int) -> TokenIds:
        """Known tokens ``start`` to ``end``."""
        num_given = len(self.given)
        if end <= num_given:
            return self.given[start:end]
        drawn = tuple(self.drawn[max(0, start - num_given) : end - num_given])
        return drawn if start >= num_given else self.given[start:] + drawn

    def extend_hashes_to(self, num_blocks: int, block_size: int) -> None:
        """Know the hashes of the first ``num_blocks`` full blocks."""
        hashes = self.hashes
        if len(hashes) >= num_blocks:
            return
        if isinstance(self.given, NamedTokens) and len(hashes) < len(self.given) // block_size:
            hashes += block_hashes(self.root, self.given, block_size)[len(hashes) : num_blocks]
        for index in range(len(hashes), num_blocks):
            parent = hashes[-1] if hashes else self.root
            tokens = self.tokens(index * block_size, (index + 1) * block_size)
            hashes.append(extend_hash(parent, tokens))


def finish_reason(
    params: SamplingParams, index: int, sampled: SampledToken, room_tokens: int
) -> FinishReason | None:
    """Whether output token ``index`` ends its choice; ``room_tokens`` more would fit the model."""
    # A constrained choice draws one before `min_tokens` only if nothing else may follow.
    may_end = index >= params.min_tokens or params.constraint is not None
    if may_end and sampled.token_id in params.ending_token_ids:
        return FinishReason.STOP
    if index + 1 >= params.max_tokens or room_tokens <= 0:
        return FinishReason.LENGTH
    return None


def sample_spec(sequence: Sequence) -> SampleSpec:
    """What a row that reaches the end of the known tokens is to draw."""
    params = sequence.params
    history, num_prompt_tokens = None, 0
    if params.has_penalties:
        num_prompt_tokens = sequence.num_prompt_tokens
        history = tuple(sequence.tokens(0, sequence.num_tokens))
    elif params.constraint is not None:
        history = tuple(sequence.tokens(sequence.num_prompt_tokens, sequence.num_tokens))
    return SampleSpec(
        params=params,
        choices=sequence.choices,
        index=sequence.next_index,
        history=history,
        num_prompt_tokens=num_prompt_tokens,
    )


def prompt_score(sequence: Sequence, start: int, end: int) -> PromptScore | None:
    """What a row with tokens ``start`` to ``end`` of a prompt is to tell of the next ones."""
    if not sequence.is_scored:
        return None
    num_top = sequence.params.prompt_logprobs
    assert num_top is not None
    return PromptScore(sequence.given[start + 1 : end + 1], num_top)


def token_deltas(
    sequence: Sequence,
    choices: tuple[int, ...],
    sampled: tuple[SampledToken, ...],
    longest_tokens: int,
) -> tuple[TokenDelta, ...]:
    """What a row has drawn for those of its ``choices`` that are still wanted."""
    index = sequence.next_index
    room_tokens = longest_tokens - sequence.num_tokens - 1
    return tuple(
        [
            TokenDelta(
                request_id=sequence.attempt.request_id,
                epoch=sequence.attempt.epoch,
                choice=choice,
                index=index,
                token_id=token.token_id,
                finish=finish_reason(sequence.params, index, token, room_tokens),
                logprobs=token.logprobs,
                skipped=index - sequence.num_told,
            )
            for choice, token in zip(choices, sampled, strict=True)
            if choice in sequence.choices
        ]
    )


def with_prompt(
    sequence: Sequence, deltas: tuple[TokenDelta, ...], cached_tokens: int
) -> tuple[TokenDelta, ...]:
    """First tokens, the first of which says what is to be told of the prompt."""
    scores = tuple(sequence.scores) if sequence.is_scored else None
    if not cached_tokens and scores is None:
        return deltas
    first = deltas[0]
    told = TokenDelta(
        request_id=first.request_id,
        epoch=first.epoch,
        choice=first.choice,
        index=first.index,
        token_id=first.token_id,
        finish=first.finish,
        logprobs=first.logprobs,
        skipped=first.skipped,
        prompt=PromptNews(cached_tokens=cached_tokens, logprobs=scores),
    )
    return (told, *deltas[1:])


def untold(sequence: Sequence) -> TokenDelta | None:
    """The last token that was drawn, with all before it that the router has not been told of; None
    if there are none."""
    index = sequence.next_index - 1
    if index < sequence.num_told:
        return None
    skipped, sequence.num_told = index - sequence.num_told, index + 1
    return TokenDelta(
        request_id=sequence.attempt.request_id,
        epoch=sequence.attempt.epoch,
        choice=sequence.choices[0],
        index=index,
        token_id=SILENT_TOKEN,
        skipped=skipped,
    )
