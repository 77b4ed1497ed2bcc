"""From options to a problem: the windows of the trace, machines, designs, prices, the promise."""

from __future__ import annotations

import argparse
import hashlib
import itertools
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from pdserve.core.errors import ConfigError, UnknownNameError
from pdserve.core.request import Role
from pdserve.core.step import StepShape
from pdserve.cost.machine import MachineModel, StepTimer
from pdserve.service_classes import ONE_CLASS
from pdserve.sim.arguments import SimOptions, declared, machine_options
from pdserve.sim.command import settings_of
from pdserve.sim.machines import SPLITWISESIM
from pdserve.sim.plan.arguments import PlanOptions
from pdserve.sim.plan.bounds import WorkBounds
from pdserve.sim.plan.change import UNIT_OF_COST
from pdserve.sim.plan.promise import NINE_LIMITS, Bounds, Promise, Slowdowns
from pdserve.sim.plan.race import Goal, Measure, Prices
from pdserve.sim.plan.sureness import ASSUMED_ERROR
from pdserve.sim.plan.trial import Candidate, Design
from pdserve.sim.plan.windows import MIN_REQUESTS, Windows, cut
from pdserve.sim.settings import SimSettings
from pdserve.sim.spec import ClusterSpec, Group, parse_cluster
from pdserve.workload.arguments import workload_options
from pdserve.workload.build import build_open
from pdserve.workload.options import WorkloadOptions
from pdserve.workload.request import TraceRequest

MAX_REQUESTS = 200_000
"""More of a trace are not held in memory."""
MAX_WINDOWED = 1_000_000
"""Of all windows; more would be simulated for hours."""
_ADDRESS = re.compile(r" at 0x[0-9a-f]+")
"""Of a function, as its ``repr`` has it."""
SAMPLE = 2000
"""Requests from which the rate that a budget can serve is estimated."""
Machines = Mapping[tuple[str, Role], MachineModel]


@dataclass(frozen=True, slots=True, kw_only=True)
class Problem:
    """``machines`` by hardware (as designs write it) and role. ``template``: settings of every
    simulation but for cluster, machines and policy. ``notes``: what the user should know of how
    the problem was put. ``present``: the layout that is there."""

    windows: Windows
    machines: Machines
    template: SimSettings
    promise: Promise
    goal: Goal
    designs: tuple[Design, ...]
    prices: Prices
    unit: str
    errors: Mapping[str, float]
    notes: tuple[str, ...] = ()
    present: Candidate | None = None

    @property
    def digest(self) -> str:
        """Of everything that an evaluation depends on, beside its trial."""
        template = replace(self.template, machines=(), cluster=ClusterSpec(()))
        machines = sorted(
            (name, role.value, repr(replace(machine, steps=machine.linear)), _times(machine.steps))
            for (name, role), machine in self.machines.items()
        )
        promise = self.promise
        reference = _times(promise.reference) if isinstance(promise, Slowdowns) else ()
        parts = (self.windows.digest, machines, repr(template), str(promise), reference)
        text = _ADDRESS.sub("", repr(parts))
        return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()

    @property
    def by_hardware(self) -> dict[str, MachineModel]:
        return {
            name: machine for (name, role), machine in self.machines.items() if role is Role.MIXED
        }


def _times(steps: StepTimer) -> tuple[float, ...]:
    """What tells one timer from another: some of its times."""
    sizes = [2**power for power in range(0, 15, 2)]
    prompts = (StepShape(prompt_tokens=n, prompt_pairs=n * n) for n in sizes)
    decodes = (
        StepShape(num_decoding=n, context_tokens=n * length) for n in sizes[:5] for length in sizes
    )
    both = (
        StepShape(prompt_tokens=n, prompt_pairs=n * n, num_decoding=8, context_tokens=8 * n)
        for n in sizes
    )
    return tuple(steps.step_s(shape) for shape in itertools.chain(prompts, decodes, both))


def problem_of(options: PlanOptions) -> Problem:
    """Raises `ConfigError` for a trace, a hardware or a combination that cannot be used."""
    parsed = options.parsed
    trace = read_requests(workload_of(parsed))
    names = (*options.hardware, *((options.reference,) if options.reference else ()))
    machines, template, left_out = make_machines(options, tuple(dict.fromkeys(names)), trace)
    hardware = [name for name in options.hardware if (name, Role.MIXED) in machines]
    promise = promise_of(options, machines)
    machines = {key: machine for key, machine in machines.items() if key[0] in hardware}
    fitting, note = fitting_requests(trace, machines)
    own_rate = (len(fitting) - 1) / max(fitting[-1].at_s - fitting[0].at_s, 1e-9)
    goal = options.goal or Goal(Measure(parsed.measure), rate=own_rate)
    designs = designs_of(hardware, options.split_policies, options.mixed_policies)
    prices, unit = prices_of(machines, options.prices)
    rate = goal.rate or likely_rate(fitting, machines, promise, designs, prices, goal, parsed)
    windows = cut_for(fitting, rate, parsed)
    return Problem(
        windows=windows,
        machines=machines,
        template=template,
        promise=promise,
        goal=goal,
        designs=designs,
        prices=prices,
        unit=unit,
        errors=errors_of(machines, parsed.error),
        notes=tuple(
            text
            for text in (
                *left_out,
                _many_note(trace),
                note,
                short_note(fitting, windows, rate, goal),
            )
            if text
        ),
    )


def workload_of(parsed: argparse.Namespace) -> WorkloadOptions:
    """The traffic at its own pace: a trace's, or generated at one request per second."""
    traced = parsed.trace is not None
    unused = {
        "burstiness": None,
        "amplitude": None,
        "period": None,
        "rates": None,
        "duration": None,
    }
    whole = argparse.Namespace(
        **{
            **unused,
            **vars(parsed),
            "arrivals": "trace" if traced else "poisson",
            "rate": None if traced else 1.0,
            "rate_scale": 1.0,
            "keep_times": False,
        }
    )
    if not traced and parsed.num_requests is None:
        whole.num_requests = SAMPLE * 2
    return workload_options(whole)


def read_requests(workload: WorkloadOptions) -> list[TraceRequest]:
    """The first of them, if they are very many. Raises `ConfigError`."""
    requests = list(itertools.islice(build_open(workload).requests, MAX_REQUESTS))
    if len(requests) < MIN_REQUESTS:
        raise ConfigError(
            f"{len(requests)} requests say too little: widen --window or the trace to at least "
            f"{MIN_REQUESTS}"
        )
    return requests


def make_machines(
    options: PlanOptions, hardware: Sequence[str], trace: Sequence[TraceRequest]
) -> tuple[dict[tuple[str, Role], MachineModel], SimSettings, list[str]]:
    """Of all hardware that can serve the model, in every role; and why others are left out. Raises
    `ConfigError` if none can, and for a name that nobody knows."""
    made: dict[tuple[str, Role], MachineModel] = {}
    template: SimSettings | None = None
    refused: list[str] = []
    for name in hardware:
        groups = tuple(_group(name, role) for role in Role)
        try:
            template = settings_of(_sim_options(options, ClusterSpec(groups)), trace[:SAMPLE])
        except UnknownNameError:
            raise
        except ConfigError as error:
            refused.append(f"{name} is left out: {error}")
            continue
        made |= {
            (name, role): machine for role, machine in zip(Role, template.machines, strict=True)
        }
    if template is None or not any(name in options.hardware for name, _ in made):
        raise ConfigError("; ".join(refused))
    return made, replace(template, service_of=None), refused


def promise_of(options: PlanOptions, machines: Machines) -> Promise:
    """Raises `ConfigError` if the reference of slowdowns cannot serve the model."""
    if options.slo is not None:
        return Bounds(options.slo, options.parsed.target)
    reference = machines.get((options.reference, Role.MIXED))
    if reference is None:
        raise ConfigError(
            f"{options.reference}, the reference of slowdowns, cannot serve the model"
        )
    theirs = options.parsed.profile == SPLITWISESIM
    return Slowdowns(reference.steps, options.reference, NINE_LIMITS, theirs)


def fitting_requests(
    trace: Sequence[TraceRequest], machines: Machines
) -> tuple[list[TraceRequest], str]:
    """Those that every machine can hold; and what to say of the others."""
    longest = min(machine.max_model_tokens for machine in machines.values())
    fitting = [r for r in trace if r.prompt_tokens + r.output_tokens <= longest]
    if len(fitting) < MIN_REQUESTS:
        raise ConfigError(
            f"only {len(fitting)} requests of the trace fit the {longest} tokens that the model "
            "and the memory of these machines allow: take another model, or more memory"
        )
    num = len(trace) - len(fitting)
    note = f"left out: {num} of {len(trace)} requests, longer than {longest} tokens"
    return fitting, note if num else ""


def designs_of(
    hardware: Sequence[str], split: Sequence[str], mixed: Sequence[str]
) -> tuple[Design, ...]:
    """Every pair for prefill and decode, and every hardware by itself for both."""
    pairs = itertools.product(itertools.product(hardware, repeat=2), split)
    singles = itertools.product(hardware, mixed)
    return (
        *(Design(pair, policy) for pair, policy in pairs),
        *(Design((name,), policy) for name, policy in singles),
    )


def prices_of(machines: Machines, given: Mapping[str, float]) -> tuple[Prices, str]:
    """What a worker costs and draws, and in which unit; where nothing has a price, a worker costs
    one. Raises `ConfigError` if only some have."""
    names = sorted({name for name, _ in machines})
    for name in given:
        if name not in names:
            raise ConfigError(f"--price names {name!r}; the hardware is {', '.join(names)}")
    cost = {name: given.get(name, machines[(name, Role.MIXED)].price_per_hour) for name in names}
    unpriced = [name for name, price in cost.items() if not price > 0]
    if unpriced and len(unpriced) < len(names):
        raise ConfigError(f"no price of {', '.join(unpriced)} is known: give --price NAME=PRICE")
    if unpriced:
        cost = dict.fromkeys(names, 1.0)
    watts = {}
    for (name, role), machine in machines.items():
        power = machine.power
        needed = {
            Role.PREFILL: power.prompt_w,
            Role.DECODE: power.decode_w,
            Role.MIXED: max(power.prompt_w, power.decode_w),
        }[role]
        watts[(name, role)] = max(needed, 1e-9)
    return Prices(cost, watts), "workers" if unpriced else UNIT_OF_COST


def errors_of(machines: Machines, given: float | None) -> dict[str, float]:
    """Mean relative error of step times, by hardware."""
    errors = {}
    for (name, role), machine in machines.items():
        if role is Role.MIXED:
            known = machine.error if machine.error is not None else ASSUMED_ERROR
            errors[name] = known if given is None else given
    return errors


def likely_rate(
    trace: Sequence[TraceRequest],
    machines: Machines,
    promise: Promise,
    designs: Sequence[Design],
    prices: Prices,
    goal: Goal,
    parsed: argparse.Namespace,
) -> float:
    """About what a budget can serve at most."""
    assert goal.budget is not None
    sample = cut(trace[:SAMPLE], 1, min(len(trace), SAMPLE), poisson=0)
    mixed = {name: machine for (name, role), machine in machines.items() if role is Role.MIXED}
    bounds = WorkBounds(sample, 1, mixed, promise, prefix_cache=parsed.prefix_cache)
    rates = []
    for design in designs:
        weights = prices.weights(design, goal.measure)
        needs = bounds.likely(design, 1.0)
        each = sum(need * weight for need, weight in zip(needs, weights, strict=True))
        rates.append(goal.budget / each)
    return max(rates)


def cut_for(trace: Sequence[TraceRequest], rate: float, parsed: argparse.Namespace) -> Windows:
    """Windows of as many seconds as asked for. Raises `ConfigError` if they are huge."""
    num_each = max(MIN_REQUESTS, round(rate * parsed.window_s))
    if num_each * parsed.windows > MAX_WINDOWED:
        raise ConfigError(
            f"{parsed.windows} windows of {parsed.window_s:g} s at {rate:g} requests/s are "
            f"{num_each * parsed.windows} requests: ask for shorter ones (--window-s), or for a "
            "part of the rate, since clusters of hundreds of workers grow in proportion"
        )
    poisson = parsed.seed if parsed.arrivals == "poisson" or trace[-1].at_s <= 0 else None
    if parsed.trace is None and not parsed.live:
        poisson = parsed.seed
    return cut(trace, parsed.windows, num_each, poisson=poisson)


def short_note(trace: Sequence[TraceRequest], windows: Windows, rate: float, goal: Goal) -> str:
    """For a trace that is too short for what it shall say."""
    num_each = len(windows.requests[0])
    laps = num_each * len(windows) / len(trace)
    if laps <= 1:
        return ""
    guessed = " (a first guess at the most)" if goal.rate is None else ""
    return (
        f"at {rate:.3g} requests/s{guessed} the trace lasts only {len(trace) / rate:.3g} s: each "
        f"of the {len(windows)} windows repeats its part of it {laps:.2g} times"
    )


def _many_note(trace: Sequence[TraceRequest]) -> str:
    if len(trace) < MAX_REQUESTS:
        return ""
    return f"only the first {MAX_REQUESTS} requests are looked at: choose others with --window"


def _group(name: str, role: Role) -> Group:
    """Raises `ConfigError` for what is no hardware's name."""
    hardware, at, link = name.partition("@")
    try:
        return replace(parse_cluster(f"1x{hardware}:mixed{at}{link}").groups[0], role=role)
    except ConfigError:
        raise ConfigError(
            f"--hardware {name!r}: write names and commas between, as h100,a100-tp4,h100@ib-200; "
            "how many, and in which role, is what the plan finds"
        ) from None


def _sim_options(options: PlanOptions, cluster: ClusterSpec) -> SimOptions:
    parsed = argparse.Namespace(**vars(options.parsed))
    parsed.sample_interval = 60.0
    parsed.load_time = SimSettings.__dataclass_fields__["load_s"].default
    return SimOptions(
        cluster=cluster,
        machines=machine_options(parsed),
        workload=workload_of(parsed),
        classes=ONE_CLASS,
        service_of=None,
        declared_tokens=declared(parsed.declared_tokens),
        slo=None,
        scenario=None,
        parsed=parsed,
    )
