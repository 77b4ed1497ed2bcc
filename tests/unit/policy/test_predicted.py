"""The route of least predicted cost: a table for every rule, and what holds for all views."""

from __future__ import annotations

import re
from dataclasses import replace
from math import isfinite

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pdserve.core.ids import WorkerId
from pdserve.core.request import Role, RoutePreference, ServiceClass
from pdserve.cost.link import LinkModel
from pdserve.cost.step import StepModel
from pdserve.policy.cluster import Candidate, ClusterView, Route, RouteAsk, WorkerView
from pdserve.policy.predicted import MAX_CANDIDATES, Predicted
from pdserve.policy.shortest_queue import ShortestQueue

STEPS = StepModel(
    prompt_base_s=0.0,
    per_prompt_token_s=1e-4,
    per_pair_s=0.0,
    decode_base_s=0.02,
    per_sequence_s=1e-4,
    per_context_token_s=0.0,
)
"""10,000 prompt tokens a second; a decode step of 20 ms, and 0.1 ms for each sequence."""
FAST_LINK = LinkModel(fixed_s=0.005, per_byte_s=1e-10)
"""1,000 tokens of 100 kB in 10 ms, and 5 ms on top."""
SLOW_LINK = LinkModel(fixed_s=0.005, per_byte_s=1e-8)
SHORT = RouteAsk(num_tokens=100, num_blocks=8, max_output_tokens=500, output_tokens=200.0)
LONG = replace(SHORT, num_tokens=4000, num_blocks=251)
SPLIT = replace(LONG, preference=RoutePreference.SPLIT)
ROLES = {"p": Role.PREFILL, "d": Role.DECODE, "m": Role.MIXED}


def worker(
    name: str,
    *,
    pending: int = 0,
    decoding: int = 0,
    free: int = 5000,
    steps: StepModel | None = STEPS,
) -> WorkerView:
    """``p0`` is a prefill worker, ``d0`` a decode worker, ``m0`` a mixed one."""
    return WorkerView(
        worker=WorkerId(name),
        role=ROLES[name[0]],
        pending_tokens=pending,
        num_decoding=decoding,
        context_tokens=500 * decoding,
        free_blocks=free,
        numerics="class a",
        steps=steps,
    )


def cluster(*workers: WorkerView, link: LinkModel = FAST_LINK) -> ClusterView:
    ordered = tuple(sorted(workers, key=lambda view: view.worker))
    return ClusterView(0.0, ordered, link=link, token_bytes=100_000)


def decide(ask: RouteAsk, *workers: WorkerView, link: LinkModel = FAST_LINK) -> Route:
    route = Predicted().choose(cluster(*workers, link=link), ask)
    assert route is not None
    return route


def pick(ask: RouteAsk, *workers: WorkerView, link: LinkModel = FAST_LINK) -> str:
    route = decide(ask, *workers, link=link)
    return f"{route.prefill} {route.decode}"


def cached(ask: RouteAsk, **tokens: int) -> RouteAsk:
    return replace(ask, cached_tokens={WorkerId(name): count for name, count in tokens.items()})


# --- split or local ---------------------------------------------------------------------------


def test_a_short_prompt_goes_to_an_idle_decode_worker() -> None:
    assert pick(SHORT, worker("p0"), worker("d0")) == "d0 d0"


def test_a_long_prompt_stays_away_from_a_busy_decode_batch() -> None:
    assert pick(LONG, worker("p0"), worker("d0", decoding=30)) == "p0 d0"


def test_a_long_queue_of_prompts_is_escaped_on_a_decode_worker_until_the_harm_is_larger() -> None:
    queue = worker("p0", pending=5000)
    assert pick(SHORT, queue, worker("d0", decoding=9)) == "d0 d0"
    assert pick(LONG, queue, worker("d0", decoding=9)) == "p0 d0"


def test_a_slow_link_makes_local_win() -> None:
    workers = (worker("p0"), worker("d0", decoding=2))
    assert pick(LONG, *workers) == "p0 d0"
    assert pick(LONG, *workers, link=SLOW_LINK) == "d0 d0"


def test_layer_wise_sending_hides_a_slow_link() -> None:
    workers = (worker("p0"), worker("d0", decoding=5))
    hidden = LinkModel(fixed_s=0.005, per_byte_s=1e-9, hidden_share=0.95)
    assert pick(LONG, *workers, link=replace(hidden, hidden_share=0.0)) == "p0 d0"
    split = decide(LONG, *workers, link=hidden).candidates[0]
    assert split.exposed_s == pytest.approx(0.005 + 0.4 - 0.95 * 0.4)


def test_a_measured_link_counts_instead_of_the_usual_one() -> None:
    view = cluster(worker("p0"), worker("d0", decoding=9), worker("d1", decoding=9))
    links = {(WorkerId("p0"), WorkerId("d0")): SLOW_LINK}
    route = Predicted().choose(replace(view, links=links), LONG)
    assert route is not None
    assert (route.prefill, route.decode) == ("p0", "d1")


def test_a_tight_tpot_forces_a_split() -> None:
    """The streams that decode there would fall behind, if every prompt came to them."""
    ask = replace(SHORT, num_tokens=2000, num_blocks=126)
    workers = (worker("p0"), worker("d0", decoding=4))
    link = LinkModel(fixed_s=1.0, per_byte_s=0.0)
    assert pick(ask, *workers, link=link) == "d0 d0"
    tight = replace(ask, service=ServiceClass(tpot_s=0.022))
    route = decide(tight, *workers, link=link)
    assert (route.prefill, route.decode) == ("p0", "d0")
    assert "bounds" not in route.reason


def test_a_tight_ttft_takes_the_shorter_queue_whatever_the_harm() -> None:
    workers = (worker("p0", pending=4000), worker("d0", decoding=20))
    ask = replace(SHORT, num_tokens=1000, num_blocks=63)
    assert pick(ask, *workers) == "p0 d0"
    assert pick(replace(ask, service=ServiceClass(ttft_s=0.3)), *workers) == "d0 d0"


def test_time_already_waited_counts_against_the_ttft() -> None:
    workers = (worker("p0", pending=4000), worker("d0", decoding=20))
    ask = replace(SHORT, num_tokens=1000, num_blocks=63, service=ServiceClass(ttft_s=0.8))
    assert pick(ask, *workers) == "p0 d0"
    assert pick(replace(ask, waited_s=0.5), *workers) == "d0 d0"


def test_if_nobody_meets_the_bounds_the_least_violation_wins() -> None:
    service = ServiceClass(ttft_s=0.001)
    workers = (worker("p0", pending=9000), worker("d0", decoding=1))
    route = decide(replace(LONG, service=service), *workers)
    assert (route.prefill, route.decode) == ("d0", "d0")
    assert route.reason.endswith("; no route meets its bounds")


def test_against_the_roles_a_route_must_be_better_by_a_margin() -> None:
    """What local saves is the link: 2 ms at least, and 10% of its own time."""
    workers = (worker("p0"), worker("d0"))
    for tokens, saved_s, expected in [
        (100, 0.0015, "p0 d0"),
        (100, 0.0025, "d0 d0"),
        (4000, 0.0300, "p0 d0"),
        (4000, 0.0500, "d0 d0"),
    ]:
        ask = replace(SHORT, num_tokens=tokens)
        link = LinkModel(fixed_s=saved_s, per_byte_s=0.0)
        assert pick(ask, *workers, link=link) == expected


def test_mixed_workers_keep_what_they_prefill_unless_a_hand_off_is_much_better() -> None:
    assert pick(LONG, worker("m0"), worker("m1")) == "m0 m0"
    uneven = (worker("m0", decoding=40), worker("m1", pending=30_000))
    assert pick(LONG, *uneven, worker("m2", decoding=3)) == "m2 m2"


def test_among_mixed_workers_it_balances_both_loads() -> None:
    assert pick(LONG, worker("m0", pending=500), worker("m1", pending=400)) == "m1 m1"
    assert pick(LONG, worker("m0", decoding=9), worker("m1", decoding=8)) == "m1 m1"
    busy = worker("m0", pending=3000)
    assert pick(SHORT, busy, worker("m1", decoding=2)) == "m1 m1"


@pytest.mark.parametrize("name", ["p0", "d0", "m0"])
@pytest.mark.parametrize("preference", RoutePreference)
def test_the_only_worker_does_both(name: str, preference: RoutePreference) -> None:
    ask = replace(SHORT, preference=preference)
    assert pick(ask, worker(name)) == f"{name} {name}"
    assert Predicted().choose(cluster(worker(name, free=7)), ask) is None


def test_a_single_token_is_written_by_the_worker_that_prefills() -> None:
    ask = replace(LONG, max_output_tokens=1, output_tokens=1.0)
    route = decide(ask, worker("p0"), worker("d0", decoding=9))
    assert (route.prefill, route.decode) == ("p0", "p0")
    assert route.candidates[0].tpot_s == 0.0


# --- which worker -----------------------------------------------------------------------------


def test_both_sides_take_their_least_loaded_worker() -> None:
    prefill = (worker("p0", pending=900), worker("p1", pending=300))
    decode = (worker("d0", decoding=20), worker("d1", decoding=10))
    assert pick(LONG, *prefill, *decode) == "p1 d1"


def test_ties_go_to_the_smaller_id() -> None:
    assert pick(SPLIT, *map(worker, ("p0", "p1", "d0", "d1"))) == "p0 d0"


def test_a_worker_whose_blocks_are_short_for_the_answer_loses() -> None:
    """250 blocks hold the prompt; the answer needs a dozen more."""
    workers = (worker("d0", decoding=20, free=252), worker("d1", decoding=22, free=400))
    assert pick(LONG, worker("p0"), *workers) == "p0 d1"
    roomy = (worker("d0", decoding=20, free=400), workers[1])
    assert pick(LONG, worker("p0"), *roomy) == "p0 d0"


def test_several_choices_weigh_on_the_batch_that_they_join() -> None:
    workers = (worker("p0"), worker("d0", decoding=10))
    one, four = (decide(replace(LONG, num_choices=n), *workers).candidates[0] for n in (1, 4))
    assert four.tpot_s - one.tpot_s == pytest.approx(3 * STEPS.per_sequence_s)
    assert four.harm_s == pytest.approx(4 * one.harm_s)


def shares(*speeds: float) -> list[int]:
    """How many of 60 long prompts each prefill worker gets, if its queue is not worked off."""
    pending, counts = [0] * len(speeds), [0] * len(speeds)
    for _ in range(60):
        prefill = [
            worker(
                f"p{i}",
                pending=pending[i],
                steps=replace(STEPS, per_prompt_token_s=STEPS.per_prompt_token_s / speed),
            )
            for i, speed in enumerate(speeds)
        ]
        route = decide(SPLIT, *prefill, worker("d0"))
        chosen = int(route.prefill[1:])
        pending[chosen] += LONG.num_tokens
        counts[chosen] += 1
    return counts


def test_faster_workers_get_more() -> None:
    """Splitwise-HA: prompts go to unlike machines by the time they take there."""
    assert shares(1.0, 1.0) == [30, 30]
    assert shares(2.0, 1.0) == [40, 20]
    assert shares(3.0, 2.0, 1.0) == [30, 20, 10]


def test_the_faster_decode_worker_wins_though_more_decodes_there() -> None:
    slow = replace(STEPS, decode_base_s=0.04)
    workers = (worker("d0", decoding=5, steps=slow), worker("d1", decoding=20))
    assert pick(LONG, worker("p0"), *workers) == "p0 d1"


def test_without_models_loads_are_compared_as_before() -> None:
    names = [
        worker("p0", pending=9000, steps=None),
        worker("p1", pending=3000, steps=None),
        worker("d0", decoding=9, steps=None),
        worker("d1", decoding=8, steps=None),
    ]
    assert pick(LONG, *names) == "p1 d1"


def test_a_worker_without_a_model_is_taken_to_be_like_another() -> None:
    slow = replace(STEPS, per_prompt_token_s=1e-2, decode_base_s=1.0)
    route = decide(LONG, worker("m0", steps=None), worker("m1", steps=slow, pending=1))
    assert route.prefill == "m0"
    assert route.candidates[0].prefill_s == pytest.approx(40.0)


# --- prefixes ---------------------------------------------------------------------------------


def test_a_hot_prefix_is_fetched_past_a_long_queue_and_then_used_there() -> None:
    workers = (worker("p0", pending=20_000), worker("p1"), worker("d0", decoding=30))
    ask = replace(SPLIT, num_tokens=4096, num_blocks=257)
    route = decide(cached(ask, p0=4000), *workers)
    assert (route.prefill, route.fetch_from) == ("p1", "p0")
    assert "fetches 4000 tokens from p0" in route.reason
    assert route.candidates[0].fetch_s == pytest.approx(0.005 + 0.04)
    assert route.candidates[0].prefill_s == pytest.approx(96e-4)
    spread = decide(cached(ask, p0=4000, p1=4000), *workers)
    assert (spread.prefill, spread.fetch_from) == ("p1", None)


def test_a_prefix_is_used_where_it_is_while_the_queue_is_short() -> None:
    workers = (worker("p0", pending=100), worker("p1"), worker("d0", decoding=30))
    route = decide(cached(SPLIT, p0=3900), *workers)
    assert (route.prefill, route.fetch_from) == ("p0", None)


def test_a_prefix_is_recomputed_where_the_link_is_slower_than_that() -> None:
    workers = (worker("p0", pending=20_000), worker("p1"), worker("d0", decoding=30))
    route = decide(cached(SPLIT, p0=3900), *workers, link=SLOW_LINK)
    assert (route.prefill, route.fetch_from) == ("p1", None)


@pytest.mark.parametrize(("own", "fetched"), [(3000, True), (3100, False)])
def test_a_match_must_be_longer_by_the_threshold_to_be_fetched(own: int, fetched: bool) -> None:
    """3,900 is more than 1.25 * 3,000 + 64, and less than 1.25 * 3,100 + 64."""
    workers = (worker("p0", pending=20_000), worker("p1"), worker("d0", decoding=30))
    route = decide(cached(SPLIT, p0=3900, p1=own), *workers)
    assert (route.prefill, route.fetch_from) == ("p1", "p0" if fetched else None)


def test_a_decode_worker_can_be_asked_for_a_prefix() -> None:
    workers = (worker("p0"), worker("d0", decoding=30), worker("d1", decoding=30))
    route = decide(cached(LONG, d1=3000), *workers)
    assert (route.prefill, route.decode, route.fetch_from) == ("p0", "d1", "d1")


def test_a_follow_up_turn_is_appended_where_its_kv_lies() -> None:
    workers = (worker("p0"), worker("d0", decoding=5), worker("d1", decoding=5))
    assert pick(LONG, *workers) == "p0 d0"
    assert pick(cached(LONG, d1=3900), *workers) == "d1 d1"


def test_what_the_decode_worker_has_is_not_sent() -> None:
    route = decide(cached(SPLIT, d0=2000), worker("p0"), worker("d0", decoding=5))
    assert route.candidates[0].exposed_s == pytest.approx(0.005 + 0.02)


# --- rules ------------------------------------------------------------------------------------


def test_a_full_decode_pool_is_helped_out_by_prefill_workers() -> None:
    workers = (worker("p0", pending=100), worker("p1"), worker("d0", free=0))
    assert pick(LONG, *workers) == "p1 p1"


def test_a_split_wish_never_decodes_where_it_was_prefilled() -> None:
    assert pick(SPLIT, worker("m0"), worker("m1", decoding=30)) == "m1 m0"
    assert pick(SPLIT, worker("m0"), worker("m1", pending=3000)) == "m0 m1"
    assert pick(SPLIT, worker("p0"), worker("p1"), worker("d0", free=0)) == "p0 p1"
    assert pick(SPLIT, worker("m0"), worker("d0", free=0)) == "d0 m0"
    assert Predicted().choose(cluster(worker("m0", free=0), worker("d0", free=0)), SPLIT) is None


def test_a_local_wish_is_met_by_mixed_workers_first() -> None:
    ask = replace(LONG, preference=RoutePreference.LOCAL)
    route = decide(ask, worker("p0"), worker("d0"), worker("m0", decoding=9))
    assert (route.prefill, route.decode) == ("m0", "m0")
    assert route.reason.startswith("the client asked for a local route: 4")


def test_after_failed_hand_offs_the_prefill_worker_keeps_it() -> None:
    ask = replace(LONG, last_prefill=WorkerId("p1"), in_place=True)
    assert pick(ask, worker("p0"), worker("p1", decoding=9), worker("d0")) == "p1 p1"
    assert pick(ask, worker("p0"), worker("p1", free=0)) == "p0 p0"


def test_a_resume_goes_back_to_its_prefill_worker_unless_the_queue_there_is_too_long() -> None:
    ask = replace(LONG, last_prefill=WorkerId("p1"))
    decode = worker("d0", decoding=30)
    assert pick(ask, worker("p0"), worker("p1", pending=500), decode) == "p1 d0"
    assert pick(ask, worker("p0"), worker("p1", pending=50_000), decode) == "p0 d0"


def test_a_decode_worker_that_failed_is_avoided_while_there_is_another() -> None:
    ask = replace(SPLIT, avoid_decode=(WorkerId("d0"),))
    assert pick(ask, worker("p0"), worker("d0"), worker("d1", decoding=30)) == "p0 d1"
    assert pick(ask, worker("p0"), worker("p1"), worker("d0", decoding=30)) == "p0 d0"


def test_a_resume_prefers_the_numerics_class_of_its_tokens() -> None:
    ask = replace(LONG, numerics="class b")
    other = replace(worker("d1", decoding=30), numerics="class b")
    assert pick(ask, worker("p0"), worker("d0"), other) == "p0 d1"
    again = replace(worker("p1", pending=5000), numerics="class b")
    assert pick(ask, worker("p0"), again, worker("d0"), other) == "p1 d1"


def test_a_worker_that_cannot_mix_keeps_to_its_role() -> None:
    decode = replace(worker("d0"), mixes=False)
    assert pick(SHORT, worker("p0"), decode) == "p0 d0"
    assert pick(SHORT, replace(worker("m0"), mixes=False)) == "m0 m0"


# --- what is said -----------------------------------------------------------------------------


def test_the_reason_names_what_was_compared() -> None:
    workers = (worker("p0", pending=500), worker("d0", decoding=7))
    assert decide(LONG, *workers).reason == (
        "split: 450 ms to the first token, then 21 ms a token, "
        "against 416 and 21 ms locally (harm 1819 ms to 7 streams)"
    )
    assert decide(SHORT, worker("m0", decoding=1)).reason == (
        "only one worker is left: 20 ms to the first token, then 20 ms a token "
        "(harm 20 ms to 1 stream)"
    )


def test_the_runner_up_and_the_other_kind_are_among_the_candidates() -> None:
    prefill = [worker(f"p{i}", pending=i) for i in range(8)]
    route = decide(LONG, *prefill, worker("d0", decoding=30))
    assert len(route.candidates) == MAX_CANDIDATES
    assert (route.candidates[1].prefill, route.candidates[1].decode) == ("p1", "d0")
    assert (route.candidates[-1].prefill, route.candidates[-1].decode) == ("d0", "d0")


# --- hundreds ---------------------------------------------------------------------------------


def many(count: int) -> list[WorkerView]:
    """Busy workers, a third of each role."""
    return [
        worker(f"{'pdm'[i % 3]}{i:04d}", pending=1000 + i % 7, decoding=(i % 3 > 0) * (20 + i % 5))
        for i in range(count)
    ]


def test_of_hundreds_a_sample_is_looked_at_and_it_differs_between_decisions() -> None:
    workers = many(900)
    chosen = [pick(replace(SPLIT, number=n), *workers) for n in range(20)]
    assert len(set(chosen)) > 10
    assert pick(replace(SPLIT, number=3), *workers) == chosen[3]


def test_the_longest_prefix_is_found_among_hundreds() -> None:
    workers = many(900)
    for name in ("p0504", "d0502", "m0500"):
        for number in range(5):
            ask = replace(cached(LONG, **{name: 3990}), number=number)
            route = decide(ask, *workers)
            assert name in (route.prefill, route.fetch_from)


def test_the_last_prefill_worker_is_found_among_hundreds() -> None:
    workers = many(900)
    for number in range(5):
        ask = replace(LONG, last_prefill=WorkerId("p0504"), number=number)
        assert decide(ask, *workers).prefill == "p0504"


def test_the_last_room_among_hundreds_is_found() -> None:
    workers = [replace(w, free_blocks=0) for w in many(900)]
    workers[700] = replace(workers[700], free_blocks=5000)
    for preference in (RoutePreference.AUTO, RoutePreference.SPLIT):
        for number in range(5):
            route = decide(replace(LONG, preference=preference, number=number), *workers)
            assert route.decode == workers[700].worker


# --- for all views ----------------------------------------------------------------------------

times = st.sampled_from([0.0, 1e-4, 2e-3, 0.5])
models = st.builds(
    StepModel,
    prompt_base_s=times,
    per_prompt_token_s=times,
    per_pair_s=st.sampled_from([0.0, 1e-8]),
    decode_base_s=times,
    per_sequence_s=times,
    per_context_token_s=st.sampled_from([0.0, 1e-6]),
)
NAMES = ["d0", "d1", "m0", "m1", "p0", "p1"]


@st.composite
def views(draw: st.DrawFn) -> ClusterView:
    names = draw(st.lists(st.sampled_from(NAMES), unique=True, max_size=6))
    workers = [
        replace(
            worker(
                name,
                pending=draw(st.integers(0, 9000)),
                decoding=draw(st.integers(0, 40)),
                free=draw(st.integers(0, 20)),
                steps=draw(st.none() | models),
            ),
            numerics=draw(st.sampled_from(["class a", "class b"])),
            mixes=draw(st.booleans()),
            mixed_chunk_tokens=draw(st.sampled_from([0, 16, 512])),
            total_blocks=draw(st.sampled_from([0, 100])),
        )
        for name in names
    ]
    link = LinkModel(
        fixed_s=draw(times), per_byte_s=1e-9, hidden_share=draw(st.sampled_from([0.0, 0.9]))
    )
    return cluster(*workers, link=link)


asks = st.builds(
    RouteAsk,
    num_tokens=st.integers(1, 9000),
    num_blocks=st.integers(1, 15),
    num_choices=st.integers(1, 3),
    preference=st.sampled_from(RoutePreference),
    last_prefill=st.sampled_from([None, WorkerId("p0"), WorkerId("m1")]),
    numerics=st.sampled_from([None, "class a"]),
    avoid_decode=st.lists(st.sampled_from([WorkerId("d0"), WorkerId("m0")])).map(tuple),
    in_place=st.booleans(),
    cached_tokens=st.dictionaries(
        st.sampled_from([WorkerId(name) for name in [*NAMES, "gone"]]), st.integers(0, 9999)
    ),
    max_output_tokens=st.integers(1, 300),
    output_tokens=st.floats(0.0, 500.0),
    service=st.builds(
        ServiceClass,
        ttft_s=st.sampled_from([0.1, 5.0, float("inf")]),
        tpot_s=st.sampled_from([0.01, 0.5, float("inf")]),
    ),
    number=st.integers(0, 9),
    waited_s=st.floats(0.0, 10.0),
)


@given(view=views(), ask=asks)
def test_whoever_has_room_serves(view: ClusterView, ask: RouteAsk) -> None:
    route = Predicted().choose(view, ask)
    roomy = [w.worker for w in view.workers if w.free_blocks >= ask.num_blocks]
    if route is None:
        assert not roomy
        assert ShortestQueue().choose(view, ask) is None
        return
    assert route.decode in roomy
    assert route.prefill in [w.worker for w in view.workers]
    if ask.in_place or ask.preference is RoutePreference.LOCAL:
        assert route.prefill == route.decode
    elif ask.preference is RoutePreference.SPLIT and len(view.workers) > 1:
        assert route.prefill != route.decode
    if route.fetch_from is not None:
        assert ask.cached_tokens[route.fetch_from] > 0
        assert route.fetch_from != route.prefill


@given(view=views(), ask=asks)
def test_candidates_are_sorted_and_their_numbers_make_sense(
    view: ClusterView, ask: RouteAsk
) -> None:
    route = Predicted().choose(view, ask)
    if route is None:
        return
    assert Predicted().choose(view, ask) == route
    first, shown = route.candidates[0], route.candidates
    assert (first.prefill, first.decode, first.fetch_from) == (
        route.prefill,
        route.decode,
        route.fetch_from,
    )
    assert len(shown) == len({(c.prefill, c.decode) for c in shown}) <= MAX_CANDIDATES
    for candidate in shown:
        assert all(isfinite(value) and value >= 0.0 for value in seconds(candidate))
        if candidate.prefill == candidate.decode:
            assert candidate.exposed_s == 0.0
    if ask.service == ServiceClass(ttft_s=float("inf"), tpot_s=float("inf")):
        scores = [candidate.score_s for candidate in shown]
        assert scores == sorted(scores)
    assert re.search(r"\d ms to the first token", route.reason)


def seconds(candidate: Candidate) -> list[float]:
    return [value for value in vars_of(candidate).values() if isinstance(value, float)]


def vars_of(candidate: Candidate) -> dict[str, object]:
    return {name: getattr(candidate, name) for name in candidate.__dataclass_fields__}


@given(
    loads=st.lists(
        st.tuples(st.sampled_from("dmp"), st.integers(0, 9000), st.integers(0, 40)),
        min_size=1,
        max_size=5,
    ),
    extra=st.sampled_from("dmp"),
    tokens=st.integers(1, 9000),
)
def test_one_more_idle_worker_never_makes_it_worse(
    loads: list[tuple[str, int, int]], extra: str, tokens: int
) -> None:
    """Of the same speed: neither in what is compared, nor, but for the margin, in the TTFT."""
    workers = [
        worker(f"{kind}{i}", pending=pending, decoding=0 if kind == "p" else decoding)
        for i, (kind, pending, decoding) in enumerate(loads)
    ]
    ask = replace(SHORT, num_tokens=tokens)
    before = decide(ask, *workers).candidates[0]
    after = decide(ask, *workers, worker(f"{extra}9")).candidates[0]
    assert after.score_s <= before.score_s + 1e-9
    margin_s = max(Predicted().margin_s, Predicted().margin_share * before.ttft_s)
    assert after.ttft_s <= before.ttft_s + margin_s + 1e-9
