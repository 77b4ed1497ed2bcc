"""The router's gate and queue: bounds of classes, refusals with a time, shares by weight."""

from __future__ import annotations

from collections import Counter

import pytest
from virtual_cluster import ClusterSpec, VirtualCluster, make_ask
from virtual_cluster.orders import of

from pdserve.core.effects import Fail, Refusal
from pdserve.core.events import LifeEvent, LifeName
from pdserve.core.request import Role, ServiceClass
from pdserve.node.settings import RouterSettings

PROMPT = tuple(range(2, 12))
GENEROUS = ServiceClass(name="generous", ttft_s=60.0, tpot_s=60.0)
DREAM = ServiceClass(name="dream", ttft_s=1e-6, tpot_s=1e-6)
"""Of which nothing can be kept: it comes in only when nothing is in its way."""


def started(admission: str = "predicted", **settings: object) -> VirtualCluster:
    router = RouterSettings(admission=admission, step_timeout_s=1e3)
    cluster = VirtualCluster(ClusterSpec(router=router, **settings))  # type: ignore[arg-type]
    cluster.run()
    return cluster


def failure_of(cluster: VirtualCluster, name: str) -> Fail | None:
    return cluster.client.answers[name].failure


def submitted(cluster: VirtualCluster, name: str) -> LifeEvent:
    return next(e for e in cluster.life if e.name is LifeName.SUBMITTED and e.request_id == name)


def busy(admission: str) -> VirtualCluster:
    """``r`` decodes, and nothing ends its steps."""
    cluster = started(admission)
    cluster.submit(make_ask("r", PROMPT, max_tokens=40))
    cluster.run(until=lambda: len(cluster.client.answers["r"].tokens[0]) > 6)
    return cluster


@pytest.mark.parametrize("admission", ["early", "predicted"])
def test_a_request_that_would_miss_its_bounds_is_refused_with_a_time(admission: str) -> None:
    cluster = busy(admission)
    cluster.submit(make_ask("s", PROMPT, service=DREAM))
    failure = failure_of(cluster, "s")
    assert failure is not None
    assert failure.kind == Refusal.OVERLOADED
    assert "class dream promises" in failure.detail
    assert failure.retry_after_s is not None
    assert 1.0 <= failure.retry_after_s <= 60.0
    assert cluster.router.num_requests == 1
    cluster.run_for(2)
    assert cluster.client.answers["r"].is_complete


def test_it_is_let_in_once_nothing_is_in_its_way() -> None:
    cluster = busy("predicted")
    cluster.run_for(2)
    cluster.submit(make_ask("s", PROMPT, service=DREAM))
    cluster.run_for(2)
    assert cluster.client.answers["s"].is_complete


def test_whoever_has_no_bounds_or_generous_ones_comes_in() -> None:
    cluster = busy("predicted")
    cluster.submit(make_ask("s", PROMPT))
    cluster.submit(make_ask("t", PROMPT, service=GENEROUS))
    assert dict(submitted(cluster, "s").detail)["service"] == "default"
    assert "admission" not in dict(submitted(cluster, "s").detail)
    assert str(dict(submitted(cluster, "t").detail)["admission"]).startswith("expected: ")
    cluster.run_for(3)
    assert cluster.client.answers["s"].is_complete
    assert cluster.client.answers["t"].is_complete


def test_without_an_admission_policy_bounds_refuse_nobody() -> None:
    cluster = busy("none")
    cluster.submit(make_ask("s", PROMPT, service=DREAM))
    cluster.run_for(3)
    assert cluster.client.answers["s"].is_complete


def test_a_resume_is_never_judged() -> None:
    """Its worker dies while another request decodes, with bounds that cannot be kept."""
    cluster = started(workers=(0, 0, 2))
    cluster.submit(make_ask("r", PROMPT, max_tokens=12, service=DREAM))
    cluster.run(until=lambda: len(cluster.client.answers["r"].tokens[0]) == 3)
    cluster.submit(make_ask("s", (1, *PROMPT), max_tokens=12))
    owner = next(
        attempt.owner
        for life in cluster.router.dispatch.lives.values()
        if life.request.request_id == "r"
        for attempt in life.attempts.values()
    )
    cluster.kill(cluster.current[owner])
    cluster.run_for(5)
    assert cluster.client.answers["r"].is_complete
    assert cluster.client.answers["s"].is_complete


def test_flights_say_who_decodes_and_who_is_on_the_way() -> None:
    cluster = started("none")
    prefill, decode = cluster.current["prefill-0"], cluster.current["decode-0"]
    assert decode.settings.role is Role.DECODE
    cluster.submit(make_ask("r", PROMPT, max_tokens=40))
    [coming] = cluster.router.dispatch.flights.of(decode.worker, cluster.now)
    assert coming.starts_in_s > 0
    assert coming.context_tokens == 10
    assert coming.tokens_left == 40
    assert cluster.router.dispatch.flights.of(prefill.worker, cluster.now) == ()
    cluster.run(until=lambda: len(cluster.client.answers["r"].tokens[0]) == 5)
    [decoding] = cluster.router.dispatch.flights.at(cluster.now)[decode.worker]
    assert (decoding.starts_in_s, decoding.context_tokens) == (0.0, 15)
    assert decoding.tokens_left == 35
    cluster.run_for(3)
    assert cluster.client.answers["r"].is_complete
    assert dict(cluster.router.dispatch.flights.at(cluster.now)) == {}


# --- the queue ------------------------------------------------------------------------------------


def test_classes_that_wait_are_served_by_weight() -> None:
    """The pool holds one request at a time; of the first ten, eight are of the heavy class."""
    cluster = started("none", workers=(0, 0, 1), num_blocks=5, block_size=4)
    cluster.submit(make_ask("first", PROMPT, max_tokens=10))
    cluster.run(until=lambda: len(cluster.client.answers["first"].tokens[0]) > 4)
    heavy = ServiceClass(name="heavy", weight=4.0)
    for number in range(12):
        cluster.submit(make_ask(f"light-{number}", PROMPT, max_tokens=6))
        cluster.submit(make_ask(f"heavy-{number}", PROMPT, max_tokens=6, service=heavy))
    answers = cluster.client.answers
    cluster.run_for(60)
    assert all(answer.is_complete for answer in answers.values())
    ended = [e.request_id for e in cluster.life if e.name is LifeName.FINISHED][1:11]
    assert Counter(name.split("-")[0] for name in ended) == {"heavy": 8, "light": 2}
    for kind in ("heavy", "light"):
        mine = [e.request_id for e in cluster.life if e.name is LifeName.ROUTED]
        order = [name for name in mine if name.startswith(kind)]
        assert order == [f"{kind}-{number}" for number in range(12)]


def test_a_small_request_of_another_tenant_passes_a_large_one_that_finds_no_room() -> None:
    cluster = started("none", workers=(0, 0, 1), num_blocks=8, block_size=4)
    cluster.submit(make_ask("r", PROMPT, max_tokens=20))
    cluster.run(until=lambda: len(cluster.client.answers["r"].tokens[0]) > 4)
    held = of(cluster.current["mixed-0"], "step")
    cluster.submit(make_ask("large", tuple(range(30)), max_tokens=2, tenant="a"))
    cluster.run(hold=held)
    cluster.submit(make_ask("small", (1, 2, 3), max_tokens=2, tenant="b"))
    cluster.submit(make_ask("small-too", (1, 2, 3), max_tokens=2, tenant="a"))
    routed = {e.request_id for e in cluster.life if e.name is LifeName.ROUTED}
    assert routed == {"r", "small"}
    cluster.run_for(5)
    assert all(answer.is_complete for answer in cluster.client.answers.values())
