"""Links between worker processes: ordered, breakable, made again once both sides have noticed."""

from __future__ import annotations

from collections import deque

from foreign_cluster.process import Process
from pdserve.core.effects import Input, PeerLost, PeerUp, Received
from pdserve.core.messages import Message


class Link:
    """``queues[p]``: what process p will hear. A side that has heard of the break keeps what it
    sends for the next connection; what it sent before that is lost."""

    def __init__(self, one: Process, other: Process) -> None:
        self.sides = (one, other)
        self.queues: dict[Process, deque[Input]] = {one: deque(), other: deque()}
        self._waiting: dict[Process, list[Message]] = {one: [], other: []}
        self._knows: set[Process] = set()
        self._broken = False

    def other(self, side: Process) -> Process:
        return self.sides[1] if side is self.sides[0] else self.sides[0]

    def send(self, side: Process, message: Message) -> None:
        if not self._broken:
            self.queues[self.other(side)].append(Received(side.worker, side.epoch, message))
        elif side in self._knows:
            self._waiting[side].append(message)

    def cut(self, keep: int) -> None:
        """It breaks; each side can still read up to ``keep`` messages."""
        if self._broken:
            return
        self._broken = True
        for side, queue in self.queues.items():
            while len(queue) > keep:
                queue.pop()
            other = self.other(side)
            queue.append(PeerLost(other.worker, other.epoch))

    def deliver(self, side: Process) -> Input:
        event = self.queues[side].popleft()
        if isinstance(event, PeerLost):
            self._knows.add(side)
            if all(p in self._knows and p.alive for p in self.sides):
                self._connect()
        return event

    def _connect(self) -> None:
        self._broken = False
        self._knows.clear()
        for side, queue in self.queues.items():
            other = self.other(side)
            queue.append(PeerUp(other.worker, other.epoch))
            messages, self._waiting[other] = self._waiting[other], []
            queue += [Received(other.worker, other.epoch, message) for message in messages]
