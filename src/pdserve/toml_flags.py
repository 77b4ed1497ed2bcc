"""A command's flags from a table of a TOML file.

The keys are the flags' names with underscores (``rate_scale = 2``), and each value is read by the
flag itself: what cannot be typed cannot be written either. A flag that is typed wins over the file.
"""

from __future__ import annotations

import argparse
import tomllib
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any, NoReturn

from pdserve.core.errors import ConfigError, meant, why


def read_table(file: Path, name: str, known: Collection[str]) -> dict[str, Any]:
    """The table of that name, which is all that the file may have, with known keys only.

    Raises `ConfigError` that says what is wrong with the file.
    """
    try:
        document = tomllib.loads(file.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"cannot read {file}: {why(error)}") from error
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(f"{file} is not TOML: {error}") from error
    table = document.get(name, {})
    strangers = sorted(set(document) - {name})
    if strangers or not isinstance(table, dict):
        raise ConfigError(
            f"{file} must hold one table, [{name}], with the options in it"
            + (f"; it also has {', '.join(strangers)}" if strangers else "")
        )
    for key in table:
        if key not in known:
            raise ConfigError(f"{file} has an unknown option {key!r}{meant(key, known)}")
    return table


def add_all(
    parser: argparse.ArgumentParser,
    add_flags: Callable[[argparse.ArgumentParser], None],
    table: str,
) -> None:
    """A command's flags, and ``--config`` for the file. What is parsed has only those that were
    typed: `with_file` adds the rest."""
    parser.add_argument(
        "--config",
        type=Path,
        metavar="FILE",
        help=f"TOML file with these flags in a [{table}] table",
    )
    add_flags(parser)
    leave_out_defaults(parser)


def leave_out_defaults(parser: argparse.ArgumentParser) -> None:
    """Have ``parsed`` hold only what was typed; `with_file` adds the rest."""
    for action in parser._actions:
        if action.dest != "help":
            if action.help is not None:  # it may show the default
                action.help = action.help.replace("%(default)s", str(action.default))
            action.default = argparse.SUPPRESS


def with_file(
    typed: argparse.Namespace,
    add_flags: Callable[[argparse.ArgumentParser], None],
    table: str,
    file: Path | None,
    written: Mapping[str, Callable[[object], str]] | None = None,
) -> argparse.Namespace:
    """Every flag: as typed, else as ``file`` has it in ``[table]``, else its default.

    ``written``: for values that may be more than texts and numbers, how they are typed.

    Raises `ConfigError` for what the file has wrong.
    """
    parser = _FileParser(add_help=False, allow_abbrev=False)
    add_flags(parser)
    words: list[str] = []
    if file is not None:
        parser.file = file
        flags = {action.dest: action for action in parser._actions if action.option_strings}
        for key, value in read_table(file, table, flags).items():
            text = written[key](value) if written and key in written else value
            words += _as_typed(flags[key], text, f"{key} in {file}")
    whole = parser.parse_args(words)
    vars(whole).update(vars(typed))
    return whole


class _FileParser(argparse.ArgumentParser):
    file: Path | None = None

    def error(self, message: str) -> NoReturn:
        raise ConfigError(f"{self.file}: {message}")


def _as_typed(action: argparse.Action, value: object, what: str) -> list[str]:
    """The words on a command line that mean the same."""
    flag = max(action.option_strings, key=len)
    if action.nargs == 0:  # a switch
        if not isinstance(value, bool):
            raise ConfigError(f"{what} is {value!r}; it must be true or false")
        if not isinstance(action, argparse.BooleanOptionalAction):
            return [flag] if value else []
        return [name for name in action.option_strings if name.startswith("--no-") is not value]
    items = value if isinstance(value, list) else [value]
    if any(isinstance(item, bool | dict | list) for item in items):
        raise ConfigError(f"{what} is {value!r}; it must be a text or a number")
    words = [str(item) for item in items]
    if action.nargs == "+":
        spread = [part for word in words for part in word.split()]
        return [flag, *spread]
    return [f"{flag}={','.join(words)}"]
