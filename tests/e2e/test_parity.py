"""Given the times of a live run, the simulator sends its requests where the live router did.

Two live runs of real processes: three workers of unlike speed that keep a pace, under a load that
makes the router choose between them; and a tiny model that really computes. Their recordings also
replay byte by byte, machine by machine.
"""

from __future__ import annotations

import asyncio
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from pdserve.bench.options import LoadOptions, TargetOptions
from pdserve.bench.plan import Load, make_load
from pdserve.bench.run import run_load
from pdserve.bench.target import Target
from pdserve.calibrate.parity import compare
from pdserve.serve.recorded import RecordedRun, read_run
from pdserve.serve.replay import replay
from pdserve.workload.outcome import Ending


class Quiet:
    """Watches a run without a word."""

    def sent(self) -> None: ...

    def ended(self, outcome: object) -> None: ...


async def send(url: str, load: Load, vocab_size: int) -> int:
    """How many requests completed."""
    target = Target(TargetOptions(url=url, vocab_size=vocab_size))
    try:
        await target.ask_for_model()
        outcomes = (await run_load(load, target, Quiet())).outcomes
    finally:
        target.close()
    return sum(outcome.ending is Ending.COMPLETED for outcome in outcomes)


def recorded(server: Any, load: Load, folder: Path, vocab_size: int) -> RecordedRun:
    assert asyncio.run(send(server.url, load, vocab_size)) == load.num_requests
    server.signal(signal.SIGTERM)
    assert server.wait() == 0, server.log
    differences = {outcome.file: outcome.difference for outcome in replay(folder)}
    assert set(differences.values()) == {None}, differences
    return read_run(folder)


def test_routes_are_the_same_among_workers_of_unlike_speed(
    start_server: Callable[..., Any], tiny_model_path: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "recording"
    server = start_server(
        "--model", str(tiny_model_path), "--engine", "modelled", "--kv-blocks", "512",
        "--step-times", "start=4ms,prompt=200us,decode=10ms,sequence=1ms,transfer=10us",
        "--speeds", "prefill=2,mixed=0.7", "--prefill", "1", "--decode", "1", "--mixed", "1",
        "--policy", "predicted", "--record", str(folder),
    )  # fmt: skip
    load = make_load(
        LoadOptions(input_tokens="20:500", output_tokens="4:40", rate=12.0, num_requests=100)
    )
    run = recorded(server, load, folder, vocab_size=384)
    parity = compare(run)
    assert parity.num_routes == 100
    assert parity.same >= 0.99, parity.differences
    assert all(difference.cause for difference in parity.differences)
    routes = {(job.prefill_worker, job.decode_worker) for r in run.requests.values()
              for _, job in r.jobs}  # fmt: skip
    assert len(routes) >= 4  # there was something to choose


@pytest.mark.model
def test_routes_are_the_same_with_a_model_that_computes(
    start_server: Callable[..., Any], smollm_path: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "recording"
    server = start_server(
        "--model", str(smollm_path), "--kv-blocks", "512", "--threads", "1",
        "--prefill", "1", "--decode", "1", "--record", str(folder),
    )  # fmt: skip
    load = make_load(
        LoadOptions(input_tokens="20:300", output_tokens="4:20", rate=4.0, num_requests=100)
    )
    run = recorded(server, load, folder, vocab_size=49152)
    parity = compare(run, goes_on_as_live=False)
    assert parity.num_routes == 100
    assert parity.same >= 0.99, parity.differences
    routes = {(job.prefill_worker, job.decode_worker) for r in run.requests.values()
              for _, job in r.jobs}  # fmt: skip
    assert len(routes) >= 2  # there was something to choose
