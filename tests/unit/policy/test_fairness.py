"""Whose turn it is: shares by weight, order within a flow, and nobody forgotten."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pdserve.core.request import ServiceClass
from pdserve.policy.fairness import FairQueue, FairShare

A = ServiceClass(name="a", weight=1.0)
B = ServiceClass(name="b", weight=4.0)

Item = tuple[str, str, int]


def drained(queue: FairQueue[Item], limit: int = 10**6) -> list[Item]:
    """Serve in order."""
    served: list[Item] = []
    while len(queue) and len(served) < limit:
        [item] = queue.heads(1)
        queue.serve(item)
        served.append(item)
    return served


def test_classes_share_by_weight_and_tenants_of_one_alike() -> None:
    queue: FairQueue[Item] = FairQueue()
    for number in range(100):
        for service, tenants in ((A, ("x",)), (B, ("x", "y"))):
            for tenant in tenants:
                queue.add((service.name, tenant, number), service, tenant, 100)
    first = drained(queue, 50)
    count = {flow: sum(item[:2] == flow for item in first) for flow in {i[:2] for i in first}}
    assert count == {("a", "x"): 10, ("b", "x"): 20, ("b", "y"): 20}


def test_a_large_request_counts_for_as_many_small_ones() -> None:
    queue: FairQueue[Item] = FairQueue()
    for number in range(3):
        queue.add(("a", "large", number), A, "large", 300)
    for number in range(9):
        queue.add(("a", "small", number), A, "small", 100)
    order = [item[1][0] for item in drained(queue)]
    assert "".join(order) == "lssslssslsss"


def test_whoever_was_away_has_saved_nothing() -> None:
    """``b`` comes when ``a`` has had 1,000 tokens: it does not get 1,000 in a row now."""
    queue: FairQueue[Item] = FairQueue()
    for number in range(30):
        queue.add(("a", "x", number), A, "x", 100)
    drained(queue, 10)
    for number in range(10):
        queue.add(("a", "y", number), A, "y", 100)
    assert [item[1] for item in drained(queue, 6)] in (list("yxyxyx"), list("xyxyxy"))


def test_leaving_and_coming_back_gains_nothing() -> None:
    queue: FairQueue[Item] = FairQueue()
    for number in range(30):
        queue.add(("a", "x", number), A, "x", 100)
    queue.add(("a", "y", 0), A, "y", 10_000)
    while ("a", "y", 0) in queue:
        queue.serve(queue.heads(1)[0])
    for number in range(1, 5):  # y owes; each of these is withdrawn before its turn
        queue.add(("a", "y", number), A, "y", 1)
        queue.drop(("a", "y", number))
    queue.add(("a", "y", 9), A, "y", 1)
    assert {item[1] for item in drained(queue, 20)} == {"x"}


def test_heads_are_one_of_each_flow_and_change_nothing() -> None:
    queue: FairQueue[Item] = FairQueue()
    for service in (A, B):
        for tenant in ("x", "y"):
            for number in range(2):
                queue.add((service.name, tenant, number), service, tenant, 10)
    heads = queue.heads(9)
    assert heads == [("a", "x", 0), ("a", "y", 0), ("b", "x", 0), ("b", "y", 0)]
    assert queue.heads(9) == heads
    assert queue.heads(3) == heads[:3]


def test_what_is_expected_to_go_first_by_class() -> None:
    queue: FairQueue[Item] = FairQueue()
    assert queue.tokens_ahead(A) == 0
    queue.add(("a", "x", 0), A, "x", 100)
    assert queue.tokens_ahead(A) == 100
    assert queue.tokens_ahead(B) == 0  # it has a turn of its own
    queue.add(("b", "x", 0), B, "x", 40)
    assert queue.tokens_ahead(B) == pytest.approx(50)  # and a fifth of the server is a's
    assert queue.tokens_ahead(A) == 140


# --- properties ---------------------------------------------------------------------------------

flows = st.tuples(st.sampled_from(["a", "b", "c"]), st.sampled_from(["x", "y", "z"]))
WEIGHTS = {"a": 1.0, "b": 4.0, "c": 0.5}
steps = st.lists(
    st.one_of(
        st.tuples(st.just("add"), flows, st.integers(1, 1000)),
        st.tuples(st.just("serve"), st.integers(0, 8)),
        st.tuples(st.just("drop"), st.integers(0, 1000)),
    ),
    max_size=80,
)


def played(history: list[tuple[object, ...]], *, in_turn: bool) -> tuple[list[Item], list[Item]]:
    """(served, left) of a queue that lives through the history; its sums are right throughout."""
    queue: FairQueue[Item] = FairQueue()
    costs: dict[Item, int] = {}
    served: list[Item] = []
    for number, step in enumerate(history):
        if step[0] == "add":
            (name, tenant), tokens = step[1], step[2]
            item = (name, tenant, number)
            costs[item] = tokens
            queue.add(item, ServiceClass(name=name, weight=WEIGHTS[name]), tenant, tokens)
        elif step[0] == "serve" and costs:
            heads = queue.heads(9)
            item = heads[0 if in_turn else step[1] % len(heads)]
            queue.serve(item)
            served.append(item)
            del costs[item]
        elif step[0] == "drop" and costs:
            item = sorted(costs)[step[1] % len(costs)]
            queue.drop(item)
            del costs[item]
        assert len(queue) == len(costs)
        assert queue.tokens == pytest.approx(sum(costs.values()))
    return served, drained(queue)


@settings(max_examples=150)
@given(history=steps, in_turn=st.booleans())
def test_within_a_flow_order_is_kept_and_nothing_is_lost(
    history: list[tuple[object, ...]], in_turn: bool
) -> None:
    served, left = played(history, in_turn=in_turn)
    by_flow: dict[tuple[str, str], list[int]] = {}
    for name, tenant, number in served + left:
        by_flow.setdefault((name, tenant), []).append(number)
    assert all(numbers == sorted(numbers) for numbers in by_flow.values())
    assert (served, left) == played(history, in_turn=in_turn)  # and again the same


@settings(max_examples=150)
@given(
    costs=st.lists(st.tuples(st.integers(1, 500), st.integers(1, 500)), min_size=20, max_size=60),
    weight=st.sampled_from([0.25, 1.0, 3.0]),
    same_class=st.booleans(),
    others=st.lists(st.tuples(st.integers(0, 30), st.integers(1, 500)), max_size=20),
)
def test_shares_are_right_within_one_request_of_each(
    costs: list[tuple[int, int]], weight: float, same_class: bool, others: list[tuple[int, int]]
) -> None:
    """Goyal, Vin and Cheng's theorem 1: over any stretch of turns in which both flows wait,
    |W_f / w_f - W_m / w_m| <= l_f / w_f + l_m / w_m, whoever else comes and goes."""
    weights = (1.0, 1.0 if same_class else weight)
    queue: FairQueue[Item] = FairQueue()
    for number, pair in enumerate(costs):
        for flow, tokens in enumerate(pair):
            name = "both" if same_class else f"c{flow}"
            service = ServiceClass(name=name, weight=weights[flow])
            queue.add((name, f"t{flow}", number), service, f"t{flow}", tokens)
    left = [len(costs), len(costs)]
    work = [0.0, 0.0]
    differences = [0.0]
    turn = 0
    while all(left):
        for number, (when, tokens) in enumerate(others):
            if when == turn:
                name = "both" if same_class else "other"
                queue.add((name, "other", number), ServiceClass(name=name), "other", tokens)
        [item] = queue.heads(1)
        queue.serve(item)
        turn += 1
        if item[1] != "other":
            flow = int(item[1][1])
            left[flow] -= 1
            work[flow] += costs[item[2]][flow] / weights[flow]
            differences.append(work[0] - work[1])
    bound = sum(max(pair[flow] for pair in costs) / weights[flow] for flow in (0, 1))
    assert max(differences) - min(differences) <= bound + 1e-6


@settings(max_examples=100)
@given(moves=st.lists(st.tuples(st.sampled_from("uvwxyz"), st.floats(0.1, 100)), max_size=100))
def test_a_share_remembers_nobody_for_ever(moves: list[tuple[str, float]]) -> None:
    """Those who are away are forgotten once the others have caught up, or nobody waits."""
    share = FairShare()
    share.join("always")
    for flow, work in moves:
        share.join(flow)
        share.serve(flow, work, waits_on=False)
        share.serve("always", work, waits_on=True)
    for _ in range(len(moves)):
        share.serve("always", 101.0, waits_on=True)
    share.serve("always", 1.0, waits_on=True)
    assert share.num_remembered == 1
    share.leave("always")
    assert share.num_remembered == 0


def test_turns_come_in_the_order_of_their_tags() -> None:
    share = FairShare()
    for flow in "cab":
        share.join(flow)
    seen = []
    for _ in range(12):
        [flow] = share.order(1)
        share.serve(flow, {"a": 1.0, "b": 2.0, "c": 4.0}[flow], waits_on=True)
        seen.append(flow)
    assert "".join(seen) == "abcaabaabcaa"
