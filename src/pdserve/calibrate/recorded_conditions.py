"""The conditions of a recorded run, for a simulation of it: births, steps, messages, transfers.

Simulated time is that of the recording, from when its router began. Machines get the settings that
the live ones were born with, and are ready when those were.
"""

from __future__ import annotations

import statistics
from bisect import bisect_left
from collections import defaultdict, deque
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

from pdserve.calibrate.fit import Neighbours, link_of
from pdserve.core.effects import WorkerUp
from pdserve.core.ids import GATEWAY, AttemptId, Epoch, WorkerId
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
from pdserve.sim.settings import SimSettings
from pdserve.sim.spec import ClusterSpec, Group
from pdserve.workload.request import TraceRequest, own_segment

SAME_TIME_S = 0.1
"""What was recorded further away than this says nothing about a moment."""
UNKNOWN_LINK = LinkSpec(bytes_per_s=1e9, fixed_s=1e-3)


class RecordedConditions:
    """Those of a recorded run. Implements ``sim.conditions.Conditions``."""

    delay: Delay | None
    exposed: Exposed | None

    def __init__(self, run: RecordedRun) -> None:
        self._run = run
        self._begun_s = run.started_s[GATEWAY]
        self._mail = _Delays(run, self._begun_s)
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
                at_s=request.submitted_s - self._begun_s,
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

    def starts_s(self, worker: WorkerId) -> float:
        return self._run.started_s[worker] - self._begun_s

    def up(self, up: WorkerUp) -> WorkerUp:
        return replace(self._run.workers[up.worker], epoch=up.epoch)

    def pacer(self, clock: Clock, worker: WorkerId, machine: MachineModel) -> RecordedPacer:
        pacer = RecordedPacer(self._steps[worker], machine.steps, self._begun_s)
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
    """Steps take what the live worker's took at that time. Implements ``sim.conditions.Pacer``.

    A simulated step is that of the live ones not yet used which was asked for at nearly the same
    moment; of another shape, it takes so much more or less as a fit says. So what held up a live
    worker holds up the simulated one once, at the same time, in whatever batch it finds it.
    """

    def __init__(self, steps: list[RanStep], timer: StepTimer, lead_s: float) -> None:
        """``lead_s``: what is to be added to simulated time to get that of the recording."""
        self.moved: Callable[[float], None] = lambda end_s: None
        self.num_steps = 0
        self.num_same = 0
        self._steps = steps
        self._asked_s = [step.asked_s for step in steps]
        self._timer = timer
        self._lead_s = lead_s
        self._next = 0
        gaps_s = [step.gap_s for step in steps]
        self._gap_s = max(0.0, statistics.median(gaps_s)) if gaps_s else 0.0

    def begin(self, shape: StepShape, asked_s: float) -> tuple[float, float]:
        self.num_steps += 1
        step = self._at(asked_s + self._lead_s)
        if step is None:
            begun_s = asked_s + self._gap_s
            return begun_s, begun_s + self._timer.step_s(shape)
        begun_s = asked_s + max(0.0, step.gap_s)
        if step.shape == shape:
            self.num_same += 1
            return begun_s, begun_s + step.elapsed_s
        usual_s = self._timer.step_s(step.shape)
        factor = step.elapsed_s / usual_s if usual_s > 0 else 1.0
        return begun_s, begun_s + factor * self._timer.step_s(shape)

    def _at(self, now: float) -> RanStep | None:
        """The unused step that was asked for at nearly this time."""
        place = bisect_left(self._asked_s, now, lo=self._next)
        near = [i for i in (place - 1, place) if self._next <= i < len(self._steps)]
        if not near:
            return None
        best = min(near, key=lambda i: abs(self._asked_s[i] - now))
        if abs(self._asked_s[best] - now) > SAME_TIME_S:
            return None
        self._next = best + 1
        return self._steps[best]

    def heard(self) -> None:
        """It is in the recorded time."""

    def end(self) -> None:
        """Nobody is waiting for it."""

    def rest(self) -> None:
        """As above."""


class _Delays:
    """How long messages took: each as its live counterpart, if it is about a request, else as the
    live one of its kind on its link at nearly that time, if there is one, else as they usually did.
    None overtakes another. ``usual_s``: the median of all."""

    def __init__(self, run: RecordedRun, lead_s: float) -> None:
        """``lead_s`` as of `RecordedPacer`."""
        self._lead_s = lead_s
        self._own: dict[tuple[Any, ...], deque[float]] = defaultdict(deque)
        self._sent: dict[tuple[Any, ...], list[tuple[float, float]]] = defaultdict(list)
        for mail in run.mail:
            link = (mail.sender, mail.receiver, mail.kind)
            if mail.about is not None:
                self._own[(*link, mail.about)].append(mail.delay_s)
            self._sent[link].append((mail.sent_s, mail.delay_s))
        self._usual = {
            link: statistics.median(delay_s for _, delay_s in of) for link, of in self._sent.items()
        }
        self._last_s: dict[tuple[WorkerId, WorkerId], float] = {}
        every = [mail.delay_s for mail in run.mail]
        self.usual_s = statistics.median(every) if every else 1e-4

    def delay_s(self, sender: WorkerId, receiver: WorkerId, message: Message, at_s: float) -> float:
        arrives_s = at_s + self._found_s(sender, receiver, message, at_s + self._lead_s)
        arrives_s = max(arrives_s, self._last_s.get((sender, receiver), 0.0))
        self._last_s[sender, receiver] = arrives_s
        return arrives_s - at_s

    def _found_s(self, sender: WorkerId, receiver: WorkerId, message: Message, now: float) -> float:
        link = (sender, receiver, type(message).__name__)
        own = self._own.get((*link, about(message)))
        if own:
            return own.popleft()
        sent = self._sent.get(link, [])
        place = bisect_left(sent, (now, 0.0))
        near = [sent[i] for i in (place - 1, place) if 0 <= i < len(sent)]
        sent_s, delay_s = min(near, key=lambda one: abs(one[0] - now), default=(0.0, 0.0))
        if near and abs(sent_s - now) <= SAME_TIME_S:
            return delay_s
        return self._usual.get(link, self.usual_s)


def _as_simulated(request: Request) -> Request:
    """The answer ends where it did, for whatever reason it did."""
    params = replace(
        request.params, eos_token_ids=(ENDING,), ignore_eos=False, stop_token_ids=(), min_tokens=0
    )
    return replace(request, params=params)
