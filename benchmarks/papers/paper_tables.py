"""Tables in Markdown, and bars beside each other as SVG."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any
from xml.sax.saxutils import escape

from pdserve.plot.axis import even_axis
from pdserve.plot.chart import BOTTOM, COLOURS, HEIGHT, LEFT, RIGHT, TOP, WIDTH, frame, legend

Cell = str | float | int | None


def table(head: Sequence[str], rows: Sequence[Sequence[Cell]]) -> str:
    """Numbers to three digits; None: a dash."""
    lines = ["| " + " | ".join(head) + " |", "|" + " --- |" * len(head)]
    lines += ["| " + " | ".join(map(_text, row)) + " |" for row in rows]
    return "\n".join(lines) + "\n"


def _text(cell: Cell) -> str:
    if cell is None:
        return "-"
    if isinstance(cell, str | int):
        return str(cell)
    return f"{cell:.0f}" if abs(cell) >= 1000 else f"{cell:.3g}"


def apart(ours: float | None, paper: float | None) -> str | None:
    """How far ours is from the paper's: ``+12 %``."""
    if not ours or not paper:
        return None
    return f"{100 * (ours / paper - 1):+.0f} %"


def bars_svg(title: str, groups: Mapping[str, Mapping[str, float | None]], unit: str = "") -> str:
    """A group of bars for each label, one bar for each series; None: nothing is known."""
    series = list(dict.fromkeys(name for bars in groups.values() for name in bars))
    values = [value for bars in groups.values() for value in bars.values() if value is not None]
    axis = even_axis(0.0, max(values, default=1.0) or 1.0)
    colours = {name: COLOURS[number % len(COLOURS)] for number, name in enumerate(series)}
    bottom, height = HEIGHT - BOTTOM, HEIGHT - TOP - BOTTOM
    parts = []
    for tick in axis.ticks:
        y = bottom - axis.share(tick) * height
        parts.append(
            f'<line class="g" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>'
            f'<text x="{LEFT - 8}" y="{y + 4:.1f}" text-anchor="end">{tick:g}</text>'
        )
    width = (WIDTH - LEFT - RIGHT) / max(1, len(groups))
    bar = 0.8 * width / max(1, len(series))
    for place, (label, bars) in enumerate(groups.items()):
        left = LEFT + width * (place + 0.1)
        for number, name in enumerate(series):
            value = bars.get(name)
            if value is None:
                continue
            tall = axis.share(value) * height
            parts.append(
                f'<rect x="{left + number * bar:.1f}" y="{bottom - tall:.1f}" '
                f'width="{bar * 0.92:.1f}" height="{tall:.1f}" fill="{colours[name]}"/>'
            )
        middle = LEFT + width * (place + 0.5)
        parts.append(
            f'<text x="{middle:.1f}" y="{bottom + 18}" text-anchor="middle">{escape(label)}</text>'
        )
    parts.append(f'<text x="{LEFT}" y="{HEIGHT - 8}">{escape(unit)}</text>')
    return frame(title, [*parts, *legend(list(colours.items()))])


def write(
    folder: Path, name: str, markdown: str, document: Any, pictures: Mapping[str, str]
) -> list[Path]:
    """``name.md``, ``name.json`` and the pictures; gives their paths."""
    written = [folder / f"{name}.md", folder / f"{name}.json"]
    written[0].write_text(markdown)
    written[1].write_text(json.dumps(document, indent=1) + "\n")
    for title, picture in pictures.items():
        written.append(folder / f"{title}.svg")
        written[-1].write_text(picture)
    return written
