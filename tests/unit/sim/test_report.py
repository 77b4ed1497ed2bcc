"""What a run says of itself in words: warnings, the short report, the bar."""

from __future__ import annotations

import io
import json

import pytest
from rich.console import Console

from pdserve.core.ids import RequestId, WorkerId
from pdserve.core.request import Role, ServiceClass
from pdserve.core.step import StepShape
from pdserve.sim import progress
from pdserve.sim.observe import WorkerLoad
from pdserve.sim.progress import Bar
from pdserve.sim.report import Report
from pdserve.sim.report_text import print_report
from pdserve.sim.settings import SimSettings
from pdserve.sim.spec import parse_cluster
from pdserve.workload.slo import parse_slo

A, B = WorkerId("prefill-0"), WorkerId("decode-0")


def told(report: Report, hook: str, *arguments: object) -> None:
    for observer in report.observers:
        getattr(observer, hook)(*arguments)


def test_steps_beyond_what_was_measured_are_warned_of(some_settings):
    report = Report(some_settings())
    for number in range(999):
        told(report, "steps", B, number, number + 1, StepShape(num_decoding=1), 1)
    told(report, "done", 1000.0)
    assert not any("extrapolated" in warning for warning in report.warnings())
    assert sum("known to 5.0%" in warning for warning in report.warnings()) == 1
    told(report, "steps", A, 0, 3, StepShape(prompt_tokens=4096), 1)
    told(report, "steps", A, 3, 6, StepShape(prompt_tokens=4096), 1)
    [warning] = [warning for warning in report.warnings() if "extrapolated" in warning]
    assert warning.startswith("0.2% of the steps")


def load(waiting: int) -> dict[WorkerId, WorkerLoad]:
    return {A: WorkerLoad(Role.PREFILL, waiting, 0, 0, 0, 10)}


@pytest.mark.parametrize(("growth", "warned"), [(1, True), (0, False)])
def test_a_queue_that_grows_is_warned_of(growth, warned, some_settings):
    report = Report(some_settings())
    for second in range(100):
        told(report, "arrived", float(second), RequestId(f"r{second}"), 10)
        told(report, "sampled", float(second), load(10 + growth * second), 0)
    assert any("did not keep up" in warning for warning in report.warnings()) is warned


def shown(report: Report) -> str:
    text = io.StringIO()
    print_report(Console(file=text, width=100, highlight=False), report.document(wall_s=2.0))
    return text.getvalue()


def test_the_short_report_has_what_there_was(some_settings, an_end):
    report = Report(some_settings(), parse_slo(["ttft:600"]))
    quick = ServiceClass(name="quick", ttft_s=0.1)
    for request in (
        an_end(),
        an_end(service=quick, attempts=2),
        an_end(failure="overloaded", first_s=None, second_s=None, last_s=None, output_tokens=0),
    ):
        told(report, "arrived", request.arrived_s, request.request_id, request.prompt_tokens)
        told(report, "ended", 2.5, request)
    told(report, "gaps", [0.2], 8)
    told(report, "steps", A, 0.0, 1.0, StepShape(prompt_tokens=100), 1)
    told(report, "sent", A, B, 2_000_000_000, 0.0, 0.5)
    told(report, "role_changed", 1.0, B, Role.MIXED)
    told(report, "worker_lost", 1.0, B)
    told(report, "done", 10.0)
    text = shown(report)
    for part in (
        "1xround:prefill,1xround:decode, none",
        "3 sent: 2 completed, 1 failed, 1 resumed",
        "attainment 33.3% (ttft:600)",
        "1, 2 GB in all; open for 500 ms (P50)",
        "role changes  1",
        "workers lost  1",
        "72 per hour",
        "class quick: 1 requests, attainment 0.0%",
        "1 x overloaded",
        "10 s in 2 s (5 x real time), seed 0",
    ):
        assert part in text, text


def test_of_an_idle_cluster_without_prices_little_is_said(a_machine):
    spec = parse_cluster("1xround:mixed")
    machine = a_machine(price_per_hour=0.0, power=type(a_machine().power)())
    report = Report(SimSettings(cluster=spec, machines=(machine,)))
    text = shown(report)
    assert "0 sent: 0 completed" in text
    assert "energy" not in text
    assert "cost" not in text


def test_a_document_is_plain_data(some_settings):
    document = Report(some_settings(declared_tokens=None)).document(wall_s=0.0)
    again = json.loads(json.dumps(document, allow_nan=False))
    assert again["settings"]["declared_tokens"] is None
    assert again["settings"]["roles"] == "fixed"
    assert again["settings"]["times"]["message_s"] == 1e-4
    assert again["speedup"] == 0.0


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize(("num", "end_s"), [(None, 100.0), (256, None), (None, None)])
def test_the_bar_comes_when_a_run_takes_long(num, end_s, monkeypatch):
    monkeypatch.setattr(progress, "SHOWN_AFTER_S", 0.0)
    monkeypatch.setenv("TERM", "xterm")
    screen = Terminal()
    monkeypatch.setattr("sys.stderr", screen)
    with Bar(shown=True, end_s=end_s, num_requests=num) as bar:
        for number in range(200):
            bar.arrived(number / 2, RequestId(f"r{number}"), 10)
    assert "192 requests" in screen.getvalue()


@pytest.mark.parametrize("shown", [True, False])
def test_no_bar_where_nobody_would_see_it(shown, monkeypatch):
    screen = Terminal() if not shown else io.StringIO()
    monkeypatch.setattr(progress, "SHOWN_AFTER_S", 0.0)
    monkeypatch.setattr("sys.stderr", screen)
    with Bar(shown=shown, end_s=None, num_requests=None) as bar:
        for number in range(200):
            bar.arrived(float(number), RequestId("r"), 10)
    assert screen.getvalue() == ""
