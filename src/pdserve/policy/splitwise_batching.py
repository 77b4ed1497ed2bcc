"""Splitwise's batching (ISCA 2024, sec. IV-B): a mixed worker runs prompts at once.

A step takes prompts first come, first served, up to ``max_step_tokens`` (2,048) with one token of
each running decode counted, and does not cut them shorter for the decodes' sake. Decodes run all
together for as long as blocks last. Where a new prompt finds no blocks, or no place, on a mixed
worker, the youngest decodes are preempted for it, as many as it takes; if all of them were not
enough, none. Preempted ones wait behind new prompts, and age (`node.turns`): nobody starves.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from pdserve.core.ids import AttemptId
from pdserve.policy.batch import BatchPlan, BatchView, DecodeView, Grant, chunk_tokens


@dataclass(frozen=True, slots=True)
class SplitwiseBatching:
    """Prompts at once, decodes as far as they fit."""

    @property
    def new_first(self) -> bool:
        return True

    @property
    def reserves(self) -> bool:
        return False

    def plan(self, view: BatchView) -> BatchPlan:
        # One block at least, beyond the bound if it must be: decodes may never leave room.
        budget = max(view.max_step_tokens - view.num_decoding, view.block_size)
        free_blocks = view.free_blocks
        places = view.max_running - view.num_decoding - view.num_admitted
        preemptible = iter(view.preemptible)
        grants: list[Grant] = []
        preempts: list[tuple[AttemptId, int]] = []
        for prompt in view.prompts:
            num_tokens = chunk_tokens(
                prompt.num_computed, prompt.num_tokens, budget, view.block_size
            )
            if num_tokens <= 0:
                break
            if prompt.blocks_missing:
                if prompt.is_new:
                    found = _make_way(preemptible, prompt.blocks_missing - free_blocks, 1 - places)
                    preempts += [decode.key for decode in found]
                    places += len(found)
                    free_blocks += sum(_gain(decode) for decode in found)
                if prompt.blocks_missing > free_blocks or places <= 0:
                    break
                free_blocks -= prompt.blocks_missing
                places -= 1
            grants.append(Grant(prompt.key, num_tokens))
            budget -= num_tokens
        return BatchPlan(tuple(grants), tuple(preempts))


def _make_way(
    preemptible: Iterator[DecodeView], blocks_wanted: int, places_wanted: int
) -> list[DecodeView]:
    """The decodes to preempt so that this much becomes free; none if they are not enough."""
    found: list[DecodeView] = []
    blocks = 0
    while blocks < blocks_wanted or len(found) < places_wanted:
        decode = next(preemptible, None)
        if decode is None:
            return []
        found.append(decode)
        blocks += _gain(decode)
    return found


def _gain(decode: DecodeView) -> int:
    """Its own blocks, and the one that was kept for it to grow into."""
    return decode.blocks_freed + 1
