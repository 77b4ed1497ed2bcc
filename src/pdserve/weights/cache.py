"""Where pdserve keeps what it can make again: pulled models and digests.

``$PDSERVE_CACHE``, else ``$XDG_CACHE_HOME/pdserve``, else ``~/.cache/pdserve``. Everything in there
appears by rename, so a reader sees a whole file or folder or none, and nothing is lost if the user
removes it.
"""

from __future__ import annotations

import os
import tempfile
from pathlib import Path


def cache_root(cache_dir: Path | str | None = None) -> Path:
    """The cache folder (which may not exist yet). ``cache_dir`` overrides the environment."""
    if cache_dir is not None:
        return Path(cache_dir)
    if chosen := os.environ.get("PDSERVE_CACHE"):
        return Path(chosen).expanduser()
    if shared := os.environ.get("XDG_CACHE_HOME"):
        return Path(shared) / "pdserve"
    return Path.home() / ".cache" / "pdserve"


def sync_folder(path: Path) -> None:
    """Make the entries of a folder (names, renames) survive a power cut."""
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sync_tree(path: Path) -> None:
    """Make every file in a folder, and the folder itself, survive a power cut."""
    for entry in sorted(path.iterdir()):
        if entry.is_dir():
            sync_tree(entry)
            continue
        with entry.open("rb") as file:
            os.fsync(file.fileno())
    sync_folder(path)


def write_atomically(path: Path, data: bytes) -> None:
    """Write a small file so that it is there as a whole or not at all. Raises `OSError`."""
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor, temporary = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(data)
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise
