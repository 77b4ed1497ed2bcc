"""Changing a workload: its window, its speed, its arrivals, who gives up. Iterators in and out.

Each takes requests in order of arrival and keeps that order. The random ones draw from a source of
their own, so that one does not move the other.
"""

from __future__ import annotations

import itertools
import random
import statistics
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace

from pdserve.workload.request import TraceRequest


def window(
    requests: Iterable[TraceRequest], start_s: float, end_s: float
) -> Iterator[TraceRequest]:
    """Those that arrive at start_s <= t < end_s, with times counted from ``start_s``."""
    for request in requests:
        if start_s <= request.at_s < end_s:
            yield replace(request, at_s=request.at_s - start_s)


def scale(requests: Iterable[TraceRequest], factor: float) -> Iterator[TraceRequest]:
    """The same requests at ``factor`` times the rate: 2 halves every gap."""
    return (replace(request, at_s=request.at_s / factor) for request in requests)


def rearrive(requests: Iterable[TraceRequest], arrivals: Iterator[float]) -> Iterator[TraceRequest]:
    """The same requests in the same order, at other times."""
    return (replace(request, at_s=at_s) for request, at_s in zip(requests, arrivals, strict=False))


def smear(requests: Sequence[TraceRequest], seed: int) -> Iterator[TraceRequest]:
    """Spread requests that share one time stamp over the time until the next.

    Traces that were recorded in ticks (3 s in Mooncake's conversations) would otherwise arrive in
    volleys that never happened. Within a tick the times are drawn evenly and the order stays; the
    last tick is as long as the median one. Requests that are alone in their tick move as well.
    """
    rng = random.Random(f"{seed}/smear")
    ticks = sorted({request.at_s for request in requests})
    gaps = [after - before for before, after in itertools.pairwise(ticks)]
    lengths = dict(zip(ticks, [*gaps, statistics.median(gaps) if gaps else 0.0], strict=True))
    for at_s, group in itertools.groupby(requests, key=lambda request: request.at_s):
        together = list(group)
        offsets = sorted(rng.random() * lengths[at_s] for _ in together)
        for request, offset_s in zip(together, offsets, strict=True):
            yield replace(request, at_s=at_s + offset_s)


def is_in_ticks(requests: Sequence[TraceRequest]) -> bool:
    """True if most requests share their time stamp with another."""
    times = {request.at_s for request in requests}
    return len(times) * 2 <= len(requests)


def with_cancellations(
    requests: Iterable[TraceRequest], rate: float, after_s: float | None, seed: int
) -> Iterator[TraceRequest]:
    """A share ``rate`` (0 .. 1) of the requests gives up.

    They leave ``after_s`` seconds after sending; with None after a number of tokens drawn evenly
    from 0 (at once) to one less than the whole answer.
    """
    rng = random.Random(f"{seed}/cancel")
    for request in requests:
        gives_up, share = rng.random() < rate, rng.random()
        if not gives_up:
            yield request
        elif after_s is not None:
            yield replace(request, cancel_after_s=after_s)
        else:
            yield replace(request, cancel_after_tokens=int(share * request.output_tokens))
