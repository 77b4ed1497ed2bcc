"""The trace, cut into windows that are simulated one by one.

A window is a run of consecutive requests; its first ones fill the empty cluster and are not judged.
Windows lie evenly over the trace. At another rate than the trace's own the gaps shrink or grow
alike, so bursts and quiet times stay, prefixes too; or requests keep their order and arrive as a
Poisson process, as in Splitwise's evaluation.

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

DEFAULT_WINDOWS = 8
LEAD_SHARE = 0.1
"""Of a window's requests, the first ones that are not judged."""
MIN_REQUESTS = 20
"""Of a window, so that a share of them means something."""
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
    most_requests: int,
    *,
    poisson: int | None = None,
) -> Windows:
    """``num`` windows with at most ``most_requests`` in all. Raises `ConfigError` if the trace is
    too short for that, or has no duration."""
    num_each = min(len(trace), most_requests) // num if num > 0 else 0
    if num_each < MIN_REQUESTS:
        least = MIN_REQUESTS * max(num, 1)
        raise ConfigError(
            f"{min(len(trace), most_requests)} requests make no {num} windows of {MIN_REQUESTS}: "
            f"give a trace of at least {least} requests, or fewer --windows"
        )
    duration_s = trace[-1].at_s - trace[0].at_s
    if duration_s <= 0 and poisson is None:
        raise ConfigError(
            "all requests of the trace arrive at once, so it has no rate: give --arrivals poisson"
        )
    starts = [round(number * len(trace) / num) for number in range(num)]
    windows = [_based(trace[start : start + num_each]) for start in starts]
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


def _load(requests: Sequence[TraceRequest]) -> float:
    """Tokens per second."""
    tokens = sum(
        request.prompt_tokens + OUTPUT_WEIGHT * request.output_tokens for request in requests
    )
    return tokens / max(requests[-1].at_s - requests[0].at_s, 1e-9)
