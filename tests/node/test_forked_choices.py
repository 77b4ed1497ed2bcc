"""Choices of one prompt: shared blocks, the copy of the partial one, and choices that go away."""

from __future__ import annotations

import pytest
from virtual_cluster import ClusterSpec, Process, VirtualCluster, make_ask

PROMPT = tuple(range(2, 12))  # two full blocks and a half


def in_the_step_that_copies(num_choices: int, **settings: object) -> tuple[VirtualCluster, Process]:
    """A mixed worker whose running step copies a partial block for a fork."""
    cluster = VirtualCluster(ClusterSpec(workers=(0, 0, 1), **settings))  # type: ignore[arg-type]
    cluster.run()
    cluster.submit(make_ask("r", PROMPT, max_tokens=4, num_choices=num_choices))
    worker = cluster.current["mixed-0"]
    cluster.run(until=lambda: worker.engine is not None and bool(worker.engine.plan.copies))
    return cluster, worker


@pytest.mark.parametrize("breaks", [False, True])
@pytest.mark.parametrize("max_running", [1, 2, 8])
@pytest.mark.parametrize("choice", [0, 1, 2])
def test_a_choice_goes_away_while_its_block_is_copied(
    choice: int, max_running: int, breaks: bool
) -> None:
    """Also one that has no row in the step, and also if the step breaks and is run again."""
    cluster, worker = in_the_step_that_copies(3, max_running=max_running)
    cluster.leave("r", (choice,))
    cluster.run(hold=lambda event: event.kind == "step")
    assert worker.engine is not None
    worker.engine.broken = breaks
    cluster.submit(make_ask("other", PROMPT[:-1], max_tokens=6))
    cluster.run_for(2)
    answers = cluster.client.answers
    assert answers["other"].is_complete
    for left in {0, 1, 2} - {choice}:
        assert tuple(answers["r"].tokens[left]) == answers["r"].ask.answers[left]
    assert worker.node.is_empty


def test_full_blocks_are_shared_and_only_the_partial_one_is_copied() -> None:
    cluster, worker = in_the_step_that_copies(3)
    assert worker.engine is not None
    assert len(worker.engine.plan.copies) == 2
    assert worker.node.batch.tables.pool.num_referenced == 2 + 3
    cluster.run_for(1)
    assert cluster.client.answers["r"].is_complete


def test_a_fork_that_finds_no_block_is_computed_again_later() -> None:
    """One block is left for two forks: the others wait, and hit the prefix that is left."""
    spec = ClusterSpec(workers=(0, 0, 1), num_blocks=4, block_size=4)
    cluster = VirtualCluster(spec)
    cluster.run()
    cluster.submit(make_ask("r", (*PROMPT, 12), max_tokens=4, num_choices=2))
    cluster.run_for(2)
    assert cluster.client.answers["r"].is_complete
    assert cluster.current["mixed-0"].node.is_empty
