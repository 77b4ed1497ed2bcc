"""What is expected of an answer before it begins, and while it goes on; and who flies where."""

from __future__ import annotations

import random
import statistics

import pytest
from virtual_cluster import ClusterSpec, VirtualCluster, make_ask

from pdserve.core.request import FinishReason, ServiceClass
from pdserve.node.answer_lengths import FEWEST, MAX_KINDS, NUM_LATEST, PRIOR_TOKENS, AnswerLengths
from pdserve.node.flights import GOLDEN, LATE_S, MAX_LATE
from pdserve.node.lives import Choice, Life
from pdserve.node.settings import RouterSettings

PROMPT = tuple(range(2, 12))
GENEROUS = ServiceClass(name="generous", ttft_s=60.0, tpot_s=60.0)
DREAM = ServiceClass(name="dream", ttft_s=1e-6, tpot_s=1e-6)
REQUEST = make_ask("x", PROMPT, max_tokens=1000).request
SHARES = [(0.5 + n * GOLDEN) % 1.0 for n in range(500)]


def started(**settings: object) -> VirtualCluster:
    router = RouterSettings(step_timeout_s=1e3)
    cluster = VirtualCluster(ClusterSpec(router=router, **settings))  # type: ignore[arg-type]
    cluster.run()
    return cluster


def learn(lengths: AnswerLengths, num_tokens: int, name: str = "r", **ask: object) -> None:
    life = Life.of(make_ask(name, PROMPT, max_tokens=1000, **ask).request, 0.0)  # type: ignore[arg-type]
    life.choices[0].taken = [1] * num_tokens
    life.choices[0].finish = FinishReason.STOP
    lengths.learn(life)


def test_answers_are_expected_to_be_like_those_of_their_kind() -> None:
    cluster = started()
    answers = cluster.router.dispatch.answers
    fresh = make_ask("x", PROMPT, max_tokens=1000, service=GENEROUS, tenant="t").request
    assert answers.expect(fresh) == PRIOR_TOKENS
    for number in range(3):
        ask = make_ask(f"r{number}", PROMPT, max_tokens=10, service=GENEROUS, tenant="other")
        cluster.submit(ask)
    cluster.submit(make_ask("d", PROMPT, max_tokens=30))
    cluster.run_for(3)
    assert answers.expect(fresh) == 10  # of its class
    unknown = make_ask("y", PROMPT, max_tokens=1000, service=DREAM).request
    assert 10 < answers.expect(unknown) < 30  # of all
    short = make_ask("z", PROMPT, max_tokens=4, service=GENEROUS, tenant="t").request
    assert answers.expect(short) == 4


def test_before_any_has_ended_one_that_outlasts_what_was_expected_goes_on_for_half_of_it() -> None:
    lengths = AnswerLengths()
    request = make_ask("x", PROMPT, max_tokens=200).request
    assert lengths.expect_more(request, Choice(0)) == PRIOR_TOKENS
    for num_taken, left in ((28, PRIOR_TOKENS - 28), (130, PRIOR_TOKENS / 2), (199, 1)):
        assert lengths.expect_more(request, Choice(0, taken=[1] * num_taken)) == left
        assert lengths.share_more(request, num_taken, 0.3) == left
    little = make_ask("y", PROMPT, max_tokens=1).request
    assert lengths.expect_more(little, Choice(0)) == lengths.share_more(little, 0, 0.9) == 1


def test_only_those_that_became_longer_say_how_one_goes_on() -> None:
    lengths = AnswerLengths()
    for num_tokens in (10, 20, 30, 40, 50, 60, 70, 80):
        learn(lengths, num_tokens)
    assert [lengths.share_more(REQUEST, 45, n / 4) for n in range(4)] == [5, 15, 25, 35]
    assert lengths.expect_more(REQUEST, Choice(0, taken=[1] * 45)) == 20
    assert lengths.share_more(REQUEST, 79, 0.99) == 1
    assert lengths.share_more(REQUEST, 80, 0.0) == lengths.expect(REQUEST) / 2  # none has outlived
    short = make_ask("y", PROMPT, max_tokens=48).request
    assert lengths.share_more(short, 45, 0.99) == 3


@pytest.mark.parametrize("age", [0, 30, 200])
def test_so_many_end_within_some_steps_as_did_of_those_that_were_that_long(age: int) -> None:
    """A few are very long, as answers are. Half of the average for each would see nobody end."""
    draw = random.Random(age)
    lengths, seen = AnswerLengths(), []
    for _ in range(NUM_LATEST):
        seen.append(1 + round(draw.lognormvariate(4.5, 1.0)))
        learn(lengths, seen[-1])
    older = [num_tokens for num_tokens in seen if num_tokens > age]
    for steps in (10, 50, 200):
        ended = statistics.mean(num_tokens <= age + steps for num_tokens in older)
        expected = [lengths.share_more(REQUEST, age, share) <= steps for share in SHARES]
        assert statistics.mean(expected) == pytest.approx(ended, abs=0.02)


def test_a_kind_counts_once_it_has_had_a_few_answers_and_forgets_old_ones() -> None:
    lengths = AnswerLengths()
    for _ in range(FEWEST):
        learn(lengths, 500)
    for _ in range(FEWEST - 1):
        learn(lengths, 100, service=GENEROUS)
    generous = make_ask("x", PROMPT, max_tokens=1000, service=GENEROUS).request
    assert lengths.share_more(generous, 50, 0.99) == 450  # of all
    learn(lengths, 100, service=GENEROUS)
    assert lengths.share_more(generous, 50, 0.99) == 50
    for _ in range(NUM_LATEST):
        learn(lengths, 300, service=GENEROUS)
    assert lengths.share_more(generous, 50, 0.0) == 250


def test_so_many_tenants_are_remembered_and_no_more() -> None:
    lengths = AnswerLengths()
    for number in range(MAX_KINDS + 50):
        learn(lengths, 10, tenant=f"t{number}")
    assert len(lengths._latest) == len(lengths._means) == MAX_KINDS


def test_sequences_alike_are_taken_to_end_one_after_the_other() -> None:
    cluster = started(num_blocks=400)
    for num_tokens in range(20, 40, 2):
        learn(cluster.router.dispatch.answers, num_tokens)
    for number in range(5):
        cluster.submit(make_ask(f"r{number}", PROMPT, max_tokens=40))
    flights = cluster.router.dispatch.flights.of(cluster.current["decode-0"].worker, cluster.now)
    assert sorted(flight.tokens_left for flight in flights) == [22, 26, 30, 34, 38]


def test_newcomers_are_who_came_of_late_after_as_long_a_time() -> None:
    cluster = started(num_blocks=400)
    flights, worker = cluster.router.dispatch.flights, cluster.current["decode-0"].worker
    assert dict(flights.newcomers_at(cluster.now)) == {}
    cluster.submit(make_ask("r", PROMPT, max_tokens=40))
    begun_s = cluster.now
    [coming] = flights.of(worker, begun_s)
    again = flights.newcomers_at(begun_s + 10)[worker]
    assert again.period_s == LATE_S
    [flight] = again.flights
    assert flight.starts_in_s == pytest.approx(coming.starts_in_s + LATE_S - 10)
    assert (flight.context_tokens, flight.tokens_left) == (10, 40)
    assert flights.newcomers(worker, begun_s + LATE_S + 1).flights == ()
    cluster.run_for(3)
    assert cluster.client.answers["r"].is_complete
    assert dict(flights.newcomers_at(cluster.now)) == {}  # nothing is there any more


def test_of_many_newcomers_the_latest_come_again_the_sooner() -> None:
    cluster = started(num_blocks=4000)
    flights, worker = cluster.router.dispatch.flights, cluster.current["decode-0"].worker
    begun_s = cluster.now
    for number in range(MAX_LATE + 10):
        cluster.submit(make_ask(f"r{number}", PROMPT, max_tokens=40))
    many = flights.newcomers(worker, begun_s + 2)
    assert len(many.flights) == MAX_LATE
    assert 0 < many.period_s <= 2


def test_what_was_broken_off_teaches_nothing() -> None:
    cluster = started()
    cluster.submit(make_ask("r", PROMPT, max_tokens=40))
    cluster.run(until=lambda: len(cluster.client.answers["r"].tokens[0]) > 6)
    cluster.leave(cluster.client.answers["r"].ask.request_id)
    cluster.run_for(1)
    request = make_ask("x", PROMPT, max_tokens=1000).request
    assert cluster.router.dispatch.answers.expect(request) == PRIOR_TOKENS
