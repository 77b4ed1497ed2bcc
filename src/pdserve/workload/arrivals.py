"""Arrival processes: endless iterators of times in seconds after the start, never going back.

A gamma process has independent gaps from a gamma distribution whose mean is 1 / rate and whose
shape is the *burstiness*: 1 gives a Poisson process, less is burstier, more is more even (the
coefficient of variation of the gaps is 1 / sqrt(burstiness)). ``vllm bench serve`` means the same
by burstiness, but stretches the drawn gaps until their sum is exactly N / rate; here they stay as
drawn.

Load that changes in time is a Poisson process whose rate does: candidates come at the highest rate,
and each stays with the probability that the rate of its moment has in the highest (thinning). A
*sinusoid* is rate x (1 + amplitude x sin(2 pi t / period)); *steps* are rates that hold for so many
seconds each, and then again from the first.

In a closed loop a new request starts when another ends, so all of them arrive at 0 and the sender's
bound on requests in flight does the rest.
"""

from __future__ import annotations

import bisect
import itertools
import math
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from pdserve.core.errors import ConfigError

KINDS = ("poisson", "gamma", "constant", "closed", "sinusoid", "steps")


@dataclass(frozen=True, slots=True)
class RateStep:
    """``rate`` requests per second, for ``duration_s`` seconds."""

    rate: float
    duration_s: float


def arrivals(
    kind: str,
    rate: float,
    burstiness: float,
    seed: int,
    *,
    amplitude: float = 0.0,
    period_s: float = 0.0,
    steps: Sequence[RateStep] = (),
) -> Iterator[float]:
    """Times of the process ``kind`` (one of `KINDS`) at ``rate`` requests per second.

    ``amplitude`` (0 .. 1) and ``period_s`` are of a sinusoid; ``steps`` take the place of ``rate``.
    Raises `ConfigError` for an unknown kind, or for numbers that bring no request.
    """
    if kind not in KINDS:
        raise ConfigError(f"unknown arrivals {kind!r}: use one of {', '.join(KINDS)}")
    if kind == "closed":
        return itertools.repeat(0.0)
    if kind == "steps":
        return stepped(steps, seed)
    if not rate > 0:
        raise ConfigError(f"a rate of {rate:g} requests/s brings no request: give one above 0")
    if kind == "sinusoid":
        return sinusoid(rate, amplitude, period_s, seed)
    if not 0 < burstiness < math.inf:
        raise ConfigError(f"burstiness is {burstiness:g}: 1 is Poisson, less is burstier")
    if math.isinf(rate):
        return itertools.repeat(0.0)
    if kind == "constant":
        return constant(rate)
    return gamma(rate, 1.0 if kind == "poisson" else burstiness, seed)


def constant(rate: float) -> Iterator[float]:
    """0, 1 / rate, 2 / rate, ... without accumulated rounding."""
    return (index / rate for index in itertools.count())


def gamma(rate: float, burstiness: float, seed: int) -> Iterator[float]:
    """A renewal process; its first request comes after a first gap, not at 0."""
    rng = random.Random(f"{seed}/arrivals")
    at_s = 0.0
    while True:
        at_s += rng.gammavariate(burstiness, 1.0 / (rate * burstiness))
        yield at_s


def sinusoid(rate: float, amplitude: float, period_s: float, seed: int) -> Iterator[float]:
    """A Poisson process around ``rate``: it begins there and rises first."""
    if not 0 <= amplitude <= 1 or not 0 < period_s < math.inf or math.isinf(rate):
        raise ConfigError(
            f"a sinusoid around {rate:g} requests/s with amplitude {amplitude:g} and period "
            f"{period_s:g} s: the amplitude is a share of the rate, 0 to 1, the period above 0"
        )
    turn = 2 * math.pi / period_s

    def rate_at(at_s: float) -> float:
        return rate * (1 + amplitude * math.sin(turn * at_s))

    return _thinned(rate_at, rate * (1 + amplitude), seed)


def stepped(steps: Sequence[RateStep], seed: int) -> Iterator[float]:
    """A Poisson process at the steps' rates, in turn, over and over."""
    highest = max((step.rate for step in steps), default=0.0)
    if not 0 < highest < math.inf or any(step.rate < 0 or step.duration_s <= 0 for step in steps):
        raise ConfigError("steps are RATE:SECONDS with some rate above 0, as 2:60,8:60")
    ends = list(itertools.accumulate(step.duration_s for step in steps))

    def rate_at(at_s: float) -> float:
        # Rounding may put the remainder at the end of the round itself: that is its last step.
        index = bisect.bisect_right(ends, math.fmod(at_s, ends[-1]))
        return steps[min(index, len(steps) - 1)].rate

    return _thinned(rate_at, highest, seed)


def parse_steps(text: str) -> tuple[RateStep, ...]:
    """From ``2:60,8:60``: 2 requests per second for 60 s, then 8. Raises `ConfigError`."""
    steps = []
    for part in text.split(","):
        rate, _, duration = part.partition(":")
        try:
            steps.append(RateStep(float(rate), float(duration)))
        except ValueError:
            steps.append(RateStep(math.nan, math.nan))
        if not (0 <= steps[-1].rate < math.inf and 0 < steps[-1].duration_s < math.inf):
            raise ConfigError(f"{part!r} is no step of a rate: write RATE:SECONDS, as 2:60,8:60")
    if not any(step.rate for step in steps):
        raise ConfigError(f"the rates {text!r} bring no request: give one above 0")
    return tuple(steps)


def _thinned(rate_at: Callable[[float], float], highest: float, seed: int) -> Iterator[float]:
    """A Poisson process whose rate at a moment, at most ``highest``, is ``rate_at``."""
    rng = random.Random(f"{seed}/thinning")
    for at_s in gamma(highest, 1.0, seed):
        if rng.random() * highest < rate_at(at_s):
            yield at_s
