"""The router watches its workers: who is killed, and who only seems to deserve it."""

from __future__ import annotations

from dataclasses import replace

import pytest
from virtual_cluster import ClusterSpec, VirtualCluster, make_ask
from virtual_cluster.orders import PROMPT, of, pair, reach, submitted

from pdserve.core.effects import Received, Send, StepDone, WorkerLost
from pdserve.core.ids import GATEWAY, Epoch, StepId, WorkerId
from pdserve.core.messages import LoadReport, TokenDelta, Tokens
from pdserve.core.step import StepResult, StepShape
from pdserve.node.outbox import Outbox
from pdserve.node.report import BatchLoad, LoadReporter
from pdserve.node.settings import RouterSettings

IMPATIENT = RouterSettings(step_timeout_s=2.0, report_timeout_s=1.0)


@pytest.mark.parametrize("stage", ["prefill runs", "decode runs"])
def test_a_worker_whose_step_hangs_is_killed(stage: str) -> None:
    """It goes on reporting, so only the age of the step tells."""
    together = submitted(router=IMPATIENT)
    cluster = together.cluster
    reach(stage, together)
    victim = together.prefill if together.prefill.engine else together.decode
    cluster.run_for(3, hold=of(victim, "step"))
    (kill,) = cluster.killed
    assert (kill.worker, kill.epoch) == (victim.worker, 1)
    assert "a step has taken 2." in kill.detail
    cluster.run_for(3)
    assert cluster.client.answers["r"].is_complete


def test_a_worker_that_stops_reporting_gets_no_work_until_it_is_heard_again() -> None:
    cluster = VirtualCluster(ClusterSpec(workers=(0, 0, 2), policy="round_robin"))
    cluster.run()
    stopped = cluster.current[WorkerId("mixed-0")]
    stopped.stopped = True
    cluster.run_for(2.1)
    for number in range(4):
        cluster.submit(make_ask(f"r{number}", PROMPT, max_tokens=2))
    prefill = [dict(event.detail)["prefill"] for event in cluster.life if event.name == "routed"]
    assert prefill == ["mixed-1"] * 4
    assert cluster.killed == []
    stopped.stopped = False
    cluster.run_for(0.6)
    assert cluster.router.books.workers[WorkerId("mixed-0")].accepts


def test_a_step_that_is_known_to_take_long_is_waited_for() -> None:
    """Ten times what such a step took before, if that is more than the limit."""
    together = submitted(router=IMPATIENT)
    cluster, decode = together.cluster, together.decode
    reach("decode runs", together)
    cluster.run_for(1.0, hold=of(decode, "step"))
    while decode.engine is not None:
        decode.compute(cluster.now)
    cluster.run(until=lambda: not decode.posted)
    assert decode.engine is not None, "the next step runs, and the last one took a second"
    cluster.run_for(8, hold=of(decode, "step"))
    assert cluster.killed == []
    cluster.run_for(5, hold=of(decode, "step"))
    assert len(cluster.killed) == 1
    cluster.run_for(3)
    assert cluster.client.answers["r"].is_complete


def test_a_large_step_is_expected_to_take_its_share_of_time() -> None:
    """128 tokens took two seconds, so 256 may take four; what was slow is forgotten slowly."""
    node = pair().prefill.node
    load = BatchLoad(node.batch, node.inbound)
    reporter = LoadReporter(node.settings, load, node.standing, lambda: True, lambda out: None)
    reporter.step_started(StepShape(128), 0.0)
    reporter.step_done(2.0)
    assert expected_s(reporter, 256) == pytest.approx(4.0)
    assert expected_s(reporter, 256) == pytest.approx(4.0 * 0.99)
    assert expected_s(reporter, 8) == pytest.approx(4.0 * 0.99**2 * 8 / 256)


def expected_s(reporter: LoadReporter, num_tokens: int) -> float:
    """What is reported of a step of so many tokens, which then takes no time at all."""
    out = Outbox(WorkerId("prefill-0"), 0.0)
    reporter.step_started(StepShape(num_tokens), 0.0)
    reporter.beat(out)
    reporter.step_done(0.0)
    (report,) = [
        effect.message
        for effect in out.effects
        if isinstance(effect, Send) and isinstance(effect.message, LoadReport)
    ]
    return report.step_expected_s


def test_a_silent_worker_is_killed() -> None:
    together = submitted(router=IMPATIENT)
    reach("decode runs", together)
    together.decode.stopped = True
    together.cluster.run_for(2)
    (kill,) = together.cluster.killed
    assert kill.worker == "decode-0"
    assert "silent for 1." in kill.detail
    together.cluster.run_for(3)
    assert together.cluster.client.answers["r"].is_complete


def test_an_idle_worker_is_not_silent() -> None:
    together = pair(router=IMPATIENT)
    together.cluster.run_for(20)
    assert together.cluster.killed == []


def test_a_router_that_has_slept_kills_nobody() -> None:
    """The reports of the meantime wait in its sockets, behind the timer that is late."""
    together = pair(router=IMPATIENT)
    cluster = together.cluster
    cluster.now += 60.0
    late = [event for event in cluster.events() if event.process is None and event.link is None]
    assert [event.kind for event in late] == ["timer"]
    cluster.do(late[0])
    assert cluster.killed == []
    cluster.run_for(5)
    assert cluster.killed == []


def test_a_worker_is_killed_once() -> None:
    """Its end takes a while; meanwhile it gets no work, and no second blow."""
    together = pair(router=IMPATIENT)
    cluster, prefill = together.cluster, together.prefill
    prefill.stopped = True
    cluster.run_for(2, hold=of(prefill, "exit"))
    assert [kill.worker for kill in cluster.killed] == ["prefill-0"]
    cluster.submit(make_ask("r", PROMPT))
    cluster.run_for(3, hold=of(prefill, "exit"))
    assert cluster.client.answers["r"].is_complete
    assert len(cluster.killed) == 1


def test_a_newer_process_replaces_one_whose_death_nobody_saw() -> None:
    together = submitted()
    cluster, decode = together.cluster, together.decode
    reach("decode runs", together)
    cluster.kill(decode)
    cluster.unreaped.clear()
    cluster.run_for(2)
    assert cluster.current["decode-0"].epoch == 2
    assert cluster.router.books.workers["decode-0"].up.epoch == 2
    assert cluster.client.answers["r"].is_complete
    late = WorkerLost(decode.worker, Epoch(1), "late")
    assert cluster.router.handle(late, cluster.now) == []
    assert cluster.router.books.workers["decode-0"].up.epoch == 2


def test_words_of_a_dead_process_are_not_heard() -> None:
    """Not even if they are right: what was taken since would not be."""
    together = submitted(max_tokens=8)
    cluster, decode = together.cluster, together.decode
    reach("decode runs", together)
    answer = cluster.client.answers["r"]
    cluster.kill(decode)
    cluster.run(until=lambda: "decode-0" not in cluster.router.books.workers)
    index = len(answer.tokens[0])
    right = TokenDelta(
        request_id=answer.ask.request_id,
        epoch=Epoch(1),
        choice=0,
        index=index,
        token_id=answer.ask.answers[0][index],
    )
    ghost = Received(decode.worker, decode.epoch, Tokens((right,)))
    assert cluster.router.handle(ghost, cluster.now) == []
    cluster.run_for(2)
    assert answer.is_complete


def test_the_last_report_of_a_dead_process_says_nothing_about_its_successor() -> None:
    together = pair()
    cluster, decode = together.cluster, together.decode
    cluster.run_for(1, hold=of(decode, "to_gateway"))
    report = next(m for m in reversed(decode.to_gateway) if isinstance(m, LoadReport))
    cluster.kill(decode)
    cluster.run_for(2)
    before = cluster.router.books.workers["decode-0"].report
    cluster.ghost(decode, GATEWAY, replace(report, draining=True))
    assert cluster.router.books.workers["decode-0"].report is before


def test_machines_refuse_inputs_that_are_not_theirs() -> None:
    together = pair()
    step = StepDone(StepResult(step_id=StepId(1), tokens=()), 0.1)
    with pytest.raises(TypeError, match="the router does not take StepDone"):
        together.cluster.router.handle(step, 0.0)
    with pytest.raises(TypeError, match="a worker does not take WorkerLost"):
        together.prefill.node.handle(WorkerLost(together.decode.worker, Epoch(1), ""), 0.0)
