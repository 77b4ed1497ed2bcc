"""Links between simulated workers that fail: cut ones and slow ones.

While a link is cut, both machines have heard `PeerLost`, and what they send waits for the link as
it does live (``serve.mesh``): if it is not back in time the peer counts as lost again, and the
messages are dropped. When it is healed both hear `PeerUp`, then what has waited. What was on its
way when the link was cut still arrives, before its end is heard of. A slow link carries KV so many
times slower.
"""

from __future__ import annotations

from collections import Counter
from typing import Protocol

from pdserve.core.effects import PeerLost, PeerUp, Received
from pdserve.core.ids import WorkerId
from pdserve.cost.machine import ClusterTimes
from pdserve.sim.clock import Clock
from pdserve.sim.network import Network
from pdserve.sim.worker import VirtualWorker
from pdserve.transport.peers import LINK_TIMEOUT_S

Pair = tuple[WorkerId, WorkerId]
GREETING_MESSAGES = 2
"""A link that is made again begins with a hello and a welcome."""


class Workers(Protocol):
    """What is needed of a `Simulation`."""

    clock: Clock
    network: Network
    times: ClusterTimes
    workers: dict[WorkerId, VirtualWorker]


class PeerLinks:
    """All that is wrong with links now. ``cut`` is empty if none is cut."""

    def __init__(self, world: Workers) -> None:
        self.cut: Counter[Pair] = Counter()
        self._world = world
        self._slow: dict[Pair, list[float]] = {}
        self._waiting: dict[tuple[VirtualWorker, VirtualWorker], list[Received]] = {}

    def is_cut(self, one: WorkerId, other: WorkerId) -> bool:
        return self.cut[pair_of(one, other)] > 0

    def send(self, sender: VirtualWorker, receiver: VirtualWorker, received: Received) -> None:
        """A message between two workers, while links are cut."""
        if not self.is_cut(sender.worker, receiver.worker):
            self._world.clock.after(self._world.times.message_s, receiver.hear, received)
            return
        waiting = self._waiting.setdefault((sender, receiver), [])
        if not waiting:
            self._world.clock.after(LINK_TIMEOUT_S, self._give_up, sender, receiver, waiting)
        waiting.append(received)

    def cut_off(self, pair: Pair) -> None:
        """The link breaks, and does not come up again."""
        self.cut[pair] += 1
        if self.cut[pair] > 1:
            return
        for worker, peer in self._ends(pair):
            lost = PeerLost(peer.worker, peer.epoch)
            self._world.clock.after(self._world.times.message_s, worker.hear, lost)

    def heal(self, pair: Pair) -> None:
        """One reason less for its being cut."""
        self.cut[pair] -= 1
        if not self.cut[pair]:
            del self.cut[pair]
            greeted_s = GREETING_MESSAGES * self._world.times.message_s
            self._world.clock.after(greeted_s, self._link_up, pair)

    def slow_down(self, pair: Pair, factor: float) -> None:
        self._slow.setdefault(pair, []).append(factor)
        self._set_rates()

    def speed_up(self, pair: Pair, factor: float) -> None:
        """The end of one `slow_down`."""
        self._slow[pair].remove(factor)
        self._set_rates()

    # --- inside -------------------------------------------------------------------------------

    def _ends(self, pair: Pair) -> list[tuple[VirtualWorker, VirtualWorker]]:
        """Each side with the other, if both live."""
        one, other = (self._world.workers.get(worker) for worker in pair)
        return [] if one is None or other is None else [(one, other), (other, one)]

    def _link_up(self, pair: Pair) -> None:
        if self.cut[pair]:
            return
        for worker, peer in self._ends(pair):
            worker.hear(PeerUp(peer.worker, peer.epoch))
        for sender, receiver in self._ends(pair):
            for received in self._waiting.pop((sender, receiver), ()):
                receiver.hear(received)

    def _give_up(
        self, sender: VirtualWorker, receiver: VirtualWorker, waiting: list[Received]
    ) -> None:
        """The link that these messages wait for has not come."""
        if self._waiting.get((sender, receiver)) is waiting:
            del self._waiting[sender, receiver]
            sender.hear(PeerLost(receiver.worker, receiver.epoch))

    def _set_rates(self) -> None:
        slowed = self._world.network.slowed
        slowed.clear()
        for (one, other), factors in self._slow.items():
            if factors:
                slowed[one, other] = slowed[other, one] = 1.0 / max(factors)
        self._world.network.links_changed()


def pair_of(one: WorkerId, other: WorkerId) -> Pair:
    return (min(one, other), max(one, other))
