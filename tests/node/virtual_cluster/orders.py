"""How a test brings about one order of events: it holds back what must not happen yet."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass

from pdserve.core.events import LifeName
from pdserve.core.messages import Accepted, Header, Message, Ticket, Trailer
from pdserve.node.inbound_state import InboundState
from virtual_cluster.cluster import Condition, Event, VirtualCluster
from virtual_cluster.oracle import make_ask
from virtual_cluster.process import Process
from virtual_cluster.spec import ClusterSpec

PROMPT = tuple(range(2, 16))
"""Three full blocks of four and a half."""


@dataclass
class Pair:
    """A cluster with one prefill and one decode worker."""

    cluster: VirtualCluster
    prefill: Process
    decode: Process

    def says(self, kind: type[Message], *, to_decode: bool) -> bool:
        """True if the next message on the link between the two is of this kind."""
        ends = (self.prefill, self.decode) if to_decode else (self.decode, self.prefill)
        queue = self.cluster.messages(*ends)
        return bool(queue) and isinstance(queue[0], kind)

    def holds(self, kind: type[Message], *, to_decode: bool) -> Condition:
        """Keep messages of this kind from being heard on the link between the two."""
        hearer = self.decode if to_decode else self.prefill

        def hold(event: Event) -> bool:
            mine = event.kind == "deliver" and event.process is hearer
            return mine and self.says(kind, to_decode=to_decode)

        return hold

    def said(self) -> Counter[type[Message]]:
        """How often each kind of message was sent by either worker, to whomever."""
        pairs = [*self.prefill.said, *self.decode.said]
        return Counter(type(message) for _, message in pairs)

    def names(self) -> list[LifeName]:
        """What happened to all requests, in order."""
        return [event.name for event in self.cluster.life]

    def completes(self, seconds: float = 1.0) -> bool:
        """Run on; true if every request is answered and neither process holds anything."""
        self.cluster.run_for(seconds)
        return (
            all(answer.is_complete for answer in self.cluster.client.answers.values())
            and self.prefill.node.is_empty
            and self.decode.node.is_empty
        )

    def inbound_states(self) -> list[InboundState]:
        return [handoff.state for handoff in self.decode.node.inbound.handoffs()]


def pair(**settings: object) -> Pair:
    """Linked and idle."""
    cluster = VirtualCluster(ClusterSpec(**settings))  # type: ignore[arg-type]
    cluster.run()
    return Pair(cluster, cluster.current["prefill-0"], cluster.current["decode-0"])


def submitted(max_tokens: int = 4, num_choices: int = 1, **settings: object) -> Pair:
    """With request ``r`` on its way."""
    together = pair(**settings)
    ask = make_ask("r", PROMPT, max_tokens=max_tokens, num_choices=num_choices)
    together.cluster.submit(ask)
    return together


def of(process: Process, *kinds: str) -> Condition:
    """Events of these kinds of a process."""
    return lambda event: event.process is process and event.kind in kinds


def any_of(*conditions: Condition) -> Condition:
    return lambda event: any(condition(event) for condition in conditions)


def nothing(event: Event) -> bool:
    """Hold nothing."""
    return False


Reached = Callable[[Pair], bool]
Holds = Callable[[Pair], Condition]

STAGES: dict[str, tuple[Reached, Holds]] = {
    "job under way": (lambda p: bool(p.prefill.to_worker), lambda p: nothing),
    "prefill runs": (lambda p: p.prefill.engine is not None, lambda p: of(p.decode, "deliver")),
    "header under way": (lambda p: p.says(Header, to_decode=True), lambda p: nothing),
    "ticket under way": (
        lambda p: p.says(Ticket, to_decode=False),
        lambda p: of(p.prefill, "deliver"),
    ),
    "ticket held, prefill runs": (
        lambda p: p.prefill.pusher.is_writing and p.prefill.engine is not None,
        lambda p: of(p.prefill, "step"),
    ),
    "prefilled, no ticket": (
        lambda p: bool(p.prefill.node.batch.queues.held),
        lambda p: of(p.decode, "deliver"),
    ),
    "prefilled, writing": (
        lambda p: p.prefill.pusher.is_writing and bool(p.prefill.node.batch.queues.held),
        lambda p: nothing,
    ),
    "trailer under way": (lambda p: p.says(Trailer, to_decode=True), lambda p: nothing),
    "verifying": (
        lambda p: p.inbound_states() == [InboundState.VERIFYING],
        lambda p: nothing,
    ),
    "accepted, nobody knows": (
        lambda p: p.decode.node.batch.num_running > 0,
        lambda p: any_of(p.holds(Accepted, to_decode=False), of(p.decode, "to_gateway")),
    ),
    "accepted, only the prefill worker knows": (
        lambda p: p.decode.node.batch.num_running > 0 and not len(p.prefill.node.outbound),
        lambda p: of(p.decode, "to_gateway"),
    ),
    "decode runs": (lambda p: p.decode.engine is not None, lambda p: nothing),
}
"""Moments in the life of a split request: when one is reached, and what is held on the way."""


def reach(stage: str, pair: Pair) -> None:
    """Run until the stage is reached."""
    reached, holds = STAGES[stage]
    pair.cluster.run(hold=holds(pair), until=lambda: reached(pair))
