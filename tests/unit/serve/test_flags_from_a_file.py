"""Flags in a table of a TOML file mean what they mean on a command line."""

from __future__ import annotations

import argparse
from pathlib import Path

import pytest

from pdserve.core.errors import ConfigError
from pdserve.toml_flags import leave_out_defaults, with_file


def add_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("-n", "--num-requests", type=int)
    parser.add_argument("--rate", type=float, default=1.0)
    parser.add_argument("--slo", "--goodput", nargs="+")
    parser.add_argument("--kind", choices=("a", "b"), default="a")
    parser.add_argument("--cache", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--quiet", action="store_true")
    parser.add_argument("--cluster")


def resolved(text: str, *words: str, folder: Path) -> argparse.Namespace:
    file = folder / "some.toml"
    file.write_text(text)
    parser = argparse.ArgumentParser()
    add_flags(parser)
    leave_out_defaults(parser)
    return with_file(parser.parse_args(words), add_flags, "sim", file)


def test_values_come_from_the_file_and_flags_win(tmp_path):
    text = """
        [sim]
        num_requests = 5
        rate = 2
        slo = "ttft:1 tpot:2"
        cache = false
        quiet = true
        cluster = ["2xa:mixed", "1xb:mixed"]
    """
    found = resolved(text, "--rate", "3", "--cache", folder=tmp_path)
    assert vars(found) == {
        "num_requests": 5,
        "rate": 3.0,
        "slo": ["ttft:1", "tpot:2"],
        "kind": "a",
        "cache": True,
        "quiet": True,
        "cluster": "2xa:mixed,1xb:mixed",
    }
    assert resolved('[sim]\nslo = ["e2e:5"]', folder=tmp_path).slo == ["e2e:5"]
    assert resolved("[sim]\nquiet = false\ncache = true", folder=tmp_path).quiet is False


def test_without_a_file_there_are_the_defaults():
    found = with_file(argparse.Namespace(kind="b"), add_flags, "sim", None)
    assert (found.kind, found.rate, found.cache, found.slo) == ("b", 1.0, True, None)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("[sim]\nrat = 1", "unknown option 'rat'; did you mean rate?"),
        ("[sim]\nrate = true", "rate in .* is True; it must be a text or a number"),
        ('[sim]\nrate = "fast"', "some.toml: .*invalid float value: 'fast'"),
        ('[sim]\nkind = "c"', "some.toml: .*invalid choice: 'c'"),
        ("[sim]\nquiet = 1", "quiet in .* is 1; it must be true or false"),
        ("[serve]\nrate = 1", r"one table, \[sim\].* it also has serve"),
        ("rate = ", "is not TOML"),
        ("[sim]\nslo = [[1]]", "slo in .* must be a text or a number"),
    ],
)
def test_what_cannot_be_is_refused_with_the_place(text, said, tmp_path):
    with pytest.raises(ConfigError, match=said):
        resolved(text, folder=tmp_path)


def test_a_file_that_is_not_there(tmp_path):
    with pytest.raises(ConfigError, match="cannot read"):
        with_file(argparse.Namespace(), add_flags, "sim", tmp_path / "none.toml")
