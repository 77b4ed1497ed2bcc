"""From a recording, and what the client saw, to a profile.

Steps are grouped by the kind of worker that ran them (weights, engine, device, numerics class: what
`cost.store.StepKey` says takes the same time), whatever their roles. Each step knows for how long
neighbours on the host computed beside it and how many tokens they drew, and how many messages came
meanwhile. The link is what transfers show that had it for themselves. Messages and the edge take
their median over requests that did not come in a burst: in one they wait for the processes at their
ends, which is no delay of theirs, and a calibration sends most of its requests in bursts; of
messages only those count that come once a request, since the many that bring a token each would
outvote them. Of the gap between two steps the mean counts, since every token pays it, without the
hundredth on either side; it is told apart by kind of step, and by whether a neighbour computed.
"""

from __future__ import annotations

import statistics
from bisect import bisect_left
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import replace
from math import inf

from pdserve.calibrate.live import Asked
from pdserve.core.errors import ConfigError
from pdserve.core.ids import RequestId, WorkerId
from pdserve.core.request import Role
from pdserve.cost.machine import ClusterTimes, LinkSpec
from pdserve.cost.measured_fit import FitError, StepsFit, TimedStep, TooFewStepsError, fit_steps
from pdserve.cost.nonnegative import Moments, nonnegative_fit
from pdserve.cost.pace import DECODE, KINDS, PROMPT, Gap, kind_of
from pdserve.cost.profile import Host, LinkFit, Machine, Profile
from pdserve.cost.store import StepKey
from pdserve.serve.recorded import Mail, RanStep, RanTransfer, RecordedRun

URGENT = {"StartJob", "Header", "Ticket", "Trailer", "Accepted"}
"""Messages that a request waits for, once each."""
LEAST_TRANSFERS = 4
LEAST_GAPS = 8
"""Fewer say nothing of their own."""
BURST_S = 0.02
"""Requests that come within this time of each other wait for each other in the gateway."""
LEAST_CALM = 8
UNEVEN = 0.15
"""A median error above this says that something else used the machine, or that it is out of what
the fit can say."""


def profile_of(
    run: RecordedRun,
    asked: Asked,
    *,
    name: str,
    made: str,
    model: str,
    host: Host,
    flags: tuple[str, ...],
    threads: int,
) -> Profile:
    """Raises `ConfigError` if the recording says too little, or is of an engine that batches for
    itself."""
    if run.foreign or not run.steps:
        raise ConfigError(
            "calibrate measures the steps of engines that batch by our policies, and this engine "
            "batches for itself"
        )
    steps = [step for step in run.steps if not step.failed and asked.holds(step.asked_s)]
    beside = Neighbours(steps, run.mail)
    machines = []
    for workers in _alike(run):
        own = [step for step in steps if step.worker in workers]
        if own:
            machines.append(_machine(run, asked, workers, own, beside, threads))
    transfers = [t for t in run.transfers.values() if asked.holds(t.opened_s)]
    layers = machines[0].num_layers
    workers_by_role: dict[str, int] = defaultdict(int)
    for worker in run.births:
        workers_by_role[run.settings(worker).role.value] += 1
    return Profile(
        name=name,
        made=made,
        model=model,
        host=host,
        flags=flags,
        workers=dict(workers_by_role),
        machines=tuple(machines),
        link=link_of(transfers, layers),
        times=times_of(run, asked),
        warnings=tuple(_warnings(machines)),
    )


def _alike(run: RecordedRun) -> list[set[WorkerId]]:
    groups: dict[StepKey, set[WorkerId]] = defaultdict(set)
    for worker, up in sorted(run.workers.items()):
        assert up.layout is not None
        key = StepKey(up.layout.weights_digest, up.engine, up.device, up.layout.numerics)
        groups[key].add(worker)
    return list(groups.values())


def _machine(
    run: RecordedRun,
    asked: Asked,
    workers: set[WorkerId],
    steps: Sequence[RanStep],
    beside: Neighbours,
    threads: int,
) -> Machine:
    samples = [
        replace(
            beside.timed(step),
            is_usual=asked.is_usual(step.asked_s),
            round=asked.round_of(step.asked_s) or 0,
        )
        for step in steps
    ]
    fit = _fit(samples, workers)
    any_worker = min(workers)
    up, settings = run.workers[any_worker], run.settings(any_worker)
    layout = settings.layout
    roles = {run.settings(worker).role for worker in workers}
    return Machine(
        roles=tuple(role for role in Role if role in roles),
        device=up.device,
        engine=up.engine,
        numerics=layout.numerics,
        threads=threads,
        num_layers=layout.num_layers,
        token_kv_bytes=layout.pool_bytes(1) // layout.block_size,
        block_size=layout.block_size,
        num_blocks=settings.num_blocks,
        max_model_tokens=settings.max_model_tokens,
        prompt=fit.steps.kinds[PROMPT],
        decode=fit.steps.kinds[DECODE],
        mixed=fit.steps.kinds.get("mixed"),
        linear=fit.linear,
        measured=fit.measured,
        errors=fit.errors,
        spreads=fit.spreads,
        lost=fit.lost,
        gaps=gaps_of(steps, samples),
    )


def gaps_of(steps: Sequence[RanStep], samples: Sequence[TimedStep]) -> dict[str, Gap]:
    """By kind of step, of usual ones if there are enough; a neighbour counts if it computed for
    half of the step."""
    gaps_s: dict[tuple[str, bool], list[tuple[bool, float]]] = defaultdict(list)
    for step, sample in zip(steps, samples, strict=True):
        beside_s = sample.beside_prompt_s + sample.beside_decode_s
        gap = (sample.is_usual, step.gap_s)
        gaps_s[kind_of(step.shape), beside_s > 0.5 * step.elapsed_s].append(gap)
    found = {}
    for kind in KINDS:
        alone, beside = (_usual(gaps_s[kind, which], LEAST_GAPS) for which in (False, True))
        if len(alone) + len(beside) >= LEAST_GAPS:
            both = [of if len(of) >= LEAST_GAPS else alone + beside for of in (alone, beside)]
            found[kind] = Gap(alone_s=_inner_mean(both[0]), beside_s=_inner_mean(both[1]))
    return found


def _usual(values: Sequence[tuple[bool, float]], least: int) -> list[float]:
    """The usual ones, or all if there are too few of those."""
    usual = [value for is_usual, value in values if is_usual]
    return usual if len(usual) >= least else [value for _, value in values]


def _fit(samples: list[TimedStep], workers: set[WorkerId]) -> StepsFit:
    try:
        return fit_steps(samples)
    except TooFewStepsError as error:
        raise ConfigError(
            f"{', '.join(sorted(workers))} ran too few {error} steps to be measured; calibrate for "
            "longer (--seconds), or with the same dtypes on both sides"
        ) from error


def _warnings(machines: Iterable[Machine]) -> Iterable[str]:
    for machine in machines:
        for kind, error in machine.errors.items():
            if error.median > UNEVEN:
                yield (
                    f"{kind} steps are off by {error.median:.0%} in the median: was anything else "
                    "running on this machine?"
                )


class Neighbours:
    """What was beside a step: for how long other workers computed, from when one of their steps was
    asked for, since its worker does not rest in between, until it was done; how many tokens they
    drew for answers that go on; and how many messages its own worker got."""

    def __init__(self, steps: Sequence[RanStep], mail: Sequence[Mail] = ()) -> None:
        """All steps and messages of all workers."""
        self._steps: dict[WorkerId, list[RanStep]] = defaultdict(list)
        for step in sorted(steps, key=lambda step: step.done_s):
            self._steps[step.worker].append(step)
        self._ends = {w: [step.done_s for step in of] for w, of in self._steps.items()}
        self._heard_s: dict[WorkerId, list[float]] = defaultdict(list)
        for one in mail:
            self._heard_s[one.receiver].append(one.received_s)
        for times_s in self._heard_s.values():
            times_s.sort()

    def timed(self, step: RanStep) -> TimedStep:
        """The step with what was beside it."""
        beside = {True: 0.0, False: 0.0}
        num_drawn = 0
        for worker, others in self._steps.items():
            if worker == step.worker:
                continue
            for other in others[bisect_left(self._ends[worker], step.begun_s) :]:
                if other.asked_s >= step.done_s:
                    break
                together_s = min(other.done_s, step.done_s) - max(other.asked_s, step.begun_s)
                beside[kind_of(other.shape) == DECODE] += max(0.0, together_s)
                if other.done_s < step.done_s:
                    num_drawn += other.shape.num_decoding
        heard_s = self._heard_s.get(step.worker, [])
        num_heard = bisect_left(heard_s, step.done_s) - bisect_left(heard_s, step.begun_s)
        times_s = (step.elapsed_s, beside[False], beside[True])
        return TimedStep(step.shape, *times_s, num_heard, num_drawn)


# --- links, messages, the edge -----------------------------------------------------------------


def link_of(transfers: Sequence[RanTransfer], num_layers: int) -> LinkFit | None:
    """What was still to be sent when the prompt was computed, over how long that took: all of it in
    one shot, the last layer if layer by layer (whose earlier ones went while others computed)."""
    samples: list[tuple[float, float]] = []
    for transfer in _alone(transfers):
        if transfer.sent_s is None or transfer.bound_s is None or not transfer.num_bytes:
            continue
        since_s = max(transfer.bound_s, transfer.computed_s or 0.0)
        share = 1.0 if transfer.one_shot or transfer.computed_s is None else 1.0 / num_layers
        samples.append((share * transfer.num_bytes, max(0.0, transfer.sent_s - since_s)))
    if len(samples) < LEAST_TRANSFERS:
        return None
    fixed_s, byte_s = _line(samples)
    errors = []
    for place, (num_bytes, seconds) in enumerate(samples):
        rest_fixed_s, rest_byte_s = _line(samples[:place] + samples[place + 1 :])
        errors.append(abs(rest_fixed_s + rest_byte_s * num_bytes - seconds))
    spec = LinkSpec(bytes_per_s=1.0 / max(byte_s, 1e-12), fixed_s=fixed_s)
    return LinkFit(spec=spec, num_transfers=len(samples), error_s=statistics.median(errors))


def _alone(transfers: Sequence[RanTransfer]) -> list[RanTransfer]:
    """Those during which none of the others was under way."""
    whole = [t for t in transfers if t.sent_s is not None]
    whole.sort(key=lambda transfer: transfer.opened_s)
    kept = []
    last_end_s = 0.0
    for place, transfer in enumerate(whole):
        end_s = transfer.sent_s or 0.0
        next_s = whole[place + 1].opened_s if place + 1 < len(whole) else float("inf")
        if last_end_s <= transfer.opened_s and end_s <= next_s:
            kept.append(transfer)
        last_end_s = max(last_end_s, end_s)
    return kept


def _line(samples: Sequence[tuple[float, float]]) -> tuple[float, float]:
    """(constant, slope), neither below 0, by least squares, so that means come out right; without
    the slowest fiftieth."""
    kept = sorted(samples, key=lambda sample: sample[1])
    kept = kept[: len(kept) - len(kept) // 50]
    moments = Moments(2)
    for num_bytes, seconds in kept:
        moments.add((1.0, num_bytes), seconds, 1.0)
    fixed_s, byte_s = nonnegative_fit(moments)
    return fixed_s, byte_s


def times_of(run: RecordedRun, asked: Asked) -> ClusterTimes:
    """Delays of what a request waits for, of those that did not come in a burst."""
    calm = _calm(run, asked)
    mail = [m for m in run.mail if m.kind in URGENT and asked.holds(m.sent_s)]
    mail_s = [m.delay_s for m in mail if m.about in calm] or [m.delay_s for m in mail]
    gaps_s = [step.gap_s for step in run.steps if asked.holds(step.asked_s)]
    edge_in_s, edge_out_s = [], []
    for outcome in asked.outcomes:
        request = run.requests.get(RequestId(outcome.response_id))
        if request is None or not request.delivered_s or outcome.first_s is None:
            continue
        if request.request.request_id in calm:
            edge_in_s.append(max(0.0, request.submitted_s - outcome.sent_s))
            edge_out_s.append(max(0.0, outcome.first_s - request.delivered_s[0]))
    checks = [
        (float(t.num_bytes), t.verified_s - t.verify_asked_s)
        for t in run.transfers.values()
        if t.verified_s is not None and t.verify_asked_s is not None and asked.holds(t.opened_s)
    ]
    verify_s, verify_byte_s = _line(checks) if len(checks) >= LEAST_TRANSFERS else (0.0, 0.0)
    return ClusterTimes(
        message_s=_median(mail_s),
        edge_in_s=_median(edge_in_s),
        edge_out_s=_median(edge_out_s),
        step_gap_s=_inner_mean(gaps_s),
        verify_byte_s=verify_byte_s,
        verify_s=verify_s,
    )


def _calm(run: RecordedRun, asked: Asked) -> set[RequestId]:
    """Requests of the calibration that the router did not get together with others, as it gets the
    batches that the calibration sends at one moment; all of them, if there are hardly any."""
    own = sorted(
        (request.submitted_s, request_id)
        for request_id, request in run.requests.items()
        if asked.holds(request.submitted_s)
    )
    times_s = [-inf, *(submitted_s for submitted_s, _ in own), inf]
    calm = {
        request_id
        for place, (submitted_s, request_id) in enumerate(own, 1)
        if times_s[place - 1] + BURST_S < submitted_s < times_s[place + 1] - BURST_S
    }
    return calm if len(calm) >= LEAST_CALM else {request_id for _, request_id in own}


def _median(values: Sequence[float]) -> float:
    """Of delays; 0 of none."""
    return max(0.0, statistics.median(values)) if values else 0.0


def _inner_mean(values: Sequence[float]) -> float:
    """The mean without the hundredth on either side; 0 of none."""
    cut = len(values) // 100
    kept = sorted(values)[cut : len(values) - cut]
    return max(0.0, statistics.fmean(kept)) if kept else 0.0


def errors_of(profile: Profile) -> list[tuple[Machine, str, FitError]]:
    """Every error of the profile, to be shown."""
    return [(m, kind, error) for m in profile.machines for kind, error in m.errors.items()]
