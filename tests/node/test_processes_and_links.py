"""Workers that die, sleep and come back, and links that break, in the orders that matter."""

from __future__ import annotations

from collections.abc import Callable

from virtual_cluster import ClusterSpec, Event, Process, VirtualCluster, make_ask

from pdserve.core.messages import Message
from pdserve.core.request import RoutePreference

PROMPT = tuple(range(2, 16))  # three full blocks and a half

Hold = Callable[[Event], bool]


def split_cluster(**settings: object) -> tuple[VirtualCluster, Process, Process]:
    """One prefill and one decode worker, linked and idle."""
    cluster = VirtualCluster(ClusterSpec(**settings))  # type: ignore[arg-type]
    cluster.run()
    return cluster, cluster.current["prefill-0"], cluster.current["decode-0"]


def holds(cluster: VirtualCluster, receiver: Process, sender: Process, *kinds: type) -> Hold:
    """Keep messages of these kinds from being delivered."""

    def hold(event: Event) -> bool:
        if event.kind != "deliver" or event.process is not receiver:
            return False
        queue = cluster.messages(sender, receiver)
        return bool(queue) and isinstance(queue[0], kinds)

    return hold


def of(process: Process, *kinds: str) -> Hold:
    """Keep events of these kinds of a process from happening."""
    return lambda event: event.process is process and event.kind in kinds


def waiting(cluster: VirtualCluster, sender: Process, receiver: Process) -> list[type[Message]]:
    return [type(message) for message in cluster.messages(sender, receiver)]


def test_quarantine_ends_with_the_word_of_its_writer_or_of_its_death() -> None:
    """Not with that of a later process of the same worker, whose link may be up first."""
    cluster = VirtualCluster(ClusterSpec(workers=(0, 0, 2)))
    cluster.run()
    writer, reader = cluster.current["mixed-0"], cluster.current["mixed-1"]
    cluster.submit(make_ask("r", PROMPT, max_tokens=4, route=RoutePreference.SPLIT))
    cluster.run(hold=of(writer, "transfer"))
    writer.stopped = True
    cluster.run_for(cluster.spec.lease_s + 0.1)
    pool = reader.node.batch.tables.pool
    assert pool.num_quarantined == 4
    cluster.kill(writer)
    cluster.run_for(0.2, hold=of(reader, "to_worker"))
    assert cluster.current["mixed-0"].epoch == reader.known["mixed-0"] == 2
    assert pool.num_quarantined == 4
    cluster.run_for(5)
    assert pool.num_quarantined == 0
    assert cluster.client.answers["r"].is_complete


def test_the_end_of_a_dead_process_does_not_touch_hand_offs_to_its_successor() -> None:
    """The link to the dead one is noticed last of all."""
    cluster, prefill, decode = split_cluster()
    cluster.late_peer_lost = True
    cluster.kill(decode)
    cluster.run_for(0.2, hold=of(prefill, "notice"))
    again = cluster.current["decode-0"]
    assert prefill.known["decode-0"] == again.epoch == 2
    cluster.submit(make_ask("r", PROMPT, max_tokens=4))
    cluster.run(hold=lambda event: event.kind in ("notice", "transfer"))
    assert len(prefill.node.outbound) == 1
    cluster.run_for(5)
    assert cluster.client.answers["r"].is_complete
    assert not [event for event in cluster.life if event.name == "resumed"]
