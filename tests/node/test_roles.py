"""Workers that change pools while they run, and workers that are drained one by one."""

from __future__ import annotations

import pytest
from virtual_cluster import ClusterSpec, VirtualCluster, make_ask

from pdserve.core.commands import ChangeRole, DrainOne, Refused, RoleChanged, UndrainOne
from pdserve.core.ids import WorkerId
from pdserve.core.messages import SetRole
from pdserve.core.request import Role, RoutePreference
from pdserve.node.settings import RoleControl, RouterSettings
from pdserve.policy.cluster import ClusterView, Route, RouteAsk
from pdserve.policy.shortest_queue import ShortestQueue

PROMPT = tuple(range(2, 12))


def cluster_of(*workers: int) -> VirtualCluster:
    cluster = VirtualCluster(ClusterSpec(workers=workers))  # type: ignore[arg-type]
    cluster.run()
    return cluster


def change(worker: str, role: Role, command: int = 1, epoch: int | None = None) -> ChangeRole:
    return ChangeRole(command=command, worker=WorkerId(worker), role=role, expected_epoch=epoch)


def routes(cluster: VirtualCluster) -> list[tuple[object, object]]:
    found = [dict(event.detail) for event in cluster.life if event.name == "routed"]
    return [(detail["prefill"], detail["decode"]) for detail in found]


# --- roles --------------------------------------------------------------------------------------


def test_a_role_takes_effect_at_the_next_route() -> None:
    """Before the worker itself has heard of it."""
    cluster = cluster_of(1, 1, 0)
    cluster.command(change("decode-0", Role.PREFILL))
    cluster.command(change("prefill-0", Role.DECODE, 2))
    cluster.submit(make_ask("r", PROMPT))
    assert routes(cluster) == [("decode-0", "prefill-0")]
    cluster.run_for(1)
    assert cluster.client.answers["r"].is_complete


def test_what_runs_stays_where_it_is() -> None:
    cluster = cluster_of(1, 1, 0)
    cluster.submit(make_ask("r", PROMPT, max_tokens=12))
    cluster.run(until=lambda: len(cluster.client.answers["r"].tokens[0]) == 3)
    cluster.command(change("decode-0", Role.PREFILL))
    cluster.run_for(1)
    assert cluster.client.answers["r"].is_complete
    assert len(routes(cluster)) == 1


def test_the_next_report_confirms_the_epoch() -> None:
    cluster = cluster_of(1, 1, 0)
    cluster.command(change("decode-0", Role.MIXED))
    book = cluster.router.books.workers[WorkerId("decode-0")]
    assert book.report is not None
    assert (book.report.role, book.report.role_epoch) == (Role.DECODE, 0)
    cluster.run_for(0.1)
    assert (book.report.role, book.report.role_epoch) == (Role.MIXED, 1)


def test_an_older_epoch_changes_nothing() -> None:
    cluster = cluster_of(1, 1, 0)
    worker = cluster.current[WorkerId("decode-0")]
    worker.to_worker.extend([SetRole(Role.MIXED, 2), SetRole(Role.PREFILL, 1)])
    cluster.run()
    assert (worker.node.standing.role, worker.node.standing.role_epoch) == (Role.MIXED, 2)


def test_a_command_with_a_stale_epoch_is_refused() -> None:
    cluster = cluster_of(1, 1, 0)
    cluster.command(change("decode-0", Role.MIXED, 1, epoch=0))
    cluster.command(change("decode-0", Role.PREFILL, 2, epoch=0))
    first, second = cluster.answer(1), cluster.answer(2)
    assert first is not None
    assert first.refused is None
    assert second is not None
    assert second.refused == Refused.STALE_EPOCH
    assert "role epoch of decode-0 is 1" in second.detail
    assert cluster.router.books.workers[WorkerId("decode-0")].role is Role.MIXED


def test_an_unknown_worker_is_named() -> None:
    cluster = cluster_of(1, 1, 0)
    cluster.command(change("decode-7", Role.MIXED))
    answer = cluster.answer(1)
    assert answer is not None
    assert answer.refused == Refused.UNKNOWN_WORKER
    assert "decode-7" in answer.detail


def test_a_slot_keeps_its_role_when_its_process_is_replaced() -> None:
    cluster = cluster_of(1, 1, 0)
    cluster.command(change("decode-0", Role.PREFILL))
    cluster.run()
    cluster.kill(cluster.current[WorkerId("decode-0")])
    cluster.run_for(1)
    worker = cluster.current[WorkerId("decode-0")]
    assert worker.epoch == 2
    assert (worker.node.standing.role, worker.node.standing.role_epoch) == (Role.PREFILL, 1)
    assert cluster.router.books.workers[WorkerId("decode-0")].role is Role.PREFILL


def test_a_decode_worker_made_mixed_keeps_what_it_preempts() -> None:
    """Out of blocks, it recomputes the youngest itself; a decode worker would hand it back."""
    spec = ClusterSpec(workers=(0, 1, 0), num_blocks=8)
    cluster = VirtualCluster(spec)
    cluster.run()
    cluster.command(change("decode-0", Role.MIXED))
    for name in "ab":
        cluster.submit(make_ask(name, PROMPT, max_tokens=12))
    cluster.run_for(2)
    assert all(answer.is_complete for answer in cluster.client.answers.values())
    assert [event.name for event in cluster.life].count("preempted") >= 1
    assert [event.name for event in cluster.life].count("resumed") == 0


# --- drawn into the mixed pool ------------------------------------------------------------------


class Drawing(ShortestQueue):
    """Draws the decode worker into the mixed pool, and routes to it alone."""

    def choose(self, view: ClusterView, ask: RouteAsk) -> Route | None:
        decode = WorkerId("decode-0")
        if not any(worker.worker == decode for worker in view.workers):
            return None
        return Route(decode, decode, "drawn", draws=(decode,))


@pytest.mark.interpreted
def test_a_drawn_worker_goes_home_when_the_other_pools_work_is_done() -> None:
    cluster = cluster_of(1, 1, 0)
    cluster.router.dispatch._policy = Drawing()
    cluster.submit(make_ask("r", PROMPT, max_tokens=8))
    book = cluster.router.books.workers[WorkerId("decode-0")]
    assert book.role is Role.MIXED
    cluster.run_for(1)
    assert cluster.client.answers["r"].is_complete
    assert book.role is Role.DECODE
    changes = [said for said in cluster.said if isinstance(said, RoleChanged)]
    assert [said.role for said in changes] == [Role.MIXED, Role.DECODE]
    assert [said.role_epoch for said in changes] == [1, 2]


def test_who_was_moved_by_hand_does_not_go_home() -> None:
    cluster = cluster_of(1, 1, 0)
    cluster.command(change("decode-0", Role.MIXED))
    cluster.submit(make_ask("r", PROMPT, max_tokens=8))
    cluster.run_for(1)
    assert cluster.router.books.workers[WorkerId("decode-0")].role is Role.MIXED


# --- drains -------------------------------------------------------------------------------------


def test_a_drain_is_answered_when_nothing_is_left() -> None:
    cluster = cluster_of(0, 0, 2)
    cluster.submit(make_ask("old", PROMPT, max_tokens=10))
    cluster.run(until=lambda: len(cluster.client.answers["old"].tokens[0]) == 3)
    cluster.command(DrainOne(command=1, worker=WorkerId("mixed-0")))
    cluster.submit(make_ask("new", PROMPT, max_tokens=2))
    assert cluster.answer(1) is None
    cluster.run(until=lambda: cluster.answer(1) is not None)
    assert cluster.client.answers["old"].is_complete
    assert cluster.current[WorkerId("mixed-0")].node.is_empty
    assert routes(cluster) == [("mixed-0", "mixed-0"), ("mixed-1", "mixed-1")]


def test_a_drained_worker_takes_work_again() -> None:
    cluster = cluster_of(0, 0, 1)
    cluster.command(DrainOne(command=1, worker=WorkerId("mixed-0")))
    cluster.run_for(1)
    assert cluster.answer(1) is not None
    cluster.submit(make_ask("r", PROMPT))
    cluster.run_for(0.5)
    assert routes(cluster) == []
    cluster.command(UndrainOne(command=2, worker=WorkerId("mixed-0")))
    cluster.run_for(0.5)
    assert cluster.client.answers["r"].is_complete


def test_a_drain_that_is_called_off_is_refused() -> None:
    cluster = cluster_of(0, 0, 2)
    cluster.submit(make_ask("old", PROMPT, max_tokens=10))
    cluster.run(until=lambda: len(cluster.client.answers["old"].tokens[0]) == 3)
    cluster.command(DrainOne(command=1, worker=WorkerId("mixed-0")))
    cluster.command(UndrainOne(command=2, worker=WorkerId("mixed-0")))
    answer = cluster.answer(1)
    assert answer is not None
    assert answer.refused == Refused.CANNOT


def test_a_worker_that_dies_has_nothing_left() -> None:
    cluster = cluster_of(0, 0, 2)
    cluster.submit(make_ask("old", PROMPT, max_tokens=10))
    cluster.run(until=lambda: len(cluster.client.answers["old"].tokens[0]) == 3)
    cluster.command(DrainOne(command=1, worker=WorkerId("mixed-0")))
    cluster.kill(cluster.current[WorkerId("mixed-0")])
    cluster.run_for(1)
    assert cluster.answer(1) is not None
    assert cluster.client.answers["old"].is_complete


@pytest.mark.parametrize("workers", [(2, 2, 0), (0, 0, 3), (1, 2, 1)])
def test_a_rolling_restart_loses_nothing(workers: tuple[int, int, int]) -> None:
    cluster = cluster_of(*workers)
    names = list(cluster.current)
    for number, worker in enumerate(names):
        for each in range(3):
            route = list(RoutePreference)[each]
            ask = make_ask(f"r{number}-{each}", PROMPT[each:], max_tokens=9, route=route)
            cluster.submit(ask)
        cluster.command(DrainOne(command=number, worker=worker, restart=True))
        cluster.run_for(1)
        assert cluster.answer(number) is not None
        assert cluster.current[worker].epoch == 2
    cluster.run_for(2)
    assert all(answer.is_complete for answer in cluster.client.answers.values())
    assert all(answer.failure is None for answer in cluster.client.answers.values())


# --- the controller -----------------------------------------------------------------------------


def test_advice_moves_nobody_and_fixed_roles_are_not_judged() -> None:
    for control, judged in ((RoleControl.FIXED, False), (RoleControl.ADVISE, True)):
        cluster = VirtualCluster(
            ClusterSpec(workers=(2, 1, 0), router=RouterSettings(roles=control))
        )
        cluster.run_for(3)
        assert bool(cluster.said) is judged
        assert not any(isinstance(said, RoleChanged) for said in cluster.said)
