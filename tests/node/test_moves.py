"""A running request goes to another decode worker with its KV, or stays as if nothing had been."""

from __future__ import annotations

import pytest
from virtual_cluster import ClusterSpec, VirtualCluster, make_ask

from pdserve.core.ids import WorkerId
from pdserve.core.messages import DrainWorker
from pdserve.policy.cluster import ClusterView, WorkerView
from pdserve.policy.rebalance import Movable, Move

PROMPT = tuple(range(2, 12))
HERE, THERE = WorkerId("decode-0"), WorkerId("decode-1")


class Once:
    """One move of the oldest request, from ``HERE`` to ``THERE``, whatever the load is."""

    def __init__(self) -> None:
        self.moved = False

    def may_be_crowded(self, worker: WorkerView, num_sequences: int) -> bool:
        return num_sequences > 0

    def propose(
        self, view: ClusterView, crowded: WorkerView, movable: tuple[Movable, ...]
    ) -> Move | None:
        there = any(worker.worker == THERE for worker in view.workers)
        if self.moved or crowded.worker != HERE or not there:
            return None
        self.moved = True
        return Move(
            attempt=movable[0].attempt, to=THERE, pause_s=0.0, saves_s=1.0, reason="told to"
        )


def moving_cluster(*, num_tokens: int = 20) -> VirtualCluster:
    """A request decodes on ``HERE`` and is about to move."""
    cluster = VirtualCluster(ClusterSpec(workers=(1, 2, 0), num_blocks=30))
    cluster.run()
    cluster.submit(make_ask("r", PROMPT, max_tokens=num_tokens))
    cluster.run(until=lambda: len(cluster.client.answers["r"].tokens[0]) == 4)
    cluster.router.moves._policy = Once()
    return cluster


def names(cluster: VirtualCluster) -> list[str]:
    return [str(event.name) for event in cluster.life]


def nodes_of(cluster: VirtualCluster, name: str) -> list[str]:
    return [str(event.node) for event in cluster.life if event.name == name]


def check_over(cluster: VirtualCluster) -> None:
    """The answer is the one that was expected, and nothing is left of it anywhere."""
    cluster.run_for(3)
    assert cluster.client.answers["r"].is_complete
    for process in cluster.members.values():
        assert process.node.is_empty
        assert process.node.batch.tables.pool.num_referenced == 0
    for book in cluster.router.books.workers.values():
        assert (book.promised, book.num_decoding) == ({}, 0)


def test_the_answer_goes_on_at_the_other_worker_without_a_recompute() -> None:
    cluster = moving_cluster()
    check_over(cluster)
    assert nodes_of(cluster, "decode_started") == [HERE, THERE]
    assert names(cluster).count("prefill_started") == 1
    assert "resumed" not in names(cluster)
    assert "preempted" not in names(cluster)


def test_an_abort_in_the_middle_has_one_address() -> None:
    cluster = moving_cluster()
    cluster.run(until=lambda: names(cluster).count("handoff_opened") == 2)
    cluster.leave("r")
    cluster.run_for(3)
    for process in cluster.members.values():
        assert process.node.is_empty


def test_an_abort_after_it_failed_lets_the_choice_go() -> None:
    cluster = moving_cluster()
    cluster.run(until=lambda: names(cluster).count("handoff_opened") == 2)
    here = cluster.current[HERE]
    there = cluster.current[THERE]
    cluster.cut(here.links[THERE, there.epoch])
    cluster.leave("r")
    cluster.run_for(3)
    assert here.node.is_empty


def test_a_refused_move_goes_on_where_it_is() -> None:
    cluster = moving_cluster()
    cluster.current[THERE].to_worker.append(DrainWorker())
    cluster.run(
        hold=lambda event: (
            event.kind == "to_gateway"
            and event.process is not None
            and event.process.worker == THERE
        )
    )
    check_over(cluster)
    assert "move_failed" in names(cluster)
    assert nodes_of(cluster, "decode_started") == [HERE]
    assert "resumed" not in names(cluster)


def test_a_corrupt_transfer_costs_a_resume_and_no_answer() -> None:
    """The trailer was sent, so the worker that had it cannot know and lets go."""
    cluster = moving_cluster()
    cluster.current[HERE].pusher.corrupt_next = True
    check_over(cluster)
    assert names(cluster).count("resumed") == 1


@pytest.mark.parametrize("victim", [HERE, THERE])
@pytest.mark.parametrize("moment", ["handoff_opened", "handoff_granted", "decode_started"])
def test_either_side_may_die_in_the_middle(victim: WorkerId, moment: str) -> None:
    cluster = moving_cluster()
    cluster.run(until=lambda: names(cluster).count(moment) == 2)
    cluster.kill(cluster.current[victim])
    check_over(cluster)


def test_nobody_moves_while_another_one_does() -> None:
    cluster = moving_cluster()
    for number in range(3):
        cluster.submit(make_ask(f"s{number}", PROMPT, max_tokens=20))
    check_over(cluster)
    assert names(cluster).count("moving") == 1


def behind(cluster: VirtualCluster) -> None:
    """The old worker's last tokens are slow, and the new worker's overtake them."""
    here, there = cluster.current[HERE], cluster.current[THERE]
    cluster.run(until=lambda: "moving" in names(cluster))
    cluster.run(
        hold=lambda event: event.kind == "to_gateway" and event.process is here,
        until=lambda: there.node.batch.num_steps > 3,
    )


def test_tokens_that_overtake_the_old_workers_wait_for_them() -> None:
    cluster = moving_cluster()
    behind(cluster)
    check_over(cluster)
    assert "resumed" not in names(cluster)


def test_tokens_that_will_never_come_are_drawn_again() -> None:
    """The old worker dies with the tokens that the new one's wait for."""
    cluster = moving_cluster()
    behind(cluster)
    cluster.below = lambda number: 0  # nothing of what it has said is read any more
    cluster.kill(cluster.current[HERE])
    check_over(cluster)
