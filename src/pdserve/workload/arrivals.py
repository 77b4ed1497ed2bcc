"""Arrival processes: endless iterators of times in seconds after the start, never going back.

A gamma process has independent gaps from a gamma distribution whose mean is 1 / rate and whose
shape is the *burstiness*: 1 gives a Poisson process, less is burstier, more is more even (the
coefficient of variation of the gaps is 1 / sqrt(burstiness)). ``vllm bench serve`` means the same
by burstiness, but stretches the drawn gaps until their sum is exactly N / rate; here they stay as
drawn.

In a closed loop a new request starts when another ends, so all of them arrive at 0 and the sender's
bound on requests in flight does the rest.
"""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Iterator

from pdserve.core.errors import ConfigError

KINDS = ("poisson", "gamma", "constant", "closed")


def arrivals(kind: str, rate: float, burstiness: float, seed: int) -> Iterator[float]:
    """Times of the process ``kind`` (one of `KINDS`) at ``rate`` requests per second.

    Raises `ConfigError` for an unknown kind, or a rate or burstiness that is not above 0.
    """
    if kind not in KINDS:
        raise ConfigError(f"unknown arrivals {kind!r}: use one of {', '.join(KINDS)}")
    if kind == "closed":
        return itertools.repeat(0.0)
    if not rate > 0:
        raise ConfigError(f"a rate of {rate:g} requests/s brings no request: give one above 0")
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
