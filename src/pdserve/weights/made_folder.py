"""A model folder in the cache that is made as a whole or not at all.

The life of one, under a lock that the kernel drops if we die::

    remove what an earlier attempt left behind    .NAME.*.partial
    fill                                          a new .NAME.*.partial
    write pdserve.json, sync to disk, rename      models/NAME

Nothing but the last rename makes a model, so an attempt that is killed anywhere leaves only a
folder that the next one removes. Two at once take turns, and the second finds the work done.
"""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from pdserve.core.errors import PullError
from pdserve.weights.cache import cache_root, sync_folder, sync_tree
from pdserve.weights.progress import Report, progress_bar

MARKER = "pdserve.json"

Fill = Callable[[Path, Path, Report], None]
"""``fill(work, folder, report)`` writes the model to ``folder``; ``work`` goes away afterwards."""


def made_folder(
    name: str,
    provenance: Mapping[str, Any],
    fill: Fill,
    cache_dir: Path | str | None,
    progress: bool | None,
) -> Path:
    """``models/NAME`` of the cache, filled unless it is there and was made from ``provenance``.

    ``progress`` None shows a bar if stderr is a terminal. Raises what ``fill`` raises, but
    `PullError` for an `OSError`.
    """
    models = cache_root(cache_dir) / "models"
    target = models / name
    if _is_current(target, provenance):
        return target
    try:
        models.mkdir(parents=True, exist_ok=True)
        with progress_bar(progress) as report, _lock(models / f".{name}.lock", report):
            if not _is_current(target, provenance):
                _remove_debris(target)
                _make(target, provenance, fill, report)
    except OSError as error:
        raise PullError(
            f"cannot pull {name} into {models}: {error}. Make room there, or choose another "
            "cache folder with PDSERVE_CACHE"
        ) from error
    return target


def _make(target: Path, provenance: Mapping[str, Any], fill: Fill, report: Report) -> None:
    prefix, suffix = _debris_affixes(target.name)
    work = Path(tempfile.mkdtemp(prefix=prefix, suffix=suffix, dir=target.parent))
    try:
        folder = work / "model"
        folder.mkdir()
        fill(work, folder, report)
        _write_marker(folder, provenance)
        sync_tree(folder)
        if target.exists():
            # An outdated or damaged model. Processes that serve it keep their mappings.
            os.rename(target, work / "replaced")
        os.rename(folder, target)
        sync_folder(target.parent)
    finally:
        shutil.rmtree(work, ignore_errors=True)


def _debris_affixes(name: str) -> tuple[str, str]:
    return f".{name}.", ".partial"


def _remove_debris(target: Path) -> None:
    """Remove what killed attempts left. Safe under the lock only: nobody else is at work."""
    prefix, suffix = _debris_affixes(target.name)
    for path in target.parent.iterdir():
        if path.name.startswith(prefix) and path.name.endswith(suffix):
            shutil.rmtree(path, ignore_errors=True)


@contextmanager
def _lock(path: Path, report: Report) -> Iterator[None]:
    """One at a time for a model, over processes. The file stays: unlinking it would race."""
    with path.open("ab") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            report("waiting for another pull", 0, 0)
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _write_marker(folder: Path, provenance: Mapping[str, Any]) -> None:
    files = {path.name: path.stat().st_size for path in sorted(folder.iterdir())}
    document = {**provenance, "files": files}
    (folder / MARKER).write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")


def _is_current(target: Path, provenance: Mapping[str, Any]) -> bool:
    """True if the model was made from the same, and no file is lost or cut off."""
    try:
        document = json.loads((target / MARKER).read_bytes())
        files = document.pop("files")
        sizes_match = all((target / name).stat().st_size == size for name, size in files.items())
    except (OSError, ValueError, KeyError, AttributeError, TypeError):
        return False
    return sizes_match and document == provenance
