"""From options to a workload: which requests, and when. Lazily: nothing is held that need not be.

A trace brings its own times; other arrivals can be put in their place. Without a trace lengths are
drawn, and requests come at the rate that is given, else in a closed loop. Whatever cannot go
together is refused here, before anything is sent or simulated.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from pdserve.core.errors import ConfigError
from pdserve.workload import shaping
from pdserve.workload.arrivals import arrivals
from pdserve.workload.lengths import length_distribution
from pdserve.workload.options import DRAWS, WorkloadOptions
from pdserve.workload.request import TraceRequest
from pdserve.workload.synthetic import PrefixGroups, drawn, synthetic
from pdserve.workload.traces import iter_trace

DEFAULT_REQUESTS = 100


@dataclass(frozen=True, slots=True, kw_only=True)
class Workload:
    """``requests`` in order of arrival, to be taken once. ``arrivals``: the kind of process;
    in a ``closed`` one times mean nothing. ``is_endless``: the requests never stop."""

    requests: Iterator[TraceRequest]
    arrivals: str
    is_endless: bool


def build(options: WorkloadOptions) -> Workload:
    """Raises `ConfigError` for options that make no sense together, or a trace without a start."""
    kind = arrivals_of(options)
    _check(options, kind)
    requests = _traced(options, kind) if options.trace else generated(options, kind)
    limit = options.num_requests
    duration_s = None if kind == "closed" else options.duration_s
    makes_requests = options.trace is None or options.draw is not None
    if makes_requests and limit is None and options.duration_s is None:
        if kind == "steps":
            duration_s = sum(step.duration_s for step in options.rates)
        else:
            limit = DEFAULT_REQUESTS
    requests = itertools.islice(requests, limit)
    if duration_s is not None:
        end_s = duration_s
        requests = itertools.takewhile(lambda request: request.at_s < end_s, requests)
    if options.cancel_rate:
        requests = shaping.with_cancellations(
            requests, options.cancel_rate, options.cancel_after_s, options.seed
        )
    is_endless = makes_requests and limit is None and duration_s is None
    return Workload(requests=requests, arrivals=kind, is_endless=is_endless)


def build_open(options: WorkloadOptions) -> Workload:
    """The same for who needs a time for each request: a closed loop is refused."""
    if arrivals_of(options) == "closed":
        raise ConfigError("say how fast requests come: --rate R, --rates R:S,... or --trace FILE")
    return build(options)


def arrivals_of(options: WorkloadOptions) -> str:
    """The kind of process that was named, or that follows from what was given."""
    if options.arrivals is not None:
        return options.arrivals
    if options.rates:
        return "steps"
    if options.rate is not None:
        if options.period_s is not None:
            return "sinusoid"
        return "poisson" if options.burstiness is None else "gamma"
    return "closed" if options.trace is None else "trace"


def _check(options: WorkloadOptions, kind: str) -> None:
    _check_arrivals(options, kind)
    if options.trace is None:
        if options.window_s or options.smear or options.rate_scale != 1.0:
            raise ConfigError("--window, --smear and --rate-scale need --trace FILE")
        if options.draw is not None or options.keep_times:
            raise ConfigError("--draw and --keep-times need --trace FILE")
    if options.draw not in (None, *DRAWS):
        raise ConfigError(f"unknown draw {options.draw!r}: use one of {', '.join(DRAWS)}")
    if kind == "trace" and options.draw is not None:
        raise ConfigError("requests drawn from a trace have no times: give --rate R")
    if kind != "trace" and options.keep_times:
        raise ConfigError("--keep-times keeps a trace's own times: leave out other arrivals")
    if kind != "trace" and options.rate_scale != 1.0:
        raise ConfigError("--rate-scale speeds up a trace's own times: leave out --rate")
    if options.trace is not None and options.prefix_groups:
        raise ConfigError("a trace has its own prefixes: leave out --prefix-groups")
    if bool(options.prefix_groups) != bool(options.prefix_tokens):
        raise ConfigError("--prefix-groups and --prefix-tokens go together")


def _check_arrivals(options: WorkloadOptions, kind: str) -> None:
    if kind == "trace" and options.trace is None:
        raise ConfigError("trace arrivals need --trace FILE")
    if kind == "closed" and options.rate is not None:
        raise ConfigError("closed arrivals have no rate: leave out --rate or --arrivals closed")
    if kind in ("poisson", "gamma", "constant", "sinusoid") and options.rate is None:
        raise ConfigError(f"{kind} arrivals need --rate R (requests per second)")
    if (kind == "steps") != bool(options.rates):
        raise ConfigError("steps of a rate and --rates R:S,R:S,... go together")
    if kind in ("steps", "trace") and options.rate is not None:
        raise ConfigError(f"{kind} arrivals have rates of their own: leave out --rate")
    if kind == "gamma" and options.burstiness is None:
        raise ConfigError("gamma arrivals need --burstiness B (1 is Poisson, less is burstier)")
    if kind != "gamma" and options.burstiness is not None:
        raise ConfigError(f"{kind} arrivals have no burstiness: leave out --burstiness")
    if kind == "sinusoid" and (options.amplitude is None or options.period_s is None):
        raise ConfigError("sinusoid arrivals need --amplitude A (0 to 1) and --period S")
    if kind != "sinusoid" and (options.amplitude, options.period_s) != (None, None):
        raise ConfigError(f"{kind} arrivals have no amplitude and period: use --arrivals sinusoid")
    if kind != "closed" and options.num_requests is None and options.rate == math.inf:
        raise ConfigError("an infinite rate needs --num-requests N")


def generated(options: WorkloadOptions, kind: str) -> Iterator[TraceRequest]:
    """Endless requests of drawn lengths."""
    groups = None
    if options.prefix_groups:
        groups = PrefixGroups(num_groups=options.prefix_groups, prefix_tokens=options.prefix_tokens)
    return synthetic(
        _times(options, kind),
        length_distribution(options.input_tokens),
        length_distribution(options.output_tokens),
        options.seed,
        groups,
    )


def _times(options: WorkloadOptions, kind: str) -> Iterator[float]:
    return arrivals(
        kind,
        math.inf if options.rate is None else options.rate,
        options.burstiness or 1.0,
        options.seed,
        amplitude=options.amplitude or 0.0,
        period_s=options.period_s or 0.0,
        steps=options.rates,
    )


def _traced(options: WorkloadOptions, kind: str) -> Iterator[TraceRequest]:
    assert options.trace is not None
    requests: Iterable[TraceRequest] = iter_trace(
        options.trace, options.trace_kind, keep_times=options.keep_times
    )
    if options.smear is None:
        head, requests = shaping.peeked(requests)
        smears = shaping.is_in_ticks(head)
    else:
        smears = options.smear
    if smears:
        requests = shaping.smear(requests, options.seed)
    if options.window_s is not None:
        requests = shaping.window(requests, *options.window_s)
    requests = shaping.bounded(requests, options.max_input_tokens, options.max_output_tokens)
    if options.draw is not None:
        head, requests = shaping.peeked(requests, 1)
        if not head:
            raise ConfigError("no request is left to draw from: widen --window or --max-input")
        pairs = options.draw == "pairs"
        return drawn(requests, _times(options, kind), options.seed, pairs=pairs)
    if kind == "trace":
        return shaping.scale(requests, options.rate_scale)
    return shaping.rearrive(requests, _times(options, kind))
