"""Answers from the simulator: one window, one cluster, the live machines in virtual time.

An observer counts misses as requests end, and breaks the simulation off when the promise is lost.
"""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from pdserve.core.request import DEFAULT_SERVICE, Role, ServiceClass
from pdserve.core.step import StepShape
from pdserve.cost.machine import MachineModel, StepTimer
from pdserve.cost.step import StepModel
from pdserve.sim.observe import Ended, Observer
from pdserve.sim.plan.promise import Bounds, Promise, latencies_of
from pdserve.sim.plan.trial import Candidate, Evaluation, Trial
from pdserve.sim.plan.windows import Windows
from pdserve.sim.settings import SimSettings
from pdserve.sim.simulation import Simulation
from pdserve.workload.summary import percentile

PERCENTS = (50, 90, 99)


class SimEvaluate:
    """Implements ``trial.Evaluate``. ``machines`` by hardware, as designs write it, and role.
    ``template``: the settings of a simulation but for its cluster, machines and policy."""

    def __init__(
        self,
        windows: Windows,
        promise: Promise,
        machines: Mapping[tuple[str, Role], MachineModel],
        template: SimSettings,
    ) -> None:
        self._windows = windows
        self._promise = promise
        self._machines = machines
        self._template = template

    def num_judged(self, window: int) -> int:
        return self._windows.num_judged

    def __call__(self, trial: Trial, allowed: Sequence[int] | None) -> Evaluation:
        began_s = time.perf_counter()
        promise = self._promise.scaled(dict(trial.conditions.looser))
        judge = _Judge(promise, self._windows.lead, allowed)
        slower = dict(trial.conditions.slower)
        settings = replace(self.settings_of(trial.candidate, slower), service=service_of(promise))
        requests = self._windows.at(trial.window, trial.conditions.rate)
        complete = True
        try:
            Simulation(settings, requests, [judge]).run()
        except _LostError:
            complete = False
        return judge.evaluation(
            self._windows.num_judged,
            complete=complete,
            span_s=self._windows.span_s(trial.window, trial.conditions.rate),
            wall_s=time.perf_counter() - began_s,
        )

    def settings_of(self, candidate: Candidate, slower: Mapping[str, float]) -> SimSettings:
        """Of a simulation of the candidate."""
        design = candidate.design
        machines = tuple(
            slowed(self._machines[(name, role)], slower.get(name, 1.0))
            for name, role in zip(design.hardware, design.roles, strict=True)
        )
        template = self._template
        return replace(
            template,
            cluster=candidate.cluster,
            machines=machines,
            policy=design.policy,
            make_policy=template.make_policy if design.policy == template.policy else None,
        )


def service_of(promise: Promise) -> ServiceClass:
    """What policies are told of the promise: they know bounds in milliseconds only."""
    if not isinstance(promise, Bounds):
        return DEFAULT_SERVICE
    bounds_s = {metric: ms / 1e3 for metric, ms in promise.slo.bounds_ms}
    return replace(
        DEFAULT_SERVICE,
        ttft_s=bounds_s.get("ttft", math.inf),
        tpot_s=bounds_s.get("tpot", math.inf),
    )


def slowed(machine: MachineModel, factor: float) -> MachineModel:
    """A machine whose steps take ``factor`` times as long; what the router believes of them does
    as well."""
    if factor == 1.0:
        return machine
    linear = {name: getattr(machine.linear, name) * factor for name in StepModel.__slots__}
    return replace(machine, steps=SlowedTimer(machine.steps, factor), linear=StepModel(**linear))


@dataclass(frozen=True, slots=True)
class SlowedTimer:
    """Implements `StepTimer`."""

    steps: StepTimer
    factor: float

    def step_s(self, shape: StepShape) -> float:
        return self.steps.step_s(shape) * self.factor


class _LostError(Exception):
    """The promise is lost whatever the other requests do."""


class _Judge(Observer):
    def __init__(self, promise: Promise, lead: int, allowed: Sequence[int] | None) -> None:
        self._promise = promise
        self._lead = lead
        self._allowed = allowed
        self._misses = [0] * len(promise.names)
        self._good = 0
        self._ttft_s: list[float] = []
        self._tpot_s: list[float] = []
        self._e2e_s: list[float] = []

    def ended(self, at_s: float, request: Ended) -> None:
        if request.index < self._lead or request.cancelled:
            return
        got = latencies_of(request)
        missed = self._promise.missed(got, request.prompt_tokens, request.output_tokens)
        self._good += not any(missed)
        if not math.isinf(got.e2e):
            self._ttft_s.append(got.ttft)
            self._tpot_s.append(got.tpot)
            self._e2e_s.append(got.e2e)
        for bound, one in enumerate(missed):
            self._misses[bound] += one
            if self._allowed is not None and self._misses[bound] > self._allowed[bound]:
                raise _LostError

    def evaluation(
        self, num_judged: int, *, complete: bool, span_s: float, wall_s: float
    ) -> Evaluation:
        return Evaluation(
            num_judged=num_judged,
            misses=tuple(self._misses),
            complete=complete,
            good=self._good,
            span_s=span_s,
            ttft_s=_percentiles(self._ttft_s),
            tpot_s=_percentiles(self._tpot_s),
            e2e_s=_percentiles(self._e2e_s),
            wall_s=wall_s,
        )


def _percentiles(values: Sequence[float]) -> tuple[float, ...]:
    ordered = sorted(values)
    return tuple(percentile(ordered, percent) for percent in PERCENTS) if ordered else ()
