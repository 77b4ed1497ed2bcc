"""Service level objectives: upper bounds on a request's own latencies.

A request is *good* if it completed and meets every bound (``<=``). An answer of one token has no
TPOT and meets any bound on it. *Goodput* is good requests per second of the run; *attainment* is
good requests over all that were sent and not cancelled by the client itself, so a refused or broken
request counts as one that missed its objectives.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from pdserve.core.errors import ConfigError
from pdserve.workload.outcome import Ending, Outcome

METRICS = ("ttft", "tpot", "e2e")
_ALIASES = {"e2el": "e2e"}


@dataclass(frozen=True, slots=True)
class Slo:
    """Bounds in milliseconds by metric; at least one."""

    bounds_ms: tuple[tuple[str, float], ...]

    def met_by(self, outcome: Outcome) -> bool:
        return outcome.ending is Ending.COMPLETED and all(
            value_ms(outcome, metric) <= bound_ms for metric, bound_ms in self.bounds_ms
        )

    def parts(self) -> list[Slo]:
        """Each bound alone."""
        return [Slo((bound,)) for bound in self.bounds_ms]

    def __str__(self) -> str:
        return " ".join(f"{metric}:{bound_ms:g}" for metric, bound_ms in self.bounds_ms)


def parse_slo(texts: Sequence[str]) -> Slo:
    """From ``["ttft:200", "tpot:50"]`` (ms). Raises `ConfigError`."""
    bounds: dict[str, float] = {}
    for text in texts:
        name, _, number = text.partition(":")
        metric = _ALIASES.get(name, name)
        try:
            bound_ms = float(number)
        except ValueError:
            bound_ms = math.nan
        if metric not in METRICS or not bound_ms > 0 or metric in bounds:
            raise ConfigError(
                f"--goodput {text!r}: write each of ttft, tpot and e2e at most once, as ttft:200 "
                "with milliseconds above 0"
            )
        bounds[metric] = bound_ms
    return Slo(tuple(bounds.items()))


def value_ms(outcome: Outcome, metric: str) -> float:
    """The latency; 0 for the TPOT of a single token, infinite if there was no token at all."""
    if outcome.first_s is None:
        return math.inf
    value = {"ttft": outcome.ttft_s, "tpot": outcome.tpot_s, "e2e": outcome.e2e_s}[metric]
    return 0.0 if value is None else value * 1e3
