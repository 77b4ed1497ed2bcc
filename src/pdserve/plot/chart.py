"""A chart: curves, bands and marks on two axes, as the text of an SVG file."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from html import escape

from pdserve.plot.axis import Axis

Point = tuple[float, float]

WIDTH, HEIGHT = 640, 400
LEFT, RIGHT, TOP, BOTTOM = 60, 20, 40, 50
COLOURS = ("#1667b7", "#d9771c", "#2f8f4e", "#8a4fb0", "#777777", "#b0387a")
MARK = "#c33"
STYLE = (
    "text{font:12px sans-serif;fill:#333}.t{font-size:15px}.g{stroke:#ddd}"
    ".c{fill:none;stroke-width:2}.s{stroke-dasharray:5 4}"
)


def frame(title: str, parts: Iterable[str], height: int = HEIGHT) -> str:
    """The whole file."""
    return "\n".join(
        [
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}">',
            f"<style>{STYLE}</style>",
            '<rect width="100%" height="100%" fill="#fff"/>',
            f'<text class="t" x="{LEFT}" y="24">{escape(title)}</text>',
            *parts,
            "</svg>",
            "",
        ]
    )


class Chart:
    """Things are drawn in the order in which they are added, each with the next colour."""

    def __init__(self, title: str, x: Axis, y: Axis, *, x_unit: str = "", percent: bool = False):
        self._title = title
        self._x, self._y = x, y
        self._parts: list[str] = []
        self._names: list[tuple[str, str]] = []
        self._draw_axes(x_unit, percent)

    def curve(self, points: Sequence[Point], name: str = "", colour: str | None = None) -> None:
        """A line through the points."""
        colour = self._next(name, colour)
        places = " ".join(f"{self._x_of(x):.1f},{self._y_of(y):.1f}" for x, y in points)
        self._parts.append(f'<polyline class="c" stroke="{colour}" points="{places}"/>')

    def band(
        self,
        xs: Sequence[float],
        lows: Sequence[float],
        highs: Sequence[float],
        name: str = "",
        colour: str | None = None,
    ) -> None:
        """The area between two lines over the same places."""
        colour = self._next(name, colour)
        there = [f"{self._x_of(x):.1f},{self._y_of(y):.1f}" for x, y in zip(xs, highs, strict=True)]
        back = [f"{self._x_of(x):.1f},{self._y_of(y):.1f}" for x, y in zip(xs, lows, strict=True)]
        places = " ".join([*there, *reversed(back)])
        self._parts.append(f'<polygon fill="{colour}" fill-opacity="0.8" points="{places}"/>')

    def mark(self, x: float, colour: str = MARK) -> None:
        """A dashed line down the chart, as of a bound."""
        at = f"{self._x_of(x):.1f}"
        self._parts.append(
            f'<line class="s" stroke="{colour}" x1="{at}" x2="{at}" '
            f'y1="{TOP}" y2="{HEIGHT - BOTTOM}"/>'
        )

    def svg(self) -> str:
        return frame(self._title, [*self._parts, *legend(self._names)])

    def _next(self, name: str, colour: str | None) -> str:
        chosen = colour or COLOURS[len(self._names) % len(COLOURS)]
        if name:
            self._names.append((name, chosen))
        return chosen

    def _x_of(self, value: float) -> float:
        return LEFT + self._x.share(value) * (WIDTH - LEFT - RIGHT)

    def _y_of(self, value: float) -> float:
        return HEIGHT - BOTTOM - self._y.share(value) * (HEIGHT - TOP - BOTTOM)

    def _draw_axes(self, x_unit: str, percent: bool) -> None:
        for tick in self._y.ticks:
            y = self._y_of(tick)
            text = f"{tick * 100:g} %" if percent else _short(tick)
            self._parts.append(
                f'<line class="g" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>'
                f'<text x="{LEFT - 8}" y="{y + 4:.1f}" text-anchor="end">{text}</text>'
            )
        places = [(self._x_of(tick), _short(tick)) for tick in self._x.ticks]
        self._parts += x_axis(places, HEIGHT - BOTTOM, x_unit)


def x_axis(places: Iterable[tuple[float, str]], bottom: float, unit: str) -> list[str]:
    """Lines up from ``bottom``, what stands below each, and the unit."""
    parts = [
        f'<line class="g" x1="{x:.1f}" x2="{x:.1f}" y1="{TOP}" y2="{bottom:.1f}"/>'
        f'<text x="{x:.1f}" y="{bottom + 18:.1f}" text-anchor="middle">{text}</text>'
        for x, text in places
    ]
    middle = (LEFT + WIDTH - RIGHT) / 2
    parts.append(
        f'<text x="{middle}" y="{bottom + BOTTOM - 8:.0f}" text-anchor="middle">'
        f"{escape(unit)}</text>"
    )
    return parts


def legend(names: Iterable[tuple[str, str]]) -> list[str]:
    """(name, colour) in a row at the top right; nothing if there is a single name."""
    listed = list(names)
    if len(listed) < 2:
        return []
    parts, right = [], float(WIDTH - RIGHT)
    for name, colour in reversed(listed):
        right -= 7.0 * len(name)
        parts.append(f'<text x="{right:.1f}" y="24">{escape(name)}</text>')
        right -= 14
        parts.append(f'<rect x="{right:.1f}" y="15" width="10" height="10" fill="{colour}"/>')
        right -= 12
    return parts


def _short(value: float) -> str:
    """12000 as 12k."""
    for power, letter in ((9, "G"), (6, "M"), (3, "k")):
        if abs(value) >= 10 ** (power + 1 if power == 3 else power):
            return f"{value / 10**power:g}{letter}"
    return f"{value:g}"
