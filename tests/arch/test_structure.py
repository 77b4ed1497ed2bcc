"""The shape of the code base, held by a machine: imports, size budgets, docs that resolve."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SOURCES = sorted((ROOT / "src").rglob("*.py"))
TESTS = sorted((ROOT / "tests").rglob("*.py"))
DOCS = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
MAX_FILE_LINES = 400
MAX_FUNCTION_LINES = 50
VAGUE_NAMES = {"utils", "common", "helpers", "misc"}
PURE_PACKAGES = {"core", "kv", "policy", "node"}
IMPURE_MODULES = {
    "asyncio", "threading", "multiprocessing", "socket", "time", "random", "os", "logging",
    "secrets", "select", "selectors", "signal", "subprocess", "torch", "numpy", "pydantic",
}  # fmt: skip


def test_import_contracts_hold() -> None:
    result = subprocess.run(
        [str(Path(sys.executable).parent / "lint-imports"), "--no-cache"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stdout


@pytest.mark.parametrize("path", SOURCES, ids=lambda p: str(p.relative_to(ROOT / "src")))
def test_files_and_functions_stay_small(path: Path) -> None:
    text = path.read_text()
    assert path.stem not in VAGUE_NAMES
    assert text.count("\n") <= MAX_FILE_LINES, "split it by what changes together"
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            length = (node.end_lineno or 0) - node.lineno + 1
            assert length <= MAX_FUNCTION_LINES, f"{node.name} has {length} lines"


@pytest.mark.parametrize("path", SOURCES, ids=lambda p: str(p.relative_to(ROOT / "src")))
def test_modules_tell_their_story(path: Path) -> None:
    if path.read_text().strip():
        assert ast.get_docstring(ast.parse(path.read_text())), "a module docstring is missing"


def test_pure_packages_import_nothing_impure() -> None:
    for path in SOURCES:
        if path.relative_to(ROOT / "src" / "pdserve").parts[0] not in PURE_PACKAGES:
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            names = []
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom):
                names = [node.module or ""]
            wrong = {name.split(".")[0] for name in names} & IMPURE_MODULES
            assert not wrong, f"{path.relative_to(ROOT)} imports {wrong}"


def test_tests_neither_sleep_nor_skip() -> None:
    sleeping = re.compile(r"\bsleep\(")
    skipping = re.compile(r"pytest\.skip\(|mark\.skip\b|mark\.xfail")
    for path in TESTS:
        if path == Path(__file__).resolve():
            continue
        text = path.read_text()
        assert not sleeping.search(text), f"{path.relative_to(ROOT)} sleeps"
        assert not skipping.search(text), f"{path.relative_to(ROOT)} skips"


@pytest.mark.parametrize("path", DOCS, ids=lambda p: str(p.relative_to(ROOT)))
def test_links_in_the_docs_resolve(path: Path) -> None:
    for target, anchor in re.findall(r"\]\(([^)#]*)(?:#([^)]*))?\)", path.read_text()):
        if "://" in target:
            continue
        linked = path.parent / target if target else path
        assert linked.exists(), f"{path.name} links to {target}"
        if anchor:
            assert anchor in _anchors(linked), f"{path.name} links to {target}#{anchor}"


def _anchors(page: Path) -> set[str]:
    """Of the headings of a page, as the sites that show it make them."""
    text = re.sub(r"^```.*?^```", "", page.read_text(), flags=re.DOTALL | re.MULTILINE)
    found: set[str] = set()
    for heading in re.findall(r"^#+ +(.+?) *$", text, flags=re.MULTILINE):
        plain = re.sub(r"\[([^]]*)\]\([^)]*\)", r"\1", heading).lower()
        slug = re.sub(r"[^\w\- ]", "", plain).replace(" ", "-")
        same = sum(1 for each in found if re.fullmatch(rf"{re.escape(slug)}(-\d+)?", each))
        found.add(f"{slug}-{same}" if same else slug)
    return found
