"""The flags that describe a workload: the same for ``pdserve bench`` and ``pdserve sim``."""

from __future__ import annotations

import argparse
import math
from collections.abc import Sequence
from pathlib import Path

from pdserve.core.errors import ConfigError
from pdserve.workload.arrivals import KINDS, parse_steps
from pdserve.workload.options import DRAWS, WorkloadOptions
from pdserve.workload.traces import KINDS as TRACE_KINDS


def add_contents(group: argparse._ArgumentGroup) -> None:
    """Which requests."""
    add = group.add_argument
    add("-n", "--num-requests", type=int, metavar="N", help="default: 100, or the whole trace")
    add("--input", default="512", metavar="LENGTH", help="prompt tokens (default: 512)")
    add(
        "--output",
        default="128",
        metavar="LENGTH",
        help="answer tokens (default: 128); a LENGTH is 512, 128:1024 (even), exp:MEAN or "
        "lognormal:MEDIAN:SIGMA",
    )
    add("--prefix-groups", type=int, default=0, metavar="G", help="prompts begin with one of G ...")
    add("--prefix-tokens", type=int, default=0, metavar="P", help="... prefixes of P tokens")
    add("--trace", type=Path, metavar="FILE", help="the requests of this trace")
    add("--trace-kind", choices=TRACE_KINDS, help="default: told by its first line")
    add(
        "--draw",
        choices=DRAWS,
        help="draw lengths from the trace, endlessly: a prompt with its answer, or each by itself",
    )
    add("--max-input", type=int, metavar="N", help="leave out a trace's longer prompts")
    add("--max-output", type=int, metavar="N", help="cut a trace's longer answers")
    add("--cancel-rate", type=float, default=0.0, metavar="P", help="share of clients that leave")
    add("--cancel-after", type=float, metavar="S", help="... S seconds after sending")
    add("--seed", type=int, default=0, help="of everything random (default: 0)")


def add_times(group: argparse._ArgumentGroup) -> None:
    """When they come."""
    add = group.add_argument
    add("--rate", type=float, metavar="R", help="requests per second; inf: all at once")
    add("--arrivals", choices=(*KINDS, "trace"), help="default: told by the other flags")
    add("--burstiness", type=float, metavar="B", help="gamma arrivals; 1: Poisson, less: burstier")
    add("--amplitude", type=float, metavar="A", help="sinusoid around --rate: A (0 to 1) of it ...")
    add("--period", type=float, metavar="S", help="... up and down within S seconds")
    add("--rates", metavar="R:S,...", help="rate R for S seconds, then the next, over and over")
    add("--rate-scale", type=float, default=1.0, metavar="X", help="replay a trace X times as fast")
    add("--window", metavar="START:END", help="only this part of a trace, in seconds")
    add(
        "--smear",
        action=argparse.BooleanOptionalAction,
        help="spread requests with one time stamp (default: if most of the trace has shared ones)",
    )
    add(
        "--keep-times",
        action="store_true",
        help="do not shift a trace's times to have the first request at 0",
    )
    add("--duration", type=float, metavar="S", help="requests of S seconds")


def workload_options(parsed: argparse.Namespace) -> WorkloadOptions:
    """What these flags say. Raises `ConfigError` for a value that cannot be."""
    check_numbers(parsed, above_0=_ABOVE_0, from_0=_FROM_0)
    if parsed.cancel_rate > 1:
        raise ConfigError(f"--cancel-rate is {parsed.cancel_rate:g}: it is a share, 0 to 1")
    return WorkloadOptions(
        trace=parsed.trace,
        trace_kind=parsed.trace_kind,
        keep_times=parsed.keep_times,
        draw=parsed.draw,
        window_s=_window(parsed.window),
        smear=parsed.smear,
        rate_scale=parsed.rate_scale,
        input_tokens=parsed.input,
        output_tokens=parsed.output,
        max_input_tokens=parsed.max_input,
        max_output_tokens=parsed.max_output,
        prefix_groups=parsed.prefix_groups,
        prefix_tokens=parsed.prefix_tokens,
        arrivals=parsed.arrivals,
        rate=parsed.rate,
        rates=parse_steps(parsed.rates) if parsed.rates is not None else (),
        burstiness=parsed.burstiness,
        amplitude=parsed.amplitude,
        period_s=parsed.period,
        num_requests=parsed.num_requests,
        duration_s=parsed.duration,
        cancel_rate=parsed.cancel_rate,
        cancel_after_s=parsed.cancel_after,
        seed=parsed.seed,
    )


_ABOVE_0 = ("num_requests", "max_input", "max_output", "rate_scale", "duration", "period")
_FROM_0 = ("prefix_groups", "prefix_tokens", "cancel_rate", "cancel_after", "amplitude")


def check_numbers(
    parsed: argparse.Namespace, *, above_0: Sequence[str], from_0: Sequence[str]
) -> None:
    """Raises `ConfigError` for the first of these fields that is infinite or too small."""
    for name in (*above_0, *from_0):
        value = getattr(parsed, name)
        flag = "--" + name.replace("_", "-")
        if value is None:
            continue
        if not math.isfinite(value) or value < 0 or (name in above_0 and value == 0):
            least = "above 0" if name in above_0 else "0 or more"
            raise ConfigError(f"{flag} is {value:g}: give a number {least}")


def _window(text: str | None) -> tuple[float, float] | None:
    if text is None:
        return None
    start, _, end = text.partition(":")
    try:
        window_s = (float(start or 0), float(end or math.inf))
    except ValueError:
        window_s = (0.0, 0.0)
    if not 0 <= window_s[0] < window_s[1]:
        raise ConfigError(f"--window {text!r}: write START:END in seconds, as 600:900")
    return window_s
