"""Compiled machines are the files: all that are to be compiled are, and they do the same.

The files run beside them in a copy of the tree, which has nothing compiled.
"""

from __future__ import annotations

import importlib
import importlib.util
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from pdserve.compiled import are_machines_compiled
from pdserve.sim.report import CLOCK_KEYS

pytestmark = pytest.mark.compiled
ROOT = Path(__file__).resolve().parents[2]
LOAD = ("--model", "llama-3-8b", "-n", "1000", "--input", "exp:1500")
LOADS = {
    "split": (
        *("--cluster", "2xa100:prefill,2xa100:decode,1xa100:mixed", "--rate", "12"),
        *("--prefix-groups", "20", "--prefix-tokens", "700", "--cancel-rate", "0.1"),
        *("--slo", "ttft=2000", "tpot=60", "--roles", "auto", "--learn"),
    ),
    "splitwise": (
        "--cluster",
        "2xa100:prefill,2xa100:decode",
        "--rate",
        "9",
        "--policy",
        "splitwise",
    ),
    "aggregated": ("--cluster", "4xa100:mixed", "--rate", "8", "--policy", "aggregated"),
    "overload": (
        *("--cluster", "1xa100:prefill,2xa100:decode", "--rate", "30", "--admission", "early"),
        *("--classes", "chat:ttft=500,tpot=50,weight=3;batch:ttft=20000,weight=1"),
        *("--class-shares", "chat=0.6,batch=0.4"),
    ),
    "failures": (
        *("--cluster", "2xa100:prefill,2xa100:decode", "--rate", "8"),
        *("--scenario", str(ROOT / "examples" / "failures.toml")),
    ),
}


@pytest.fixture(scope="module")
def tool() -> ModuleType:
    """``tools/compile_machines.py``."""
    path = ROOT / "tools" / "compile_machines.py"
    spec = importlib.util.spec_from_file_location("compile_machines", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the package as it was written."""
    folder = tmp_path_factory.mktemp("files")
    only_python = shutil.ignore_patterns("*.so", "__pycache__")
    shutil.copytree(ROOT / "src" / "pdserve", folder / "pdserve", ignore=only_python)
    return folder


def test_all_that_are_to_be_compiled_are(tool: ModuleType) -> None:
    for source in tool.sources():
        name = source.removesuffix(".py").replace(os.sep, ".")
        file = importlib.import_module(name).__file__
        assert file is not None
        assert not file.endswith(".py"), f"{name} is not compiled"
    assert are_machines_compiled()


def simulated(folder: Path, flags: tuple[str, ...], source: Path | None) -> tuple[Any, bytes]:
    """The report, less what it says of its own speed, and the life events."""
    folder.mkdir()
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    if source is not None:
        environment["PYTHONPATH"] = str(source)
    out = ("--json", "report.json", "--events", "events.jsonl", "--no-progress")
    subprocess.run(
        [sys.executable, "-m", "pdserve", "sim", *LOAD, *flags, *out],
        cwd=folder, env=environment, check=True, stdout=subprocess.DEVNULL,
    )  # fmt: skip
    report = json.loads((folder / "report.json").read_text())
    for key in CLOCK_KEYS:
        del report[key]
    return report, (folder / "events.jsonl").read_bytes()


@pytest.mark.parametrize("load", LOADS)
def test_they_do_what_the_files_do(load: str, files: Path, tmp_path: Path) -> None:
    compiled = simulated(tmp_path / "compiled", LOADS[load], None)
    written = simulated(tmp_path / "written", LOADS[load], files)
    assert compiled[0]["completed"] > 500
    assert compiled == written
