"""Which cluster, and what may go wrong in it."""

from __future__ import annotations

from dataclasses import dataclass
from random import Random

from pdserve.core.request import ServiceClass
from pdserve.node.settings import RouterSettings
from virtual_cluster.spec import ClusterSpec

TOPOLOGIES = (
    *((1, 1, 0), (2, 1, 0), (1, 2, 0), (0, 0, 1)),
    *((0, 0, 2), (1, 1, 1), (1, 0, 0), (0, 2, 0)),
)
"""Numbers of prefill, decode and mixed workers."""
ALWAYS = ("advance", "leave")
LINKS = ("cut", "cut_for_good", "heal", "give_up", "corrupt", "fail_write")
DEATHS = ("kill", "stop", "continue", "ghost")
POLICIES = (
    "shortest_queue",
    "predicted",
    "splitwise:queue_threshold_tokens=20",
    "aggregated",
    "random",
    "round_robin",
    "power_of_two",
    "prefix_aware",
)
BATCHINGS = ("fcfs", "splitwise")
FAULTS = {
    "calm": ALWAYS,
    "links": ALWAYS + LINKS,
    "engines": (*ALWAYS, "break_step", "corrupt"),
    "deaths": ALWAYS + DEATHS,
    "operators": (*ALWAYS, "change_role", "drain_one"),
    "everything": (
        *(*ALWAYS, *LINKS, *DEATHS, "break_step", "far", "drain_worker", "drain"),
        *("change_role", "drain_one", "share"),
    ),
    "sharing": (*ALWAYS, *LINKS, *DEATHS, "share"),
}

CLASSES = (
    ServiceClass(),
    ServiceClass(name="quick", ttft_s=0.05, tpot_s=0.01, weight=4.0),
    ServiceClass(name="generous", ttft_s=60.0, tpot_s=60.0, weight=0.5),
)
"""Of the requests in turn."""


@dataclass(frozen=True, kw_only=True)
class Scenario:
    """``faults`` names a row of `FAULTS`; ``percent`` of what happens is one of them or a new
    request. ``late_peer_lost``: a peer's end is noticed on its link only, in any order with the
    gateway's word. ``restless``: running requests are moved whenever they can be; ``fetching``:
    prefixes are fetched whenever somebody has more of them."""

    spec: ClusterSpec
    faults: str
    percent: int
    poison: bool = False
    restless: bool = False
    fetching: bool = False
    late_peer_lost: bool = False

    @classmethod
    def of(cls, random: Random) -> Scenario:
        """Any scenario."""
        block_size = random.choice((2, 4, 4))
        spec = ClusterSpec(
            workers=random.choice(TOPOLOGIES),
            num_blocks=random.choice((8, 12, 20, 40)) * 4 // block_size,
            block_size=block_size,
            max_model_tokens=random.choice((24, 32, 64)),
            max_step_tokens=random.choice((8, 16, 64)),
            mixed_chunk_tokens=random.choice((4, 8, 32)),
            policy=random.choice(POLICIES),
            batching=random.choice(BATCHINGS),
            max_running=random.choice((2, 4, 16)),
            one_shot_tokens=random.choice((0, 8, 100)),
            lease_s=random.choice((0.05, 1.0, 4.0)),
            ticket_timeout_s=random.choice((0.05, 1.0, 4.0)),
            prefix_cache=random.random() < 0.9,
            fewer_blocks=random.choice(((0,), (0,), (0, 2), (3, 0))),
            numerics=random.choice((("class a",), ("class a",), ("class a", "class b"))),
            router=RouterSettings(
                max_attempts=10_000,
                queue_timeout_s=random.choice((0.5, 8.0, 30.0)),
                max_queued_requests=random.choice((2, 1024)),
                patience_s=random.choice((0.0, 0.1, 10.0)),
                admission=random.choice(("none", "early", "predicted")),
            ),
        )
        return cls(
            spec=spec,
            faults=random.choice(list(FAULTS)),
            percent=random.choice((3, 10, 25)),
            poison=random.random() < 0.3,
            late_peer_lost=random.random() < 0.5,
            restless=random.random() < 0.5,
            fetching=random.random() < 0.5,
        )
