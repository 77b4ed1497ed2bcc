"""What the router knows of prefix caches, and prefixes that are fetched before prompts are run."""

from __future__ import annotations

import pytest
from virtual_cluster import Ask, ClusterSpec, Event, VirtualCluster, make_ask
from virtual_cluster.checks import check_books_restored, check_caches_known
from virtual_cluster.cluster import Condition

from pdserve.core.commands import DrainOne
from pdserve.core.ids import RequestId, WorkerId
from pdserve.core.messages import CacheChanged, PrefixSent, SendPrefix, StartJob
from pdserve.node.fetches import FETCH_TIMEOUT_S, MAX_FETCHES
from pdserve.node.lives import Life
from pdserve.node.prefixes import COMING_S, MAX_COMING
from pdserve.node.report import MAX_HASHES
from pdserve.policy.cluster import ClusterView, Route, RouteAsk

PROMPT = tuple(range(2, 16))
"""Three full blocks of four and a half."""
P0, P1, P2 = (WorkerId(f"prefill-{number}") for number in range(3))
D0 = WorkerId("decode-0")


class Directed:
    """Routes as it is told."""

    def __init__(self) -> None:
        self.route = Route(P0, D0, "told so")
        self.asks: list[RouteAsk] = []

    def choose(self, view: ClusterView, ask: RouteAsk) -> Route | None:
        self.asks.append(ask)
        there = {worker.worker for worker in view.workers}
        route = self.route
        return route if {route.prefill, route.decode} <= there else Route(P0, D0, "else")


def directed(*workers: int, **settings: object) -> tuple[VirtualCluster, Directed]:
    """A cluster that is linked and idle, and who routes in it."""
    spec = ClusterSpec(workers=workers or (2, 1, 0), **settings)  # type: ignore[arg-type]
    cluster = VirtualCluster(spec)
    policy = cluster.router.dispatch._policy = Directed()
    cluster.run()
    return cluster, policy


def known(cluster: VirtualCluster, ask: Ask) -> dict[WorkerId, int]:
    """What the router would tell a policy of the prompt now."""
    life = Life.of(ask.request, cluster.now)
    return cluster.router.dispatch.prefixes.cached_tokens(life, 0, cluster.now)


def sent(cluster: VirtualCluster, worker: WorkerId, kind: type) -> int:
    """Messages of this kind on their way from the router to a worker."""
    return sum(isinstance(each, kind) for each in cluster.current[worker].to_worker)


def details(cluster: VirtualCluster, name: str) -> list[dict[str, object]]:
    return [dict(event.detail) for event in cluster.life if event.name == name]


def of_kind(*kinds: str) -> Condition:
    return lambda event: event.kind in kinds


def warmed(**settings: object) -> tuple[VirtualCluster, Directed]:
    """The prompt is cached on prefill-0 and decode-0; the next one goes to prefill-1, which is to
    fetch it from prefill-0."""
    cluster, policy = directed(**settings)
    cluster.submit(make_ask("warm", PROMPT))
    cluster.run_for(COMING_S + 1)
    policy.route = Route(P1, D0, "told so", fetch_from=P0)
    return cluster, policy


def ends_well(cluster: VirtualCluster, seconds: float = 2.0) -> None:
    """Everything is answered, and nothing is left."""
    cluster.run_for(seconds)
    assert all(answer.is_over for answer in cluster.client.answers.values())
    for answer in cluster.client.answers.values():
        assert answer.failure is None
        for choice in answer.wanted:
            assert tuple(answer.tokens[choice]) == answer.ask.answers[choice]
    assert all(process.node.is_empty for process in cluster.current.values())
    check_books_restored(cluster.router)
    check_caches_known(cluster.router, cluster.current.values())
    assert not [timer for timer in cluster.router_timers if timer.startswith("fetch")]


# --- what the router knows ----------------------------------------------------------------------


def test_who_has_computed_or_received_a_prompt_has_it() -> None:
    cluster, _ = warmed()
    assert known(cluster, make_ask("again", PROMPT)) == {P0: 12, D0: 12}
    assert known(cluster, make_ask("longer", (*PROMPT, 1, 2, 3))) == {P0: 12, D0: 12}
    assert known(cluster, make_ask("other end", (*PROMPT[:9], 1, 1, 1))) == {P0: 8, D0: 8}
    assert known(cluster, make_ask("other", (1, *PROMPT))) == {}
    assert known(cluster, make_ask("salted", PROMPT, salt="salt")) == {}


def test_the_last_token_is_always_to_be_computed() -> None:
    cluster, _ = warmed()
    assert known(cluster, make_ask("two blocks", PROMPT[:8])) == {P0: 4, D0: 4}
    assert known(cluster, make_ask("and one", PROMPT[:9])) == {P0: 8, D0: 8}


def test_a_follow_up_finds_the_answer_where_it_was_decoded() -> None:
    cluster, _ = directed()
    first = make_ask("first", PROMPT, max_tokens=12)
    cluster.submit(first)
    cluster.run_for(1)
    turn = (*PROMPT, *first.answers[0], 1, 1)
    assert known(cluster, make_ask("second", turn)) == {P0: 12, D0: 24}


def test_a_dead_worker_has_nothing_and_its_successor_neither() -> None:
    cluster, _ = warmed()
    cluster.kill(cluster.current[P0])
    cluster.run_for(1)
    assert known(cluster, make_ask("again", PROMPT)) == {D0: 12}


def test_what_was_under_way_to_a_dead_worker_is_not() -> None:
    cluster, policy = warmed()
    policy.route = Route(P1, D0, "told so")
    cluster.submit(make_ask("r", (1, *PROMPT)))
    assert known(cluster, make_ask("again", (1, *PROMPT))) == {P1: 12}
    cluster.kill(cluster.current[P1])
    policy.route = Route(P0, D0, "told so")
    cluster.run(until=lambda: P1 not in cluster.router.books.workers)
    assert known(cluster, make_ask("again", (1, *PROMPT))) == {P0: 12}
    ends_well(cluster)


def test_what_is_evicted_is_not_there() -> None:
    cluster, _ = warmed(num_blocks=10)
    cluster.submit(make_ask("large", tuple(range(30, 60))))
    ends_well(cluster)
    assert known(cluster, make_ask("again", PROMPT)).get(P1, 0) == 0


def test_workers_of_another_numerics_class_share_nothing() -> None:
    """The decode worker has blocks of the other class, which no prompt of its own will find."""
    cluster, _ = directed(1, 1, 0, numerics=("class a", "class b"))
    cluster.submit(make_ask("warm", PROMPT))
    cluster.run_for(COMING_S + 1)
    assert known(cluster, make_ask("again", PROMPT)) == {P0: 12}


def test_a_prompt_under_way_counts_where_it_goes_for_a_while() -> None:
    cluster, policy = warmed()
    policy.route = Route(P1, D0, "told so")
    cluster.submit(make_ask("new", (*PROMPT[:9], *range(60, 70))))
    assert known(cluster, make_ask("same head", (*PROMPT[:9], *range(60, 65)))) == {
        P0: 8,
        D0: 8,
        P1: 12,
    }
    cluster.current[P1].stopped = True
    cluster.run_for(COMING_S + 0.1)
    assert P1 not in known(cluster, make_ask("same head", (*PROMPT[:9], *range(60, 65))))
    cluster.current[P1].stopped = False
    ends_well(cluster)


def test_few_prompts_under_way_are_remembered() -> None:
    cluster, _ = warmed()
    for number in range(MAX_COMING + 5):
        cluster.submit(make_ask(f"r{number}", (70 + number, *PROMPT), max_tokens=1))
    assert len(cluster.router.dispatch.prefixes._coming) == MAX_COMING
    assert known(cluster, make_ask("first", (70, *PROMPT))) == {}
    ends_well(cluster, 5)
    assert len(cluster.router.dispatch.prefixes._coming) == 0


def test_nothing_is_hashed_while_nobody_has_anything() -> None:
    cluster, policy = directed(prefix_cache=False)
    cluster.submit(make_ask("a", PROMPT))
    cluster.run_for(1)
    cluster.submit(make_ask("b", PROMPT))
    assert [life.hashes for life in cluster.router.dispatch.lives.values()] == [{}]
    assert [ask.cached_tokens for ask in policy.asks] == [{}, {}]
    ends_well(cluster)


def test_a_resume_counts_the_tokens_of_the_answer() -> None:
    cluster, policy = warmed()
    policy.route = Route(P1, D0, "told so")
    cluster.submit(make_ask("r", PROMPT, max_tokens=12))
    cluster.run(until=lambda: len(cluster.client.answers["r"].tokens[0]) == 8)
    policy.route = Route(P1, P1, "told so")
    life = cluster.router.dispatch.lives[RequestId("r")]
    assert cluster.router.dispatch.prefixes.cached_tokens(life, 0, cluster.now)[P1] == 12
    cluster.run_for(0.02)
    cached = cluster.router.dispatch.prefixes.cached_tokens(life, 0, cluster.now)
    num_tokens = len(PROMPT) + len(life.choices[0].taken)
    assert 16 <= cached[D0] <= num_tokens
    ends_well(cluster)


def test_a_large_change_is_told_in_parts() -> None:
    cluster, _ = directed(1, 1, 0, num_blocks=3 * MAX_HASHES)
    process = cluster.current[P0]
    pool = process.node.batch.tables.pool
    blocks = pool.allocate(2 * MAX_HASHES + 1)
    for number, block in enumerate(blocks):
        pool.publish(block, number.to_bytes(16))  # type: ignore[arg-type]
    pool.release(blocks)
    cluster.run_for(1)
    told = [message for _, message in process.said if isinstance(message, CacheChanged)]
    assert [len(message.stored) for message in told] == [MAX_HASHES, MAX_HASHES]
    check_caches_known(cluster.router, cluster.current.values())


def test_cached_tokens_are_not_pending() -> None:
    """Neither in the books nor in what the worker reports while the prompt waits."""
    cluster, policy = warmed()
    policy.route = Route(P0, D0, "told so")
    cluster.submit(make_ask("first", tuple(range(60, 80))))
    cluster.run(until=lambda: cluster.current[P0].engine is not None)
    book = cluster.router.books.workers[P0]
    before = book.pending_tokens
    cluster.submit(make_ask("r", PROMPT))
    assert book.pending_tokens == before + 2
    cluster.run_for(0.1, hold=of_kind("step"))
    assert book.report is not None
    assert (book.unreported, book.report.pending_prefill_tokens) == ([], before + 2)
    ends_well(cluster)


# --- fetches ------------------------------------------------------------------------------------


def test_a_job_waits_for_its_prefix() -> None:
    cluster, _ = warmed()
    cluster.submit(make_ask("r", (*PROMPT, 1, 1)))
    assert (sent(cluster, P0, SendPrefix), sent(cluster, P1, StartJob)) == (1, 0)
    book = cluster.router.books.workers[P1]
    assert book.pending_tokens == 4
    cluster.run(until=lambda: sent(cluster, P1, StartJob) == 1)
    assert (book.unreported, book.held) == ([(1, 4)], {})
    assert details(cluster, "prefix_fetched") == [
        {"source": "prefill-0", "outcome": "sent", "blocks": 3}
    ]
    ends_well(cluster)
    assert [each["cached_tokens"] for each in details(cluster, "prefill_started")] == [0, 12]
    assert known(cluster, make_ask("again", PROMPT))[P1] == 12


def test_two_jobs_wait_for_one_fetch() -> None:
    cluster, _ = warmed()
    cluster.submit(make_ask("a", (*PROMPT, 1, 1)))
    cluster.submit(make_ask("b", (*PROMPT, 3, 3)))
    cluster.submit(make_ask("shorter", PROMPT[:10]))
    assert len(cluster.router.dispatch.fetches) == 1
    assert cluster.router.dispatch.fetches.num_held == 3
    assert sent(cluster, P0, SendPrefix) == 1
    ends_well(cluster)
    assert [each["cached_tokens"] for each in details(cluster, "prefill_started")] == [0, 12, 12, 8]


def test_a_fetch_that_brings_nothing_new_is_not_made() -> None:
    cluster, policy = warmed()
    cluster.submit(make_ask("unknown", (1, *PROMPT)))
    policy.route = Route(P0, D0, "told so", fetch_from=D0)
    cluster.submit(make_ask("as long", PROMPT))
    policy.route = Route(P0, D0, "told so", fetch_from=P0)
    cluster.submit(make_ask("from itself", PROMPT))
    policy.route = Route(P0, D0, "told so", fetch_from=WorkerId("nobody"))
    cluster.submit(make_ask("from nobody", PROMPT))
    assert len(cluster.router.dispatch.fetches) == 0
    ends_well(cluster)
    assert details(cluster, "prefix_fetched") == []


def test_no_block_is_fetched_that_would_not_be_used() -> None:
    """The last token is computed in any case: its block cannot come from a cache."""
    cluster, _ = warmed()
    cluster.submit(make_ask("r", PROMPT[:12]))
    [message] = [m for m in cluster.current[P0].to_worker if isinstance(m, SendPrefix)]
    assert message.token_ids == PROMPT[:8]
    ends_well(cluster)


def test_each_worker_has_a_fetch_of_its_own() -> None:
    cluster, policy = directed(3, 1, 0)
    cluster.submit(make_ask("warm", PROMPT))
    cluster.run_for(1)
    for worker in (P1, P2):
        policy.route = Route(worker, D0, "told so", fetch_from=P0)
        cluster.submit(make_ask(f"for {worker}", PROMPT))
    assert sent(cluster, P0, SendPrefix) == 2
    ends_well(cluster)
    assert known(cluster, make_ask("again", PROMPT)) == {P0: 12, P1: 12, P2: 12, D0: 12}


def test_blocks_of_another_class_are_not_asked_for() -> None:
    """The decode worker has blocks of a class that is not its own, and cannot name them."""
    numerics = ("class a", "class b", "class b", "class a")
    cluster, policy = directed(3, 1, 0, numerics=numerics)
    policy.route = Route(P1, D0, "told so")
    cluster.submit(make_ask("warm", PROMPT))
    cluster.run_for(COMING_S + 1)
    assert cluster.current[D0].node.batch.tables.pool.num_cached == 3
    policy.route = Route(P2, D0, "told so", fetch_from=D0)
    cluster.submit(make_ask("r", PROMPT))
    assert len(cluster.router.dispatch.fetches) == 0
    ends_well(cluster)


def test_only_the_holder_can_say_what_came_of_it() -> None:
    cluster, _ = warmed()
    cluster.submit(make_ask("r", PROMPT))
    [fetch] = cluster.router.dispatch.fetches._open
    cluster.current[P1].to_gateway.append(PrefixSent(attempt=fetch, num_blocks=3))
    cluster.run(hold=of_kind("to_worker"))
    assert cluster.router.dispatch.fetches.num_held == 1
    ends_well(cluster)


def test_only_so_many_fetches_share_a_link() -> None:
    cluster, policy = warmed(num_blocks=80)
    policy.route = Route(P0, D0, "told so")
    heads = [(70 + number, *PROMPT) for number in range(MAX_FETCHES + 1)]
    for number, head in enumerate(heads):
        cluster.submit(make_ask(f"warm {number}", head, max_tokens=1))
    cluster.run_for(1)
    policy.route = Route(P1, D0, "told so", fetch_from=P0)
    for number, head in enumerate(heads):
        cluster.submit(make_ask(f"r{number}", head))
    assert len(cluster.router.dispatch.fetches) == MAX_FETCHES
    assert sent(cluster, P1, StartJob) == 1
    ends_well(cluster)


def test_the_holder_dies() -> None:
    cluster, _ = warmed()
    cluster.submit(make_ask("r", PROMPT))
    cluster.kill(cluster.current[P0])
    cluster.run(until=lambda: cluster.router.dispatch.fetches.num_held == 0)
    assert [each["outcome"] for each in details(cluster, "prefix_fetched")] == ["lost"]
    ends_well(cluster)
    assert details(cluster, "resumed") == []


def test_the_worker_that_waits_for_it_dies() -> None:
    cluster, _ = warmed()
    cluster.submit(make_ask("r", PROMPT))
    cluster.kill(cluster.current[P1])
    cluster.run(until=lambda: len(cluster.router.dispatch.fetches) == 0)
    assert details(cluster, "prefix_fetched") == []
    ends_well(cluster)
    assert len(details(cluster, "resumed")) == 1


def test_the_prefix_is_evicted_before_it_is_sent() -> None:
    cluster, _ = warmed()
    cluster.current[P0].node.batch.tables.pool.clear_cache()
    cluster.submit(make_ask("r", PROMPT))
    assert cluster.router.dispatch.fetches.num_held == 1
    ends_well(cluster)
    assert [each["outcome"] for each in details(cluster, "prefix_fetched")] == ["failed"]


def test_the_prefix_takes_too_long() -> None:
    """The job starts, and what is still being sent is stopped."""
    cluster, _ = warmed()
    cluster.submit(make_ask("r", PROMPT))
    cluster.run_for(FETCH_TIMEOUT_S - 0.1, hold=of_kind("transfer"))
    assert cluster.router.dispatch.fetches.num_held == 1
    cluster.run_for(0.2, hold=of_kind("transfer"))
    assert [each["outcome"] for each in details(cluster, "prefix_fetched")] == ["late"]
    assert all(handoff.stopping for handoff in cluster.current[P0].node.outbound._open.values())
    ends_well(cluster)


def test_a_worker_without_room_refuses_a_prefix_at_once() -> None:
    """Nobody waits for room on its account: neither the job, nor what is handed over there."""
    cluster, policy = warmed(num_blocks=8, max_model_tokens=32)
    policy.route = Route(P1, P1, "told so")
    cluster.submit(make_ask("big", tuple(range(30, 52)), max_tokens=8))
    cluster.run(until=lambda: bool(cluster.client.answers["big"].tokens[0]))
    policy.route = Route(P1, P1, "told so", fetch_from=P0)
    cluster.submit(make_ask("r", PROMPT))
    cluster.run(until=lambda: cluster.router.dispatch.fetches.num_held == 0)
    assert [each["outcome"] for each in details(cluster, "prefix_fetched")] == ["failed"]
    assert not cluster.client.answers["big"].is_over
    ends_well(cluster)


@pytest.mark.parametrize("choices", [None, (0,), (0, 1)])
def test_the_client_goes_while_the_job_is_held_back(choices: tuple[int, ...] | None) -> None:
    """What is left of it is started, if anything is."""
    cluster, _ = warmed()
    cluster.submit(make_ask("r", PROMPT, num_choices=2))
    cluster.leave(RequestId("r"), choices)
    started: list[StartJob] = []

    def hears_all(event: Event) -> bool:
        found = cluster.current[P1].to_worker
        started.extend(m for m in found if isinstance(m, StartJob) and m not in started)
        return False

    cluster.run(hold=hears_all)
    assert [message.job.choices for message in started] == ([(1,)] if choices == (0,) else [])
    assert len(details(cluster, "prefix_fetched")) == len(started)
    ends_well(cluster)
    assert known(cluster, make_ask("again", PROMPT))[P1] == 12


def test_a_drain_waits_for_what_is_held_back() -> None:
    cluster, policy = warmed()
    cluster.submit(make_ask("r", PROMPT))
    cluster.command(DrainOne(command=1, worker=P1))
    policy.route = Route(P0, D0, "told so")
    cluster.run_for(1, hold=of_kind("deliver"))
    assert cluster.current[P1].node.is_empty
    assert cluster.answer(1) is None
    ends_well(cluster)
    assert cluster.answer(1) is not None


def test_jobs_are_numbered_in_the_order_in_which_they_are_sent() -> None:
    """A report that includes the later one says nothing about the one that is held back."""
    cluster, policy = warmed()
    cluster.submit(make_ask("held", PROMPT))
    policy.route = Route(P1, D0, "told so")
    cluster.submit(make_ask("sent", (1, *PROMPT), max_tokens=1))
    cluster.run_for(0.2, hold=of_kind("transfer"))
    book = cluster.router.books.workers[P1]
    assert book.report is not None
    assert (book.report.last_route_seq, book.route_seq) == (1, 1)
    assert book.pending_tokens == 2
    ends_well(cluster)
    assert book.route_seq == 2


# --- together with the policy that predicts -------------------------------------------------------


def test_a_follow_up_turn_goes_where_its_kv_lies() -> None:
    """Locally on the decode worker: there it is one block to compute, elsewhere all of it."""
    spec = ClusterSpec(
        num_blocks=200, max_model_tokens=400, max_step_tokens=400, policy="predicted"
    )
    cluster = VirtualCluster(spec)
    cluster.run()
    prompt = tuple(number % 19 for number in range(200))
    first = make_ask("first", prompt, max_tokens=60)
    cluster.submit(first)
    cluster.run_for(COMING_S + 1)
    second = (*prompt, *first.answers[0], 1, 2, 3)
    cluster.submit(make_ask("second", second, max_tokens=20))
    long = tuple(number % 17 for number in (*second, *second))[:370]  # it would hold up the other
    cluster.submit(make_ask("stranger", long, max_tokens=20))
    _, follow_up, stranger = details(cluster, "routed")
    assert (follow_up["prefill"], follow_up["decode"]) == ("decode-0", "decode-0")
    assert follow_up["cached_tokens"] == 256
    assert stranger["cached_tokens"] == 16  # both begin by counting
    cluster.run_for(3)
    assert all(answer.is_complete for answer in cluster.client.answers.values())
    check_books_restored(cluster.router)
