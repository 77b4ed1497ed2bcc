"""What no cluster can do better than, and about what one will need: before anything is simulated.

*Work conservation*: a request costs at least so many seconds of a worker, whatever the policy, and
a worker has one second per second. A prompt costs its share of the fullest step; an output token
its share of the largest batch. Of those that may miss the promise the most expensive are left out,
and the last ones may end as late as the promise lets them. Since a policy may have any worker do
either phase, a cluster passes if some division of both phases over its workers does; what does not
pass cannot meet the promise.

*The floor*: on an idle worker a prompt takes at least its own step, and a token a step by itself.

The estimate (`likely`) is no bound: it is where a search begins.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from pdserve.core.step import StepShape
from pdserve.cost.machine import MachineModel
from pdserve.sim.plan.promise import Latencies, Promise, allowed_misses, floor_misses
from pdserve.sim.plan.trial import Counts, Design
from pdserve.sim.plan.windows import Windows
from pdserve.workload.request import Segment, TraceRequest

MAX_BATCH = 256
MAX_STEP_TOKENS = 2048
LIKELY_LOAD = 0.75
"""The share of its time that a worker of a good cluster is busy, to begin a search with."""
_SOONEST = (0.5, 0.9, 1.0)
_GRID = 8
"""Lengths are rounded down to powers of 2^(1/8), which keeps bounds and saves time."""


@dataclass(frozen=True, slots=True)
class Work:
    """What requests need of one kind of worker at least, in seconds: ``prefill_s`` and
    ``decode_s``. They are over ``slack_s`` after the last one's arrival."""

    prefill_s: float
    decode_s: float
    slack_s: float


class WorkBounds:
    """Of one promise on the first ``num_windows`` windows. ``machines`` by hardware."""

    def __init__(
        self,
        windows: Windows,
        num_windows: int,
        machines: Mapping[str, MachineModel],
        promise: Promise,
        *,
        prefix_cache: bool = True,
    ) -> None:
        self._windows = windows
        self._num_windows = num_windows
        self._machines = machines
        self._promise = promise
        self._requests: list[tuple[TraceRequest, int]] = []
        for window in range(num_windows):
            new = new_tokens(windows.requests[window], prefix_cache=prefix_cache)
            self._requests += list(zip(windows.requests[window], new, strict=True))[windows.lead :]
        self._work = {name: self._works_on(machine) for name, machine in machines.items()}
        self._floors: dict[Design, str | None] = {}
        self._likely = {name: self._likely_on(machine) for name, machine in machines.items()}

    def refuses(self, design: Design, counts: Counts, rate: float) -> bool:
        """True if these workers cannot do the work in time, whatever the policy."""
        span_s = self._span_s(rate)
        for works in zip(*(self._work[name] for name in design.hardware), strict=True):
            time_s = span_s + works[0].slack_s * self._num_windows
            seconds = [count * time_s for count in counts]
            if not _divides([(work.prefill_s, work.decode_s) for work in works], seconds):
                return True
        return False

    def likely(self, design: Design, rate: float) -> tuple[float, ...]:
        """How many workers of each kind it will take, as fractions."""
        span_s = self._span_s(rate) * LIKELY_LOAD
        phases = [self._likely[name] for name in design.hardware]
        if not design.is_split:
            return (sum(phases[0]) / span_s,)
        return phases[0][0] / span_s, phases[1][1] / span_s

    def floor_of(self, design: Design) -> list[tuple[TraceRequest, Latencies]]:
        """How each judged request is served by an idle cluster of the design, at best."""
        machines = [self._machines[name] for name in design.hardware]
        floors = []
        for request, new in self._requests:
            ttft = min(_prompt_s(m, request.prompt_tokens, new) for m in machines)
            tpot = min(_token_s(m, request.prompt_tokens, 1) for m in machines)
            tpot = tpot if request.output_tokens > 1 else 0.0
            e2e = ttft + tpot * (request.output_tokens - 1)
            floors.append((request, Latencies(ttft, tpot, e2e)))
        return floors

    def floor_breaks(self, design: Design) -> str | None:
        """What of the promise no number of such workers could hold, in words; None: nothing."""
        if design not in self._floors:
            self._floors[design] = self._floor_breaks(design)
        return self._floors[design]

    def _floor_breaks(self, design: Design) -> str | None:
        floors = self.floor_of(design)
        allowed = allowed_misses(self._promise, len(floors))
        misses = floor_misses(self._promise, floors)
        names = " + ".join(sorted(set(design.hardware)))
        for bound, (missed, may_miss) in enumerate(zip(misses, allowed, strict=True)):
            if missed > may_miss:
                percent = 100 * (1 - self._promise.shares[bound])
                least = "; ".join(
                    f"{metric} {1e3 * _quantile(floors, metric, percent):,.1f} ms"
                    for metric in self._promise.metrics
                )
                return (
                    f"{self._promise.names[bound]}: an idle {names} worker has at P{percent:g} "
                    f"at best {least}"
                )
        return None

    def _span_s(self, rate: float) -> float:
        return sum(self._windows.span_s(window, rate) for window in range(self._num_windows))

    def _works_on(self, machine: MachineModel) -> list[Work]:
        """For some shares of the requests, those that must be over soonest: what they need. Of
        each, the most expensive that may miss the promise are left out."""
        known: dict[tuple[int, int, int], tuple[float, float]] = {}
        needs = []
        for request, new in self._requests:
            prompt, outputs = request.prompt_tokens, request.output_tokens
            key = (_down(prompt), _down(new), _down(prompt + outputs // 2))
            if key not in known:
                least_s = _least_prompt_s(machine, key[0], key[1])
                known[key] = (least_s, _least_token_s(machine, key[2]))
            prompt_s, token_s = known[key]
            first_s, last_s = _latest_s(self._promise, request)
            needs.append((first_s, last_s, prompt_s, token_s * (outputs - 1)))
        spare = min(allowed_misses(self._promise, len(needs)))
        works = []
        for share in _SOONEST:
            for end in (0, 1):  # all that is to be done by the first token, and by the last
                soonest = sorted(needs, key=lambda need: need[end])[: math.ceil(share * len(needs))]
                prefills = sorted(need[2] for need in soonest)
                decodes = sorted(need[3] if end else 0.0 for need in soonest)
                kept = max(0, len(soonest) - spare)
                slack_s = soonest[-1][end]
                works.append(Work(sum(prefills[:kept]), sum(decodes[:kept]), slack_s))
        return works

    def _likely_on(self, machine: MachineModel) -> tuple[float, float]:
        """Seconds of the prefills and of the decodes, as they will probably be batched."""
        prefills = (_least_prompt_s(machine, r.prompt_tokens, new) for r, new in self._requests)
        batch, context = self._likely_batch(machine), self._mean_context()
        tokens = sum(request.output_tokens - 1 for request, _ in self._requests)
        return sum(prefills), tokens * _token_s(machine, context, batch) / batch

    def _mean_context(self) -> int:
        total = sum(r.prompt_tokens + r.output_tokens // 2 for r, _ in self._requests)
        return max(1, total // len(self._requests))

    def _likely_batch(self, machine: MachineModel) -> int:
        """The largest batch whose step the promise allows, and whose KV has room."""
        context = self._mean_context()
        room = max(1, machine.num_blocks * machine.block_size // context)
        median = sorted(self._requests, key=lambda pair: pair[0].prompt_tokens)[
            len(self._requests) // 2
        ][0]
        limit_s = min(
            self._promise.limit_s("tpot", bound, median.prompt_tokens, median.output_tokens)
            for bound in range(len(self._promise.names))
        )
        batch = 1
        while batch < min(room, MAX_BATCH) and _token_s(machine, context, batch * 2) <= limit_s:
            batch *= 2
        return batch


def new_tokens(requests: Iterable[TraceRequest], *, prefix_cache: bool) -> list[int]:
    """Of each prompt, the tokens that no cache of any size could have: at least one."""
    seen: set[Segment] = set()
    found = []
    for request in requests:
        cached = 0
        if prefix_cache:
            for segment in request.segments:
                if segment not in seen:
                    break
                cached += segment.num_tokens
            seen.update(request.segments)
        found.append(max(1, request.prompt_tokens - cached))
    return found


def _divides(works: Sequence[tuple[float, float]], seconds: Sequence[float]) -> bool:
    """Can both phases be divided over the kinds of workers so that each has the time? ``works``:
    (prefill, decode) seconds of all the work on each kind."""
    if len(works) == 1:
        return sum(works[0]) <= seconds[0]
    (prefill_a, decode_a), (prefill_b, decode_b) = works
    # The first kind takes first what it is relatively better at: then nothing is gained by a swap.
    phases = [(prefill_a, prefill_b), (decode_a, decode_b)]
    phases.sort(key=lambda phase: phase[0] / phase[1] if phase[1] > 0 else math.inf)
    left_s, rest_s = seconds[0], 0.0
    for on_first, on_second in phases:
        share = 1.0 if on_first <= left_s else left_s / on_first
        left_s = max(0.0, left_s - share * on_first)
        rest_s += (1 - share) * on_second
    return rest_s <= seconds[1] * (1 + 1e-12)


def _latest_s(promise: Promise, request: TraceRequest) -> tuple[float, float]:
    """After its arrival: when its first and its last token have come, if it keeps the bounds that
    the fewest requests may miss."""
    first_s = last_s = math.inf
    strictest = min(promise.shares)
    for bound, share in enumerate(promise.shares):
        if share > strictest:
            continue
        ttft, tpot, e2e = (
            promise.limit_s(metric, bound, request.prompt_tokens, request.output_tokens)
            for metric in ("ttft", "tpot", "e2e")
        )
        gaps_s = tpot * (request.output_tokens - 1) if request.output_tokens > 1 else 0.0
        first_s = min(first_s, ttft, e2e)
        last_s = min(last_s, e2e, ttft + gaps_s)
    return first_s, last_s


def _prompt_s(machine: MachineModel, prompt: int, new: int) -> float:
    """Of a prompt by itself."""
    pairs = prompt**2 - (prompt - new) ** 2
    return machine.steps.step_s(StepShape(prompt_tokens=new, prompt_pairs=pairs))


def _least_prompt_s(machine: MachineModel, prompt: int, new: int) -> float:
    """By itself, or as its share of a full step; whichever is less."""
    new = max(1, min(prompt, new))
    alone_s = _prompt_s(machine, prompt, new)
    if new >= MAX_STEP_TOKENS:
        return alone_s
    pairs = (prompt**2 - (prompt - new) ** 2) * MAX_STEP_TOKENS // new
    full = StepShape(prompt_tokens=MAX_STEP_TOKENS, prompt_pairs=pairs)
    return min(alone_s, machine.steps.step_s(full) * new / MAX_STEP_TOKENS)


def _token_s(machine: MachineModel, context: int, batch: int) -> float:
    """Of a step that decodes so many sequences of this length."""
    shape = StepShape(num_decoding=batch, context_tokens=batch * context)
    return machine.steps.step_s(shape)


def _least_token_s(machine: MachineModel, context: int) -> float:
    """A token's share of the largest batch, or what it adds to a step with prompts."""
    decodes = {"num_decoding": MAX_BATCH, "context_tokens": MAX_BATCH * context}
    prompts = {"prompt_tokens": MAX_STEP_TOKENS, "prompt_pairs": MAX_STEP_TOKENS**2}
    alone_s = machine.steps.step_s(StepShape(**decodes))
    added_s = machine.steps.step_s(StepShape(**decodes, **prompts)) - machine.steps.step_s(
        StepShape(**prompts)
    )
    return max(0.0, min(alone_s, added_s)) / MAX_BATCH


def _down(length: int) -> int:
    if length <= 1:
        return max(length, 0)
    return min(length, math.floor(2 ** (math.floor(math.log2(length) * _GRID) / _GRID)))


def _quantile(
    floors: Sequence[tuple[TraceRequest, Latencies]], metric: str, percent: float
) -> float:
    ordered = sorted(best.of(metric) for _, best in floors)
    return ordered[min(len(ordered) - 1, math.ceil(percent / 100 * len(ordered)) - 1)]
