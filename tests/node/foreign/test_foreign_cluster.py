"""Requests through the same router, served by engines that batch for themselves."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
from foreign_cluster import Answer, Cluster, ForeignBackend, Spec, make_request
from foreign_cluster.answers import ENDING, expected_answer

from pdserve.core.effects import Refusal
from pdserve.core.ids import RequestId
from pdserve.core.request import Request, RoutePreference
from pdserve.node.engine_tasks import TaskState
from pdserve.node.foreign import ForeignWorkerNode
from pdserve.node.settings import RouterSettings

SPLIT = Spec()
LONG = tuple(range(5, 45))
ID = RequestId("r")


def foreign(cluster: Cluster, worker: str) -> ForeignWorkerNode:
    node = cluster.process(worker).node
    assert isinstance(node, ForeignWorkerNode)
    return node


def in_state(cluster: Cluster, worker: str, *states: TaskState) -> Callable[[], bool]:
    """True once the worker's engine holds a task in one of the states."""
    return lambda: any(task.state in states for task in foreign(cluster, worker).tasks)


def serve(cluster: Cluster, *requests: Request) -> list[Answer]:
    answers = [cluster.submit(request) for request in requests]
    cluster.run()
    cluster.check_end()
    return answers


def assert_whole(*answers: Answer) -> None:
    for answer in answers:
        assert answer.failure is None
        for choice, expected in answer.expected.items():
            assert answer.taken[choice] == len(expected)


def first_token_ends() -> Request:
    """A request whose only choice ends with its first token."""
    for seed in range(1000):
        request = make_request("r", seed=seed, stops=True)
        if expected_answer(request, 64)[0][0].token_id in ENDING:
            return request
    raise AssertionError("no such seed")


# --- right answers ------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["plain", "redraws"])
@pytest.mark.parametrize("workers", [(0, 0, 1), (1, 1, 0), (2, 2, 1)])
def test_answers_are_right_wherever_they_are_computed(
    workers: tuple[int, int, int], kind: str
) -> None:
    spec = Spec(workers=workers)
    cluster = Cluster(replace(spec, kinds={worker: kind for worker, _ in spec.slots}))
    requests = [
        make_request(f"r{i}", tuple(range(i, 12 + i)), num_choices=1 + i % 3, seed=i, stops=i > 3)
        for i in range(8)
    ]
    assert_whole(*serve(cluster, *requests))
    handed_over = cluster.sent["Accepted"]
    assert handed_over == 0 if workers == (0, 0, 1) else handed_over > 0
    assert cluster.sent["TicketRefused"] == cluster.sent["HandoffRejected"] == 0


def test_the_life_of_a_split_request() -> None:
    cluster = Cluster(SPLIT)
    serve(cluster, make_request("r", LONG))
    assert cluster.names("r") == [
        "submitted",
        "routed",
        "prefill_queued",
        "handoff_opened",
        "prefill_started",
        "handoff_granted",
        "prefill_ended",
        "first_token",
        "decode_queued",
        "handoff_closed",
        "decode_started",
        "finished",
    ]


def test_the_life_of_a_local_request() -> None:
    cluster = Cluster(Spec(workers=(0, 0, 1)))
    serve(cluster, make_request("r", LONG))
    names = ["prefill_started", "prefill_ended", "decode_queued", "first_token", "decode_started"]
    assert [name for name in cluster.names("r") if name in names] == names


def test_the_header_goes_out_before_the_prefill_starts() -> None:
    """And the ticket is there when it ends: the first token does not wait for it."""
    cluster = Cluster(SPLIT)
    cluster.submit(make_request("one", LONG))
    cluster.submit(make_request("two", LONG))
    cluster.run(until=lambda: cluster.sent["Header"] == 1)
    node = foreign(cluster, "prefill-0")
    assert node.tasks.num_waiting >= 1
    cluster.run()
    for name in ("one", "two"):
        names = cluster.names(name)
        assert names.index("handoff_granted") < names.index("prefill_ended")


def test_one_token_opens_no_handoff() -> None:
    cluster = Cluster(SPLIT)
    assert_whole(*serve(cluster, make_request("r", max_tokens=1, num_choices=2)))
    assert cluster.sent["Header"] == 0


def test_a_stop_on_the_first_token_sends_no_payload() -> None:
    cluster = Cluster(SPLIT)
    assert_whole(*serve(cluster, first_token_ends()))
    assert cluster.sent["Header"] == 1
    assert cluster.sent["OpaquePayload"] == 0
    assert cluster.sent["HandoffAbort"] == 1


def test_what_does_not_fit_is_refused() -> None:
    cluster = Cluster(SPLIT)
    (answer,) = serve(cluster, make_request("r", tuple(range(60)), max_tokens=30))
    assert answer.failure is not None
    assert answer.failure.kind == Refusal.TOO_LONG


# --- payloads -----------------------------------------------------------------------------------


def test_payloads_stay_within_the_window() -> None:
    cluster = Cluster(Spec(slice_bytes=48, window_bytes=100))
    serve(cluster, *(make_request(f"r{i}", LONG[i:]) for i in range(6)))
    assert cluster.sent["OpaquePayload"] > 6 * 5
    assert 48 < cluster.most_in_flight_bytes <= 100


def test_a_payload_that_is_too_large_is_decoded_in_place() -> None:
    cluster = Cluster(Spec(max_payload_bytes=300))
    answers = serve(cluster, make_request("large", LONG), make_request("small"))
    assert_whole(*answers)
    assert cluster.sent["Accepted"] == 1
    assert cluster.names("large").count("resumed") == 2


def test_a_payload_that_changes_on_the_way_is_sent_again() -> None:
    cluster = Cluster(SPLIT)
    backend = cluster.process("decode-0").backend
    assert isinstance(backend, ForeignBackend)
    backend.damage_next = True
    assert_whole(*serve(cluster, make_request("r", LONG)))
    assert cluster.sent["HandoffRejected"] == 1
    assert cluster.sent["Accepted"] == 1


def test_an_engine_that_draws_another_first_token_never_answers_wrong() -> None:
    cluster = Cluster(Spec(kinds={"decode-0": "drifts"}))
    answers = serve(cluster, make_request("one", LONG, num_choices=2), make_request("two"))
    assert_whole(*answers)
    reasons = [dict(event.detail).get("reason", "") for event in cluster.life]
    assert any("drew token 0 again" in str(reason) for reason in reasons)


# --- other kinds of worker ----------------------------------------------------------------------


@pytest.mark.parametrize("native", ["prefill-0", "decode-0"])
def test_two_kinds_do_not_understand_each_other_and_still_answer(native: str) -> None:
    cluster = Cluster(Spec(kinds={native: "native"}))
    answers = serve(cluster, make_request("one", LONG, num_choices=2), make_request("two"))
    assert_whole(*answers)
    assert cluster.sent["TicketRefused"] >= 2
    assert cluster.sent["Accepted"] == 0
    reasons = " ".join(str(dict(event.detail).get("reason")) for event in cluster.life)
    assert ("takes no KV blocks" if native == "prefill-0" else "another kind of engine") in reasons


def test_the_router_finds_the_decode_worker_of_the_right_kind() -> None:
    cluster = Cluster(Spec(workers=(1, 2, 0), kinds={"decode-0": "native"}))
    assert_whole(*serve(cluster, *(make_request(f"r{i}", LONG[i:]) for i in range(4))))
    assert cluster.sent["Accepted"] == 4


def test_a_mixed_cluster_of_both_kinds() -> None:
    cluster = Cluster(Spec(workers=(2, 1, 1), kinds={"prefill-1": "native"}))
    requests = [make_request(f"r{i}", LONG[i:], num_choices=1 + i % 2) for i in range(8)]
    assert_whole(*serve(cluster, *requests))


# --- ends ---------------------------------------------------------------------------------------

STAGES: dict[str, Callable[[Cluster], bool]] = {
    "queued": lambda c: c.sent["Header"] == 1,
    "granted": lambda c: c.sent["Ticket"] == 1,
    "held": lambda c: in_state(c, "prefill-0", TaskState.HELD)(),
    "exporting": lambda c: foreign(c, "prefill-0").sender.is_exporting,
    "sending": lambda c: c.sent["OpaquePayload"] == 2,
    "all sent": lambda c: c.sent["Trailer"] == 1,
    "adopting": lambda c: in_state(c, "decode-0", TaskState.ADOPTING)(),
    "accepted": lambda c: c.sent["Accepted"] == 1,
    "decoding": lambda c: foreign(c, "decode-0").tasks.num_decoding > 0,
}


def at_stage(stage: str, spec: Spec = SPLIT) -> tuple[Cluster, Answer]:
    """A cluster in which request r is just there."""
    cluster = Cluster(spec)
    answer = cluster.submit(make_request("r", LONG, num_choices=2, max_tokens=12))
    cluster.run(until=lambda: STAGES[stage](cluster))
    assert not answer.is_over
    return cluster, answer


@pytest.mark.parametrize("stage", STAGES)
def test_a_client_that_goes_away_leaves_nothing(stage: str) -> None:
    cluster, _ = at_stage(stage)
    cluster.leave(ID)
    cluster.run()
    cluster.check_end()


@pytest.mark.parametrize("stage", STAGES)
def test_a_choice_that_is_not_wanted_leaves_the_other_alone(stage: str) -> None:
    cluster, answer = at_stage(stage)
    cluster.leave(ID, (0,))
    cluster.run()
    cluster.check_end()
    assert answer.failure is None
    assert answer.taken[1] == len(answer.expected[1])


@pytest.mark.parametrize("keep", [0, 2])
@pytest.mark.parametrize("worker", ["prefill-0", "decode-0"])
@pytest.mark.parametrize("stage", STAGES)
def test_a_killed_worker_costs_no_answer(stage: str, worker: str, keep: int) -> None:
    cluster, answer = at_stage(stage)
    cluster.kill(cluster.process(worker), keep)
    cluster.run()
    cluster.check_end()
    assert_whole(answer)


@pytest.mark.parametrize("keep", [0, 1, 5])
@pytest.mark.parametrize("stage", STAGES)
def test_a_link_that_breaks_costs_no_answer(stage: str, keep: int) -> None:
    cluster, answer = at_stage(stage)
    cluster.cut("prefill-0", "decode-0", keep)
    cluster.run()
    cluster.check_end()
    assert_whole(answer)


@pytest.mark.parametrize("stage", ["granted", "held", "sending"])
def test_a_writer_that_sleeps_past_its_lease_is_let_fall(stage: str) -> None:
    cluster, answer = at_stage(stage)
    decode = foreign(cluster, "decode-0")
    prefill = cluster.process("prefill-0")
    prefill.stopped = True
    cluster.run(until=lambda: decode.inbound.is_empty and cluster.now > 1.0)
    assert decode.is_empty
    prefill.stopped = False
    cluster.run()
    cluster.check_end()
    assert_whole(answer)


def test_a_writer_that_takes_its_time_renews_its_lease() -> None:
    spec = Spec(lease_s=0.3, ticket_timeout_s=5.0)
    cluster, answer = at_stage("granted", spec)
    backend = cluster.process("prefill-0").backend
    assert isinstance(backend, ForeignBackend)
    backend.hangs = True
    cluster.run(until=lambda: cluster.now > 2.0)
    assert cluster.sent["LeaseRenew"] >= 5
    backend.hangs = False
    cluster.run()
    cluster.check_end()
    assert_whole(answer)
    assert cluster.sent["Header"] == 1


@pytest.mark.parametrize("worker", ["prefill-0", "decode-0"])
def test_a_worker_whose_engine_hangs_is_killed(worker: str) -> None:
    router = RouterSettings(step_timeout_s=1.0)
    cluster, answer = at_stage("sending", Spec(router=router))
    backend = cluster.process(worker).backend
    assert isinstance(backend, ForeignBackend)
    backend.hangs = True
    cluster.run()
    assert cluster.process(worker).epoch == 2
    cluster.check_end()
    assert_whole(answer)


def test_a_worker_whose_engine_only_holds_is_not_killed() -> None:
    """It waits for a ticket, and rightly does nothing."""
    router = RouterSettings(step_timeout_s=1.0)
    cluster = Cluster(Spec(router=router, ticket_timeout_s=8.0))
    cluster.process("decode-0").stopped = True
    answer = cluster.submit(make_request("r", LONG, route=RoutePreference.SPLIT))
    cluster.run(until=in_state(cluster, "prefill-0", TaskState.HELD))
    cluster.run(until=lambda: cluster.process("decode-0").epoch == 2)
    cluster.run()
    cluster.check_end()
    assert cluster.process("prefill-0").epoch == 1
    assert_whole(answer)


@pytest.mark.parametrize("worker", ["prefill-0", "decode-0"])
def test_a_draining_worker_finishes_and_takes_nothing_new(worker: str) -> None:
    cluster, running = at_stage("decoding", Spec(workers=(1, 1, 1)))
    cluster.drain(worker)
    cluster.run(until=lambda: foreign(cluster, worker).draining)
    answers = serve(cluster, *(make_request(f"n{i}", LONG[i:]) for i in range(4)))
    assert_whole(running, *answers)
    node = foreign(cluster, worker)
    assert node.is_empty
    assert node.draining
