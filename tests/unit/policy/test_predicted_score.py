"""What the predictions are made of: queues, chunks, harm, waits, and samples of large pools."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pdserve.core.ids import WorkerId
from pdserve.core.request import Role, ServiceClass
from pdserve.core.step import StepShape
from pdserve.cost.link import LinkModel
from pdserve.cost.step import StepModel
from pdserve.policy.cluster import ClusterView, RouteAsk, WorkerView
from pdserve.policy.score import Scorer, Weights
from pdserve.policy.shortlist import KEEP, SAMPLE, Shortlist, find, longest_holder, sample

STEPS = StepModel(
    prompt_base_s=0.01,
    per_prompt_token_s=1e-4,
    per_pair_s=1e-8,
    decode_base_s=0.008,
    per_sequence_s=1e-4,
    per_context_token_s=1e-7,
)
ASK = RouteAsk(num_tokens=1000, num_blocks=63, max_output_tokens=500, output_tokens=101.0)
IDLE = WorkerView(
    worker=WorkerId("w0"),
    role=Role.MIXED,
    pending_tokens=0,
    num_decoding=0,
    free_blocks=500,
    numerics="",
    steps=STEPS,
)
BUSY = replace(IDLE, num_decoding=10, context_tokens=5000)
PENDING_S = 2000 * (1e-4 + 1e-8 * 1000)
"""2,000 tokens of prompts as long as this one, without the base of their steps."""
OWN_S = 0.1 + 0.01
"""The same for this one."""
MANY = [replace(IDLE, worker=WorkerId(f"w{i:04d}")) for i in range(300)]
DRAG_S = 10 * 1e-4 + 5000 * 1e-7


def scorer(
    ask: RouteAsk = ASK, *workers: WorkerView, link: LinkModel | None = None, **weights: float
) -> Scorer:
    link = link or LinkModel(fixed_s=0.002, per_byte_s=1e-9)
    view = ClusterView(0.0, workers or (IDLE,), link=link, token_bytes=100_000)
    return Scorer(view, ask, Weights(**weights))  # type: ignore[arg-type]


def test_an_idle_worker_takes_one_step_as_the_model_says() -> None:
    side = scorer().prefill_side(IDLE)
    assert side.queue_s == 0.0
    assert side.prefill_s == pytest.approx(STEPS.prefill_s(1000))
    assert (side.harm_s, side.caused_tpot_s) == (0.0, 0.0)


def test_a_cached_prefix_is_not_computed_but_one_token_always_is() -> None:
    for cached, computed in [(600, 600), (1000, 999), (5000, 999)]:
        ask = replace(ASK, cached_tokens={IDLE.worker: cached})
        side = scorer(ask).prefill_side(IDLE)
        assert side.prefill_s == pytest.approx(STEPS.prefill_s(1000, computed))


@pytest.mark.parametrize(
    ("pending", "queued_steps", "own_steps"),
    [(2000, 0, 2), (2048, 1, 1), (1048, 0, 1), (1049, 0, 2), (4096, 2, 1)],
)
def test_prompts_go_in_batches(pending: int, queued_steps: int, own_steps: int) -> None:
    """Of 2,048 tokens: the first token comes with the step that ends this prompt."""
    side = scorer().prefill_side(replace(IDLE, pending_tokens=pending))
    assert side.queue_s == pytest.approx(queued_steps * 0.01 + pending * (1e-4 + 1e-5))
    assert side.prefill_s == pytest.approx(own_steps * 0.01 + OWN_S)


def test_beside_decodes_prompts_go_in_chunks_and_every_stream_waits_for_them() -> None:
    side = scorer().prefill_side(replace(BUSY, pending_tokens=2000))
    step_s = 0.01 + DRAG_S
    decode_s = STEPS.decode_s(10, 5000)
    assert side.queue_s == pytest.approx(3 * step_s + PENDING_S + decode_s / 2)
    assert side.prefill_s == pytest.approx(3 * step_s + OWN_S)
    late_s = 3 * (0.01 - 0.008) + OWN_S
    assert side.harm_s == pytest.approx(10 * late_s)
    assert side.caused_tpot_s == pytest.approx(decode_s + 10 * late_s / 100)


def test_smaller_chunks_take_longer() -> None:
    slow = scorer().prefill_side(replace(BUSY, mixed_chunk_tokens=64))
    fast = scorer().prefill_side(BUSY)
    assert slow.prefill_s - fast.prefill_s == pytest.approx((16 - 2) * (0.01 + DRAG_S))


def test_a_worker_that_does_not_mix_stands_still_for_a_prompt() -> None:
    side = scorer().prefill_side(replace(BUSY, mixes=False))
    assert side.prefill_s == pytest.approx(STEPS.prefill_s(1000))
    assert side.harm_s == pytest.approx(10 * STEPS.prefill_s(1000))


def test_prompts_that_cost_less_than_a_decode_step_harm_nobody() -> None:
    free = replace(STEPS, prompt_base_s=0.0, per_prompt_token_s=0.0, per_pair_s=0.0)
    assert scorer().prefill_side(replace(BUSY, steps=free)).harm_s == 0.0


def test_one_more_sequence_makes_each_step_longer_for_all() -> None:
    side = scorer().decode_side(replace(BUSY, role=Role.DECODE))
    mine_s = 1e-4 + 1e-7 * (1000 + 50)
    assert side.step_s == pytest.approx(STEPS.step_s(StepShape(0, 0, 11, 6050)))
    assert side.harm_s == pytest.approx(10 * 100 * mine_s)
    assert side.join_s == pytest.approx(STEPS.decode_s(10, 5000) / 2)
    assert scorer().decode_side(IDLE).join_s == 0.0


def test_a_mixed_worker_is_expected_to_get_a_prompt_for_each_answer_that_ends() -> None:
    """Each of ten streams lives for 100 steps: ten prompts, for which every stream waits."""
    question = scorer()
    alone_s = question.decode_side(replace(BUSY, role=Role.DECODE)).step_s
    late_s = question.prefill_side(BUSY).harm_s / 10
    assert question.decode_side(BUSY).step_s == pytest.approx(alone_s + 10 * late_s / 100)


@pytest.mark.parametrize(("allowed", "usual", "steps"), [(500, 101.0, 100), (11, 101.0, 10)])
def test_an_answer_is_as_long_as_usual_and_no_longer_than_allowed(
    allowed: int, usual: float, steps: int
) -> None:
    assert scorer(replace(ASK, max_output_tokens=allowed)).decode_steps == steps
    assert scorer(replace(ASK, output_tokens=0.0)).decode_steps == 1.0
    assert scorer(replace(ASK, max_output_tokens=1)).decode_steps == 0.0


def test_blocks_that_the_answer_lacks_come_free_as_others_finish() -> None:
    """100 tokens need 6.25 blocks of 16; the batch holds 400, and frees them in 100 steps."""
    tight = replace(BUSY, free_blocks=65, total_blocks=465)
    side = scorer().decode_side(tight)
    assert side.blocks_s == pytest.approx((6.25 - 2) / 400 * 100 * side.step_s)
    assert scorer().decode_side(replace(tight, free_blocks=70)).blocks_s == 0.0
    unknown = scorer().decode_side(replace(tight, total_blocks=0))
    assert unknown.blocks_s == pytest.approx((6.25 - 2) / 312 * 100 * side.step_s)


def test_a_wait_for_blocks_is_no_longer_than_all_answers_take() -> None:
    side = scorer().decode_side(replace(BUSY, free_blocks=63, total_blocks=64))
    assert side.blocks_s == pytest.approx(100 * side.step_s)


def test_prompts_left_at_the_decode_worker_slow_the_first_tokens() -> None:
    other = replace(IDLE, worker=WorkerId("w1"))
    behind = replace(other, pending_tokens=51_200, num_decoding=1, context_tokens=100)
    ask = scorer(ASK, IDLE, other)
    quiet = ask.pair(ask.prefill_side(IDLE), ask.decode_side(replace(behind, pending_tokens=0)))
    assert quiet.decode_wait_s == pytest.approx(STEPS.decode_s(1, 100) / 2)
    loaded_side = ask.decode_side(behind)
    loaded = ask.pair(ask.prefill_side(IDLE), loaded_side)
    assert quiet.tpot_s < loaded.tpot_s < loaded_side.mixed_step_s
    soon_done = ask.decode_side(replace(behind, pending_tokens=500))
    assert ask.pair(ask.prefill_side(IDLE), soon_done).tpot_s == soon_done.step_s


def test_a_pair_sees_the_transfer_and_a_local_route_does_not() -> None:
    other = replace(IDLE, worker=WorkerId("w1"))
    question = scorer(ASK, IDLE, other)
    prefill, decode = question.prefill_side(IDLE), question.decode_side(other)
    split = question.pair(prefill, decode)
    local = question.local(prefill, question.decode_side(IDLE))
    assert split.exposed_s == pytest.approx(0.002 + 1000 * 1e5 * 1e-9)
    assert local.exposed_s == 0.0
    latency_s = prefill.ttft_s + split.exposed_s
    margin_s = 0.1 * latency_s
    assert split.score_s == pytest.approx(latency_s + 100 * split.tpot_s + margin_s)
    assert local.score_s == pytest.approx(prefill.ttft_s + 100 * local.tpot_s)


def test_settings_weigh_harm_and_misses() -> None:
    late = replace(ASK, service=ServiceClass(ttft_s=0.1), waited_s=0.05)
    for harm, miss in [(1.0, 10.0), (0.0, 10.0), (2.0, 0.0)]:
        question = scorer(late, BUSY, harm=harm, miss=miss)
        route = question.local(question.prefill_side(BUSY), question.decode_side(BUSY))
        ttft_s = route.prefill.ttft_s
        assert route.misses
        assert route.score_s == pytest.approx(
            ttft_s + 100 * route.tpot_s + harm * route.harm_s + miss * (0.05 + ttft_s - 0.1)
        )


def test_a_bound_on_the_tpot_holds_for_the_streams_already_there() -> None:
    bound_s = 0.015
    for streams, misses in [(1, False), (40, True)]:
        view = replace(IDLE, role=Role.DECODE, num_decoding=streams)
        question = scorer(replace(ASK, service=ServiceClass(tpot_s=bound_s)), view)
        route = question.local(question.prefill_side(view), question.decode_side(view))
        assert route.tpot_s < bound_s
        assert route.misses is misses


def test_a_candidate_repeats_the_parts() -> None:
    other = replace(BUSY, worker=WorkerId("w1"))
    ask = replace(ASK, cached_tokens={other.worker: 900})
    question = scorer(ask, IDLE, other, link=LinkModel(fixed_s=0.001, per_byte_s=1e-11))
    estimate = question.pair(question.prefill_side(IDLE, other), question.decode_side(other))
    candidate = estimate.candidate()
    assert (candidate.prefill, candidate.decode, candidate.fetch_from) == ("w0", "w1", "w1")
    assert candidate.fetch_s == pytest.approx(0.001 + 900 * 1e5 * 1e-11)
    assert candidate.exposed_s == pytest.approx(0.001 + 100 * 1e5 * 1e-11)
    assert candidate.ttft_s == pytest.approx(estimate.prefill.ttft_s)
    assert candidate.harm_s == pytest.approx(estimate.decode.harm_s)


@given(size=st.integers(0, 300), number=st.integers(0, 10_000))
def test_a_sample_is_all_of_a_small_pool_and_different_ones_of_a_large_one(
    size: int, number: int
) -> None:
    workers = MANY[:size]
    drawn = sample(workers, number)
    assert len({w.worker for w in drawn}) == min(len(workers), SAMPLE)
    assert sample(workers, number) == drawn


def test_every_worker_of_a_large_pool_is_drawn_as_often() -> None:
    counts = dict.fromkeys((w.worker for w in MANY), 0)
    for number in range(600):
        for drawn in sample(MANY, number):
            counts[drawn.worker] += 1
    expected = 600 * SAMPLE / 300
    assert all(0.7 * expected < count < 1.3 * expected for count in counts.values())


def named(*views: WorkerView) -> list[WorkerView]:
    return [replace(view, worker=WorkerId(f"w{i}")) for i, view in enumerate(views)]


def ids(workers: list[WorkerView]) -> list[str]:
    return [str(view.worker) for view in workers]


def test_a_shortlist_of_prefill_workers_sees_queues_streams_and_caches() -> None:
    """40 streams that wait are worse than a queue of 3,000 tokens, and a cached prompt is best."""
    crowded = replace(IDLE, num_decoding=40)
    queue = replace(IDLE, pending_tokens=3000)
    workers = named(crowded, queue, IDLE, replace(IDLE, pending_tokens=500))
    ask = replace(ASK, cached_tokens={WorkerId("w3"): 900})
    assert ids(Shortlist(scorer(ask, *workers)).prefill(workers)) == ["w3", "w2", "w1", "w0"]


def test_a_shortlist_of_decode_workers_sees_what_a_batch_loses() -> None:
    """The slow worker's batch is small: all in all the fast one with many streams loses more."""
    slow = replace(IDLE, num_decoding=1, steps=replace(STEPS, decode_base_s=0.012))
    workers = named(replace(IDLE, num_decoding=30), slow, replace(BUSY, num_decoding=3))
    assert ids(Shortlist(scorer(ASK, *workers)).decode(workers)) == ["w2", "w1", "w0"]
    fewer = replace(ASK, output_tokens=2.0)
    assert ids(Shortlist(scorer(fewer, *workers)).local(workers)) == ["w1", "w2", "w0"]


def test_a_shortlist_is_short_and_ties_go_to_the_smaller_id() -> None:
    shortlist = Shortlist(scorer(ASK, *MANY[:20]))
    for best in (shortlist.prefill, shortlist.decode, shortlist.local):
        assert best(MANY[:20]) == MANY[:KEEP]


def test_the_holder_of_the_longest_prefix_with_the_least_to_do() -> None:
    workers = [replace(IDLE, worker=WorkerId(f"w{i}"), pending_tokens=9 - i) for i in range(4)]
    known = {WorkerId("w0"): 500, WorkerId("w1"): 900, WorkerId("w2"): 900, WorkerId("gone"): 999}
    assert longest_holder(scorer(replace(ASK, cached_tokens=known), *workers)) is workers[2]
    assert longest_holder(scorer(ASK, *workers)) is None
    nothing = {WorkerId("w0"): 0}
    assert longest_holder(scorer(replace(ASK, cached_tokens=nothing), *workers)) is None


def test_workers_are_found_by_id() -> None:
    workers = [replace(IDLE, worker=WorkerId(f"w{i}")) for i in range(0, 9, 2)]
    assert all(find(workers, w.worker) is w for w in workers)
    assert all(find(workers, WorkerId(name)) is None for name in ("a", "w1", "w9", "x"))
    assert find([], WorkerId("w0")) is None
