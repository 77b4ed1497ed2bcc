"""The distributions of a run as pictures: one SVG a latency."""

from __future__ import annotations

from pathlib import Path

from pdserve.plot.cdf import cdf_svg
from pdserve.plot.files import write_pictures


def write_plots(
    folder: Path, values_ms: dict[str, list[float]], bounds_ms: dict[str, float]
) -> list[Path]:
    """``ttft.svg`` and so on, of the latencies that have values. Raises `ConfigError`."""
    pictures = {
        name: cdf_svg(name.upper(), values, bounds_ms.get(name))
        for name, values in values_ms.items()
        if values
    }
    return write_pictures(folder, pictures)
