"""Workers that die, stop and come back, and links that break, in the orders that matter."""

from __future__ import annotations

import pytest
from virtual_cluster import ClusterSpec, VirtualCluster, check_books_restored, make_ask
from virtual_cluster.orders import PROMPT, STAGES, Pair, of, pair, reach, submitted

from pdserve.core.messages import Accepted
from pdserve.core.request import RoutePreference


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
    together = pair()
    cluster, prefill, decode = together.cluster, together.prefill, together.decode
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


def test_a_header_of_a_dead_process_opens_nothing() -> None:
    """A ticket for it would be held by nobody, and its blocks could never leave quarantine."""
    together = submitted()
    cluster, prefill, decode = together.cluster, together.prefill, together.decode
    reach("header under way", together)
    (header,) = cluster.messages(prefill, decode)
    cluster.kill(prefill)
    cluster.run_for(1)
    cluster.ghost(prefill, decode.worker, header)
    assert decode.node.inbound.is_empty
    cluster.run_for(1)
    check_nothing_left(cluster)


def test_a_hand_off_that_is_dropped_while_it_is_verified_is_not_adopted() -> None:
    together = submitted()
    cluster, decode = together.cluster, together.decode
    reach("verifying", together)
    cluster.kill(together.prefill)
    cluster.run(until=lambda: bool(decode.node._gone), hold=of(decode, "transfer"))
    cluster.run_for(1, hold=of(decode, "to_gateway"))
    assert Accepted not in [type(message) for _, message in decode.said]
    cluster.run_for(1)
    assert cluster.client.answers["r"].is_complete


def check_nothing_left(cluster: VirtualCluster) -> None:
    for process in cluster.current.values():
        assert process.alive
        assert process.node.is_empty
        pool = process.node.batch.tables.pool
        assert pool.num_free == pool.num_blocks
    check_books_restored(cluster.router)


def at(stage: str, num_choices: int = 2, **settings: object) -> Pair:
    """A split request in this moment of its life."""
    together = pair(**settings)
    together.cluster.submit(make_ask("r", PROMPT, max_tokens=5, num_choices=num_choices))
    reach(stage, together)
    return together


@pytest.mark.parametrize("stage", STAGES)
def test_a_client_that_goes_away_leaves_nothing(stage: str) -> None:
    cluster = at(stage).cluster
    cluster.leave("r")
    cluster.run_for(1)
    check_nothing_left(cluster)


@pytest.mark.parametrize("stage", STAGES)
def test_a_choice_that_goes_away_leaves_the_other_alone(stage: str) -> None:
    cluster = at(stage).cluster
    cluster.leave("r", (0,))
    cluster.run_for(2)
    answer = cluster.client.answers["r"]
    assert tuple(answer.tokens[1]) == answer.ask.answers[1]
    check_nothing_left(cluster)


@pytest.mark.parametrize("stage", list(STAGES)[:-1])
def test_nobody_decodes_a_choice_that_is_not_wanted(stage: str) -> None:
    """Also if it left while the hand-off was under way, which took it along."""
    together = at(stage)
    cluster, decode = together.cluster, together.decode
    cluster.leave("r", (0,))
    held = of(decode, "step")
    cluster.run(hold=held)
    running = [sequence.choices for sequence in decode.node.batch.sequences()]
    assert running == [(1,)]


@pytest.mark.parametrize("kept", [0, 1, 5])
@pytest.mark.parametrize("victim", ["prefill-0", "decode-0"])
@pytest.mark.parametrize("stage", STAGES)
def test_a_killed_worker_costs_no_answer(stage: str, victim: str, kept: int) -> None:
    """``kept``: messages of each kind of link that can still be read."""
    cluster = at(stage).cluster
    cluster.below = lambda number: min(kept, number - 1)
    cluster.kill(cluster.current[victim])
    cluster.run_for(3)
    assert cluster.client.answers["r"].is_complete
    check_nothing_left(cluster)


@pytest.mark.parametrize("kept", [0, 1, 5])
@pytest.mark.parametrize("stage", STAGES)
def test_a_broken_link_costs_no_answer(stage: str, kept: int) -> None:
    together = at(stage)
    cluster = together.cluster
    cluster.below = lambda number: min(kept, number - 1)
    cluster.cut(together.prefill.links["decode-0", 1])
    cluster.run_for(3)
    assert cluster.client.answers["r"].is_complete
    check_nothing_left(cluster)


@pytest.mark.parametrize("stopped_s", [0.5, 2.0, 6.0])
@pytest.mark.parametrize("victim", ["prefill-0", "decode-0"])
@pytest.mark.parametrize("stage", STAGES)
def test_a_stopped_worker_costs_no_answer(stage: str, victim: str, stopped_s: float) -> None:
    """Shorter than a lease, longer than a lease, and long enough to be killed for it. What it still
    writes when it wakes up lands where nobody reads."""
    cluster = at(stage).cluster
    process = cluster.current[victim]
    process.stopped = True
    cluster.run_for(stopped_s)
    process.stopped = False
    assert process.alive == (stopped_s < cluster.spec.router.report_timeout_s)
    cluster.run_for(4)
    assert cluster.client.answers["r"].is_complete
    check_nothing_left(cluster)
