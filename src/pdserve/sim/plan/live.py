"""A problem out of a running server: its traffic, its workers, what it has learned of them.

Workers of one device and engine are one hardware, named by both; their step times are what the
server's router believes of them, with the error that it has found. Nothing is known of their price
and power, so a worker costs one unless ``--price`` says more. What of a prompt was in a worker's
prefix cache is taken to be a prefix that these requests share, so that it can be again.
"""

from __future__ import annotations

import argparse
import re
import statistics
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from pdserve.core.errors import ConfigError, UnavailableError
from pdserve.core.request import Role
from pdserve.cost.machine import LinkSpec, MachineModel
from pdserve.cost.step import StepModel
from pdserve.policy.registry import ROUTE_POLICIES
from pdserve.sim.arguments import declared
from pdserve.sim.plan.arguments import PlanOptions
from pdserve.sim.plan.problem import (
    Problem,
    cut_for,
    designs_of,
    errors_of,
    fitting_requests,
    likely_rate,
    prices_of,
    promise_of,
    short_note,
)
from pdserve.sim.plan.race import Goal, Measure
from pdserve.sim.plan.trial import Candidate, Design
from pdserve.sim.plan.windows import ALWAYS, MIN_REQUESTS
from pdserve.sim.settings import SimSettings
from pdserve.sim.spec import ClusterSpec
from pdserve.workload.request import Segment, TraceRequest, own_segment

MIN_STEPS = 32
"""Learned from fewer, step times are the prior's."""
_UNNAMED = re.compile(r"[^A-Za-z0-9_.+-]+")


@dataclass(frozen=True, slots=True)
class Recorded:
    """What the server says at ``/cluster`` and ``/cluster/traffic``."""

    cluster: Mapping[str, Any]
    traffic: Mapping[str, Any]


Fetch = Callable[[str, str | None], Recorded]
"""Of a URL and an API key. Raises `UnavailableError`."""


def live_problem(options: PlanOptions, recorded: Recorded) -> Problem:
    """Raises `ConfigError` if the server has served too little, or says nothing of its workers."""
    parsed = options.parsed
    try:
        workers = [_Worker.of(worker, recorded.traffic) for worker in recorded.traffic["workers"]]
        trace = requests_of(recorded.traffic["requests"])
    except (KeyError, TypeError, ValueError) as error:
        raise UnavailableError(
            f"{parsed.live} tells its traffic in no known way: {error!r}"
        ) from error
    if not workers:
        raise ConfigError(f"no worker of {parsed.live} is up: there is nothing to plan with")
    if len(trace) < MIN_REQUESTS:
        raise ConfigError(
            f"{parsed.live} remembers {len(trace)} requests that ended; a plan takes at least "
            f"{MIN_REQUESTS}: try again when it has served more"
        )
    machines = _machines(workers, recorded.traffic)
    promise = promise_of(options, machines)
    fitting, note = fitting_requests(trace, machines)
    parsed.windows = min(parsed.windows, len(fitting) // MIN_REQUESTS)
    prices, unit = prices_of(machines, options.prices)
    hardware = sorted({name for name, _ in machines})
    policy = str(recorded.traffic.get("policy") or "")
    present = _present(workers, policy)
    cost = sum(prices.cost[worker.hardware] for worker in workers)
    goal = options.goal or Goal(Measure.COST, budget=cost)
    designs = designs_of(hardware, options.split_policies, options.mixed_policies)
    rate = goal.rate or likely_rate(fitting, machines, promise, designs, prices, goal, parsed)
    windows = cut_for(fitting, rate, parsed)
    notes = [note, short_note(fitting, windows, rate, goal), *_notes(workers, present)]
    return Problem(
        windows=windows,
        machines=machines,
        template=_template(parsed),
        promise=promise,
        goal=goal,
        designs=designs,
        prices=prices,
        unit=unit,
        errors=errors_of(machines, parsed.error),
        notes=tuple(text for text in notes if text),
        present=present,
    )


def _notes(workers: Sequence[_Worker], present: Candidate | None) -> list[str]:
    notes = []
    if present is None:
        notes.append("the present layout mixes kinds of workers in a way that is not compared with")
    for worker in workers[:1]:
        if worker.num_steps < MIN_STEPS:
            notes.append(
                f"{worker.hardware} has taken only {worker.num_steps} steps: its times are mostly "
                "guessed"
            )
    return notes


def _template(parsed: argparse.Namespace) -> SimSettings:
    return SimSettings(
        cluster=ClusterSpec(()),
        machines=(),
        declared_tokens=declared(parsed.declared_tokens),
        max_step_tokens=parsed.max_step_tokens,
        mixed_chunk_tokens=parsed.mixed_chunk_tokens,
        max_running=parsed.max_running,
        one_shot_tokens=parsed.one_shot_tokens,
        prefix_cache=parsed.prefix_cache,
        queue_timeout_s=parsed.queue_timeout,
        max_queued_requests=parsed.max_queued_requests,
        sample_interval_s=60.0,
        seed=parsed.seed,
    )


def requests_of(rows: Sequence[Mapping[str, Any]]) -> list[TraceRequest]:
    """Those that were answered, times from the first one."""
    answered = sorted(
        (row for row in rows if row["failure"] is None and row["output_tokens"] > 0),
        key=lambda row: row["at_s"],
    )
    found = []
    for index, row in enumerate(answered):
        prompt, cached = int(row["prompt_tokens"]), int(row["cached_tokens"])
        cached = min(cached, prompt - 1)
        segments: tuple[Segment, ...] = (own_segment(index, prompt - cached),)
        if cached:
            segments = (Segment(ALWAYS, cached), *segments)
        found.append(
            TraceRequest(
                index=index,
                at_s=float(row["at_s"]) - float(answered[0]["at_s"]),
                segments=segments,
                output_tokens=int(row["output_tokens"]),
            )
        )
    return found


@dataclass(frozen=True, slots=True, kw_only=True)
class _Worker:
    hardware: str
    role: Role
    num_blocks: int
    block_size: int
    num_layers: int
    token_kv_bytes: int
    steps: StepModel
    error: float | None
    num_steps: int

    @classmethod
    def of(cls, row: Mapping[str, Any], document: Mapping[str, Any]) -> _Worker:
        if not row["block_size"]:
            raise ConfigError(
                f"{row['id']} has an engine that batches for itself, which cannot be simulated"
            )
        device, engine = str(row["device"]), str(row["engine"])
        device = device if engine in device else f"{device}-{engine}"
        return cls(
            hardware=_UNNAMED.sub("-", device).strip("-.+") or "worker",
            role=Role(row["role"]),
            num_blocks=int(row["num_blocks"]),
            block_size=int(row["block_size"]),
            num_layers=int(row["num_layers"]),
            token_kv_bytes=int(row["token_kv_bytes"]),
            steps=StepModel(**row["steps"]),
            error=row["error"],
            num_steps=int(row["num_steps"]),
        )


def _machines(
    workers: Sequence[_Worker], document: Mapping[str, Any]
) -> dict[tuple[str, Role], MachineModel]:
    """Of workers that are alike: the median of what is believed of each."""
    link = document["link"]
    per_byte_s = float(link["per_byte_s"])
    spec = LinkSpec(
        bytes_per_s=1 / per_byte_s if per_byte_s > 0 else 1e12, fixed_s=float(link["fixed_s"])
    )
    made: dict[tuple[str, Role], MachineModel] = {}
    for name in sorted({worker.hardware for worker in workers}):
        alike = [worker for worker in workers if worker.hardware == name]
        steps = StepModel(
            **{
                field: statistics.median(getattr(worker.steps, field) for worker in alike)
                for field in StepModel.__slots__
            }
        )
        errors = [worker.error for worker in alike if worker.error is not None]
        one = alike[0]
        machine = MachineModel(
            name=name,
            model=str(document["model"]),
            steps=steps,
            linear=steps,
            num_layers=one.num_layers,
            token_kv_bytes=one.token_kv_bytes,
            block_size=one.block_size,
            num_blocks=min(worker.num_blocks for worker in alike),
            max_model_tokens=int(document["max_model_tokens"]),
            link=spec,
            error=statistics.fmean(errors) if errors else None,
            source="learned by the running server",
        )
        made |= {(name, role): replace(machine) for role in Role}
    return made


def _present(workers: Sequence[_Worker], policy: str) -> Candidate | None:
    """The layout that is there, if it is one that a plan can have."""
    counts = Counter((worker.role, worker.hardware) for worker in workers)
    roles = [role for role, _ in counts]
    name = policy if policy.partition(":")[0] in ROUTE_POLICIES else "predicted"
    if sorted(roles) == [Role.MIXED]:
        ((_, hardware),) = counts
        return Candidate(Design((hardware,), name), (counts[(Role.MIXED, hardware)],))
    if sorted(roles) == sorted((Role.PREFILL, Role.DECODE)):
        by_role = {role: (hardware, num) for (role, hardware), num in counts.items()}
        prefill, decode = by_role[Role.PREFILL], by_role[Role.DECODE]
        return Candidate(Design((prefill[0], decode[0]), name), (prefill[1], decode[1]))
    return None
