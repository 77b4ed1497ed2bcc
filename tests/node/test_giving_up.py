"""How often a request is tried again, and what is then said."""

from __future__ import annotations

import pytest
from virtual_cluster import ClusterSpec, VirtualCluster, make_ask

from pdserve.core.effects import Refusal
from pdserve.node.settings import RouterSettings

PROMPT = tuple(range(2, 12))


def killed_while_decoding(num_kills: int, num_choices: int) -> VirtualCluster:
    """Whoever decodes dies as soon as each choice has two more tokens, and comes back."""
    cluster = VirtualCluster(ClusterSpec(router=RouterSettings(max_attempts=3)))
    cluster.run()
    cluster.submit(make_ask("r", PROMPT, max_tokens=12, num_choices=num_choices))
    answer = cluster.client.answers["r"]
    for num_tokens in range(2, 2 * num_kills + 1, 2):
        cluster.run(until=lambda least=num_tokens: min(map(len, answer.tokens)) >= least)
        running = [p for p in cluster.current.values() if p.alive and p.node.batch.num_running]
        assert len(running) == 1
        cluster.kill(running[0])
    cluster.run_for(5)
    return cluster


@pytest.mark.parametrize("num_choices", [1, 3])
def test_each_choice_has_its_own_attempts(num_choices: int) -> None:
    """Three choices that are resumed apart lose three attempts to one death, each only one."""
    cluster = killed_while_decoding(3, num_choices)
    assert cluster.client.answers["r"].is_complete


def test_after_too_many_failures_the_client_hears_of_it() -> None:
    cluster = killed_while_decoding(4, 1)
    failure = cluster.client.answers["r"].failure
    assert failure is not None
    assert failure.kind == Refusal.INTERNAL
    assert "4 failures" in failure.detail
