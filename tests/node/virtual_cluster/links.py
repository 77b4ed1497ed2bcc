"""The link between two worker processes: ordered, breakable, made again.

Each link that is made is a generation of its own with a queue in each direction. A side sees a new
generation, or the end of its old one, at a time of its own. What is sent while no link is seen
waits for the next one, as in ``serve.mesh``.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable

from pdserve.core.effects import Input, PeerLost, PeerUp, Received
from pdserve.core.messages import Message
from virtual_cluster.process import Process

Hear = Callable[[Process, Input], None]


class Generation:
    """One connection. ``queues[p]`` travels to process p."""

    def __init__(self, one: Process, other: Process) -> None:
        self.queues: dict[Process, deque[Message]] = {one: deque(), other: deque()}
        self.broken = False


class PairLink:
    """Everything between two processes. ``cut``: it cannot be made again for now."""

    def __init__(self, one: Process, other: Process, hear: Hear) -> None:
        self.sides = (one, other)
        self.cut = False
        self.latest: Generation | None = None
        self.seen: dict[Process, Generation | None] = {one: None, other: None}
        self.waiting: dict[Process, list[Message]] = {one: [], other: []}
        self._hear = hear

    def other(self, side: Process) -> Process:
        return self.sides[1] if side is self.sides[0] else self.sides[0]

    # --- what may happen --------------------------------------------------------------------------

    @property
    def can_connect(self) -> bool:
        """The smaller id dials, once it has heard of the other."""
        dialler = min(self.sides, key=lambda side: side.worker)
        other = self.other(dialler)
        return (
            not self.cut
            and dialler.runs
            and other.runs
            and (self.latest is None or self.latest.broken)
            and dialler.known.get(other.worker) == other.epoch
        )

    def can_see(self, side: Process) -> bool:
        latest = self.latest
        other = self.other(side)
        return (
            latest is not None
            and not latest.broken
            and self.seen[side] is not latest
            and side.known.get(other.worker, other.epoch) <= other.epoch
        )

    def can_notice(self, side: Process) -> bool:
        generation = self.seen[side]
        return generation is not None and generation.broken

    def can_deliver(self, side: Process) -> bool:
        generation = self.seen[side]
        return generation is not None and bool(generation.queues[side])

    def can_give_up(self, side: Process) -> bool:
        return self.seen[side] is None and bool(self.waiting[side])

    def queue(self, side: Process) -> deque[Message]:
        """What the side will hear next."""
        generation = self.seen[side]
        return deque() if generation is None else generation.queues[side]

    # --- what happens -----------------------------------------------------------------------------

    def connect(self) -> None:
        self.latest = Generation(*self.sides)

    def see(self, side: Process) -> None:
        """The new connection counts for this side."""
        assert self.latest is not None
        other = self.other(side)
        if self.seen[side] is not None:
            self.notice(side)
        self.seen[side] = self.latest
        self.latest.queues[other] += self.waiting[side]
        self.waiting[side] = []
        self._hear(side, PeerUp(other.worker, other.epoch))

    def notice(self, side: Process) -> None:
        """The old connection is over for this side; what it has not read is lost."""
        self.seen[side] = None
        other = self.other(side)
        self._hear(side, PeerLost(other.worker, other.epoch))

    def give_up(self, side: Process) -> None:
        """The connection that messages wait for does not come."""
        self.waiting[side] = []
        other = self.other(side)
        self._hear(side, PeerLost(other.worker, other.epoch))

    def deliver(self, side: Process) -> None:
        other = self.other(side)
        message = self.queue(side).popleft()
        self._hear(side, Received(other.worker, other.epoch, message))

    def send(self, side: Process, message: Message) -> None:
        generation = self.seen[side]
        if generation is None:
            self.waiting[side].append(message)
        elif not generation.broken:
            generation.queues[self.other(side)].append(message)

    def break_off(self, below: Callable[[int], int]) -> None:
        """The connection ends; of what is under way only a part can still be read."""
        if self.latest is not None and not self.latest.broken:
            self.latest.broken = True
            for queue in self.latest.queues.values():
                keep = below(len(queue) + 1)
                while len(queue) > keep:
                    queue.pop()
