"""From options to a load: the requests of a workload, and how many of them at a time.

Everything is planned before the first request is sent, so that planning takes no time from sending:
only a closed loop that lasts for some time makes its requests on the way.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

from pdserve.bench.options import LoadOptions
from pdserve.core.errors import ConfigError
from pdserve.workload.build import arrivals_of, build, generated
from pdserve.workload.request import TraceRequest, own_segment
from pdserve.workload.reuse import Reuse, prefix_reuse


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
    if arrivals_of(options) == "closed" and options.concurrency is None:
        raise ConfigError("say how fast requests come: --concurrency N, --rate R or --trace FILE")
    workload = build(options)
    planned = None if workload.is_endless else list(workload.requests)
    if planned is not None and not planned:
        raise ConfigError("no request is left to send: widen --window, --duration or the trace")
    return Load(
        requests=workload.requests if planned is None else planned,
        warmup=_warmup(options, planned),
        num_requests=None if planned is None else len(planned),
        duration_s=options.duration_s,
        concurrency=options.concurrency,
        is_paced=workload.arrivals != "closed" and options.rate != math.inf,
        arrivals=workload.arrivals,
        reuse=None if planned is None else prefix_reuse(planned, math.inf),
    )


def _warmup(options: LoadOptions, planned: Sequence[TraceRequest] | None) -> list[TraceRequest]:
    """Requests like the planned ones, with prompts that nobody else has, and negative numbers."""
    if not options.warmup:
        return []
    if planned is None:
        planned = list(itertools.islice(generated(options, "closed"), options.warmup))
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
