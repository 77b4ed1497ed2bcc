"""The file of ``--api-keys-file``: who may use the server, and how much of it.

As lines, a name and a key, then what the key may do; ``#`` begins a comment::

    alice   sk-4f9c...
    bob     sha256:9f86d0...   requests_per_minute=60 concurrent_tokens=20000 class=batch
    prom    sha256:1b4f0e...   rights=watch

and the same as TOML, if the file's name ends in ``.toml``; here one name can have several keys,
so that a new one can be handed out before the old one ends::

    [keys.bob]
    key = ["sha256:9f86d0...", "sha256:60303a..."]
    requests_per_minute = 60
    concurrent_tokens = 20000
    class = "batch"

``sha256:`` is followed by the hexadecimal SHA-256 of the key, and then the file itself lets nobody
in. No message here holds a key.
"""

from __future__ import annotations

import hashlib
import re
import tomllib
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from enum import IntEnum
from pathlib import Path
from typing import Any

from pdserve.core.errors import ConfigError

MIN_KEY_CHARS = 16
"""A shorter key can be guessed."""
DIGEST_PREFIX = "sha256:"
FIELDS = ("key", "requests_per_minute", "concurrent_tokens", "class", "rights")

_NAME = re.compile(r"[A-Za-z0-9._@-]{1,64}")
_DIGEST = re.compile(r"[0-9a-fA-F]{64}")
_Table = tuple[str, str, Mapping[str, Any]]
"""(place in the file, name, fields)"""


class Rights(IntEnum):
    """What a key may do; each includes those before it. WATCH: see what the server does for
    others. OPERATE: move workers about."""

    GENERATE = 0
    WATCH = 1
    OPERATE = 2


@dataclass(frozen=True, slots=True, kw_only=True)
class KeyEntry:
    """A name and what its keys may do. ``digests``: SHA-256 of each. ``concurrent_tokens``: most
    tokens, of prompts and of answers as long as they may become, in flight at a time."""

    name: str
    digests: tuple[bytes, ...]
    requests_per_minute: float | None = None
    concurrent_tokens: int | None = None
    class_name: str | None = None
    rights: Rights = Rights.GENERATE
    is_plain: bool = False


def digest_of(key: bytes) -> bytes:
    """By which a key is known."""
    return hashlib.sha256(key).digest()


def parse_key_file(file: Path, content: bytes, classes: Collection[str]) -> tuple[KeyEntry, ...]:
    """Entries of the file, whose ``class`` is one of ``classes``.

    Raises `ConfigError` that names the line, or in TOML the entry, and what is wrong with it.
    """
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ConfigError(f"{file} is not UTF-8: byte {error.start} of it") from None
    tables = _toml_tables(file, text) if file.suffix == ".toml" else _line_tables(file, text)
    entries: dict[str, KeyEntry] = {}
    owners: dict[bytes, str] = {}
    for place, name, table in tables:
        try:
            if name in entries:
                raise ConfigError(f"the name {name!r} is there twice")
            entry = entries[name] = _entry(name, table, classes)
            for digest in entry.digests:
                if owners.setdefault(digest, name) != name:
                    raise ConfigError(f"its key is that of {owners[digest]!r} too")
        except ConfigError as error:
            raise ConfigError(f"{place}: {error}") from None
    if not entries:
        raise ConfigError(f"{file} holds no key, so nobody could be let in")
    return tuple(entries.values())


def _toml_tables(file: Path, text: str) -> list[_Table]:
    try:
        document = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(f"{file} is not TOML: {error}") from None
    keys = document.get("keys", {})
    if set(document) - {"keys"} or not isinstance(keys, dict):
        raise ConfigError(f"{file} must hold tables [keys.NAME], and nothing else")
    found: list[_Table] = []
    for name, table in keys.items():
        place = f"{file}, [keys.{name}]"
        if not isinstance(table, dict):
            raise ConfigError(f"{place}: it must be a table with a key in it")
        found.append((place, name, table))
    return found


def _line_tables(file: Path, text: str) -> list[_Table]:
    found: list[_Table] = []
    for number, line in enumerate(text.splitlines(), start=1):
        words = line.partition("#")[0].split()
        if not words:
            continue
        place = f"{file}, line {number}"
        if len(words) < 2:
            raise ConfigError(f"{place}: a line has a name, then a key")
        table: dict[str, Any] = {"key": words[1]}
        for word in words[2:]:
            field, equals, value = word.partition("=")
            if not equals or field in table:  # it may be part of a key: never shown
                raise ConfigError(
                    f"{place}: after the key come FIELD=VALUE, each field once: "
                    + ", ".join(FIELDS[1:])
                )
            table[field] = value
        found.append((place, words[0], table))
    return found


def _entry(name: str, table: Mapping[str, Any], classes: Collection[str]) -> KeyEntry:
    if _NAME.fullmatch(name) is None:
        raise ConfigError("a name has up to 64 letters, digits and . _ @ -")
    strangers = sorted(set(table) - set(FIELDS))
    if strangers:
        raise ConfigError(f"unknown: {', '.join(strangers)}; it may have {', '.join(FIELDS)}")
    given = table.get("key")
    keys: list[Any] = given if isinstance(given, list) else [given]
    if not keys or not all(isinstance(key, str) for key in keys):
        raise ConfigError("key must be a text, or a list of texts")
    class_name = table.get("class")
    if class_name is not None and class_name not in classes:
        raise ConfigError(f"class is {class_name!r}; the classes here are: {', '.join(classes)}")
    rights = table.get("rights", "generate")
    if not isinstance(rights, str) or rights.upper() not in Rights.__members__:
        raise ConfigError("rights must be generate, watch or operate")
    tokens = _limit(table, "concurrent_tokens")
    return KeyEntry(
        name=name,
        digests=tuple(dict.fromkeys(_digest(key) for key in keys)),
        requests_per_minute=_limit(table, "requests_per_minute"),
        concurrent_tokens=None if tokens is None else int(tokens),
        class_name=class_name,
        rights=Rights[rights.upper()],
        is_plain=not all(key.startswith(DIGEST_PREFIX) for key in keys),
    )


def _digest(key: str) -> bytes:
    if key.startswith(DIGEST_PREFIX):
        if _DIGEST.fullmatch(key.removeprefix(DIGEST_PREFIX)) is None:
            raise ConfigError("after sha256: come 64 hexadecimal digits")
        return bytes.fromhex(key.removeprefix(DIGEST_PREFIX))
    if not key.isascii() or not key.isprintable() or key != key.strip():
        raise ConfigError("a key has printable ASCII characters only: it travels in a header")
    if len(key) < MIN_KEY_CHARS:
        raise ConfigError(
            f"a key has at least {MIN_KEY_CHARS} characters, or it can be guessed; make one with: "
            "openssl rand -hex 32"
        )
    return digest_of(key.encode())


def _limit(table: Mapping[str, Any], field: str) -> float | None:
    value = table.get(field)
    if value is None:
        return None
    try:
        number = 0.0 if isinstance(value, bool) else float(value)
    except (TypeError, ValueError):
        number = 0.0
    if not 1 <= number <= 1e12:
        raise ConfigError(f"{field} must be a number of 1 or more; leave it out for no limit")
    return number
