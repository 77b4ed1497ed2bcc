"""Distributions: the cumulative share of values up to x, with a dashed line at a bound."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from pdserve.plot.axis import Axis, axis_of
from pdserve.plot.chart import Chart, Point

MAX_POINTS = 512
_SHARES = Axis((0.0, 0.25, 0.5, 0.75, 0.9, 1.0))


def cdf_svg(title: str, values: Sequence[float], bound: float | None = None) -> str:
    """Of values in milliseconds, at least one."""
    ordered = sorted(values)
    return cdfs_svg(f"{title} (n = {len(ordered)})", {"": cdf_points(ordered)}, bound, "ms")


def cdfs_svg(
    title: str, curves: Mapping[str, Sequence[Point]], bound: float | None, unit: str
) -> str:
    """Several curves of (value, share up to it) by name; none is empty."""
    low = min(points[0][0] for points in curves.values())
    high = max(points[-1][0] for points in curves.values())
    shown = [] if bound is None else [bound]
    chart = Chart(title, axis_of(low, high, *shown), _SHARES, x_unit=unit, percent=True)
    for name, points in curves.items():
        chart.curve(points, name)
    if bound is not None and bound > 0:
        chart.mark(bound)
    return chart.svg()


def cdf_points(ordered: Sequence[float]) -> list[Point]:
    """At most some `MAX_POINTS` of the curve of sorted values, its two ends among them."""
    num = len(ordered)
    step = max(1, num // MAX_POINTS)
    indexes = [*range(0, num - 1, step), num - 1]
    return [(ordered[0], 0.0), *((ordered[i], (i + 1) / num) for i in indexes)]
