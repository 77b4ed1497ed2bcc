"""Metrics: events, deliveries and reports in; the exposition, parsed, out."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from prometheus_client.parser import text_string_to_metric_families

from pdserve.core.messages import LoadReport
from pdserve.core.request import Role
from pdserve.obs.families import MAX_LABEL_VALUES, token_count_buckets
from pdserve.obs.metrics import MAX_CLOSED_RECORDS, Metrics

REPORT = LoadReport(
    seq=1,
    last_route_seq=0,
    pending_prefill_tokens=10,
    num_waiting=2,
    num_running=3,
    free_blocks=60,
    total_blocks=80,
    cached_blocks=10,
    quarantined_blocks=4,
    open_leases=1,
    num_preemptions=5,
    num_steps=9,
    prefix_queries_tokens=100,
    prefix_hits_tokens=40,
    transfer_bytes=0,
    step_age_s=0.0,
    step_expected_s=0.0,
    draining=False,
)


def samples(metrics: Metrics, **wanted: str) -> dict[str, float]:
    """Sum of each sample name over the series that carry the wanted labels."""
    found: dict[str, float] = {}
    for family in text_string_to_metric_families(metrics.exposition().decode()):
        for sample in family.samples:
            if wanted.items() <= sample.labels.items():
                found[sample.name] = found.get(sample.name, 0.0) + sample.value
    return found


def histogram(metrics: Metrics, name: str) -> tuple[float, float]:
    """Count and sum."""
    found = samples(metrics)
    return found[f"{name}_count"], pytest.approx(found[f"{name}_sum"])


@pytest.fixture
def metrics() -> Metrics:
    return Metrics("tiny")


def test_vllm_and_own_names_are_there_from_the_start(metrics: Metrics) -> None:
    metrics.on_report("d0", Role.DECODE, REPORT)
    names = samples(metrics, model_name="tiny").keys()
    for name in [
        "vllm:num_requests_running",
        "vllm:num_requests_waiting",
        "vllm:kv_cache_usage_perc",
        "vllm:prefix_cache_queries_total",
        "vllm:prefix_cache_hits_total",
        "vllm:prompt_tokens_total",
        "vllm:generation_tokens_total",
        "vllm:num_preemptions_total",
        "vllm:request_success_total",
        "vllm:time_to_first_token_seconds_bucket",
        "vllm:inter_token_latency_seconds_bucket",
        "vllm:request_time_per_output_token_seconds_sum",
        "vllm:e2e_request_latency_seconds_count",
        "vllm:request_queue_time_seconds_sum",
        "vllm:request_prefill_time_seconds_sum",
        "vllm:request_decode_time_seconds_sum",
        "vllm:request_prompt_tokens_bucket",
        "vllm:request_generation_tokens_bucket",
        "pdserve:handoffs_total",
        "pdserve:handoff_seconds_bucket",
        "pdserve:handoff_bytes_total",
        "pdserve:handoff_reused_blocks_total",
        "pdserve:routes_total",
        "pdserve:route_cached_tokens_total",
        "pdserve:prefix_fetches_total",
        "pdserve:quarantined_blocks",
        "pdserve:open_leases",
        "pdserve:worker_up",
    ]:
        assert name in names


def test_an_undisturbed_split_request(metrics: Metrics, split_life) -> None:
    for moment in split_life[:-1]:
        metrics.on_event(moment)
    assert metrics.num_open_requests == 1
    for number in range(11):
        metrics.on_tokens("req-1", 1, 10.5 + 0.1 * number)
    metrics.on_event(split_life[-1])
    assert metrics.num_open_requests == 0
    assert histogram(metrics, "vllm:time_to_first_token_seconds") == (1, 0.5)
    assert histogram(metrics, "vllm:inter_token_latency_seconds") == (10, 1.0)
    assert histogram(metrics, "vllm:e2e_request_latency_seconds") == (1, 2.0)
    assert histogram(metrics, "vllm:request_queue_time_seconds") == (1, 0.1)
    assert histogram(metrics, "vllm:request_prefill_time_seconds") == (1, 0.3)
    assert histogram(metrics, "vllm:request_decode_time_seconds") == (1, 1.5)
    assert histogram(metrics, "vllm:request_time_per_output_token_seconds") == (1, 0.15)
    assert histogram(metrics, "vllm:request_prompt_tokens") == (1, 100)
    assert histogram(metrics, "vllm:request_generation_tokens") == (1, 11)
    assert histogram(metrics, "pdserve:handoff_seconds") == (1, 0.39)
    totals = samples(metrics)
    assert totals["vllm:prompt_tokens_total"] == 100
    assert totals["vllm:generation_tokens_total"] == 11
    assert totals["pdserve:handoff_bytes_total"] == 4096
    assert totals["pdserve:handoff_reused_blocks_total"] == 2
    assert samples(metrics, finished_reason="length")["vllm:request_success_total"] == 1
    assert samples(metrics, outcome="accepted")["pdserve:handoffs_total"] == 1
    assert samples(metrics, kind="split")["pdserve:routes_total"] == 1
    assert samples(metrics, kind="local")["pdserve:routes_total"] == 0


def test_prefixes_that_are_known_and_fetched(metrics: Metrics, event) -> None:
    metrics.on_event(event("routed", 0.1, prefill="p0", decode="d0", cached_tokens=16))
    metrics.on_event(event("routed", 0.2, prefill="p1", decode="d0", cached_tokens=32))
    metrics.on_event(event("prefix_fetched", 0.3, source="p0", outcome="sent", blocks=2))
    assert samples(metrics)["pdserve:route_cached_tokens_total"] == 48
    assert samples(metrics, outcome="sent")["pdserve:prefix_fetches_total"] == 1
    assert samples(metrics, outcome="late")["pdserve:prefix_fetches_total"] == 0


def test_a_resumed_request_counts_once(metrics: Metrics, resumed_life) -> None:
    for moment in resumed_life:
        if moment.name == "resumed":
            metrics.on_tokens("req-1", 1, 0.1)
            metrics.on_tokens("req-1", 4, 0.2)
        if moment.name == "finished":
            metrics.on_tokens("req-1", 25, 2.0)
        metrics.on_event(moment)
    totals = samples(metrics)
    assert totals["vllm:prompt_tokens_total"] == 20
    assert totals["vllm:generation_tokens_total"] == 30
    assert totals["vllm:request_success_total"] == 1
    assert samples(metrics, reason="worker_lost")["pdserve:resumes_total"] == 1
    assert histogram(metrics, "vllm:request_prefill_time_seconds") == (1, 0.048)
    assert histogram(metrics, "vllm:inter_token_latency_seconds") == (2, 1.9)


def test_failures_before_and_after_the_first_token(metrics: Metrics, event, failed_life) -> None:
    for moment in failed_life:
        metrics.on_event(moment)
    metrics.on_event(event("submitted", 0.0, request="req-2", prompt_tokens=1))
    metrics.on_tokens("req-2", 1, 0.1)
    metrics.on_event(event("failed", 0.2, request="req-2", kind="unavailable"))
    rejected = samples(metrics, kind="overloaded")["pdserve:requests_rejected_total"]
    assert rejected == samples(metrics)["pdserve:requests_rejected_total"] == 1
    assert samples(metrics, finished_reason="error")["vllm:request_success_total"] == 1
    assert samples(metrics)["vllm:e2e_request_latency_seconds_count"] == 0


def test_time_per_output_token_is_that_of_one_choice(metrics: Metrics, event) -> None:
    metrics.on_event(event("submitted", 0.0, choices=4))
    metrics.on_tokens("req-1", 4, 1.0)
    metrics.on_tokens("req-1", 4, 1.5)
    metrics.on_tokens("req-1", 4, 2.0)
    metrics.on_event(event("finished", 2.0, reason="stop", output_tokens=12, choices=4))
    assert histogram(metrics, "vllm:request_time_per_output_token_seconds") == (1, 0.5)
    assert histogram(metrics, "vllm:inter_token_latency_seconds") == (2, 1.0)


def test_what_arrives_after_the_end_still_counts_for_a_while(metrics: Metrics, split_life) -> None:
    """A worker's events travel apart from its tokens."""
    late = [e for e in split_life if e.node != "gateway"]
    for moment in split_life:
        if moment not in late:
            metrics.on_event(moment)
    metrics.on_tokens("req-1", 11, 12.0)
    for moment in late:
        metrics.on_event(moment)
    assert histogram(metrics, "pdserve:handoff_seconds") == (1, 0.39)
    assert histogram(metrics, "vllm:request_prefill_time_seconds") == (1, 0.3)
    assert histogram(metrics, "vllm:time_to_first_token_seconds") == (1, 0.45)
    assert samples(metrics)["vllm:prompt_tokens_total"] == 100
    assert metrics.num_open_requests == 0


def test_a_handoff_counts_once_though_both_sides_report_it(metrics: Metrics, event) -> None:
    metrics.on_event(event("submitted", 0.0))
    for epoch, ok in ((1, False), (2, True)):
        metrics.on_event(event("handoff_closed", 0.1, "d0", epoch=epoch, ok=ok, bytes=10))
        metrics.on_event(event("handoff_closed", 0.2, "p0", epoch=epoch, ok=ok, bytes=10))
    assert samples(metrics, outcome="failed")["pdserve:handoffs_total"] == 1
    assert samples(metrics, outcome="accepted")["pdserve:handoffs_total"] == 1
    assert samples(metrics)["pdserve:handoff_bytes_total"] == 20


def test_records_of_ended_requests_are_bounded(metrics: Metrics, event) -> None:
    for number in range(MAX_CLOSED_RECORDS + 50):
        metrics.on_event(event("submitted", 0.0, request=f"req-{number}"))
        metrics.on_event(event("finished", 1.0, request=f"req-{number}", reason="stop"))
    assert metrics.num_open_requests == 0
    assert len(metrics._closed) == MAX_CLOSED_RECORDS


def test_an_id_that_is_used_again_counts_again(metrics: Metrics, event) -> None:
    for start in (0.0, 10.0):
        metrics.on_event(event("submitted", start))
        metrics.on_event(event("finished", start + 1.0, reason="stop"))
    assert histogram(metrics, "vllm:e2e_request_latency_seconds") == (2, 2.0)


def test_labels_that_a_node_makes_up_are_bounded(metrics: Metrics, event) -> None:
    for number in range(MAX_LABEL_VALUES + 5):
        metrics.on_event(event("resumed", 0.0, reason=f"reason {number}"))
    assert samples(metrics, reason="other")["pdserve:resumes_total"] == 5
    assert samples(metrics)["pdserve:resumes_total"] == MAX_LABEL_VALUES + 5


@settings(derandomize=True, max_examples=60)
@given(st.data())
def test_any_part_of_a_life_in_any_order_leaves_nothing(
    split_life, resumed_life, failed_life, data
) -> None:
    metrics = Metrics("tiny")
    life = data.draw(st.sampled_from([split_life, resumed_life, failed_life]))
    part = data.draw(st.lists(st.sampled_from(life), unique_by=id))
    bare = data.draw(st.booleans())
    for moment in part:
        metrics.on_event(replace(moment, detail=()) if bare else moment)
        metrics.on_tokens("req-1", data.draw(st.integers(0, 3)), data.draw(st.floats(0.0, 20.0)))
    ended = any(moment.name in ("finished", "failed") for moment in part)
    submitted = any(moment.name == "submitted" for moment in part)
    assert metrics.num_open_requests == (1 if submitted and not ended else 0)
    metrics.on_event(life[-1])
    assert metrics.num_open_requests == 0
    totals = samples(metrics)
    ends = totals["vllm:request_success_total"] + totals.get("pdserve:requests_rejected_total", 0.0)
    assert ends == 1
    assert all(value >= 0.0 for value in totals.values())


def test_a_delivery_out_of_order_is_no_negative_gap(metrics: Metrics, event) -> None:
    metrics.on_event(event("submitted", 0.0))
    metrics.on_tokens("req-1", 1, 2.0)
    metrics.on_tokens("req-1", 1, 1.0)
    assert histogram(metrics, "vllm:inter_token_latency_seconds") == (1, 0.0)


def test_events_of_two_workers_may_overtake_each_other(metrics: Metrics, split_life) -> None:
    for moment in (split_life[0], *split_life[-2:0:-1]):
        metrics.on_event(moment)
    assert histogram(metrics, "vllm:request_queue_time_seconds") == (1, 0.1)
    assert histogram(metrics, "vllm:request_prefill_time_seconds") == (1, 0.3)
    assert samples(metrics, outcome="accepted")["pdserve:handoffs_total"] == 1


@settings(derandomize=True)
@given(st.sampled_from(["text", True, -1, float("nan"), float("inf")]))
def test_detail_that_makes_no_sense_is_no_detail(event, value) -> None:
    metrics = Metrics("tiny")
    metrics.on_event(event("submitted", 0.0, prompt_tokens=value, choices=value))
    metrics.on_event(event("handoff_granted", 0.0, reused_blocks=value))
    metrics.on_event(event("handoff_closed", 0.0, bytes=value))
    metrics.on_tokens("req-1", 2, 1.0)
    metrics.on_event(event("finished", 1.0, output_tokens=value, choices=value, reason="stop"))
    totals = samples(metrics)
    assert totals["vllm:prompt_tokens_total"] == totals["pdserve:handoff_bytes_total"] == 0
    assert totals["vllm:request_generation_tokens_sum"] == 2


def test_a_report_sets_gauges_and_adds_growth(metrics: Metrics) -> None:
    metrics.on_worker("d0", Role.DECODE, up=True)
    metrics.on_report("d0", Role.DECODE, REPORT)
    metrics.on_report(
        "d0", Role.DECODE, replace(REPORT, num_running=1, num_preemptions=7, prefix_hits_tokens=90)
    )
    mine = samples(metrics, engine="d0")
    assert mine["vllm:num_requests_running"] == 1
    assert mine["vllm:num_requests_waiting"] == 2
    assert mine["vllm:kv_cache_usage_perc"] == 0.25
    assert mine["vllm:num_preemptions_total"] == 7
    assert mine["vllm:prefix_cache_queries_total"] == 100
    assert mine["vllm:prefix_cache_hits_total"] == 90
    ours = samples(metrics, worker="d0")
    assert (ours["pdserve:quarantined_blocks"], ours["pdserve:open_leases"]) == (4, 1)
    assert samples(metrics, worker="d0", role="decode")["pdserve:worker_up"] == 1


@pytest.mark.parametrize(("told", "counted"), [(True, 2), (True, 9), (False, 2)])
def test_counters_go_on_after_a_restart(metrics: Metrics, told: bool, counted: int) -> None:
    metrics.on_report("d0", Role.DECODE, REPORT)
    if told:
        metrics.on_worker("d0", Role.DECODE, up=False)
        metrics.on_worker("d0", Role.DECODE, up=True)
    metrics.on_report("d0", Role.DECODE, replace(REPORT, num_preemptions=counted))
    assert samples(metrics, engine="d0")["vllm:num_preemptions_total"] == 5 + counted


def test_a_lost_worker_shows_no_load(metrics: Metrics) -> None:
    metrics.on_report("d0", Role.DECODE, REPORT)
    metrics.on_report("d1", Role.DECODE, REPORT)
    metrics.on_worker("d0", Role.DECODE, up=False)
    metrics.on_report("d0", Role.DECODE, REPORT)  # was still on its way
    lost = samples(metrics, engine="d0")
    assert "vllm:num_requests_running" not in lost
    assert lost["vllm:num_preemptions_total"] == 5
    assert samples(metrics, worker="d0")["pdserve:worker_up"] == 0
    assert samples(metrics, engine="d1")["vllm:num_requests_running"] == 3


def test_a_new_role_replaces_the_old_one_and_counts_nothing_twice(metrics: Metrics) -> None:
    metrics.on_report("w0", Role.MIXED, REPORT)
    metrics.on_report("w0", Role.DECODE, REPORT)
    assert "pdserve:worker_up" not in samples(metrics, worker="w0", role="mixed")
    assert samples(metrics, worker="w0", role="decode")["pdserve:worker_up"] == 1
    assert samples(metrics, engine="w0")["vllm:num_preemptions_total"] == 5


def test_a_worker_that_was_never_heard_of_can_be_lost(metrics: Metrics) -> None:
    metrics.on_worker("d0", Role.DECODE, up=False)
    assert samples(metrics, worker="d0")["pdserve:worker_up"] == 0


def test_two_gateways_fit_in_one_process(split_life) -> None:
    one, two = Metrics("one"), Metrics("two")
    one.on_event(split_life[1])
    assert samples(one, model_name="one", kind="split")["pdserve:routes_total"] == 1
    assert samples(two, model_name="two", kind="split")["pdserve:routes_total"] == 0


def test_token_buckets_end_at_the_longest_sequence() -> None:
    assert token_count_buckets(300) == [1, 2, 5, 10, 20, 50, 100, 200]
    assert token_count_buckets(1) == [1]


def test_predictions_are_held_against_what_was_measured(metrics: Metrics, event) -> None:
    metrics.on_event(
        event(
            "finished",
            12.0,
            reason="length",
            ttft_ms=300.0,
            predicted_ttft_ms=200.0,
            tpot_ms=10.0,
            predicted_tpot_ms=20.0,
            regret_ms=-40.0,
        )
    )
    metrics.on_event(event("finished", 12.0, request="req-2", reason="stop", ttft_ms=300.0))
    assert histogram(metrics, "pdserve:ttft_measured_to_predicted") == (1, 1.5)
    assert histogram(metrics, "pdserve:tpot_measured_to_predicted") == (1, 0.5)
    assert histogram(metrics, "pdserve:route_regret_seconds") == (1, 0.0)


def test_a_worker_shows_the_role_that_it_has_now(metrics: Metrics) -> None:
    metrics.on_worker("decode-0", Role.DECODE, True)
    metrics.on_report("decode-0", Role.DECODE, REPORT)
    metrics.on_role("decode-0", Role.PREFILL, True)
    metrics.on_report("decode-0", Role.PREFILL, REPORT)
    assert samples(metrics, role="prefill")["pdserve:role_changes_total"] == 1
    assert samples(metrics, role="prefill")["pdserve:worker_up"] == 1
    assert "pdserve:worker_up" not in samples(metrics, engine="decode-0", role="decode")
