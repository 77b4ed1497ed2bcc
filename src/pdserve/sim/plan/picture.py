"""The clusters of a plan on two axes: what they cost (or draw) against the rate that they serve."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

from pdserve.plot.axis import Axis, axis_of
from pdserve.plot.chart import BOTTOM, COLOURS, HEIGHT, LEFT, RIGHT, TOP, WIDTH, Chart
from pdserve.sim.plan.race import Found

_RADIUS = 4


def front_svg(
    title: str, clusters: Sequence[Found], front: Sequence[Found], *, power: bool, unit: str
) -> str:
    """``front`` as full points, other ``clusters`` as rings; split ones in one colour, aggregated
    ones in another. At least one."""
    every = [*clusters, *front]
    xs = [_x(found, power=power) for found in every]
    ys = [found.rate for found in every]
    x, y = axis_of(min(xs) * 0.9, max(xs) * 1.1), axis_of(min(ys) * 0.9, max(ys) * 1.1)
    chart = Chart(title, x, y, x_unit="kW" if power else unit)
    known = {found.candidate for found in front}
    dots = [
        _dot(found, x, y, power=power, full=False)
        for found in clusters
        if found.candidate not in known
    ]
    dots += [_dot(found, x, y, power=power, full=True) for found in front]
    legend = [
        f'<text x="{WIDTH - RIGHT}" y="{TOP - 4}" text-anchor="end" fill="{colour}">{name}</text>'
        for name, colour in (("split", COLOURS[0]),)
    ] + [
        f'<text x="{WIDTH - RIGHT - 40}" y="{TOP - 4}" text-anchor="end" fill="{COLOURS[1]}">'
        "aggregated</text>",
        f'<text x="{LEFT}" y="{TOP - 4}">requests/s</text>',
    ]
    return chart.svg().replace("</svg>", "\n".join([*legend, *dots, "</svg>"]))


def _x(found: Found, *, power: bool) -> float:
    return found.power_w / 1e3 if power else found.cost


def _dot(found: Found, x: Axis, y: Axis, *, power: bool, full: bool) -> str:
    at_x = LEFT + x.share(_x(found, power=power)) * (WIDTH - LEFT - RIGHT)
    at_y = HEIGHT - BOTTOM - y.share(found.rate) * (HEIGHT - TOP - BOTTOM)
    colour = COLOURS[0] if found.design.is_split else COLOURS[1]
    fill = colour if full else "none"
    return (
        f'<circle cx="{at_x:.1f}" cy="{at_y:.1f}" r="{_RADIUS}" stroke="{colour}" fill="{fill}">'
        f"<title>{escape(str(found.candidate))}: {found.rate:.4g} requests/s</title></circle>"
    )
