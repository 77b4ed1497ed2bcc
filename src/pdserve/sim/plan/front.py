"""Clusters of which no other is better in everything: cost, power, and the rate that they serve."""

from __future__ import annotations

from collections.abc import Iterable

from pdserve.sim.plan.race import Found

ROUNDING = 1e-9


def pareto(found: Iterable[Found]) -> list[Found]:
    """Those that no other dominates, by cost. Of equal ones the first by name."""
    kept: list[Found] = []
    for one in sorted(found, key=lambda f: (f.cost, f.power_w, -f.rate, f.candidate)):
        if not any(_covers(other, one) for other in kept):
            kept.append(one)
    return kept


def _covers(other: Found, one: Found) -> bool:
    """At least as good in everything."""
    return (
        other.cost <= one.cost * (1 + ROUNDING)
        and other.power_w <= one.power_w * (1 + ROUNDING)
        and other.rate >= one.rate * (1 - ROUNDING)
    )
