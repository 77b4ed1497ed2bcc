"""The loads of ``scheduling.py``: who asks for what, and when.

Each is a function of the arguments and of a round's seed, and scales with ``--load``. At 1 they
fill eight workers of the benchmark's step times, so that a policy can be wrong.
"""

from __future__ import annotations

import argparse
import heapq
import itertools
import random
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace

from pdserve.bench.plan import Load
from pdserve.workload import shaping
from pdserve.workload.arrivals import gamma
from pdserve.workload.lengths import length_distribution
from pdserve.workload.request import Segment, TraceRequest, own_segment
from pdserve.workload.synthetic import synthetic
from pdserve.workload.traces import read_trace

MAX_TOKENS = 8192


def drawn(
    rate: float, prompts: str, answers: str, start_s: float, end_s: float, seed: int
) -> Iterator[TraceRequest]:
    """A Poisson process of requests with these lengths between two moments."""
    requests = synthetic(
        (start_s + at_s for at_s in gamma(rate, 1.0, seed)),
        length_distribution(prompts),
        length_distribution(answers),
        seed,
    )
    for request in itertools.takewhile(lambda request: request.at_s < end_s, requests):
        yield _bounded(request)


def _bounded(request: TraceRequest) -> TraceRequest:
    """No prompt and no answer beyond a quarter of the longest sequence."""
    most = MAX_TOKENS // 4
    segments = request.segments
    if request.prompt_tokens > most and len(segments) == 1:
        segments = (replace(segments[0], num_tokens=most),)
    return replace(request, segments=segments, output_tokens=min(request.output_tokens, most))


def conversation(arguments: argparse.Namespace, seed: int) -> Iterable[TraceRequest]:
    rate = 12.0 * arguments.load
    return drawn(rate, "lognormal:300:0.8", "lognormal:80:0.6", 0.0, arguments.duration, seed)


def code(arguments: argparse.Namespace, seed: int) -> Iterable[TraceRequest]:
    rate = 10.0 * arguments.load
    return drawn(rate, "lognormal:1200:0.5", "lognormal:14:0.6", 0.0, arguments.duration, seed)


def shift(arguments: argparse.Namespace, seed: int) -> Iterable[TraceRequest]:
    third = arguments.duration / 3
    phases = (
        (9.0, "lognormal:1200:0.5", "lognormal:14:0.6"),
        (9.0, "lognormal:150:0.5", "lognormal:130:0.5"),
        (9.0, "lognormal:1200:0.5", "lognormal:14:0.6"),
    )
    for number, (rate, prompts, answers) in enumerate(phases):
        start_s = number * third
        rate *= arguments.load
        yield from drawn(rate, prompts, answers, start_s, start_s + third, 3 * seed + number)


def sessions(arguments: argparse.Namespace, seed: int) -> Iterable[TraceRequest]:
    """Each session: a common prefix (of 4, 768 tokens), then turns that grow."""
    rng = random.Random(f"{seed}/sessions")
    starts = gamma(2.2 * arguments.load, 1.0, seed)
    turns = []
    for session in itertools.count():
        at_s = next(starts)
        if at_s >= arguments.duration:
            break
        history = [Segment(f"prefix:{rng.randrange(4)}", 768)]
        for turn in range(rng.randint(1, 6)):
            history.append(Segment(f"session:{session}:{turn}", rng.randint(60, 300)))
            answer = rng.randint(30, 90)
            turns.append((at_s, session, turn, tuple(history), answer))
            history.append(Segment(f"answer:{session}:{turn}", answer))
            at_s += rng.uniform(3.0, 6.0)
    heapq.heapify(turns)
    for at_s, _, _, segments, answer in (heapq.heappop(turns) for _ in range(len(turns))):
        if at_s < arguments.duration:
            yield TraceRequest(index=0, at_s=at_s, segments=segments, output_tokens=answer)


def trace(arguments: argparse.Namespace, seed: int) -> Iterable[TraceRequest]:
    if arguments.trace is None:
        raise SystemExit("the load trace needs --trace FILE")
    whole = shaping.scale(read_trace(arguments.trace), arguments.trace_scale * arguments.load)
    start_s = seed * arguments.duration
    return map(_bounded, shaping.window(whole, start_s, start_s + arguments.duration))


LOADS: dict[str, Callable[[argparse.Namespace, int], Iterable[TraceRequest]]] = {
    "conversation": conversation,
    "code": code,
    "shift": shift,
    "sessions": sessions,
    "trace": trace,
}


def load_of(name: str, arguments: argparse.Namespace, seed: int) -> Load:
    ordered = sorted(LOADS[name](arguments, seed), key=lambda request: request.at_s)
    # Names of segments are a round's own, so that no server has seen them.
    requests = [
        replace(
            request,
            index=number,
            segments=tuple(
                own_segment(number, part.num_tokens)
                if part.name.startswith("own:")
                else replace(part, name=f"{seed}/{part.name}")
                for part in request.segments
            ),
        )
        for number, request in enumerate(ordered)
    ]
    return Load(
        requests=requests,
        warmup=[],
        num_requests=len(requests),
        duration_s=arguments.duration,
        concurrency=None,
        is_paced=True,
        arrivals=name,
        reuse=None,
    )
