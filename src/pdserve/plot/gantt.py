"""What each of many workers did over time: a row for each, in it a bar for each stretch of time.

A bar is as high as the share of that time in which the worker was busy, and its parts have the
colours of what it was busy with; so of short stretches, each with one kind of work, it is a Gantt
chart, and of long ones it shows how full they were. All bars of one kind are one path, which keeps
the file small.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from html import escape
from itertools import groupby

from pdserve.plot.axis import tight_axis
from pdserve.plot.chart import BOTTOM, COLOURS, LEFT, RIGHT, TOP, WIDTH, frame, legend, x_axis

ROW_HEIGHT = 14
BAR_HEIGHT = 12
MIN_SHARE = 0.005
"""Less than this of a bar's height is not seen."""
MAX_BARS = 20_000
"""Of one picture: with more workers, their stretches of time are longer."""


def gantt_svg(
    title: str,
    rows: Mapping[str, Sequence[Sequence[float]]],
    kinds: Sequence[str],
    stretch_s: float,
) -> str:
    """``rows[name][kind][i]``: the share (0 to 1) of stretch i, ``stretch_s`` long, spent with that
    kind of work. All rows are equally long."""
    num = max((len(row[0]) for row in rows.values()), default=0)
    together = max(1, -(-num * len(rows) * len(kinds) // MAX_BARS))
    axis = tight_axis(0.0, -(-num // together) * together * stretch_s)
    left = max(LEFT, 7 * max(map(len, rows), default=0) + 12)
    width = WIDTH - left - RIGHT
    scale = width / (axis.high - axis.low)
    bottom = TOP + ROW_HEIGHT * len(rows)
    places = [(left + axis.share(tick) * width, f"{tick:g}") for tick in axis.ticks]
    parts = x_axis(places, bottom, "s")
    paths: list[list[str]] = [[] for _ in kinds]
    for number, (name, row) in enumerate(rows.items()):
        base = TOP + ROW_HEIGHT * (number + 1)
        parts.append(f'<text x="{left - 6}" y="{base - 3}" text-anchor="end">{escape(name)}</text>')
        for kind, stretches in enumerate(_stacked(row, together)):
            paths[kind] += _bars(stretches, left, scale * stretch_s * together, base)
    for path, colour in zip(paths, COLOURS, strict=False):
        parts.append(f'<path fill="{colour}" d="{"".join(path)}"/>')
    parts += legend(zip(kinds, COLOURS, strict=False))
    return frame(title, parts, bottom + BOTTOM)


def _stacked(row: Sequence[Sequence[float]], together: int) -> list[list[tuple[float, float]]]:
    """For each kind the (from, to) of its part of each bar, one kind upon the other."""
    num_bars = -(-len(row[0]) // together)
    tops = [0.0] * num_bars
    stacked = []
    for shares in row:
        parts = []
        for bar in range(num_bars):
            own = shares[bar * together : (bar + 1) * together]
            low, tops[bar] = tops[bar], min(1.0, tops[bar] + sum(own) / together)
            parts.append((low, tops[bar]))
        stacked.append(parts)
    return stacked


def _bars(
    parts: Sequence[tuple[float, float]], left: float, width: float, base: float
) -> Iterator[str]:
    """Neighbours of equal height become one bar."""
    at = 0
    for (low, high), group in groupby(parts):
        num = len(list(group))
        if high - low > MIN_SHARE:
            y = base - high * BAR_HEIGHT
            yield (
                f"M{left + at * width:.1f} {y:.1f}h{num * width:.1f}"
                f"v{(high - low) * BAR_HEIGHT:.1f}h{-num * width:.1f}z"
            )
        at += num
