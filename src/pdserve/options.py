"""One option of ``pdserve serve``: how its value is read, from a flag, a variable or a file.

A parser takes what was written, a text or a value of TOML, and raises `ValueError` with the end of
the sentence "it must be ...". `option` makes the field of a configuration (``config``,
``edge_config``) that has such a parser and a help text.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import field
from pathlib import Path
from typing import Any

_SIZE = re.compile(r"\s*(\d+(?:\.\d+)?)\s*([kmgt]?)(i?)b?\s*", re.IGNORECASE)
_POWERS = {"": 0, "k": 1, "m": 2, "g": 3, "t": 4}


def option(default: Any, parse: Callable[[object], Any], text: str) -> Any:
    """A field with this default, parser and help text."""
    return field(default=default, metadata={"parse": parse, "help": text})


def flag_of(name: str) -> str:
    """The command-line flag of a field."""
    return "--" + name.replace("_", "-")


def parse_size(value: object) -> int:
    """Bytes of ``1073741824``, ``"512MiB"`` or ``"2GB"``. Raises `ValueError`."""
    if isinstance(value, int) and not isinstance(value, bool):
        return value
    match = _SIZE.fullmatch(value) if isinstance(value, str) else None
    if match is None:
        raise ValueError("a size such as 512MiB or 2GB")
    number, prefix, binary = match.groups()
    return int(float(number) * (1024 if binary else 1000) ** _POWERS[prefix.lower()])


def parse_text(value: object) -> str:
    if not isinstance(value, str) or not value:
        raise ValueError("a text that is not empty")
    return value


def parse_path(value: object) -> Path:
    """``~`` is the user's home."""
    return Path(parse_text(value)).expanduser()


def parse_names(value: object) -> tuple[str, ...]:
    """A list of texts, or one text with commas between them."""
    names = value.split(",") if isinstance(value, str) else value
    if not isinstance(names, list) or not all(isinstance(n, str) and n.strip() for n in names):
        raise ValueError("names with commas between them")
    return tuple(name.strip() for name in names)


def parse_whole(value: object) -> int:
    try:
        if isinstance(value, str):
            return int(value)
    except ValueError:
        pass
    if isinstance(value, int) and not isinstance(value, bool):
        return value
    raise ValueError("a whole number")


def parse_seconds(value: object) -> float:
    try:
        if isinstance(value, str):
            return float(value)
    except ValueError:
        pass
    if isinstance(value, int | float) and not isinstance(value, bool):
        return float(value)
    raise ValueError("a number of seconds")


def parse_switch(value: object) -> bool:
    words = {"true": True, "yes": True, "1": True, "false": False, "no": False, "0": False}
    found = value if isinstance(value, bool) else words.get(str(value).lower())
    if found is None:
        raise ValueError("true or false")
    return found
