"""Service level objectives: upper bounds on a request's own latencies.

A request is *good* if it completed and meets every bound (``<=``). An answer of one token has no
TPOT and meets any bound on it. *Goodput* is good requests per second of the run; *attainment* is
good requests over all that were sent and not cancelled by the client itself, so a refused or broken
request counts as one that missed its objectives.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from pdserve.core.errors import ConfigError
from pdserve.core.request import ServiceClass
from pdserve.workload.outcome import Ending

METRICS = ("ttft", "tpot", "e2e")
_ALIASES = {"e2el": "e2e"}
_BOUND = re.compile(r"([a-z0-9]+)[:=]([0-9.]+(?:e[+-]?[0-9]+)?)(ms|s|)")


class Judged(Protocol):
    """What an objective is about: an `Outcome`, or a request that a simulator has ended."""

    @property
    def ending(self) -> Ending: ...

    @property
    def first_s(self) -> float | None: ...

    @property
    def ttft_s(self) -> float | None: ...

    @property
    def tpot_s(self) -> float | None: ...

    @property
    def e2e_s(self) -> float | None: ...


@dataclass(frozen=True, slots=True)
class Slo:
    """Bounds in milliseconds by metric; at least one."""

    bounds_ms: tuple[tuple[str, float], ...]

    def met_by(self, outcome: Judged) -> bool:
        return outcome.ending is Ending.COMPLETED and all(
            value_ms(outcome, metric) <= bound_ms for metric, bound_ms in self.bounds_ms
        )

    def parts(self) -> list[Slo]:
        """Each bound alone."""
        return [Slo((bound,)) for bound in self.bounds_ms]

    def __str__(self) -> str:
        return " ".join(f"{metric}:{bound_ms:g}" for metric, bound_ms in self.bounds_ms)


def parse_slo(texts: Sequence[str], flag: str = "--goodput") -> Slo:
    """From ``["ttft:200", "tpot:50"]`` (ms), or ``["ttft=2s"]``. Raises `ConfigError`."""
    bounds: dict[str, float] = {}
    for text in texts:
        match = _BOUND.fullmatch(text)
        name, bound_ms = ("", math.nan) if match is None else (match[1], _milliseconds(match))
        metric = _ALIASES.get(name, name)
        if metric not in METRICS or not 0 < bound_ms < math.inf or metric in bounds:
            raise ConfigError(
                f"{flag} {text!r}: write each of ttft, tpot and e2e at most once, as ttft:200 "
                "with milliseconds above 0 (or ttft:2s)"
            )
        bounds[metric] = bound_ms
    return Slo(tuple(bounds.items()))


def _milliseconds(match: re.Match[str]) -> float:
    try:
        return float(match[2]) * (1e3 if match[3] == "s" else 1.0)
    except ValueError:  # such as 1.2.3
        return math.nan


def slo_of(service: ServiceClass) -> Slo | None:
    """What a class of service is promised; None if nothing is."""
    promised = (("ttft", service.ttft_s * 1e3), ("tpot", service.tpot_s * 1e3))
    bounds = tuple((metric, bound_ms) for metric, bound_ms in promised if bound_ms < math.inf)
    return Slo(bounds) if bounds else None


def value_ms(outcome: Judged, metric: str) -> float:
    """The latency; 0 for the TPOT of a single token, infinite if there was no token at all."""
    if outcome.first_s is None:
        return math.inf
    value = {"ttft": outcome.ttft_s, "tpot": outcome.tpot_s, "e2e": outcome.e2e_s}[metric]
    return 0.0 if value is None else value * 1e3
