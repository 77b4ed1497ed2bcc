"""Who is refused, who waits, and for how long."""

from __future__ import annotations

import pytest
from virtual_cluster import ClusterSpec, VirtualCluster, make_ask

from pdserve.core.effects import Refusal

PROMPT = tuple(range(2, 12))


def started(**settings: object) -> VirtualCluster:
    cluster = VirtualCluster(ClusterSpec(**settings))  # type: ignore[arg-type]
    cluster.run()
    return cluster


@pytest.mark.parametrize("workers", [(1, 1, 0), (0, 0, 1), (0, 1, 0), (1, 0, 0)])
def test_an_answer_may_fill_the_pool_to_its_last_slot(workers: tuple[int, int, int]) -> None:
    cluster = started(workers=workers, num_blocks=4, block_size=4, max_model_tokens=64)
    cluster.submit(make_ask("r", PROMPT, max_tokens=6))  # 16 tokens, all there is
    cluster.run_for(1)
    assert cluster.client.answers["r"].is_complete


@pytest.mark.parametrize("workers", [(1, 1, 0), (0, 0, 1)])
def test_a_request_that_outgrows_every_pool_is_refused_at_once(
    workers: tuple[int, int, int],
) -> None:
    cluster = started(workers=workers, num_blocks=4, block_size=4, max_model_tokens=64)
    cluster.submit(make_ask("r", PROMPT, max_tokens=7))
    failure = cluster.client.answers["r"].failure
    assert failure is not None
    assert failure.kind == Refusal.TOO_LONG
    assert "17 tokens; at most 16" in failure.detail


def test_a_resume_needs_no_more_room_than_its_pool_has() -> None:
    """The decode worker dies when 13 of at most 16 tokens are there: 4 blocks are all it needs."""
    cluster = started(workers=(1, 1, 0), num_blocks=4, block_size=4)
    cluster.submit(make_ask("r", PROMPT, max_tokens=6))
    answer = cluster.client.answers["r"]
    cluster.run(until=lambda: len(answer.tokens[0]) == 3)
    cluster.kill(cluster.current["decode-0"])
    cluster.run_for(5)
    assert answer.is_complete
