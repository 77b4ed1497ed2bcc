"""From options to a load: which requests, when, and how many at a time.

A trace brings its own times; other arrivals can be put in their place. Without a trace lengths are
drawn, and requests come as a Poisson process if there is a rate, else in a closed loop. Whatever
cannot go together is refused here, before anything is sent.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace

from pdserve.bench.options import LoadOptions
from pdserve.core.errors import ConfigError
from pdserve.workload import shaping
from pdserve.workload.arrivals import arrivals
from pdserve.workload.lengths import length_distribution
from pdserve.workload.request import TraceRequest, own_segment
from pdserve.workload.reuse import Reuse, prefix_reuse
from pdserve.workload.synthetic import PrefixGroups, synthetic
from pdserve.workload.traces import read_trace

DEFAULT_REQUESTS = 100


@dataclass(frozen=True, slots=True, kw_only=True)
class Load:
    """What to send. ``num_requests`` None: as many as fit into ``duration_s``.

    ``is_paced`` says that the requests' times mean something (in a closed loop they do not). At
    most ``concurrency`` requests are in flight (None: no bound); the others wait for their turn.
    ``reuse`` is what an endless prefix cache could serve.
    """

    requests: Iterable[TraceRequest]
    warmup: Sequence[TraceRequest]
    num_requests: int | None
    duration_s: float | None
    concurrency: int | None
    is_paced: bool
    arrivals: str
    reuse: Reuse | None


def make_load(options: LoadOptions) -> Load:
    """Raises `ConfigError` for options that make no sense together."""
    kind = _arrivals_of(options)
    _check(options, kind)
    requests = _traced(options, kind) if options.trace else _generated(options, kind)
    limit = options.num_requests
    if limit is None and options.trace is None and options.duration_s is None:
        limit = DEFAULT_REQUESTS
    requests = itertools.islice(requests, limit)
    if kind != "closed" and options.duration_s is not None:
        duration_s = options.duration_s
        requests = itertools.takewhile(lambda request: request.at_s < duration_s, requests)
    if options.cancel_rate:
        requests = shaping.with_cancellations(
            requests, options.cancel_rate, options.cancel_after_s, options.seed
        )
    is_endless = limit is None and options.trace is None and kind == "closed"
    planned = None if is_endless else list(requests)
    if planned is not None and not planned:
        raise ConfigError("no request is left to send: widen --window, --duration or the trace")
    return Load(
        requests=requests if planned is None else planned,
        warmup=_warmup(options, planned),
        num_requests=None if planned is None else len(planned),
        duration_s=options.duration_s,
        concurrency=options.concurrency,
        is_paced=kind != "closed" and options.rate != math.inf,
        arrivals=kind,
        reuse=None if planned is None else prefix_reuse(planned, math.inf),
    )


def _arrivals_of(options: LoadOptions) -> str:
    if options.arrivals is not None:
        return options.arrivals
    if options.rate is not None:
        return "poisson" if options.burstiness is None else "gamma"
    if options.trace is not None:
        return "trace"
    return "closed"


def _check(options: LoadOptions, kind: str) -> None:
    if kind == "closed" and options.concurrency is None:
        raise ConfigError("say how fast requests come: --concurrency N, --rate R or --trace FILE")
    if kind == "closed" and options.rate is not None:
        raise ConfigError("closed arrivals have no rate: leave out --rate or --arrivals closed")
    if kind in ("poisson", "gamma", "constant") and options.rate is None:
        raise ConfigError(f"{kind} arrivals need --rate R (requests per second)")
    if kind == "gamma" and options.burstiness is None:
        raise ConfigError("gamma arrivals need --burstiness B (1 is Poisson, less is burstier)")
    if kind != "gamma" and options.burstiness is not None:
        raise ConfigError(f"{kind} arrivals have no burstiness: leave out --burstiness")
    if kind == "trace" and options.trace is None:
        raise ConfigError("trace arrivals need --trace FILE")
    if options.trace is None and (options.window_s or options.smear or options.rate_scale != 1.0):
        raise ConfigError("--window, --smear and --rate-scale need --trace FILE")
    if kind != "trace" and options.rate_scale != 1.0:
        raise ConfigError("--rate-scale speeds up a trace's own times: leave out --rate")
    if options.trace is not None and options.prefix_groups:
        raise ConfigError("a trace has its own prefixes: leave out --prefix-groups")
    if bool(options.prefix_groups) != bool(options.prefix_tokens):
        raise ConfigError("--prefix-groups and --prefix-tokens go together")
    if kind != "closed" and options.num_requests is None and options.rate == math.inf:
        raise ConfigError("an infinite rate needs --num-requests N")


def _generated(options: LoadOptions, kind: str) -> Iterator[TraceRequest]:
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


def _times(options: LoadOptions, kind: str) -> Iterator[float]:
    rate = math.inf if options.rate is None else options.rate
    return arrivals(kind, rate, options.burstiness or 1.0, options.seed)


def _traced(options: LoadOptions, kind: str) -> Iterator[TraceRequest]:
    assert options.trace is not None
    whole = read_trace(options.trace, options.trace_kind)
    requests: Iterable[TraceRequest] = whole
    if options.smear or (options.smear is None and shaping.is_in_ticks(whole)):
        requests = shaping.smear(whole, options.seed)
    if options.window_s is not None:
        requests = shaping.window(requests, *options.window_s)
    most_in = options.max_input_tokens or math.inf
    most_out = options.max_output_tokens or math.inf
    requests = (
        replace(request, output_tokens=min(request.output_tokens, int(min(most_out, 1 << 40))))
        for request in requests
        if request.prompt_tokens <= most_in
    )
    if kind == "trace":
        return shaping.scale(requests, options.rate_scale)
    return shaping.rearrive(requests, _times(options, kind))


def _warmup(options: LoadOptions, planned: Sequence[TraceRequest] | None) -> list[TraceRequest]:
    """Requests like the planned ones, with prompts that nobody else has, and negative numbers."""
    if not options.warmup:
        return []
    if planned is None:
        planned = list(itertools.islice(_generated(options, "closed"), options.warmup))
    return [
        replace(
            request,
            index=-1 - number,
            at_s=0.0,
            segments=(own_segment(-1 - number, request.prompt_tokens),),
            cancel_after_tokens=None,
            cancel_after_s=None,
        )
        for number, request in enumerate(itertools.islice(itertools.cycle(planned), options.warmup))
    ]
