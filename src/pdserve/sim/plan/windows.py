"""The trace, cut into windows that are simulated one by one.

A window is a run of consecutive requests; its first ones fill the empty cluster and are not judged.
Windows lie evenly over the trace, and have no request in common: where the trace is too short for
them at the rate that is asked for, each repeats its own. At another rate than the trace's own the
gaps shrink or grow alike, so bursts and quiet times stay, prefixes too; or requests keep their
order and arrive as a Poisson process, as in Splitwise's evaluation.

The first window is the one of median load, by which designs are compared first; the others follow
from the heaviest to the lightest, so that what fails does so early.
"""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from pdserve.core.errors import ConfigError
from pdserve.workload.arrivals import arrivals
from pdserve.workload.request import TraceRequest
from pdserve.workload.shaping import rearrive, scale

DEFAULT_WINDOWS = 6
DEFAULT_WINDOW_S = 45.0
LEAD_SHARE = 0.2
"""Of a window's requests, the first ones that are not judged."""
MIN_REQUESTS = 20
"""Of a window, so that a share of them means something."""
ALWAYS = "cached"
"""The name of a prefix that all who have it share, at any time."""
OUTPUT_WEIGHT = 8.0
"""What an output token counts in the load of a window, in prompt tokens."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Windows:
    """``requests`` of each window, times from its start at the trace's own pace. ``rate``: the
    trace's own, in requests per second. ``lead``: how many of each are not judged. ``poisson``: the
    seed of arrivals that replace the trace's own."""

    requests: tuple[tuple[TraceRequest, ...], ...]
    rate: float
    lead: int
    poisson: int | None = None

    def __len__(self) -> int:
        return len(self.requests)

    @property
    def num_judged(self) -> int:
        """Of each window."""
        return len(self.requests[0]) - self.lead

    def judged(self, window: int) -> Sequence[TraceRequest]:
        return self.requests[window][self.lead :]

    def at(self, window: int, rate: float) -> Iterator[TraceRequest]:
        """The window's requests, numbered from 0, as they arrive at that mean rate."""
        numbered = (
            replace(request, index=index) for index, request in enumerate(self.requests[window])
        )
        if self.poisson is not None:
            return rearrive(numbered, arrivals("poisson", rate, 1.0, self.poisson + window))
        return scale(numbered, rate / self.rate)

    def span_s(self, window: int, rate: float) -> float:
        """From the first to the last arrival."""
        if self.poisson is not None:
            return len(self.requests[window]) / rate
        requests = self.requests[window]
        return (requests[-1].at_s - requests[0].at_s) * self.rate / rate

    @property
    def digest(self) -> str:
        """Of everything that decides which requests come when."""
        found = hashlib.blake2b(repr((self.rate, self.lead, self.poisson)).encode(), digest_size=16)
        for requests in self.requests:
            for request in requests:
                found.update(repr((request.at_s, request.segments, request.output_tokens)).encode())
        return found.hexdigest()


def cut(
    trace: Sequence[TraceRequest],
    num: int,
    num_each: int,
    *,
    poisson: int | None = None,
) -> Windows:
    """``num`` windows of ``num_each`` requests. Where the trace has fewer, each window repeats its
    own part of it. Raises `ConfigError` if the trace is too short for that, or has no duration."""
    part = len(trace) // num if num > 0 else 0
    if part < MIN_REQUESTS:
        raise ConfigError(
            f"{len(trace)} requests make no {num} windows of {MIN_REQUESTS}: give a trace of at "
            f"least {MIN_REQUESTS * max(num, 1)} requests, or fewer --windows"
        )
    num_each = max(num_each, MIN_REQUESTS)
    duration_s = trace[-1].at_s - trace[0].at_s
    if duration_s <= 0 and poisson is None:
        raise ConfigError(
            "all requests of the trace arrive at once, so it has no rate: give --arrivals poisson"
        )
    starts = [number * len(trace) // num for number in range(num)]
    length = min(part, num_each)
    windows = [_repeated(_based(trace[start : start + length]), num_each) for start in starts]
    ordered = sorted(windows, key=_load, reverse=True)
    median = ordered.pop(len(ordered) // 2)
    return Windows(
        requests=tuple(itertools.chain([median], ordered)),
        rate=(len(trace) - 1) / duration_s if duration_s > 0 else 1.0,
        lead=int(num_each * LEAD_SHARE),
        poisson=poisson,
    )


def _based(requests: Sequence[TraceRequest]) -> tuple[TraceRequest, ...]:
    start_s = requests[0].at_s
    return tuple(replace(request, at_s=request.at_s - start_s) for request in requests)


def _repeated(part: Sequence[TraceRequest], num: int) -> tuple[TraceRequest, ...]:
    """As often as it takes for ``num`` requests; prompts of one lap share nothing with another's,
    but for prefixes that are always there (`ALWAYS`)."""
    gap_s = part[-1].at_s / max(1, len(part) - 1)
    lap_s = part[-1].at_s + gap_s
    requests = list(part)
    for lap in itertools.count(1):
        if len(requests) >= num:
            break
        requests += [_in_lap(request, lap, lap * lap_s) for request in part]
    return tuple(requests[:num])


def _in_lap(request: TraceRequest, lap: int, after_s: float) -> TraceRequest:
    segments = tuple(
        segment if segment.name == ALWAYS else replace(segment, name=f"{segment.name}/{lap}")
        for segment in request.segments
    )
    return replace(request, at_s=request.at_s + after_s, segments=segments)


def _load(requests: Sequence[TraceRequest]) -> float:
    """Tokens per second."""
    tokens = sum(
        request.prompt_tokens + OUTPUT_WEIGHT * request.output_tokens for request in requests
    )
    return tokens / max(requests[-1].at_s - requests[0].at_s, 1e-9)
