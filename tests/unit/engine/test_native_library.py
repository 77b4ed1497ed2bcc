"""Without compiled kernels that fit, pdserve computes with torch alone and says so once."""

from __future__ import annotations

import logging
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from pdserve.engine import native
from pdserve.engine.native import library


@pytest.fixture(autouse=True)
def loaded_anew(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.delenv(library.KERNELS_VARIABLE, raising=False)
    library.load.cache_clear()
    yield
    library.load.cache_clear()


def said(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records]


def test_a_missing_library_is_said_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(native, "__path__", [str(tmp_path)])
    with caplog.at_level(logging.WARNING):
        assert library.levels() == ()
        assert library.choose_level() is None
        assert library.load() is None
    assert len(said(caplog)) == 1
    assert "no compiled kernels" in said(caplog)[0]
    assert "install a C++ compiler" in said(caplog)[0]


def test_a_broken_library_is_passed_over(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "_kernels.so").write_bytes(b"no library")
    monkeypatch.setattr(native, "__path__", [str(tmp_path)])
    assert library.choose_level() is None
    assert "do not load" in said(caplog)[0]


def test_a_library_of_another_version_is_passed_over(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    found = [Path(folder) / "_kernels.so" for folder in native.__path__]
    shutil.copy(next(path for path in found if path.exists()), tmp_path)
    monkeypatch.setattr(native, "__path__", [str(tmp_path)])
    monkeypatch.setattr(library, "ABI", library.ABI + 1)
    assert library.choose_level() is None
    assert "another version" in said(caplog)[0]
