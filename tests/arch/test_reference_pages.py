"""The reference pages say what the code says."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

FOLDER = Path(__file__).parents[2] / "docs" / "reference"
REMEDY = "run: python docs/reference/generate.py"


@pytest.fixture(scope="module")
def generate() -> ModuleType:
    spec = importlib.util.spec_from_file_location("generate_reference", FOLDER / "generate.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_pages_are_those_of_the_code(generate: ModuleType) -> None:
    assert generate.stale() == [], REMEDY


def test_a_page_that_was_changed_or_is_gone_is_stale(generate: ModuleType, tmp_path: Path) -> None:
    texts = generate.pages()
    for name, text in texts.items():
        (tmp_path / name).write_text(text, encoding="utf-8")
    assert generate.stale(tmp_path) == []
    (tmp_path / "cli.md").write_text(texts["cli.md"] + "\nand more\n", encoding="utf-8")
    (tmp_path / "http.md").unlink()
    assert generate.stale(tmp_path) == ["cli.md", "http.md"]


def test_they_tell_what_there_is(generate: ModuleType) -> None:
    texts = generate.pages()
    assert "## pdserve serve" in texts["cli.md"]
    assert "| `--max-model-len LEN` | longest prompt and answer, in tokens |" in texts["cli.md"]
    assert "| `max_model_len` | `--max-model-len` |" in texts["configuration.md"]
    assert "## POST /v1/chat/completions" in texts["http.md"]
    assert "| `temperature` | number ≥ 0, ≤ 100 | `1.0` | 0: greedy. |" in texts["http.md"]


def test_no_terminal_and_no_variable_changes_them() -> None:
    environment = {**os.environ, "COLUMNS": "40", "PDSERVE_API_KEY": "own", "PDSERVE_PORT": "1"}
    result = subprocess.run(
        [sys.executable, str(FOLDER / "generate.py"), "--check"],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stdout + result.stderr
