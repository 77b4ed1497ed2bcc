"""``pdserve sim``: simulate a cluster under a load, and show what comes of it."""

from __future__ import annotations

import argparse
import json
import math
import statistics
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from pdserve.core.errors import ConfigError, why
from pdserve.cost.machine import MachineModel
from pdserve.cost.roofline import check_slo, slo_floor
from pdserve.page import page
from pdserve.plot.files import write_pictures
from pdserve.sim.arguments import SimOptions, check_blocks
from pdserve.sim.logs import EventFile, RequestFile
from pdserve.sim.machines import Machines
from pdserve.sim.observe import Observer
from pdserve.sim.pictures import pictures
from pdserve.sim.progress import Bar
from pdserve.sim.report import Report
from pdserve.sim.report_text import print_report
from pdserve.sim.scenario import ScenarioPlayer
from pdserve.sim.settings import SimSettings
from pdserve.sim.simulation import Simulation
from pdserve.sim.splitwisesim import figures_of, imitate
from pdserve.workload.build import build_open
from pdserve.workload.options import WorkloadOptions
from pdserve.workload.request import TraceRequest
from pdserve.workload.scenario_score import lines_of
from pdserve.workload.shaping import peeked
from pdserve.workload.slo import Slo, slo_of

NOTHING_COMPLETED_STATUS = 1
BLOCK_TOKENS = 16
LIVE_HEARTBEAT_S = 0.5
"""With failures, hangs are to be noticed as soon as live (`WorkerSettings.heartbeat_s`)."""
LONGEST_S = 10 * 366 * 86_400.0
"""Requests that lie further apart than years are a mistake, and simulating them takes as long."""
HASHED_BLOCK_TOKENS = 512
"""Traces with block hashes say nothing of what is inside a block: it is reused whole or not."""


def run(typed: argparse.Namespace) -> int:
    """Gives the exit status: 0 if any request completed."""
    options = SimOptions.of(typed)
    check_place(options.parsed.json, options.parsed.plot)
    head, requests = peeked(build_open(options.workload).requests)
    if not head:
        raise ConfigError("no request is left to simulate: widen --window, --duration or the trace")
    if head[-1].at_s > LONGEST_S:
        raise ConfigError(
            f"request {len(head)} comes only after {head[-1].at_s:.3g} s: look at the times of the "
            "trace, or at --rate"
        )
    settings = settings_of(options, head)
    figures = figures_of(Machines(options.machines))
    if options.scenario is not None:
        settings = replace(settings, heartbeat_s=LIVE_HEARTBEAT_S)
    promises = [options.slo, *map(slo_of, options.classes.classes)]
    for slo in promises:
        if slo is not None:
            refuse_impossible(slo, settings.machines, head)
    report = Report(settings, options.slo)
    player = ScenarioPlayer(options.scenario, options.slo) if options.scenario else None
    wall_s = _simulate(options, settings, requests, [*report.observers, *figures], player)
    document = report.document(wall_s, load_document(options.workload))
    for each in figures:
        document |= each.document()
    if player is not None:
        document["scenario"] = player.document
    parsed = options.parsed
    if parsed.json is not None:
        write_json(parsed.json, document)
    if parsed.json != "-":
        print_report(page(), document)
        for line in () if player is None else lines_of(player.document):
            print(line)
    if parsed.plot is not None:
        for path in write_pictures(parsed.plot, pictures(report)):
            if parsed.json != "-":
                print(path)
    return 0 if document["completed"] else NOTHING_COMPLETED_STATUS


def settings_of(options: SimOptions, head: Sequence[TraceRequest]) -> SimSettings:
    """What is simulated. ``head``: the first requests. Raises `ConfigError`."""
    parsed = options.parsed
    machines = Machines(options.machines)
    usual = machines.block_size or (HASHED_BLOCK_TOKENS if _is_hashed(head) else BLOCK_TOKENS)
    block_size = parsed.block_size or usual
    check_blocks(parsed, block_size)
    admission = parsed.admission
    if admission == "auto":
        admission = "predicted" if options.classes.are_bounded else "none"
    settings = SimSettings(
        cluster=options.cluster,
        machines=machines.of(options.cluster, block_size),
        times=machines.times,
        policy=parsed.policy,
        batching=parsed.batching or "",
        service_of=options.service_of,
        roles=parsed.roles,
        admission=admission,
        declared_tokens=options.declared_tokens,
        learns=parsed.learn,
        max_step_tokens=parsed.max_step_tokens,
        mixed_chunk_tokens=parsed.mixed_chunk_tokens,
        max_running=parsed.max_running,
        one_shot_tokens=parsed.one_shot_tokens,
        prefix_cache=parsed.prefix_cache,
        queue_timeout_s=parsed.queue_timeout,
        max_queued_requests=parsed.max_queued_requests,
        sample_interval_s=parsed.sample_interval,
        load_s=parsed.load_time,
        seed=parsed.seed,
    )
    table = machines.imitated
    return settings if table is None else imitate(settings, table)


def refuse_impossible(
    slo: Slo, machines: Sequence[MachineModel], head: Sequence[TraceRequest]
) -> None:
    """Raises `ConfigError` with the bound, if a request of median lengths could not keep the
    objective on an idle machine."""
    bounds_ms = dict(slo.bounds_ms)
    prompt_tokens = int(statistics.median(request.prompt_tokens for request in head))
    output_tokens = int(statistics.median(request.output_tokens for request in head))
    check_slo(
        machines,
        prompt_tokens=prompt_tokens,
        context_tokens=prompt_tokens + output_tokens // 2,
        ttft_s=bounds_ms["ttft"] / 1e3 if "ttft" in bounds_ms else None,
        tpot_s=bounds_ms["tpot"] / 1e3 if "tpot" in bounds_ms else None,
    )
    floors = [slo_floor(each, prompt_tokens, prompt_tokens) for each in machines]
    least_ttft_s, least_tpot_s = (min(values) for values in zip(*floors, strict=True))
    least_ms = 1e3 * (least_ttft_s + (output_tokens - 1) * least_tpot_s)
    if bounds_ms.get("e2e", math.inf) < least_ms:
        raise ConfigError(
            f"no machine here can keep an E2E of {bounds_ms['e2e']:g} ms: {prompt_tokens} tokens "
            f"in and {output_tokens} out take at least {least_ms:.4g} ms, with nothing else to "
            "do; ask for more, or for faster hardware or more devices a worker"
        )


def load_document(options: WorkloadOptions) -> dict[str, Any]:
    """What was asked for, as plain data; JSON has no infinity."""
    usual = asdict(WorkloadOptions())
    asked = {name: value for name, value in asdict(options).items() if value != usual[name]}
    return {name: _plain(value) for name, value in asked.items()}


def check_place(place: str | None, folder: Path | None = None) -> None:
    """Raises `ConfigError` if ``--json`` or ``--plot`` cannot be written, before the work is
    done."""
    if place is not None and place != "-":
        if Path(place).is_dir():
            raise ConfigError(f"--json: {place} is a folder; name a file, or - for stdout")
        if not Path(place).absolute().parent.is_dir():
            raise ConfigError(f"--json: there is no folder for {place}")
    if folder is not None:
        write_pictures(folder, {})


def write_json(place: str, document: dict[str, Any]) -> None:
    """To a file, or with ``-`` to stdout. Raises `ConfigError`."""
    text = json.dumps(document, allow_nan=False)
    if place == "-":
        print(text)
        return
    try:
        Path(place).write_text(text + "\n")
    except OSError as error:
        raise ConfigError(f"--json: cannot write {place}: {why(error)}") from error


def _simulate(
    options: SimOptions,
    settings: SimSettings,
    requests: Iterator[TraceRequest],
    observers: list[Observer],
    player: ScenarioPlayer | None,
) -> float:
    """Gives the seconds that it took."""
    parsed, workload = options.parsed, options.workload
    with ExitStack() as files:
        if parsed.events is not None:
            observers.append(files.enter_context(EventFile(parsed.events)))
        if parsed.requests is not None:
            observers.append(files.enter_context(RequestFile(parsed.requests)))
        bar = Bar(
            shown=not parsed.no_progress,
            end_s=_end_s(workload),
            num_requests=workload.num_requests,
        )
        observers.append(files.enter_context(bar))
        if player is not None:
            observers.append(player)
        simulation = Simulation(settings, requests, observers)
        if player is not None:
            player.begin(simulation)
        begun_s = time.perf_counter()
        simulation.run()
        return time.perf_counter() - begun_s


def _end_s(workload: WorkloadOptions) -> float | None:
    """When the last request comes, if that was said."""
    if workload.duration_s is not None:
        return workload.duration_s
    if workload.window_s is None or math.isinf(workload.window_s[1]):
        return None
    start_s, end_s = workload.window_s
    return (end_s - start_s) / workload.rate_scale


def _is_hashed(head: Sequence[TraceRequest]) -> bool:
    return any(segment.name.startswith("block:") for r in head for segment in r.segments)


def _plain(value: object) -> object:
    if isinstance(value, tuple | list):
        return [_plain(item) for item in value]
    if isinstance(value, Path):
        return str(value)
    return str(value) if isinstance(value, float) and math.isinf(value) else value
