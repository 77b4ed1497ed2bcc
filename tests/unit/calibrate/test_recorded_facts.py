"""What a recording says, on machines that were driven by hand, and what a fit makes of it."""

from __future__ import annotations

from array import array
from dataclasses import replace
from pathlib import Path

import pytest

from pdserve.calibrate.fit import Neighbours, gaps_of, link_of, times_of
from pdserve.calibrate.live import Asked
from pdserve.core.errors import ConfigError
from pdserve.core.ids import GATEWAY, AttemptId, Epoch, RequestId, StepId, WorkerId
from pdserve.core.request import Request, SamplingParams
from pdserve.core.step import StepShape
from pdserve.node.settings import RouterSettings
from pdserve.serve.recorded import (
    Mail,
    RanRequest,
    RanStep,
    RanTransfer,
    RecordedRun,
    read_run,
)
from pdserve.workload.outcome import Ending, Outcome

PREFILL, DECODE = WorkerId("prefill-0"), WorkerId("decode-0")


def a_step(worker: WorkerId, asked_s: float, done_s: float, shape: StepShape) -> RanStep:
    return RanStep(
        worker=worker,
        epoch=Epoch(1),
        step_id=StepId(1),
        shape=shape,
        asked_s=asked_s,
        done_s=done_s,
        elapsed_s=done_s - asked_s - 0.001,
    )


def test_a_step_knows_for_how_long_neighbours_computed_beside_it() -> None:
    prompt = a_step(PREFILL, 1.0, 2.0, StepShape(500, 250_000))
    decodes = [
        a_step(DECODE, 0.95 + 0.1 * n, 1.05 + 0.1 * n, StepShape(0, 0, 2, 90)) for n in range(5)
    ]
    beside = Neighbours([prompt, *decodes])
    timed = beside.timed(prompt)
    assert timed.beside_prompt_s == 0.0
    assert timed.beside_decode_s == pytest.approx(1.45 - 1.001)  # the prompt began at 1.001
    first = beside.timed(decodes[0])
    assert first.beside_prompt_s == pytest.approx(0.05)
    assert first.beside_decode_s == 0.0
    assert timed.num_drawn == 5 * 2
    assert first.num_drawn == 0
    assert timed.elapsed_s == pytest.approx(0.999)


def test_a_step_knows_how_many_messages_came_while_it_ran() -> None:
    step = a_step(DECODE, 1.0, 2.0, StepShape(0, 0, 2, 90))  # it began at 1.001
    mail = [
        Mail(PREFILL, receiver, "Header", None, 0.9, at_s)
        for receiver, at_s in (
            (DECODE, 0.99),
            (DECODE, 1.7),
            (PREFILL, 1.5),
            (DECODE, 1.2),
            (DECODE, 2.1),
        )
    ]
    assert Neighbours([step], mail).timed(step).num_heard == 2
    assert Neighbours([step]).timed(step).num_heard == 0


def test_gaps_are_told_apart_by_kind_and_by_what_computes_beside() -> None:
    shape = StepShape(0, 0, 1, 9)
    steps = [replace(a_step(DECODE, n, n + 0.5, shape), done_s=n + 0.502) for n in range(20)]
    prompts = [a_step(PREFILL, 2 * n, 2 * n + 0.9, StepShape(50, 2500)) for n in range(10)]
    beside = Neighbours([*steps, *prompts])
    steps = [
        replace(step, done_s=step.done_s + 0.001 * (n % 2 == 0)) for n, step in enumerate(steps)
    ]
    gaps = gaps_of(steps, [beside.timed(step) for step in steps])
    assert set(gaps) == {"decode"}
    assert gaps["decode"].alone_s == pytest.approx(0.003)
    assert gaps["decode"].beside_s == pytest.approx(0.004)
    few = gaps_of(steps[1:], [beside.timed(step) for step in steps[1:]][:1] * 19)
    assert few["decode"].alone_s == few["decode"].beside_s
    assert not gaps_of(steps[:3], [beside.timed(step) for step in steps[:3]])


def test_gaps_are_those_of_steps_in_operation_if_there_are_enough() -> None:
    shape = StepShape(0, 0, 1, 9)
    steps = [a_step(DECODE, n, n + 0.5, shape) for n in range(40)]
    steps = [replace(s, done_s=s.done_s + (0.004 if s.asked_s < 20 else 0.0)) for s in steps]
    timed = [Neighbours(steps).timed(step) for step in steps]
    usual = [replace(sample, is_usual=n >= 20) for n, sample in enumerate(timed)]
    assert gaps_of(steps, usual)["decode"].alone_s == pytest.approx(0.001)
    assert gaps_of(steps, timed)["decode"].alone_s == pytest.approx(0.003)


def a_transfer(number: int, num_bytes: int, exposed_s: float, *, one_shot: bool) -> RanTransfer:
    at_s = 10.0 * number
    return RanTransfer(
        attempt=AttemptId(RequestId(f"r{number}"), Epoch(1)),
        sender=PREFILL,
        receiver=DECODE,
        one_shot=one_shot,
        opened_s=at_s,
        bound_s=at_s + 0.1,
        computed_s=at_s + 1.0,
        sent_s=at_s + 1.0 + exposed_s,
        num_bytes=num_bytes,
    )


def test_the_link_is_what_remains_when_the_prompt_is_computed() -> None:
    """1 ms and 1 GB/s: all of one shot, a layer of ten of the others."""
    sizes = [1e6 * (1 + n * 7 % 40) for n in range(60)]
    transfers = [
        a_transfer(n, size, 1e-3 + (size if n % 2 else size / 10) / 1e9, one_shot=bool(n % 2))
        for n, size in enumerate(sizes)
    ]
    link = link_of([*transfers, a_transfer(99, 10**7, 30.0, one_shot=True)], num_layers=10)
    assert link is not None
    assert link.spec.bytes_per_s == pytest.approx(1e9, rel=1e-3)
    assert link.spec.fixed_s == pytest.approx(1e-3, rel=1e-3)
    assert link.error_s < 1e-6


def test_transfers_that_share_the_link_do_not_count() -> None:
    alone = [a_transfer(n, 10**6 * n, 2e-3, one_shot=True) for n in range(1, 6)]
    beside = a_transfer(3, 10**6, 5.0, one_shot=True)
    together = link_of([*alone, beside], num_layers=2)
    assert together is not None
    assert together.num_transfers == 4
    assert link_of(alone[:2], num_layers=2) is None


def test_tokens_do_not_outvote_the_messages_of_a_hand_off() -> None:
    run = RecordedRun(router=RouterSettings(), policy="predicted")
    run.mail = [Mail(DECODE, PREFILL, "Tokens", None, 5.0 + n, 5.0002 + n) for n in range(200)]
    run.mail += [Mail(PREFILL, DECODE, "Trailer", None, 5.5 + n, 5.501 + n) for n in range(10)]
    times = times_of(run, Asked(spans=((5.0, 900.0),)))
    assert times.message_s == pytest.approx(1e-3)


def test_a_burst_does_not_change_how_long_a_message_takes() -> None:
    run = RecordedRun(router=RouterSettings(), policy="predicted")
    delays_s = [1e-3] * 20 + [0.5] * 5
    run.mail = [
        Mail(DECODE, PREFILL, "Ticket", None, 5.0 + n, 5.0 + n + d) for n, d in enumerate(delays_s)
    ]
    run.mail.append(Mail(DECODE, PREFILL, "LoadReport", None, 6.0, 9.0))
    run.steps = [a_step(DECODE, n, n + 0.5, StepShape(0, 0, 1, 9)) for n in range(5, 9)]
    times = times_of(run, Asked(spans=((5.0, 900.0),)))
    assert times.message_s == pytest.approx(1e-3)
    assert times.step_gap_s == pytest.approx(1e-3)
    assert (times.edge_in_s, times.edge_out_s, times.verify_byte_s) == (0.0, 0.0, 0.0)


def a_request(run: RecordedRun, name: str, sent_s: float, in_s: float, out_s: float) -> Outcome:
    """A request that waits so long at either edge, and for its job's message as long as at both."""
    request = Request(
        request_id=RequestId(name),
        prompt_token_ids=array("I", [1, 2]),
        params=SamplingParams(max_tokens=2, seed=0),
    )
    submitted_s = sent_s + in_s
    run.requests[request.request_id] = RanRequest(
        request=request, submitted_s=submitted_s, delivered_s=[sent_s + 0.5], num_tokens=1
    )
    arrives_s = submitted_s + in_s + out_s
    run.mail.append(Mail(GATEWAY, PREFILL, "StartJob", request.request_id, submitted_s, arrives_s))
    return Outcome(
        index=len(run.requests),
        response_id=name,
        due_s=sent_s,
        sent_s=sent_s,
        ending=Ending.COMPLETED,
        first_s=sent_s + 0.5 + out_s,
    )


def test_requests_that_come_in_a_burst_do_not_say_how_long_the_edge_takes() -> None:
    run = RecordedRun(router=RouterSettings(), policy="predicted")
    outcomes = [a_request(run, f"lone-{n}", float(n), 0.001, 0.002) for n in range(10)]
    outcomes += [a_request(run, f"b-{n}", 20.0, 0.001 + 0.002 * n, 0.03) for n in range(32)]
    times = times_of(run, Asked(spans=((0.0, 30.0),), outcomes=tuple(outcomes)))
    assert times.edge_in_s == pytest.approx(0.001)
    assert times.edge_out_s == pytest.approx(0.002)
    assert times.message_s == pytest.approx(0.003)
    burst = times_of(run, Asked(spans=((15.0, 30.0),), outcomes=tuple(outcomes)))
    assert burst.edge_in_s == pytest.approx(0.032)  # there is nothing else
    assert burst.edge_out_s == pytest.approx(0.03)


def test_what_other_loads_did_in_between_is_no_part_of_a_calibration() -> None:
    """The gaps, messages, checks and edges of a load between two rounds are another's."""
    shape = StepShape(0, 0, 1, 9)
    run = RecordedRun(router=RouterSettings(), policy="predicted")
    for at_s, more_s in ((1.0, 0.0), (12.0, 0.5), (23.0, 0.0)):
        for n in range(8):
            begun_s = at_s + n
            done_s = begun_s + 0.4 + more_s
            step = a_step(DECODE, begun_s, begun_s + 0.4, shape)
            run.steps.append(replace(step, done_s=done_s))
            run.mail.append(Mail(PREFILL, DECODE, "Ticket", None, begun_s, begun_s + 0.01 + more_s))
            run.transfers[AttemptId(RequestId(f"r{begun_s}"), Epoch(1))] = RanTransfer(
                attempt=AttemptId(RequestId(f"r{begun_s}"), Epoch(1)),
                sender=PREFILL,
                receiver=DECODE,
                one_shot=False,
                opened_s=begun_s,
                num_bytes=1000,
                verify_asked_s=begun_s,
                verified_s=begun_s + 0.002 + more_s,
            )
    rounds = Asked(spans=((0.0, 9.0),)).plus(Asked(spans=((22.0, 31.0),)))
    assert rounds.seconds == pytest.approx(18.0)
    assert [rounds.round_of(at_s) for at_s in (3.0, 15.0, 25.0)] == [0, None, 1]
    times = times_of(run, rounds)
    assert times.step_gap_s == pytest.approx(0.001)
    assert times.message_s == pytest.approx(0.01)
    assert times.verify_s + 1000 * times.verify_byte_s == pytest.approx(0.002)
    slower = times_of(run, Asked(spans=((11.0, 21.0),)))
    assert slower.step_gap_s == pytest.approx(0.501)
    assert slower.message_s == pytest.approx(0.51)


def test_a_folder_without_a_router_is_no_run(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"no recording of a router \(router.rec\)"):
        read_run(tmp_path)
