"""Distributions: the cumulative share of values up to x, with a dashed line at a bound."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from pdserve.plot.axis import Axis, axis_of
from pdserve.plot.chart import COLOURS, Chart, Point

MAX_POINTS = 512
_SHARES = Axis((0.0, 0.25, 0.5, 0.75, 0.9, 1.0))


def cdf_svg(title: str, values: Sequence[float], bound: float | None = None) -> str:
    """Of values in milliseconds, at least one."""
    ordered = sorted(values)
    bounds = {} if bound is None else {"": bound}
    return cdfs_svg(f"{title} (n = {len(ordered)})", {"": cdf_points(ordered)}, bounds, "ms")


def cdfs_svg(
    title: str, curves: Mapping[str, Sequence[Point]], bounds: Mapping[str, float], unit: str
) -> str:
    """Several curves of (value, share up to it) by name, none of them empty, and the bound of each
    that has one. If all bounds are equal there is one line."""
    low = min(points[0][0] for points in curves.values())
    high = max(points[-1][0] for points in curves.values())
    shown = {name: bound for name, bound in bounds.items() if bound > 0 and name in curves}
    axis = axis_of(low, high, *shown.values())
    chart = Chart(title, axis, _SHARES, x_unit=unit, percent=True)
    is_one = len(set(shown.values())) == 1
    for number, (name, points) in enumerate(curves.items()):
        chart.curve(points, name)
        if name in shown and not is_one:
            chart.mark(shown[name], COLOURS[number % len(COLOURS)])
    if is_one:
        chart.mark(next(iter(shown.values())))
    return chart.svg()


def cdf_points(ordered: Sequence[float]) -> list[Point]:
    """At most some `MAX_POINTS` of the curve of sorted values, its two ends among them."""
    num = len(ordered)
    step = max(1, num // MAX_POINTS)
    indexes = [*range(0, num - 1, step), num - 1]
    return [(ordered[0], 0.0), *((ordered[i], (i + 1) / num) for i in indexes)]
