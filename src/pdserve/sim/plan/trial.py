"""One question to the simulator, and its answer.

A *design* is a policy on a choice of hardware: ``(h100,)`` with every worker mixed, or
``(h100, a100)`` with prefill on the one and decode on the other. A *candidate* is a design with
counts. A *trial* asks how a candidate does on one window of the trace under `Conditions`; an
`Evaluation` says how many of its requests missed which bound.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from pdserve.core.request import Role
from pdserve.sim.spec import ClusterSpec, Group

Counts = tuple[int, ...]
Factors = tuple[tuple[str, float], ...]
"""By name, sorted; a factor of 1 is left out."""


@dataclass(frozen=True, slots=True, order=True)
class Design:
    """``hardware``: of all workers, or of prefill and of decode workers; each as in a cluster's
    specification, link included (``h100@ib-400``)."""

    hardware: tuple[str, ...]
    policy: str

    @property
    def is_split(self) -> bool:
        return len(self.hardware) == 2

    @property
    def roles(self) -> tuple[Role, ...]:
        return (Role.PREFILL, Role.DECODE) if self.is_split else (Role.MIXED,)

    def __str__(self) -> str:
        pairs = zip(self.hardware, self.roles, strict=True)
        return f"{' + '.join(f'{name} {role}' for name, role in pairs)}, {self.policy}"


@dataclass(frozen=True, slots=True, order=True)
class Candidate:
    """``counts`` of the design's workers, in the order of its hardware; each at least 1."""

    design: Design
    counts: Counts

    @property
    def cluster(self) -> ClusterSpec:
        groups = []
        for count, name, role in zip(
            self.counts, self.design.hardware, self.design.roles, strict=True
        ):
            hardware, _, link = name.partition("@")
            groups.append(Group(count=count, hardware=hardware, role=role, link=link))
        return ClusterSpec(tuple(groups))

    @property
    def words(self) -> str:
        """``27 h100 prefill and 3 h100 decode workers``."""
        parts = [
            f"{count} {name} {role}"
            for count, name, role in zip(
                self.counts, self.design.hardware, self.design.roles, strict=True
            )
        ]
        return f"{' and '.join(parts)} worker{'s' if sum(self.counts) > 1 else ''}"

    def __str__(self) -> str:
        return f"{self.cluster} ({self.design.policy})"


@dataclass(frozen=True, slots=True)
class Conditions:
    """What a question is asked under. ``looser``: factors on the promise's bounds by metric;
    ``slower``: factors on step times by hardware."""

    rate: float
    looser: Factors = ()
    slower: Factors = ()


@dataclass(frozen=True, slots=True)
class Trial:
    """``window``: its number."""

    candidate: Candidate
    conditions: Conditions
    window: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Evaluation:
    """``misses`` of each bound among ``num_judged`` requests. Not ``complete``: the simulation
    stopped when one of them was over what was allowed, so they are at least so many, and the other
    figures are of what had ended by then. Percentiles (P50, P90, P99) are in seconds; infinite ones
    are of requests without an answer. ``energy_j`` of all workers."""

    num_judged: int
    misses: tuple[int, ...]
    complete: bool = True
    good: int = 0
    span_s: float = 0.0
    ttft_s: tuple[float, ...] = ()
    tpot_s: tuple[float, ...] = ()
    e2e_s: tuple[float, ...] = ()
    wall_s: float = 0.0

    def document(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in self.__slots__}

    @classmethod
    def of(cls, document: dict[str, Any]) -> Evaluation:
        """Raises `TypeError` or `KeyError` for what is none."""
        values = dict(document)
        for name in ("misses", "ttft_s", "tpot_s", "e2e_s"):
            values[name] = tuple(values[name])
        return cls(**values)


def factors(**by_name: float) -> Factors:
    """In their canonical form."""
    return tuple(sorted((name, factor) for name, factor in by_name.items() if factor != 1.0))


class Evaluate(Protocol):
    """Who answers: the simulator, or a formula in tests."""

    def __call__(self, trial: Trial, allowed: Sequence[int] | None) -> Evaluation:
        """May stop as soon as a bound has more misses than ``allowed``; with None it may not."""
        ...

    def num_judged(self, window: int) -> int:
        """How many requests of the window are judged, whatever the candidate and the rate."""
        ...
