"""Where each sequence of a worker is, and what that comes to.

A sequence is in one queue at a time, or in none while a hand-off holds it. The sums that load
reports are made of are kept as sequences come, go and grow, since a report may follow any input.
``changes`` counts whatever may let somebody in who had to wait: comings, goings and progress of
prompts. The growth of those that decode is no such change: it only takes.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import chain

from pdserve.node.sequence import Sequence, SequenceKey

Queue = dict[SequenceKey, Sequence]


class Queues:
    """``waiting``: new ones. ``resuming``: preempted, to be recomputed. ``admitted``: their prompt
    is being computed. ``decoding``: one token in each step. ``held``: for their hand-off.

    ``pending_tokens``: of prompts that are still to be computed. ``num_staying``: choices that
    decode here, or will once their prompt is computed; ``context_tokens``: their length.
    ``num_arrivals``, of which ``departed_at`` came before the last of ``num_departures`` hand-offs
    was over.
    """

    def __init__(self) -> None:
        self.waiting: Queue = {}
        self.resuming: Queue = {}
        self.admitted: Queue = {}
        self.decoding: Queue = {}
        self.held: Queue = {}
        self.pending_tokens = 0
        self.num_staying = 0
        self.context_tokens = 0
        self.changes = 0
        self.growing: list[Sequence] = []
        """Of those that decode, all whose last token may have no slot yet, and perhaps others."""
        self.num_arrivals = 0
        self.num_departures = 0
        self.departed_at = 0

    def next_arrival(self) -> int:
        """The age of one that comes now; older ones have smaller numbers."""
        self.num_arrivals += 1
        return self.num_arrivals

    def count_departure(self) -> None:
        """A hand-off is over, in one way or another."""
        self.num_departures += 1
        self.departed_at = self.num_arrivals

    def enter(self, queue: Queue, sequence: Sequence) -> None:
        """At the end of it."""
        queue[sequence.key] = sequence
        if queue is self.decoding:
            self.growing.append(sequence)
        sequence.counted_tokens = sequence.pending_tokens
        self._weigh(queue, sequence, 1)

    def leave(self, queue: Queue, sequence: Sequence) -> None:
        """Before it has other choices, or is handed off no more."""
        del queue[sequence.key]
        self._weigh(queue, sequence, -1)

    def find(self, sequence: Sequence) -> Queue | None:
        """The queue that it is in."""
        key = sequence.key
        for queue in self._all():
            if queue.get(key) is sequence:
                return queue
        return None

    def computed(self, sequence: Sequence, num_computed: int) -> None:
        """A chunk of an admitted prompt is done."""
        sequence.num_computed = num_computed
        pending = sequence.pending_tokens
        self.pending_tokens += pending - sequence.counted_tokens
        sequence.counted_tokens = pending
        self.changes += 1

    def keep(self, sequence: Sequence) -> None:
        """It was to be handed off, and now it is to stay."""
        sequence.hands_off = False
        if self.admitted.get(sequence.key) is sequence:
            self._weigh_staying(sequence, 1)

    def decoding_but(self, keys: tuple[SequenceKey, ...]) -> list[Sequence]:
        """All who decode but for these."""
        if not keys:
            return list(self.decoding.values())
        left_out = set(keys)
        return [sequence for key, sequence in self.decoding.items() if key not in left_out]

    def sequences(self) -> Iterator[Sequence]:
        """Every sequence in a queue, each once."""
        return chain.from_iterable([queue.values() for queue in self._all()])

    @property
    def are_empty(self) -> bool:
        return not any(self._all())

    def check(self) -> None:
        """Assert that the sums are right, in linear time: for tests."""
        prompts = [*self.waiting.values(), *self.resuming.values(), *self.admitted.values()]
        staying = [*self.decoding.values()]
        staying += [sequence for sequence in self.admitted.values() if not sequence.hands_off]
        assert self.pending_tokens == sum(s.pending_tokens for s in prompts)
        assert self.num_staying == sum(len(s.choices) for s in staying)
        assert self.context_tokens == sum(len(s.choices) * s.num_tokens for s in staying)

    def _all(self) -> tuple[Queue, ...]:
        return self.waiting, self.resuming, self.admitted, self.decoding, self.held

    def _weigh(self, queue: Queue, sequence: Sequence, sign: int) -> None:
        self.changes += 1
        if queue is self.decoding:
            self._weigh_staying(sequence, sign)
        elif queue is not self.held:
            self.pending_tokens += sign * sequence.counted_tokens
            if queue is self.admitted and not sequence.hands_off:
                self._weigh_staying(sequence, sign)

    def _weigh_staying(self, sequence: Sequence, sign: int) -> None:
        number = sign * len(sequence.choices)
        self.num_staying += number
        self.context_tokens += number * sequence.num_tokens
