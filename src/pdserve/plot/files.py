"""Writing pictures into the folder of ``--plot``."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from pdserve.core.errors import ConfigError, why


def write_pictures(folder: Path, pictures: Mapping[str, str]) -> list[Path]:
    """``name.svg`` of each; gives the paths. Raises `ConfigError` if it cannot be done."""
    written = []
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for name, picture in pictures.items():
            path = folder / f"{name}.svg"
            path.write_text(picture)
            written.append(path)
    except OSError as error:
        raise ConfigError(f"--plot: cannot write to {folder}: {why(error)}") from error
    return written
