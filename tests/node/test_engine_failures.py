"""A step that breaks: innocents survive it, and what breaks every step is found and given up."""

from __future__ import annotations

from dataclasses import replace

import pytest
from virtual_cluster import ClusterSpec, VirtualCluster, make_ask
from virtual_cluster.orders import PROMPT, Pair, of, reach, submitted

from pdserve.core.effects import Refusal
from pdserve.core.events import LifeName

TOPOLOGIES = [(0, 0, 1), (0, 0, 2), (1, 1, 0), (1, 2, 0)]


@pytest.mark.parametrize("workers", TOPOLOGIES)
def test_one_that_breaks_every_step_takes_no_other_along(workers: tuple[int, int, int]) -> None:
    cluster = VirtualCluster(ClusterSpec(workers=workers, num_blocks=60))
    cluster.run()
    for number in range(4):
        poison = number == 2
        ask = make_ask(f"r{number}", (number, *PROMPT), max_tokens=6, num_choices=2, poison=poison)
        cluster.submit(ask)
    cluster.run_for(3)
    for number in (0, 1, 3):
        assert cluster.client.answers[f"r{number}"].is_complete
    failure = cluster.client.answers["r2"].failure
    assert failure is not None
    assert failure.kind == Refusal.INTERNAL
    assert "the engine failed" in failure.detail
    assert all(process.node.is_empty for process in cluster.current.values())


@pytest.mark.parametrize("index", [0, 1, 3])
@pytest.mark.parametrize("workers", TOPOLOGIES)
def test_a_row_that_can_draw_nothing_fails_alone(workers: tuple[int, int, int], index: int) -> None:
    cluster = VirtualCluster(ClusterSpec(workers=workers, num_blocks=60))
    cluster.run()
    for number in range(4):
        ask = make_ask(f"r{number}", (number, *PROMPT), max_tokens=6, num_choices=2)
        cluster.submit(replace(ask, barren=index) if number == 2 else ask)
    cluster.run_for(3)
    for number in (0, 1, 3):
        assert cluster.client.answers[f"r{number}"].is_complete
        names = [e.name for e in cluster.life if e.request_id == f"r{number}"]
        assert LifeName.RESUMED not in names
    failure = cluster.client.answers["r2"].failure
    assert failure is not None
    assert failure.kind == Refusal.INTERNAL
    assert "nothing to draw" in failure.detail
    assert all(process.node.is_empty for process in cluster.current.values())


@pytest.mark.parametrize("stage", ["prefill runs", "ticket held, prefill runs", "decode runs"])
def test_a_step_of_one_row_that_breaks_once_costs_a_resume(stage: str) -> None:
    together = submitted()
    reach(stage, together)
    engine = together.prefill.engine or together.decode.engine
    assert engine is not None
    engine.broken = True
    assert together.completes()
    assert together.names().count(LifeName.RESUMED) == 1


def in_a_shared_step() -> Pair:
    """``s`` and ``t`` are prefilled in one step, which is going to break."""
    together = submitted()
    cluster, prefill = together.cluster, together.prefill
    cluster.submit(make_ask("s", (1, *PROMPT), max_tokens=4))
    cluster.submit(make_ask("t", (0, *PROMPT), max_tokens=4))
    cluster.run(until=lambda: bool(prefill.engine and len(prefill.engine.plan.rows) > 1))
    assert prefill.engine is not None
    prefill.engine.broken = True
    return together


def test_a_shared_step_that_breaks_once_costs_no_resume() -> None:
    """Each of its rows is run again alone, where it is; hand-offs among them are given up."""
    together = in_a_shared_step()
    assert together.completes()
    assert LifeName.RESUMED not in together.names()
    queued = [e.node for e in together.cluster.life if e.name == LifeName.DECODE_QUEUED]
    assert sorted(queued) == ["decode-0", "prefill-0", "prefill-0"]


@pytest.mark.parametrize("held", ["transfer", "step"])
def test_a_client_leaves_a_request_that_was_kept_here(held: str) -> None:
    """Its hand-off is given up while its prefill goes on: the abort must reach both, whichever of
    the two moves first."""
    together = in_a_shared_step()
    cluster, prefill = together.cluster, together.prefill
    cluster.run(hold=of(prefill, "transfer"), until=lambda: prefill.node.batch.num_steps == 3)
    cluster.leave("s")
    cluster.run(hold=of(prefill, held))
    cluster.run_for(2)
    assert cluster.client.answers["r"].is_complete
    assert cluster.client.answers["t"].is_complete
    assert prefill.node.is_empty
    assert together.decode.node.is_empty


def test_what_a_broken_step_wrote_is_never_read() -> None:
    """Neither here nor by others: nothing of it enters the prefix cache."""
    cluster = VirtualCluster(ClusterSpec(workers=(0, 0, 1)))
    cluster.run()
    worker = cluster.current["mixed-0"]
    cluster.submit(make_ask("r", PROMPT, max_tokens=4))
    cluster.run(until=lambda: worker.engine is not None)
    assert worker.engine is not None
    worker.engine.broken = True
    cluster.run_for(0.1)
    cluster.submit(make_ask("s", PROMPT, max_tokens=4, seed=3))
    cluster.run_for(1)
    assert cluster.client.answers["r"].is_complete
    assert cluster.client.answers["s"].is_complete
