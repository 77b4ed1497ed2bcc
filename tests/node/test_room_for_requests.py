"""Who is refused, who waits, and for how long."""

from __future__ import annotations

import pytest
from virtual_cluster import ClusterSpec, VirtualCluster, make_ask
from virtual_cluster.orders import any_of, of, pair, reach, submitted

from pdserve.core.effects import Fail, Refusal
from pdserve.core.events import LifeName
from pdserve.core.messages import DrainWorker, TicketRefused
from pdserve.core.request import RoutePreference
from pdserve.node.settings import RouterSettings

PROMPT = tuple(range(2, 12))

PATIENCE_S = RouterSettings().no_worker_timeout_s


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


def failure_of(cluster: VirtualCluster, request_id: str) -> Fail:
    failure = cluster.client.answers[request_id].failure
    assert failure is not None
    return failure


def routes(cluster: VirtualCluster, request_id: str) -> list[tuple[object, object]]:
    """(prefill, decode) worker of each attempt."""
    routed = [e for e in cluster.life if e.name == LifeName.ROUTED and e.request_id == request_id]
    return [(dict(e.detail)["prefill"], dict(e.detail)["decode"]) for e in routed]


# --- before token 0 -----------------------------------------------------------------------------


def full_decode_pool(**router: object) -> VirtualCluster:
    """``r`` fills the decode worker and goes on decoding for ever, as nothing ends its steps."""
    settings = RouterSettings(**router)  # type: ignore[arg-type]
    cluster = started(num_blocks=5, block_size=4, router=settings)
    cluster.submit(make_ask("r", PROMPT, max_tokens=10))
    cluster.run(until=lambda: len(cluster.client.answers["r"].tokens[0]) > 6)
    return cluster


def test_a_full_decode_pool_refuses_before_token_0() -> None:
    """With a time after which to come again; what runs is not touched."""
    cluster = full_decode_pool(queue_timeout_s=2.0, step_timeout_s=100.0)
    held = of(cluster.current["decode-0"], "step")
    cluster.submit(make_ask("s", PROMPT, max_tokens=4))
    cluster.run_for(1.9, hold=held)
    assert cluster.client.answers["s"].failure is None
    cluster.run_for(0.2, hold=held)
    failure = failure_of(cluster, "s")
    assert failure.kind == Refusal.OVERLOADED
    assert failure.retry_after_s is not None
    assert 1.0 <= failure.retry_after_s <= 60.0
    cluster.run_for(1)
    assert cluster.client.answers["r"].is_complete


def test_room_in_time_is_as_good_as_room_at_once() -> None:
    cluster = full_decode_pool(queue_timeout_s=2.0, step_timeout_s=100.0)
    cluster.submit(make_ask("s", PROMPT, max_tokens=4))
    cluster.run_for(1.5, hold=of(cluster.current["decode-0"], "step"))
    cluster.run_for(1.0)
    assert cluster.client.answers["s"].is_complete


def test_a_queue_that_is_full_refuses_at_once() -> None:
    cluster = full_decode_pool(max_queued_requests=2, step_timeout_s=100.0)
    held = of(cluster.current["decode-0"], "step")
    for name in ("s", "t", "u"):
        cluster.submit(make_ask(name, PROMPT, max_tokens=4))
        cluster.run(hold=held)
    assert failure_of(cluster, "u").kind == Refusal.OVERLOADED
    assert "2 requests are waiting already" in failure_of(cluster, "u").detail
    cluster.run_for(3)
    assert cluster.client.answers["s"].is_complete
    assert cluster.client.answers["t"].is_complete


def test_a_request_that_a_worker_has_begun_is_not_refused_for_its_slowness() -> None:
    together = submitted(router=RouterSettings(queue_timeout_s=1.0, step_timeout_s=100.0))
    reach("prefill runs", together)
    together.cluster.run_for(5, hold=of(together.prefill, "step"))
    assert together.completes()


def test_no_ticket_for_longer_than_the_queue_may_last_is_a_refusal() -> None:
    """The prefill is done, so the router waits, but not for ever."""
    together = submitted(
        ticket_timeout_s=1.5, router=RouterSettings(queue_timeout_s=1.0, step_timeout_s=100.0)
    )
    reach("prefilled, no ticket", together)
    together.cluster.run_for(2, hold=of(together.decode, "deliver"))
    failure = failure_of(together.cluster, "r")
    assert failure.kind == Refusal.OVERLOADED
    assert failure.detail == "no decode worker had room"
    together.cluster.run_for(1)
    assert together.prefill.node.is_empty
    assert together.decode.node.is_empty


def test_a_refused_ticket_finds_another_decode_worker_and_then_stays_in_place() -> None:
    """The prefill is not done again: what it has computed is in the prefix cache."""
    cluster = started(workers=(1, 3, 0))
    prefill = cluster.current["prefill-0"]
    draining = [cluster.current["decode-0"], cluster.current["decode-1"]]
    for decode in draining:
        decode.to_worker.append(DrainWorker())
    silent = any_of(*(of(decode, "to_gateway") for decode in draining))  # the router knows nothing
    cluster.run(hold=silent)
    cluster.submit(make_ask("r", PROMPT, max_tokens=4, route=RoutePreference.SPLIT))
    cluster.run_for(0.3, hold=silent)
    assert cluster.client.answers["r"].is_complete
    assert routes(cluster, "r") == [
        ("prefill-0", "decode-0"),
        ("prefill-0", "decode-1"),
        ("prefill-0", "prefill-0"),
    ]
    tables = prefill.node.batch.tables
    assert tables.hits_tokens == 8 + 8  # two full blocks, in both resumes


def test_a_ticket_that_does_not_come_is_asked_for_elsewhere() -> None:
    cluster = started(workers=(1, 2, 0), ticket_timeout_s=0.5)
    cluster.submit(make_ask("r", PROMPT, max_tokens=4, route=RoutePreference.SPLIT))
    cluster.run_for(2, hold=of(cluster.current["decode-0"], "deliver"))
    assert cluster.client.answers["r"].is_complete
    assert routes(cluster, "r") == [("prefill-0", "decode-0"), ("prefill-0", "decode-1")]
    cluster.run_for(1)
    assert all(process.node.is_empty for process in cluster.current.values())


def test_a_header_waits_for_room_and_the_ticket_comes_with_it() -> None:
    """The router thinks that there is room; the decode worker knows better."""
    cluster = started(num_blocks=5, block_size=4, ticket_timeout_s=5.0)
    decode = cluster.current["decode-0"]
    cluster.submit(make_ask("r", PROMPT, max_tokens=10))
    cluster.run(until=lambda: len(cluster.client.answers["r"].tokens[0]) > 2)
    stale = cluster.router.books.workers["decode-0"]
    stale.report = None
    stale.changed()
    cluster.submit(make_ask("s", (1, *PROMPT), max_tokens=4))
    cluster.run(hold=of(decode, "step", "to_gateway"))
    assert decode.node.inbound.num_queued == 1
    cluster.run_for(2)
    assert cluster.client.answers["s"].is_complete
    assert not [m for p in cluster.current.values() for _, m in p.said if type(m) is TicketRefused]


def test_a_ticket_leaves_every_running_sequence_a_block_to_grow_into() -> None:
    """Three are free and three are needed, but then the next token would cost a hand-back."""
    cluster = started(num_blocks=7, block_size=4, ticket_timeout_s=5.0)
    decode = cluster.current["decode-0"]
    cluster.submit(make_ask("r", PROMPT, max_tokens=10))
    pool = decode.node.batch.tables.pool
    cluster.run(until=lambda: pool.num_free == 3)
    book = cluster.router.books.workers["decode-0"]
    book.report = None
    book.changed()
    cluster.submit(make_ask("s", (1, *PROMPT), max_tokens=2))
    cluster.run(hold=of(decode, "step", "to_gateway"))
    assert decode.node.inbound.num_queued == 1
    cluster.run_for(2)
    assert cluster.client.answers["s"].is_complete
    assert decode.node.batch.num_preemptions == 0


# --- with nobody left ----------------------------------------------------------------------------


def test_with_nobody_left_the_client_hears_of_it() -> None:
    together = submitted(max_tokens=8)
    cluster = together.cluster
    reach("decode runs", together)
    cluster.restarts = False
    for process in (together.prefill, together.decode):
        cluster.kill(process)
    cluster.submit(make_ask("late", PROMPT))
    cluster.run_for(PATIENCE_S - 0.5)
    assert cluster.client.answers["r"].failure is None
    cluster.run_for(1)
    assert failure_of(cluster, "r").kind == Refusal.UNAVAILABLE
    assert failure_of(cluster, "late").kind == Refusal.UNAVAILABLE
    assert cluster.router.num_requests == 0


def test_a_restart_in_time_is_nothing_but_a_pause() -> None:
    together = submitted(max_tokens=8)
    cluster = together.cluster
    reach("decode runs", together)
    cluster.restarts = False
    for process in (together.prefill, together.decode):
        cluster.kill(process)
    cluster.run_for(4.5)
    cluster.restarts = True
    cluster.run_for(10)
    assert cluster.client.answers["r"].is_complete


def test_a_lone_prefill_worker_takes_over_decoding() -> None:
    together = submitted(max_tokens=8)
    cluster = together.cluster
    reach("decode runs", together)
    cluster.restarts = False
    cluster.kill(together.decode)
    cluster.run_for(2)
    assert cluster.client.answers["r"].is_complete
    assert routes(cluster, "r")[-1] == ("prefill-0", "prefill-0")


def test_requests_that_come_before_any_worker_wait_for_one() -> None:
    cluster = VirtualCluster(ClusterSpec())
    cluster.submit(make_ask("r", PROMPT))
    cluster.run_for(1)
    assert cluster.client.answers["r"].is_complete


# --- after token 0 ------------------------------------------------------------------------------


def test_a_decode_worker_out_of_blocks_hands_its_youngest_back() -> None:
    """It does not prefill again by itself; nobody fails, and what was taken is kept."""
    together = pair(num_blocks=8, block_size=4)
    cluster = together.cluster
    cluster.submit(make_ask("old", PROMPT, max_tokens=20))
    cluster.submit(make_ask("young", (1, *PROMPT), max_tokens=20))
    cluster.run_for(3)
    assert cluster.client.answers["old"].is_complete
    assert cluster.client.answers["young"].is_complete
    assert routes(cluster, "old") == [("prefill-0", "decode-0")]
    assert len(routes(cluster, "young")) >= 2
    preempted = [e for e in cluster.life if e.name == LifeName.PREEMPTED]
    assert {(e.request_id, e.node) for e in preempted} == {("young", "decode-0")}


def test_a_mixed_worker_out_of_blocks_computes_its_youngest_again() -> None:
    cluster = started(workers=(0, 0, 1), num_blocks=8, block_size=4)
    cluster.submit(make_ask("old", PROMPT, max_tokens=20))
    cluster.submit(make_ask("young", (1, *PROMPT), max_tokens=20))
    cluster.run_for(3)
    assert cluster.client.answers["old"].is_complete
    assert cluster.client.answers["young"].is_complete
    assert len(routes(cluster, "young")) == 1
    assert cluster.current["mixed-0"].node.batch.num_preemptions >= 1


def test_after_token_0_nobody_is_refused_however_long_it_takes() -> None:
    """It is handed back, the pool stays full, and every timeout passes."""
    cluster = started(
        num_blocks=8,
        block_size=4,
        router=RouterSettings(queue_timeout_s=1.0, max_queued_requests=1, step_timeout_s=1e3),
    )
    cluster.submit(make_ask("old", PROMPT, max_tokens=20))
    cluster.submit(make_ask("young", (1, *PROMPT), max_tokens=20))
    cluster.run(until=lambda: any(e.name == LifeName.PREEMPTED for e in cluster.life))
    cluster.run_for(20, hold=of(cluster.current["decode-0"], "step"))
    assert cluster.client.answers["young"].failure is None
    cluster.run_for(3)
    assert cluster.client.answers["young"].is_complete


def test_resumes_go_before_what_is_new_in_the_order_in_which_they_were_broken_off() -> None:
    cluster = started(workers=(0, 0, 2))
    answers = cluster.client.answers
    for name in ("a", "b", "c"):
        cluster.submit(make_ask(name, (ord(name), *PROMPT), max_tokens=12))
    cluster.run(until=lambda: all(answers[name].tokens[0] for name in ("a", "b", "c")))
    cluster.restarts = False
    for process in cluster.current.values():
        cluster.kill(process)
    cluster.run(until=lambda: not cluster.router.books.workers)
    cluster.submit(make_ask("new", PROMPT))
    assert cluster.router.dispatch.queue == ["a", "b", "c", "new"]
    cluster.restarts = True
    cluster.run_for(5)
    assert all(answer.is_complete for answer in answers.values())


# --- workers of different sizes -------------------------------------------------------------------


def test_a_request_goes_only_to_workers_that_can_hold_all_of_it() -> None:
    """Its prompt would fit everywhere, and the first worker is idle."""
    cluster = started(workers=(0, 0, 2), num_blocks=8, block_size=4, fewer_blocks=(4, 0))
    cluster.submit(make_ask("large", PROMPT, max_tokens=20))
    cluster.submit(make_ask("small", PROMPT, max_tokens=6))
    cluster.run_for(2)
    assert routes(cluster, "large") == [("mixed-1", "mixed-1")]
    assert cluster.client.answers["large"].is_complete
    assert cluster.client.answers["small"].is_complete


@pytest.mark.parametrize("returns", [True, False])
def test_only_workers_that_are_too_small_are_as_good_as_none(returns: bool) -> None:
    """The client waits for the large one to come back as long as for any."""
    cluster = started(workers=(0, 0, 2), num_blocks=8, block_size=4, fewer_blocks=(4, 0))
    cluster.submit(make_ask("large", PROMPT, max_tokens=20))
    cluster.run(until=lambda: len(cluster.client.answers["large"].tokens[0]) == 3)
    cluster.restarts = False
    cluster.kill(cluster.current["mixed-1"])
    cluster.run_for(PATIENCE_S - 0.5)
    assert cluster.client.answers["large"].failure is None
    cluster.restarts = returns
    cluster.run_for(3)
    if returns:
        assert cluster.client.answers["large"].is_complete
    else:
        assert failure_of(cluster, "large").kind == Refusal.UNAVAILABLE
    cluster.submit(make_ask("small", PROMPT, max_tokens=6))
    cluster.run_for(1)
    assert cluster.client.answers["small"].is_complete
