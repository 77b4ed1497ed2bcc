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

from pdserve.workload.request import TraceRequest, arriving


def window(
    requests: Iterable[TraceRequest], start_s: float, end_s: float
) -> Iterator[TraceRequest]:
    """Those that arrive at start_s <= t < end_s, with times counted from ``start_s``. Nothing is
    taken after the first that arrives later."""
    for request in requests:
        if request.at_s >= end_s:
            return
        if request.at_s >= start_s:
            yield arriving(request, request.at_s - start_s)


def scale(requests: Iterable[TraceRequest], factor: float) -> Iterator[TraceRequest]:
    """The same requests at ``factor`` times the rate: 2 halves every gap."""
    if factor == 1.0:
        return iter(requests)
    return (arriving(request, request.at_s / factor) for request in requests)


def rearrive(requests: Iterable[TraceRequest], arrivals: Iterator[float]) -> Iterator[TraceRequest]:
    """The same requests in the same order, at other times."""
    return (arriving(request, at_s) for request, at_s in zip(requests, arrivals, strict=False))


def smear(requests: Iterable[TraceRequest], seed: int) -> Iterator[TraceRequest]:
    """Spread requests that share one time stamp over their tick.

    Traces that were recorded in ticks (3 s in Mooncake's conversations) would otherwise arrive in
    volleys that never happened. A tick is as long as the median one at the start of the trace, or
    until the next one, whichever is less. Within it the times are drawn evenly and the order stays;
    requests that are alone in their tick move as well.
    """
    rng = random.Random(f"{seed}/smear")
    head, requests = peeked(requests)
    tick_s = _tick_s(head)
    groups = itertools.groupby(requests, key=lambda request: request.at_s)
    ticks = ((at_s, list(group)) for at_s, group in groups)
    current = next(ticks, None)
    while current is not None:
        at_s, together = current
        current = next(ticks, None)
        length_s = tick_s if current is None else min(tick_s, current[0] - at_s)
        offsets = sorted(rng.random() * length_s for _ in together)
        for request, offset_s in zip(together, offsets, strict=True):
            yield arriving(request, at_s + offset_s)


def _tick_s(requests: Sequence[TraceRequest]) -> float:
    """The median time between two different time stamps; 0 if there is one."""
    stamps = sorted({request.at_s for request in requests})
    return statistics.median(
        [after - before for before, after in itertools.pairwise(stamps)] or [0]
    )


def is_in_ticks(requests: Sequence[TraceRequest]) -> bool:
    """True if most requests share their time stamp with another."""
    times = {request.at_s for request in requests}
    return len(times) * 2 <= len(requests)


def peeked(
    requests: Iterable[TraceRequest], count: int = 1000
) -> tuple[list[TraceRequest], Iterator[TraceRequest]]:
    """The first ``count`` requests, and all of them."""
    rest = iter(requests)
    head = list(itertools.islice(rest, count))
    return head, itertools.chain(head, rest)


def bounded(
    requests: Iterable[TraceRequest], max_input_tokens: int | None, max_output_tokens: int | None
) -> Iterator[TraceRequest]:
    """Without those of longer prompts, and with longer answers cut. None: no bound."""
    for request in requests:
        if max_input_tokens is not None and request.prompt_tokens > max_input_tokens:
            continue
        if max_output_tokens is not None and request.output_tokens > max_output_tokens:
            request = replace(request, output_tokens=max_output_tokens)
        yield request


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
