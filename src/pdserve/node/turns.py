"""Whose turn it is on one worker, and why nobody waits for ever.

Two kinds of sequences wait for blocks: new ones, first come first served, and *resuming* ones,
which were preempted and are to be recomputed. A batch policy may let new ones go first. Each time
that a resuming sequence is set back - preempted, or passed by one that is admitted before it -
it ages; after ``max_preemptions`` setbacks it is *old*: it goes before everybody else, and nobody
is given blocks that it waits for. One that was preempted that often is admitted with blocks for its
whole answer, so that it never needs to be preempted again. Hand-offs that arrive take blocks too,
so a new sequence ages as well while they are let past it.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping

from pdserve.node.queues import Queues
from pdserve.node.sequence import Sequence, SequenceKey
from pdserve.node.settings import WorkerSettings

Queue = Mapping[SequenceKey, Sequence]


def is_old(sequence: Sequence, settings: WorkerSettings) -> bool:
    """Whether it has been set back so often that nobody may pass it any more."""
    return sequence.num_preemptions + sequence.num_passed >= settings.max_preemptions


def in_turn(
    waiting: Queue, resuming: Queue, settings: WorkerSettings, *, new_first: bool
) -> Iterator[Sequence]:
    """Everybody who waits, next one first."""
    by_age = sorted(resuming.values(), key=lambda s: s.arrival)
    yield from (s for s in by_age if not new_first or is_old(s, settings))
    yield from waiting.values()
    yield from (s for s in by_age if new_first and not is_old(s, settings))


def first_old(waiting: Queue, resuming: Queue, settings: WorkerSettings) -> Sequence | None:
    """The old sequence that waits longest, if there is one."""
    for sequence in sorted(resuming.values(), key=lambda s: s.arrival):
        if is_old(sequence, settings):
            return sequence
    for sequence in waiting.values():
        return sequence if is_old(sequence, settings) else None
    return None


def pass_by(passed: Iterable[Sequence]) -> None:
    """Others were given blocks before these."""
    for sequence in passed:
        sequence.num_passed += 1


def set_back(sequence: Sequence, queues: Queues, settings: WorkerSettings) -> None:
    """It has lost its blocks, and is to be recomputed here; all of it is then of our own class."""
    sequence.num_computed = sequence.num_cached_blocks = sequence.num_published = 0
    if not sequence.extends_hashes:
        sequence.extends_hashes, sequence.hashes = True, []
    reserve_answer(sequence, settings)
    queues.enter(queues.resuming, sequence)


def reserve_answer(sequence: Sequence, settings: WorkerSettings) -> None:
    """After its last preemption: have blocks for all of its tokens from the next start on."""
    if sequence.num_preemptions >= settings.max_preemptions:
        most_tokens = sequence.num_prompt_tokens + sequence.params.max_tokens
        sequence.reserved_tokens = min(most_tokens, settings.longest_tokens)
