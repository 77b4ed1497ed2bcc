"""Clients as their users install them: each in a venv of its own, from the package index.

The venvs are kept in ``.cache/clients`` and used again. torch is pinned in each before its client
comes: what a client asks for by itself may be gigabytes.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[3]
PROGRAMS = Path(__file__).parent / "programs"


class ClientVenv:
    """Runs programs with what is installed in ``folder``."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def install(self, *requirements: str) -> None:
        """Once; a half-made venv is made again."""
        mark = self.folder / ".ready"
        if mark.exists() and mark.read_text() == "\n".join(requirements):
            return
        _run([sys.executable, "-m", "venv", "--clear", str(self.folder)])
        for requirement in requirements:
            _run([self._bin("python"), "-m", "pip", "install", "-q", *requirement.split()])
        mark.write_text("\n".join(requirements))

    def script(self, name: str, *arguments: str) -> dict[str, object]:
        """What a program of `PROGRAMS` prints, as JSON."""
        out = _run([self._bin("python"), str(PROGRAMS / f"{name}.py"), *arguments])
        document: dict[str, object] = json.loads(out.splitlines()[-1])
        return document

    def command(self, name: str, *arguments: str, cwd: Path) -> str:
        """What one of the client's commands prints."""
        return _run([self._bin(name), *arguments], cwd=cwd)

    def _bin(self, name: str) -> str:
        return str(self.folder / "bin" / name)


def _run(command: list[str], cwd: Path | None = None) -> str:
    done = subprocess.run(command, capture_output=True, text=True, cwd=cwd, check=False)
    assert done.returncode == 0, f"{command}:\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}"
    return done.stdout


@pytest.fixture
def client_venv() -> Callable[..., ClientVenv]:
    """(name, pip arguments ...): the venv of a client, made if it is missing."""

    def make(name: str, *requirements: str) -> ClientVenv:
        venv = ClientVenv(ROOT / ".cache" / "clients" / name)
        venv.install(*requirements)
        return venv

    return make


@pytest.fixture
def server(start_server: Callable[..., Any], tiny_model_path: Path) -> Any:
    """Of the tiny model, a worker for each phase."""
    flags = ["--prefill", "1", "--decode", "1", "--threads", "1", "--max-model-len", "2048"]
    return start_server("--model", str(tiny_model_path), *flags)
