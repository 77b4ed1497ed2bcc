"""Distributions as pictures: one SVG a latency, its cumulative share over milliseconds.

Written by hand, since a curve and two axes need no library. The horizontal axis is logarithmic when
the values span more than a factor of 20.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from xml.sax.saxutils import escape

from pdserve.core.errors import ConfigError

WIDTH, HEIGHT = 640, 400
_LEFT, _RIGHT, _TOP, _BOTTOM = 60, 20, 40, 50
_MAX_POINTS = 512
_LOG_SPAN = 20.0
_STYLE = (
    "text{font:12px sans-serif;fill:#333}.t{font-size:15px}.g{stroke:#ddd}"
    ".c{fill:none;stroke:#1667b7;stroke-width:2}.s{stroke:#c33;stroke-dasharray:5 4}"
)


def write_plots(
    folder: Path, values_ms: dict[str, list[float]], bounds_ms: dict[str, float]
) -> list[Path]:
    """``ttft.svg`` and so on, of the latencies that have values. Raises `ConfigError`."""
    written = []
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for name, values in values_ms.items():
            if values:
                path = folder / f"{name}.svg"
                path.write_text(cdf_svg(name.upper(), values, bounds_ms.get(name)))
                written.append(path)
    except OSError as error:
        raise ConfigError(f"--plot: cannot write to {folder}: {error}") from error
    return written


def cdf_svg(title: str, values: Sequence[float], bound: float | None = None) -> str:
    """The share of values up to x, with a dashed line at ``bound``."""
    ordered = sorted(values)
    low, high = ordered[0], max(ordered[-1], ordered[0] + 1e-6)
    is_log = low > 0 and high / low > _LOG_SPAN
    if bound is not None and bound > 0:
        low, high = min(low, bound), max(high, bound)
    ticks = _log_ticks(low, high) if is_log else _even_ticks(low, high)
    low, high = min(low, ticks[0]), max(high, ticks[-1])

    def x_of(value: float) -> float:
        if is_log:
            share = math.log(value / low) / math.log(high / low)
        else:
            share = (value - low) / (high - low)
        return _LEFT + share * (WIDTH - _LEFT - _RIGHT)

    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}">',
        f"<style>{_STYLE}</style>",
        '<rect width="100%" height="100%" fill="#fff"/>',
        f'<text class="t" x="{_LEFT}" y="24">{escape(title)} (n = {len(ordered)})</text>',
        *_axes(ticks, x_of=[x_of(tick) for tick in ticks]),
        f'<polyline class="c" points="{_points(ordered, x_of)}"/>',
    ]
    if bound is not None and bound > 0:
        x = x_of(bound)
        parts.append(f'<line class="s" x1="{x:.1f}" x2="{x:.1f}" y1="{_TOP}" y2="{_y_of(0):.1f}"/>')
    return "\n".join([*parts, "</svg>", ""])


def _y_of(share: float) -> float:
    return HEIGHT - _BOTTOM - share * (HEIGHT - _TOP - _BOTTOM)


def _axes(ticks: Sequence[float], x_of: Sequence[float]) -> list[str]:
    parts = []
    for percent in (0, 25, 50, 75, 90, 100):
        y = _y_of(percent / 100)
        parts.append(
            f'<line class="g" x1="{_LEFT}" x2="{WIDTH - _RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>'
        )
        parts.append(f'<text x="{_LEFT - 8}" y="{y + 4:.1f}" text-anchor="end">{percent} %</text>')
    bottom = _y_of(0)
    for tick, x in zip(ticks, x_of, strict=True):
        parts.append(f'<line class="g" x1="{x:.1f}" x2="{x:.1f}" y1="{_TOP}" y2="{bottom:.1f}"/>')
        parts.append(
            f'<text x="{x:.1f}" y="{bottom + 18:.1f}" text-anchor="middle">{tick:g}</text>'
        )
    middle = (_LEFT + WIDTH - _RIGHT) / 2
    parts.append(f'<text x="{middle}" y="{HEIGHT - 8}" text-anchor="middle">ms</text>')
    return parts


def _points(ordered: Sequence[float], x_of: object) -> str:
    assert callable(x_of)
    num = len(ordered)
    step = max(1, num // _MAX_POINTS)
    indexes = [*range(0, num - 1, step), num - 1]
    corners = [f"{x_of(ordered[0]):.1f},{_y_of(0):.1f}"]
    corners += [f"{x_of(ordered[i]):.1f},{_y_of((i + 1) / num):.1f}" for i in indexes]
    return " ".join(corners)


def _even_ticks(low: float, high: float) -> list[float]:
    """Some five round numbers that enclose low and high."""
    step = 10.0 ** math.floor(math.log10((high - low) / 4))
    step *= next(factor for factor in (1, 2, 5, 10) if (high - low) / (step * factor) <= 6)
    first = math.floor(low / step)
    last = max(first + 1, math.ceil(high / step))
    return [round(index * step, 12) for index in range(first, last + 1)]


def _log_ticks(low: float, high: float) -> list[float]:
    """1, 2, 5, 10, ... from the last at or under low to the first at or over high."""
    decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    ticks = [round(factor * 10.0**decade, 12) for decade in decades for factor in (1, 2, 5)]
    first = max(i for i, tick in enumerate(ticks) if tick <= low)
    last = min(i for i, tick in enumerate(ticks) if tick >= high)
    chosen = ticks[first : last + 1]
    return chosen if len(chosen) <= 12 else [*chosen[:-1:3], chosen[-1]]
