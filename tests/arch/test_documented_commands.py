"""Every ``pdserve`` command that the docs show is one that this pdserve takes."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from pathlib import Path

import pytest

from pdserve.cli import parse
from pdserve.core.errors import ConfigError

ROOT = Path(__file__).resolve().parents[2]
DOCS = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
BLOCK = re.compile(r"^ *```sh\n(.*?)^ *```", re.DOTALL | re.MULTILINE)
SETS = re.compile(r"([A-Z_]+)=(.*)", re.DOTALL)
ENDS = re.compile(r"[|&;]+|\d?>+")


def commands(text: str) -> Iterator[list[str]]:
    """What a shell would hand to pdserve, with the variables that a block sets."""
    for block in BLOCK.findall(text):
        values: dict[str, str] = {}
        for line in block.replace("\\\n", " ").splitlines():
            for name, value in values.items():
                line = line.replace(f"${name}", value)
            words = shlex.split(line, comments=True)
            while words and (found := SETS.fullmatch(words[0])):
                values[found[1]] = found[2]
                words.pop(0)
            if words[:1] == ["pdserve"]:
                end = next((n for n, word in enumerate(words) if ENDS.fullmatch(word)), None)
                yield words[1:end]


@pytest.mark.parametrize("path", DOCS, ids=lambda p: str(p.relative_to(ROOT)))
def test_commands_in_the_docs_are_taken(path: Path) -> None:
    for words in commands(path.read_text()):
        parse(words)  # raises or exits if there is no such flag


def test_some_commands_are_found_and_a_wrong_one_is_not_taken() -> None:
    found = list(commands((ROOT / "docs" / "hosts.md").read_text()))
    assert [words[0] for words in found] == ["serve", "worker", "serve"]
    with pytest.raises(ConfigError, match="--colour"):
        parse(["serve", "--colour"])
