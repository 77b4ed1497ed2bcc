"""Does the simulator decide as the live server did, given the times that the live run had?

A recording holds when each request came, how long each step took and each message travelled. A
simulation is given these (`RecordedConditions`), and the settings, links and costs that the live
machines were born with, and makes its own decisions: every route is compared with the live one.
Where they differ, both machines are right about what they saw, and the *cause* says what they saw
differently: by the live router's own scores, how far apart the two routes were, and which figure of
them was another in the simulation. A step that only the simulation took, since a batch came
together differently, takes what steps of its shape took.
"""

from __future__ import annotations

import json
import statistics
from collections import defaultdict, deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

from pdserve.calibrate.fit import Neighbours, link_of
from pdserve.core.effects import WorkerUp
from pdserve.core.events import LifeEvent, LifeName
from pdserve.core.ids import AttemptId, Epoch, RequestId, WorkerId
from pdserve.core.messages import Message
from pdserve.core.request import Request, Role
from pdserve.core.step import StepShape
from pdserve.cost.machine import ClusterTimes, LinkSpec, MachineModel, StepTimer
from pdserve.cost.measured_fit import TooFewStepsError, fit_steps
from pdserve.cost.step import StepModel
from pdserve.node.settings import RouterSettings, WorkerSettings
from pdserve.serve.recorded import RanStep, RecordedRun, about
from pdserve.sim.clients import ENDING
from pdserve.sim.clock import Clock
from pdserve.sim.conditions import Delay, Exposed
from pdserve.sim.observe import Observer
from pdserve.sim.settings import SimSettings
from pdserve.sim.simulation import Simulation
from pdserve.sim.spec import ClusterSpec, Group
from pdserve.workload.request import TraceRequest, own_segment

LEAD_S = 1.0
"""Simulated machines are up so long before the first request."""
NEAR = 0.05
"""Two routes whose scores differ by less are nearly the same to the router."""
UNKNOWN_LINK = LinkSpec(bytes_per_s=1e9, fixed_s=1e-3)

Route = tuple[WorkerId, WorkerId]


@dataclass(frozen=True, slots=True, kw_only=True)
class Difference:
    """A request that went elsewhere, and why."""

    request_id: RequestId
    live: Route
    simulated: Route | None
    cause: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Parity:
    """Of all requests that the live router routed. ``same_steps``: the share of the simulated
    steps that took what a live one of their shape did."""

    num_routes: int
    differences: tuple[Difference, ...]
    same_steps: float

    @property
    def same(self) -> float:
        """The share of the routes that are the same."""
        return 1.0 - len(self.differences) / max(1, self.num_routes)


def compare(run: RecordedRun) -> Parity:
    """Simulate the recorded run with its own times."""
    conditions = RecordedConditions(run)
    heard = _Heard()
    settings, requests = conditions.settings()
    Simulation(settings, requests, [heard], conditions).run()
    differences = []
    routed = [request for request in run.requests.values() if request.jobs]
    for request in routed:
        _, job = request.jobs[0]
        live = (job.prefill_worker, job.decode_worker)
        event = heard.routes.get(request.request.request_id)
        simulated = None if event is None else _route_of(event)
        if simulated != live:
            cause = _cause(request.routed[0] if request.routed else None, event, live, simulated)
            differences.append(
                Difference(
                    request_id=request.request.request_id,
                    live=live,
                    simulated=simulated,
                    cause=cause,
                )
            )
    return Parity(
        num_routes=len(routed),
        differences=tuple(differences),
        same_steps=conditions.same_steps,
    )


class _Heard(Observer):
    """The first route of each request."""

    def __init__(self) -> None:
        self.routes: dict[RequestId, LifeEvent] = {}

    def life(self, event: LifeEvent) -> None:
        if event.name is LifeName.ROUTED:
            self.routes.setdefault(event.request_id, event)


# --- conditions as they were recorded ----------------------------------------------------------


class RecordedConditions:
    """Those of a recorded run. Implements ``sim.conditions.Conditions``."""

    delay: Delay | None
    exposed: Exposed | None

    def __init__(self, run: RecordedRun) -> None:
        self._run = run
        self._begun_s = min((request.submitted_s for request in run.requests.values()), default=0.0)
        self._mail = _Delays(run)
        self.delay = self._mail.delay_s
        self.exposed = self._exposed_s
        self._steps: dict[WorkerId, list[RanStep]] = defaultdict(list)
        for step in run.steps:
            self._steps[step.worker].append(step)
        self._timers = self._fits()
        self._pacers: list[RecordedPacer] = []

    @property
    def same_steps(self) -> float:
        num = sum(pacer.num_steps for pacer in self._pacers)
        return sum(pacer.num_same for pacer in self._pacers) / max(1, num)

    def settings(self) -> tuple[SimSettings, Iterator[TraceRequest]]:
        """Of the simulation, and its requests."""
        workers = sorted(self._run.births)
        groups = tuple(self._group(worker) for worker in workers)
        requests = sorted(self._run.requests.values(), key=lambda request: request.submitted_s)
        asked = [
            TraceRequest(
                index=index,
                at_s=request.submitted_s - self._begun_s + LEAD_S,
                segments=(own_segment(index, len(request.request.prompt_token_ids)),),
                output_tokens=max(1, request.num_tokens),
            )
            for index, request in enumerate(requests)
        ]
        any_worker = self._run.settings(workers[0])
        settings = SimSettings(
            cluster=ClusterSpec(groups),
            machines=tuple(self._machine(worker) for worker in workers),
            times=ClusterTimes(message_s=self._mail.usual_s, verify_s=self._verify_s()),
            policy=self._run.policy,
            batching=self._run.births[workers[0]][-1].policy,
            heartbeat_s=any_worker.heartbeat_s,
            request_of=lambda one: _as_simulated(requests[one.index].request),
            stretches=False,
        )
        return settings, iter(asked)

    def router(self) -> RouterSettings:
        return self._run.router

    def worker(
        self, worker: WorkerId, epoch: Epoch, role: Role, machine: MachineModel
    ) -> WorkerSettings:
        return replace(self._run.settings(worker), epoch=epoch)

    def up(self, up: WorkerUp) -> WorkerUp:
        return replace(self._run.workers[up.worker], epoch=up.epoch)

    def pacer(self, clock: Clock, worker: WorkerId, machine: MachineModel) -> RecordedPacer:
        pacer = RecordedPacer(self._steps[worker], machine.steps)
        self._pacers.append(pacer)
        return pacer

    # --- inside -------------------------------------------------------------------------------

    def _exposed_s(self, attempt: AttemptId) -> float | None:
        transfer = self._run.transfers.get(attempt)
        if transfer is None or transfer.sent_s is None or transfer.bound_s is None:
            return None
        return max(0.0, transfer.sent_s - max(transfer.bound_s, transfer.computed_s or 0.0))

    def _group(self, worker: WorkerId) -> Group:
        return Group(count=1, hardware=worker, role=self._run.settings(worker).role)

    def _machine(self, worker: WorkerId) -> MachineModel:
        settings = self._run.settings(worker)
        layout = settings.layout
        link = link_of(list(self._run.transfers.values()), layout.num_layers)
        timer = self._timers[worker]
        return MachineModel(
            name=worker,
            model=layout.weights_digest,
            steps=timer,
            linear=timer if isinstance(timer, StepModel) else self._linear(worker),
            num_layers=layout.num_layers,
            token_kv_bytes=layout.pool_bytes(1) // layout.block_size,
            block_size=layout.block_size,
            num_blocks=settings.num_blocks,
            max_model_tokens=settings.max_model_tokens,
            link=UNKNOWN_LINK if link is None else link.spec,
        )

    def _linear(self, worker: WorkerId) -> StepModel:
        steps = self._steps[worker]
        usual_s = statistics.median(step.elapsed_s for step in steps) if steps else 1e-3
        return StepModel(
            prompt_base_s=usual_s,
            per_prompt_token_s=0.0,
            per_pair_s=0.0,
            decode_base_s=usual_s,
            per_sequence_s=0.0,
            per_context_token_s=0.0,
        )

    def _fits(self) -> dict[WorkerId, StepTimer]:
        """For steps that were not recorded: of a worker's own, of all, or the usual time."""
        beside = Neighbours(self._run.steps)
        timed = {w: [beside.timed(step) for step in of] for w, of in self._steps.items()}
        every = [step for of in timed.values() for step in of]
        found: dict[WorkerId, StepTimer] = {}
        for worker in self._run.births:
            for samples in (timed.get(worker, []), every):
                try:
                    found[worker] = fit_steps(samples).steps
                    break
                except TooFewStepsError:
                    found[worker] = self._linear(worker)
        return found

    def _verify_s(self) -> float:
        checks = [
            transfer.verified_s - transfer.verify_asked_s
            for transfer in self._run.transfers.values()
            if transfer.verified_s is not None and transfer.verify_asked_s is not None
        ]
        return statistics.median(checks) if checks else 0.0


class RecordedPacer:
    """Steps take what the live worker's took: the one of the same number if it has the same shape,
    else one of that shape, else what a fit says. Implements ``sim.conditions.Pacer``."""

    def __init__(self, steps: list[RanStep], timer: StepTimer) -> None:
        self.moved: Callable[[float], None] = lambda end_s: None
        self.num_steps = 0
        self.num_same = 0
        self._steps = steps
        self._timer = timer
        self._by_shape: dict[StepShape, deque[RanStep]] = defaultdict(deque)
        for step in steps:
            self._by_shape[step.shape].append(step)
        gaps_s = [step.gap_s for step in steps]
        self._gap_s = max(0.0, statistics.median(gaps_s)) if gaps_s else 0.0

    def begin(self, shape: StepShape, asked_s: float) -> tuple[float, float]:
        place, self.num_steps = self.num_steps, self.num_steps + 1
        step = self._steps[place] if place < len(self._steps) else None
        if step is None or step.shape != shape:
            same = self._by_shape.get(shape)
            step = None if not same else same[0]
            if same:
                same.rotate(-1)
        if step is None:
            begun_s = asked_s + self._gap_s
            return begun_s, begun_s + self._timer.step_s(shape)
        self.num_same += 1
        begun_s = asked_s + max(0.0, step.gap_s)
        return begun_s, begun_s + step.elapsed_s

    def end(self) -> None:
        """Nobody is waiting for it."""

    def rest(self) -> None:
        """As above."""


class _Delays:
    """How long messages took: each as its live counterpart, if it has one, else as others of its
    kind on its link. ``usual_s``: the median of all."""

    def __init__(self, run: RecordedRun) -> None:
        self._own: dict[tuple[Any, ...], deque[float]] = defaultdict(deque)
        by_kind: dict[tuple[Any, ...], list[float]] = defaultdict(list)
        for mail in run.mail:
            link = (mail.sender, mail.receiver, mail.kind)
            self._own[(*link, mail.about)].append(mail.delay_s)
            by_kind[link].append(mail.delay_s)
        self._kinds = {link: statistics.median(of) for link, of in by_kind.items()}
        every = [mail.delay_s for mail in run.mail]
        self.usual_s = statistics.median(every) if every else 1e-4

    def delay_s(self, sender: WorkerId, receiver: WorkerId, message: Message) -> float:
        link = (sender, receiver, type(message).__name__)
        own = self._own.get((*link, about(message)))
        if own:
            return own.popleft()
        return self._kinds.get(link, self.usual_s)


def _as_simulated(request: Request) -> Request:
    """The answer ends where it did, for whatever reason it did."""
    params = replace(
        request.params, eos_token_ids=(ENDING,), ignore_eos=False, stop_token_ids=(), min_tokens=0
    )
    return replace(request, params=params)


# --- causes ------------------------------------------------------------------------------------


def _route_of(event: LifeEvent) -> Route:
    detail = dict(event.detail)
    return WorkerId(str(detail["prefill"])), WorkerId(str(detail["decode"]))


def _cause(
    live_event: LifeEvent | None,
    sim_event: LifeEvent | None,
    live: Route,
    simulated: Route | None,
) -> str:
    if sim_event is None or simulated is None:
        return "the simulated router did not route it"
    live_scores, sim_scores = _candidates(live_event), _candidates(sim_event)
    mine, other = live_scores.get(live), live_scores.get(simulated)
    if not sim_scores or mine is None:
        reasons = [dict(e.detail).get("reason", "") if e else "" for e in (live_event, sim_event)]
        return f"live: {reasons[0]}; simulated: {reasons[1]}"
    if other is None:
        return "the live router did not consider the simulated route"
    apart_ms = other["score_ms"] - mine["score_ms"]
    text = f"live scores were {apart_ms:.1f} ms apart of {mine['score_ms']:.1f}"
    if abs(apart_ms) <= NEAR * abs(mine["score_ms"]):
        text = "nearly a tie: " + text
    changes = []
    for route, scores in live_scores.items():
        for name, value in scores.items():
            seen = sim_scores.get(route, {}).get(name)
            if name.endswith("_ms") and name != "score_ms" and seen is not None and seen != value:
                changes.append((abs(seen - value), f"{name} of {'+'.join(route)}", value, seen))
    if changes:
        _, name, value, seen = max(changes)
        text += f"; {name} was {value:.1f} live and {seen:.1f} simulated"
    return text


def _candidates(event: LifeEvent | None) -> dict[Route, dict[str, float]]:
    """Scores by route, of policies that say them."""
    written = dict(event.detail).get("candidates") if event is not None else None
    if not isinstance(written, str):
        return {}
    found = {}
    for candidate in json.loads(written):
        route = (WorkerId(candidate["prefill"]), WorkerId(candidate["decode"]))
        found[route] = {k: v for k, v in candidate.items() if isinstance(v, int | float)}
    return found
