"""Length distributions, as one writes them on a command line.

===================  ==========================================================
``512``              always 512
``128:1024``         uniform over 128 .. 1024, both included
``exp:200``          exponential with mean 200
``lognormal:500:1``  lognormal with median 500; the logarithm deviates by 1
===================  ==========================================================

Drawn lengths are rounded and at least 1.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable

from pdserve.core.errors import ConfigError

Draw = Callable[[random.Random], int]


def length_distribution(text: str) -> Draw:
    """The distribution that ``text`` describes. Raises `ConfigError` if it describes none."""
    name, *numbers = text.split(":") if text[:1].isalpha() else ("", *text.split(":"))
    try:
        values = [float(number) for number in numbers]
    except ValueError:
        values = []
    draw = _draw(name, values)
    if draw is None or not all(math.isfinite(value) for value in values):
        raise ConfigError(
            f"{text!r} is no length: write 512, 128:1024, exp:MEAN or lognormal:MEDIAN:SIGMA"
        )
    return draw


def _draw(name: str, values: list[float]) -> Draw | None:
    match name, values:
        case "", [value] if value >= 1 and value.is_integer():
            return lambda rng: int(value)
        case "", [low, high] if 1 <= low <= high and low.is_integer() and high.is_integer():
            return lambda rng: rng.randint(int(low), int(high))
        case "exp", [mean] if mean > 0:
            return lambda rng: max(1, round(rng.expovariate(1.0 / mean)))
        case "lognormal", [median, sigma] if median > 0 and sigma >= 0:
            return lambda rng: max(1, round(rng.lognormvariate(math.log(median), sigma)))
    return None
