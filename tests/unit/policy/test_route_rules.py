"""The baselines' own rules, and what holds for every routing policy."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pdserve.core.ids import WorkerId
from pdserve.core.request import Role, RoutePreference
from pdserve.cost.step import StepModel
from pdserve.policy.cluster import ClusterView, Route, RouteAsk, WorkerView
from pdserve.policy.draws import draw
from pdserve.policy.registry import ROUTE_POLICIES, make_policy

ASK = RouteAsk(num_tokens=100, num_blocks=8, output_tokens=20.0)
SPLIT = replace(ASK, preference=RoutePreference.SPLIT)
LOCAL = replace(ASK, preference=RoutePreference.LOCAL)
ROLES = {"p": Role.PREFILL, "d": Role.DECODE, "m": Role.MIXED}
RULES = [
    "aggregated",
    "power_of_two",
    "prefix_aware",
    "random",
    "round_robin",
    "shortest_queue",
    "splitwise",
]
PAIRS = [name for name in RULES if name not in ("aggregated", "splitwise")]


def model(factor: float) -> StepModel:
    return StepModel(
        prompt_base_s=0.0,
        per_prompt_token_s=0.001 * factor,
        per_pair_s=0.0,
        decode_base_s=0.010 * factor,
        per_sequence_s=0.001 * factor,
        per_context_token_s=0.0,
    )


def worker(
    name: str,
    *,
    pending: int = 0,
    decoding: int = 0,
    free: int = 50,
    steps: StepModel | None = None,
    numerics: str = "class a",
) -> WorkerView:
    """``p0`` is a prefill worker, ``d0`` a decode worker, ``m0`` a mixed one."""
    return WorkerView(
        worker=WorkerId(name),
        role=ROLES[name[0]],
        home_role=ROLES[name[0]],
        pending_tokens=pending,
        num_decoding=decoding,
        free_blocks=free,
        numerics=numerics,
        steps=steps,
    )


def choose(policy: str, ask: RouteAsk, *workers: WorkerView) -> Route | None:
    return make_policy(policy).choose(ClusterView(0.0, workers), ask)


def route(policy: str, ask: RouteAsk, *workers: WorkerView) -> str | None:
    chosen = choose(policy, ask, *workers)
    return None if chosen is None else f"{chosen.prefill} {chosen.decode}"


def routes(policy: str, ask: RouteAsk, num: int, *workers: WorkerView) -> Counter[str | None]:
    return Counter(route(policy, replace(ask, number=n), *workers) for n in range(num))


SMALL = tuple(map(worker, ("d0", "d1", "d2", "p0", "p1")))


# --- draws ------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [2, 3, 7, 64])
def test_draws_are_even_over_numbers(size: int) -> None:
    """Within five standard deviations of an even share."""
    num = 400 * size
    counts = Counter(draw(number, "prefill", size) for number in range(num))
    assert set(counts) == set(range(size))
    assert all(abs(count - 400) < 5 * 20 for count in counts.values())


def test_purposes_draw_independently() -> None:
    both = Counter((draw(n, "prefill", 2), draw(n, "decode", 2)) for n in range(4000))
    assert all(abs(both[a, b] - 1000) < 150 for a in (0, 1) for b in (0, 1))


def test_random_uses_every_pair_evenly() -> None:
    counts = routes("random", ASK, 3000, *SMALL)
    assert set(counts) == {f"p{p} d{d}" for p in (0, 1) for d in (0, 1, 2)}
    assert all(abs(count - 500) < 115 for count in counts.values())


def test_random_looks_at_no_load() -> None:
    counts = routes("random", LOCAL, 2000, worker("m0", pending=900, decoding=90), worker("m1"))
    assert abs(counts["m0 m0"] - 1000) < 230


# --- round robin ------------------------------------------------------------------------------


def test_round_robin_takes_turns_on_both_sides() -> None:
    counts = routes("round_robin", ASK, 60, *SMALL)
    assert Counter(pair.split()[0] for pair in counts.elements() if pair) == {"p0": 30, "p1": 30}
    assert Counter(pair.split()[1] for pair in counts.elements() if pair) == dict.fromkeys(
        ("d0", "d1", "d2"), 20
    )


@pytest.mark.parametrize(("num_prefill", "num_decode"), [(2, 2), (3, 3), (2, 4), (1, 3)])
def test_round_robin_comes_to_use_every_pair(num_prefill: int, num_decode: int) -> None:
    prefill = [worker(f"p{n}") for n in range(num_prefill)]
    decode = [worker(f"d{n}") for n in range(num_decode)]
    num = 2 * num_prefill * num_decode * num_decode
    assert len(routes("round_robin", ASK, num, *decode, *prefill)) == num_prefill * num_decode


def test_round_robin_keeps_what_a_mixed_worker_prefills() -> None:
    counts = routes("round_robin", ASK, 30, worker("m0"), worker("m1"), worker("m2"))
    assert counts == {"m0 m0": 10, "m1 m1": 10, "m2 m2": 10}


# --- power of two -----------------------------------------------------------------------------


def test_power_of_two_never_takes_the_most_loaded() -> None:
    prefill = [worker(f"p{n}", pending=n) for n in range(4)]
    decode = [worker(f"d{n}", decoding=n) for n in range(4)]
    counts = routes("power_of_two", ASK, 2000, *decode, *prefill)
    wins = Counter(pair.split()[0] for pair in counts.elements() if pair)
    assert "p3" not in wins
    # Of six equally likely pairs, three hold the best worker, two more the second, one the third.
    assert abs(wins["p0"] - 1000) < 115
    assert abs(wins["p1"] - 667) < 110
    assert abs(wins["p2"] - 333) < 90
    assert not any(pair and pair.endswith("d3") for pair in counts)


def test_power_of_two_compares_both_of_two() -> None:
    workers = (worker("d0", decoding=1), worker("d1"), worker("p0", pending=1), worker("p1"))
    assert routes("power_of_two", ASK, 50, *workers) == {"p1 d1": 50}


# --- prefix aware -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("cached", "pending", "expected"),
    [
        ({}, 0, "p0 d0"),  # ties by id
        ({"p1": 64}, 0, "p1 d0"),  # 36 tokens to compute instead of 100
        ({"p1": 64}, 63, "p1 d0"),  # 99 before the first token
        ({"p1": 64}, 65, "p0 d0"),  # 101
        ({"p0": 32, "p1": 64}, 30, "p1 d0"),
        ({"p0": 32, "p1": 64}, 40, "p0 d0"),
        ({"d0": 96}, 0, "p0 d0"),  # a decode worker's cache is not asked
        ({"p1": 100}, 98, "p1 d0"),  # one token at least is computed
        ({"p1": 100}, 100, "p0 d0"),
    ],
)
def test_prefix_aware_adds_queue_and_uncached_tokens(
    cached: dict[str, int], pending: int, expected: str
) -> None:
    ask = replace(ASK, cached_tokens={WorkerId(name): n for name, n in cached.items()})
    workers = (worker("d0"), worker("p0"), worker("p1", pending=pending))
    assert route("prefix_aware", ask, *workers) == expected


def test_prefix_aware_counts_in_seconds() -> None:
    ask = replace(ASK, cached_tokens={WorkerId("p1"): 40})
    slow = worker("p1", steps=model(2.0))
    assert route("prefix_aware", ask, worker("d0", steps=model(1.0)), worker("p0"), slow) == "p1 d0"
    fast = worker("p0", steps=model(1.0))
    assert route("prefix_aware", ask, worker("d0", steps=model(1.0)), fast, slow) == "p0 d0"


# --- aggregated -------------------------------------------------------------------------------


def test_aggregated_looks_at_no_role() -> None:
    workers = (worker("d0", decoding=2), worker("m0", decoding=3), worker("p0", decoding=1))
    assert route("aggregated", ASK, *workers) == "p0 p0"
    assert route("aggregated", ASK, *workers[:2], worker("p0", free=0)) == "d0 d0"


def test_aggregated_weighs_queue_and_decodes_by_speed() -> None:
    """100 tokens cost 0.1 s of a fast worker, and 20 steps 0.22 s and 0.02 s a sequence more."""
    slow, fast = model(2.0), model(1.0)
    idle = worker("m0", steps=slow)
    assert route("aggregated", ASK, idle, worker("m1", pending=300, steps=fast)) == "m1 m1"
    assert route("aggregated", ASK, idle, worker("m1", pending=330, steps=fast)) == "m0 m0"
    assert route("aggregated", ASK, idle, worker("m1", decoding=15, steps=fast)) == "m1 m1"
    assert route("aggregated", ASK, idle, worker("m1", decoding=17, steps=fast)) == "m0 m0"


def test_aggregated_splits_for_a_client_that_asks() -> None:
    workers = (worker("d0", decoding=2), worker("m0", decoding=3), worker("p0", decoding=1))
    assert route("aggregated", SPLIT, *workers) == "p0 d0"
    assert route("aggregated", SPLIT, *workers[:1], *workers[2:]) == "p0 d0"
    assert route("aggregated", SPLIT, worker("m0"), worker("m1", free=0)) is None


def test_a_resume_of_aggregated_goes_back_to_its_prefix() -> None:
    ask = replace(ASK, last_prefill=WorkerId("m1"))
    workers = (worker("m0"), worker("m1", decoding=9))
    assert route("aggregated", ask, *workers) == "m1 m1"
    assert route("aggregated", ask, worker("m0"), worker("m1", free=0)) == "m0 m0"


# --- rules of all -----------------------------------------------------------------------------


@pytest.mark.parametrize("policy", RULES)
def test_the_registry_has_it(policy: str) -> None:
    assert policy in ROUTE_POLICIES


@pytest.mark.parametrize("policy", PAIRS)
def test_a_mixed_worker_keeps_what_it_prefills_if_it_has_room(policy: str) -> None:
    ask = replace(ASK, last_prefill=WorkerId("m0"))
    assert route(policy, ask, worker("d0"), worker("m0"), worker("p0")) == "m0 m0"
    assert route(policy, ask, worker("d0"), worker("m0", free=1), worker("p0")) == "m0 d0"


@pytest.mark.parametrize("policy", RULES)
@pytest.mark.parametrize("number", range(4))
def test_wishes_and_history_hold_for_all(policy: str, number: int) -> None:
    workers = (worker("d0"), worker("d1"), worker("p0"), worker("p1"))
    in_place = replace(SPLIT, in_place=True, last_prefill=WorkerId("p1"), number=number)
    assert route(policy, in_place, *workers) == "p1 p1"
    split = replace(
        SPLIT, last_prefill=WorkerId("p1"), avoid_decode=(WorkerId("d0"),), number=number
    )
    if policy != "aggregated":  # whose decode side is everybody
        assert route(policy, split, *workers) == "p1 d1"
    chosen = choose(policy, replace(LOCAL, number=number), *workers)
    assert chosen is not None
    assert chosen.prefill == chosen.decode
    assert chosen.draws == ()
    other = replace(ASK, numerics="class b", number=number, preference=RoutePreference.SPLIT)
    b = worker("d2", decoding=9, numerics="class b")
    resumed = choose(policy, other, *workers[:2], b, *workers[2:])
    assert resumed is not None
    assert resumed.decode == "d2"


views = st.lists(
    st.builds(
        worker,
        st.sampled_from([f"{kind}{n}" for kind in "pdm" for n in range(3)]),
        pending=st.integers(0, 3).map(lambda n: 4000 * n),
        decoding=st.integers(0, 5),
        free=st.integers(0, 20),
        steps=st.sampled_from([model(1.0), model(2.0), model(1.0), None]),
        numerics=st.sampled_from(["class a", "class b"]),
    ),
    unique_by=lambda view: view.worker,
    max_size=9,
).map(lambda workers: tuple(sorted(workers, key=lambda w: w.worker)))
ids = st.sampled_from([WorkerId(name) for name in ("p0", "d0", "m1")])
asks = st.builds(
    RouteAsk,
    num_tokens=st.sampled_from([10, 3000]),
    num_blocks=st.integers(1, 15),
    preference=st.sampled_from(RoutePreference),
    last_prefill=st.none() | ids,
    numerics=st.sampled_from([None, "class a", "class b"]),
    avoid_decode=st.lists(ids, max_size=2).map(tuple),
    in_place=st.booleans(),
    cached_tokens=st.dictionaries(ids, st.integers(0, 10), max_size=2),
    output_tokens=st.floats(1.0, 100.0),
    number=st.integers(0, 1 << 40),
)


@pytest.mark.parametrize("policy", RULES)
@given(workers=views, ask=asks)
def test_a_route_keeps_to_the_view_the_room_and_the_wish(
    policy: str, workers: tuple[WorkerView, ...], ask: RouteAsk
) -> None:
    view = ClusterView(0.0, workers)
    chosen = make_policy(policy).choose(view, ask)
    assert make_policy(policy).choose(replace(view, now=9.0), ask) == chosen
    by_id = {w.worker: w for w in workers}
    one_worker = ask.in_place or ask.preference is RoutePreference.LOCAL or len(workers) == 1
    if chosen is None:
        if one_worker:
            assert all(w.free_blocks < ask.num_blocks for w in workers)
        return
    assert chosen.reason
    assert chosen.prefill in by_id
    assert by_id[chosen.decode].free_blocks >= ask.num_blocks
    assert set(chosen.draws) <= {chosen.prefill, chosen.decode}
    assert all(by_id[drawn].role is not Role.MIXED for drawn in chosen.draws)
    if one_worker:
        assert chosen.prefill == chosen.decode
    elif ask.preference is RoutePreference.SPLIT:
        assert chosen.prefill != chosen.decode


@pytest.mark.parametrize("policy", ["aggregated", "prefix_aware", "shortest_queue", "splitwise"])
@given(workers=views, ask=asks, data=st.data())
def test_ties_do_not_depend_on_the_order(
    policy: str, workers: tuple[WorkerView, ...], ask: RouteAsk, data: st.DataObject
) -> None:
    shuffled = tuple(data.draw(st.permutations(workers)))
    made = make_policy(policy)
    assert made.choose(ClusterView(0.0, shuffled), ask) == made.choose(
        ClusterView(0.0, workers), ask
    )


@pytest.mark.parametrize("policy", RULES)
@given(workers=views, ask=asks)
def test_somebody_with_room_is_found(
    policy: str, workers: tuple[WorkerView, ...], ask: RouteAsk
) -> None:
    """If all have room, nobody waits."""
    roomy = tuple(replace(w, free_blocks=20) for w in workers)
    chosen = make_policy(policy).choose(ClusterView(0.0, roomy), ask)
    assert (chosen is None) == (not workers)
