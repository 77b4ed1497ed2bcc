"""Which tokens go into the next step of one worker.

Every running sequence decodes one token in every step; a batch policy decides how many prompt
tokens ride along, and of whom. `FcfsBatching` follows Splitwise (sec. IV-B): prompts first come,
first served, at most ``max_step_tokens`` of them in a step that only prefills; beside running
decodes the prompt is cut into chunks of at most ``mixed_chunk_tokens``: no decode waits long.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import field
from typing import Protocol

from pdserve.core.ids import AttemptId
from pdserve.core.values import value

SequenceKey = tuple[AttemptId, int]
"""Attempt and first choice."""


class Resident(Protocol):
    """A sequence that is on the worker, to be looked at only. ``arrival``: its number among all
    that have come there; ``number``: of its request among all that have come to the router;
    ``answer_tokens``: for how many output tokens its route reserves room."""

    @property
    def key(self) -> SequenceKey: ...

    @property
    def arrival(self) -> int: ...

    @property
    def number(self) -> int: ...

    @property
    def num_prompt_tokens(self) -> int: ...

    @property
    def answer_tokens(self) -> int: ...

    @property
    def hands_off(self) -> bool: ...


@value(kw_only=True)
class PromptView:
    """A sequence whose known tokens are not all computed. ``key`` (attempt, first choice) names it.

    ``blocks_missing`` is what must still be allocated before any of it can run: 0 once admitted.
    ``is_new``: it has not run; others were preempted and are recomputed.
    """

    key: tuple[AttemptId, int]
    num_computed: int
    num_tokens: int
    blocks_missing: int
    is_new: bool = True


@value(kw_only=True)
class DecodeView:
    """A running sequence that may be preempted, and the blocks that would be free then."""

    key: tuple[AttemptId, int]
    blocks_freed: int


@value(kw_only=True)
class BatchView:
    """What a batch policy sees. ``prompts`` come once, whose turn it is first, admitted ones before
    all others. ``preemptible`` come once, youngest first; there are none but on a mixed worker.

    ``waiting`` and ``decodes``: the sequences that have not been admitted, and those that decode.
    ``unused_blocks``: all that are free, growth or not. ``num_arrivals`` sequences have come so far
    and ``num_departures`` were handed off, the last one after ``departed_at`` arrivals. ``memory``:
    what the last plan asked to be remembered; it belongs to whoever plans.
    """

    num_decoding: int
    prompts: Iterable[PromptView]
    num_admitted: int
    free_blocks: int
    block_size: int
    max_step_tokens: int
    mixed_chunk_tokens: int
    max_running: int
    preemptible: Iterable[DecodeView] = ()
    waiting: Mapping[SequenceKey, Resident] = field(default_factory=dict)
    decodes: Mapping[SequenceKey, Resident] = field(default_factory=dict)
    unused_blocks: int = 0
    num_arrivals: int = 0
    num_departures: int = 0
    departed_at: int = 0
    memory: object = None

    def blocks(self, num_tokens: int) -> int:
        """Blocks that hold so many tokens."""
        return -(-num_tokens // self.block_size)


@value()
class Grant:
    """Compute the next ``num_tokens`` tokens of the sequence in this step."""

    key: tuple[AttemptId, int]
    num_tokens: int


@value()
class BatchPlan:
    """``preempts``: running sequences to be set aside before anything else is done, without their
    blocks. ``pauses``: running sequences that have no part in the step, and keep theirs.
    ``memory``: for the next view."""

    grants: tuple[Grant, ...]
    preempts: tuple[SequenceKey, ...] = ()
    pauses: tuple[SequenceKey, ...] = ()
    memory: object = None


class BatchPolicy(Protocol):
    """``new_first``: on a mixed worker new prompts go before preempted sequences, until these are
    old (`node.turns`). ``reserves``: a prompt gets a slot for its first token with its own, and a
    sequence that decodes for the first time slots for its whole answer, as its route has it; none
    ever grows beyond, so none is preempted for lack of blocks. Such a policy is asked about
    steps of decodes alone too, and plans none for which there are no blocks."""

    @property
    def new_first(self) -> bool: ...

    @property
    def reserves(self) -> bool: ...

    def plan(self, view: BatchView) -> BatchPlan:
        """Grants in the order in which blocks are to be given; no key twice.

        A plan without grants and preemptions stands until there has been more than the growth of
        the sequences that decode: it is not asked for again before each of their steps.
        """
        ...


@value()
class FcfsBatching:
    """First come, first served; nobody overtakes a prompt that waits for blocks."""

    @property
    def new_first(self) -> bool:
        return False

    @property
    def reserves(self) -> bool:
        return False

    def plan(self, view: BatchView) -> BatchPlan:
        budget = view.max_step_tokens
        if view.num_decoding:
            budget = min(view.mixed_chunk_tokens, view.max_step_tokens - view.num_decoding)
        # One block at least, beyond either bound if it must be: decodes may never leave room.
        budget = max(budget, view.block_size)
        free_blocks = view.free_blocks
        sequences_left = view.max_running - view.num_decoding - view.num_admitted
        grants: list[Grant] = []
        for prompt in view.prompts:
            if prompt.blocks_missing:
                if prompt.blocks_missing > free_blocks or sequences_left <= 0:
                    break
                free_blocks -= prompt.blocks_missing
                sequences_left -= 1
            num_tokens = chunk_tokens(
                prompt.num_computed, prompt.num_tokens, budget, view.block_size
            )
            if num_tokens <= 0:
                break
            grants.append(Grant(prompt.key, num_tokens))
            budget -= num_tokens
        return BatchPlan(tuple(grants))


def chunk_tokens(num_computed: int, num_tokens: int, budget: int, block_size: int) -> int:
    """Tokens to compute now: all that remain, or a chunk that ends on a block border.

    Chunks end on block borders so that each (layer, block) is finished, and pushed, once.
    """
    remaining = num_tokens - num_computed
    if remaining <= budget:
        return remaining
    end = (num_computed + budget) // block_size * block_size
    return max(0, end - num_computed)
