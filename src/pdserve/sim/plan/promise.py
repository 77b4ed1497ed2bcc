"""What a cluster must hold to be an answer: shares of requests that may miss a bound.

Every promise is a list of *bounds*. A bound says for each request how much of it was used (1: all
of it, more: it was missed), and which share of the requests may miss it. So ``ttft:500 tpot:50`` at
99 % is one bound, the worse of both latencies, which 1 % may miss; Splitwise's nine slowdowns
(sec. V, table VI) are nine, of which half, a tenth or a hundredth may miss. Misses can be counted
while a simulation runs, which can stop when too many have been; and they can be added over
windows.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Protocol

from pdserve.core.errors import ConfigError
from pdserve.core.step import StepShape
from pdserve.cost.machine import StepTimer
from pdserve.sim.observe import Ended
from pdserve.workload.outcome import Ending
from pdserve.workload.request import TraceRequest
from pdserve.workload.slo import Slo

DEFAULT_TARGET = 0.99
_SHARE_SLACK = 1e-9
"""So that 1 % of 300 is 3 whatever floats make of it."""


@dataclass(frozen=True, slots=True)
class Latencies:
    """Of one request, in seconds. Infinite for one that had no answer; ``tpot`` of an answer of one
    token is 0."""

    ttft: float
    tpot: float
    e2e: float

    def of(self, metric: str) -> float:
        return {"ttft": self.ttft, "tpot": self.tpot, "e2e": self.e2e}[metric]


LOST = Latencies(math.inf, math.inf, math.inf)


class Promise(Protocol):
    """``names`` of the bounds, and the share of requests that may miss each (``shares``)."""

    @property
    def names(self) -> tuple[str, ...]: ...

    @property
    def shares(self) -> tuple[float, ...]: ...

    @property
    def metrics(self) -> tuple[str, ...]:
        """The latencies that are bounded at all."""
        ...

    def missed(self, got: Latencies, prompt_tokens: int, output_tokens: int) -> Sequence[bool]:
        """For each bound: did this request miss it?"""
        ...

    def limit_s(self, metric: str, bound: int, prompt_tokens: int, output_tokens: int) -> float:
        """The most that the bound lets this latency be; infinite if it says nothing of it."""
        ...

    def scaled(self, factors: Mapping[str, float]) -> Promise:
        """The same with the bounds on some latencies so many times as large."""
        ...


def allowed_misses(promise: Promise, num: int) -> tuple[int, ...]:
    """Of ``num`` requests, for each bound."""
    return tuple(math.floor(share * num + _SHARE_SLACK) for share in promise.shares)


@dataclass(frozen=True, slots=True)
class Bounds:
    """A request is good if it meets all of ``slo``; a share ``target`` of them must be good."""

    slo: Slo
    target: float = DEFAULT_TARGET

    def __post_init__(self) -> None:
        if not 0 < self.target < 1:
            raise ConfigError(
                f"the share of requests that must meet the SLO is {self.target:g}; give one above "
                "0 and below 1, as --target 0.99"
            )

    @property
    def names(self) -> tuple[str, ...]:
        return (str(self.slo),)

    @property
    def shares(self) -> tuple[float, ...]:
        return (1 - self.target,)

    @property
    def metrics(self) -> tuple[str, ...]:
        return tuple(metric for metric, _ in self.slo.bounds_ms)

    def missed(self, got: Latencies, prompt_tokens: int, output_tokens: int) -> Sequence[bool]:
        return (any(got.of(name) * 1e3 > bound for name, bound in self.slo.bounds_ms),)

    def limit_s(self, metric: str, bound: int, prompt_tokens: int, output_tokens: int) -> float:
        return dict(self.slo.bounds_ms).get(metric, math.inf) / 1e3

    def scaled(self, factors: Mapping[str, float]) -> Bounds:
        scaled = ((name, ms * factors.get(name, 1.0)) for name, ms in self.slo.bounds_ms)
        return Bounds(Slo(tuple(scaled)), self.target)

    def __str__(self) -> str:
        return f"{self.slo} for {100 * self.target:g} % of the requests"


@dataclass(frozen=True, slots=True)
class Slowdowns:
    """So many times the latency of an idle machine, at P50, P90 and P99: ``limits`` by metric. All
    strict: a slowdown equal to its limit misses. ``reference``: the step times of that machine.
    ``theirs``: as SplitwiseSim has them, whose time per token counts the first one as well, and
    whose reference for it is looked up at the prompt's length in place of a number of sequences."""

    reference: StepTimer
    reference_name: str
    limits: tuple[tuple[str, tuple[float, float, float]], ...]
    theirs: bool = False
    _known: dict[tuple[int, int], Latencies] = field(
        default_factory=dict, repr=False, compare=False, hash=False
    )

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(
            f"{metric} {limit:g}x at P{percent}"
            for metric, limits in self.limits
            for limit, percent in zip(limits, _PERCENTS, strict=True)
        )

    @property
    def shares(self) -> tuple[float, ...]:
        return tuple(1 - percent / 100 for _ in self.limits for percent in _PERCENTS)

    @property
    def metrics(self) -> tuple[str, ...]:
        return tuple(metric for metric, _ in self.limits)

    def missed(self, got: Latencies, prompt_tokens: int, output_tokens: int) -> Sequence[bool]:
        idle = self.idle(prompt_tokens, output_tokens)
        if self.theirs and not math.isinf(got.e2e):
            got = replace(got, tpot=(got.e2e - got.ttft) / output_tokens)
        return [
            got.of(metric) >= limit * idle.of(metric) and got.of(metric) > 0
            for metric, limits in self.limits
            for limit in limits
        ]

    def limit_s(self, metric: str, bound: int, prompt_tokens: int, output_tokens: int) -> float:
        about, limits = self.limits[bound // len(_PERCENTS)]
        if about != metric:
            return math.inf
        idle = self.idle(prompt_tokens, output_tokens)
        return limits[bound % len(_PERCENTS)] * idle.of(metric)

    def scaled(self, factors: Mapping[str, float]) -> Slowdowns:
        scaled = []
        for metric, (half, tenth, hundredth) in self.limits:
            by = factors.get(metric, 1.0)
            scaled.append((metric, (half * by, tenth * by, hundredth * by)))
        return replace(self, limits=tuple(scaled))

    def idle(self, prompt_tokens: int, output_tokens: int) -> Latencies:
        """On an idle machine: the prompt in one step, then a sequence by itself."""
        key = (prompt_tokens, output_tokens)
        if key not in self._known:
            ttft = self.reference.step_s(
                StepShape(prompt_tokens=prompt_tokens, prompt_pairs=prompt_tokens**2)
            )
            alone = StepShape(num_decoding=1, context_tokens=prompt_tokens)
            looked_up = StepShape(num_decoding=prompt_tokens)
            tpot = self.reference.step_s(looked_up if self.theirs else alone)
            self._known[key] = Latencies(ttft, tpot, ttft + tpot * (output_tokens - 1))
        return self._known[key]

    def __str__(self) -> str:
        limits = "; ".join(
            f"{metric} {'/'.join(f'{limit:g}' for limit in limits)}"
            for metric, limits in self.limits
        )
        return f"slowdowns (P50/P90/P99) below {limits} times an idle {self.reference_name}"


_PERCENTS = (50, 90, 99)
NINE_LIMITS = (
    ("ttft", (2.0, 3.0, 6.0)),
    ("tpot", (1.25, 1.5, 5.0)),
    ("e2e", (1.25, 1.5, 5.0)),
)
"""Splitwise (ISCA 2024), table VI."""


def latencies_of(ended: Ended) -> Latencies:
    """As the client saw them."""
    ttft_s, e2e_s = ended.ttft_s, ended.e2e_s
    if ended.ending is not Ending.COMPLETED or ttft_s is None or e2e_s is None:
        return LOST
    return Latencies(ttft_s, ended.tpot_s or 0.0, e2e_s)


def floor_misses(promise: Promise, floors: Sequence[tuple[TraceRequest, Latencies]]) -> list[int]:
    """For each bound, how many requests miss it even if they are served as in ``floors``."""
    misses = [0] * len(promise.names)
    for request, best in floors:
        for bound, missed in enumerate(
            promise.missed(best, request.prompt_tokens, request.output_tokens)
        ):
            misses[bound] += missed
    return misses
