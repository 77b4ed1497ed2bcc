"""Failure scenarios: what goes wrong when, as a TOML file says it.

::

    seed = 7                       # of every "random" below; 0 if left out

    [[event]]
    at_s = 10                      # from the start of the load
    kind = "kill"
    worker = "decode-0"
    restart_after_s = 4            # left out: when the launcher would; inf: never

    [[event]]
    at_s = 20
    kind = "hang"
    worker = "prefill/random"      # any of that pool
    for_s = 2                      # left out: until somebody kills it

    [[event]]
    at_s = 30
    kind = "slow_link"
    between = ["prefill", "decode-1"]
    factor = 8                     # so many times slower
    for_s = 5

    [[event]]
    at_s = 40
    kind = "partition"
    worker = "decode-1"            # cut off from all other workers, not from the router
    for_s = 3

A worker is named by its id (``decode-0``), as the N-th of those that are in a pool at that moment
(``decode/0``), as a random one of them (``decode/random``), as all of them (``decode``), or as any
that is up (``random``). What operators do can be part of it: ``drain``, ``undrain`` and ``role``
(with ``role = "prefill"``). ``every_s`` and ``times`` repeat an event.

A scenario says nothing of how a fault is done: that is the business of who runs it, against live
workers (``bench.faults``) or simulated ones (``sim.faults``).
"""

from __future__ import annotations

import math
import re
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Any

from pdserve.core.errors import ConfigError, meant, why
from pdserve.core.request import Role

MAX_EVENTS = 10_000


class Kind(StrEnum):
    KILL = "kill"
    HANG = "hang"
    SLOW_LINK = "slow_link"
    PARTITION = "partition"
    DRAIN = "drain"
    UNDRAIN = "undrain"
    ROLE = "role"

    @property
    def is_of_links(self) -> bool:
        return self in (Kind.SLOW_LINK, Kind.PARTITION)

    @property
    def is_failure(self) -> bool:
        """False for what operators do."""
        return self not in (Kind.DRAIN, Kind.UNDRAIN, Kind.ROLE)


@dataclass(frozen=True, slots=True, kw_only=True)
class Event:
    """``targets``: one selector of workers; of links two, one for each side, where the second is
    `EVERYBODY_ELSE` if the file names one ``worker``. ``for_s`` infinite: until it is over by
    itself. ``restart_after_s`` None: as the launcher does."""

    at_s: float
    kind: Kind
    targets: tuple[str, ...]
    for_s: float = math.inf
    factor: float = 1.0
    restart_after_s: float | None = None
    role: Role | None = None

    def __str__(self) -> str:
        words = [self.kind.value, " | ".join(self.targets)]
        if self.role is not None:
            words.append(self.role.value)
        if self.kind is Kind.SLOW_LINK:
            words.append(f"x{self.factor:g}")
        if math.isfinite(self.for_s):
            words.append(f"for {self.for_s:g} s")
        return " ".join(words)


@dataclass(frozen=True, slots=True, kw_only=True)
class Scenario:
    """``events`` in the order of their times. ``name``: of the file."""

    name: str
    events: tuple[Event, ...]
    seed: int = 0

    @property
    def needs_link_faults(self) -> bool:
        return any(event.kind.is_of_links for event in self.events)


EVERYBODY_ELSE = "*"
_ROLES = "|".join(Role)
_SELECTOR = re.compile(rf"random|({_ROLES})(/(\d+|random))?|[A-Za-z][\w.]*-\d+")
_HEADER = re.compile(r"\s*\[\[\s*event\s*\]\]")
_FIELDS: Mapping[Kind, tuple[str, ...]] = {
    Kind.KILL: ("worker", "restart_after_s"),
    Kind.HANG: ("worker", "for_s"),
    Kind.SLOW_LINK: ("worker", "between", "factor", "for_s"),
    Kind.PARTITION: ("worker", "between", "for_s"),
    Kind.DRAIN: ("worker",),
    Kind.UNDRAIN: ("worker",),
    Kind.ROLE: ("worker", "role"),
}
_OF_ALL = ("at_s", "kind", "every_s", "times")


def read_scenario(path: Path) -> Scenario:
    """Raises `ConfigError` that names file, line and event, and what is allowed there."""
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"--scenario: cannot read {path}: {why(error)}") from error
    return parse_scenario(text, path.name)


def parse_scenario(text: str, name: str) -> Scenario:
    """The scenario that ``text`` (TOML) describes. ``name`` is what errors call the file."""
    try:
        document = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(f"{name} is not TOML: {error}") from error
    strangers = set(document) - {"seed", "event"}
    if strangers:
        raise ConfigError(
            f"{name} has {', '.join(sorted(strangers))}; a scenario has seed and [[event]] tables"
        )
    seed = document.get("seed", 0)
    if not isinstance(seed, int) or isinstance(seed, bool):
        raise ConfigError(f"{name}: seed is {seed!r}; it must be a whole number")
    tables = document.get("event", [])
    if not isinstance(tables, list) or not tables or not all(isinstance(t, dict) for t in tables):
        raise ConfigError(f"{name} has no event: write [[event]] with at_s, kind and worker")
    lines = text.splitlines()
    headers = [number for number, line in enumerate(lines, 1) if _HEADER.match(line)]
    events: list[Event] = []
    for index, table in enumerate(tables):
        place = f"{name}, event {index + 1}"
        if len(headers) == len(tables):
            place = f"{name}, line {headers[index]} (event {index + 1})"
        events += _Table(table, place).events()
        if len(events) > MAX_EVENTS:
            raise ConfigError(f"{place}: more than {MAX_EVENTS} events in all; repeat fewer times")
    return Scenario(
        name=name, seed=seed, events=tuple(sorted(events, key=lambda event: event.at_s))
    )


class _Table:
    """One ``[[event]]``. What is wrong with it is told with its place."""

    def __init__(self, table: Mapping[str, Any], place: str) -> None:
        self._table = table
        self._place = place

    def events(self) -> list[Event]:
        kind = self._kind()
        self._check_names(kind)
        first_s = self._number("at_s", least=0.0, required=True)
        times = self._table.get("times", 1)
        if not isinstance(times, int) or isinstance(times, bool) or times < 1:
            raise self._wrong("times", "a whole number from 1 on")
        if ("times" in self._table) != ("every_s" in self._table):
            raise ConfigError(f"{self._place}: every_s and times go together")
        every_s = self._number("every_s", default=0.0, above=0.0)
        restart_after_s = None
        if "restart_after_s" in self._table:
            restart_after_s = self._number("restart_after_s", least=0.0, finite=False)
        return [
            Event(
                at_s=first_s + number * every_s,
                kind=kind,
                targets=self._targets(kind),
                for_s=self._number("for_s", default=math.inf, above=0.0, finite=False),
                factor=self._factor(kind),
                restart_after_s=restart_after_s,
                role=self._role(kind),
            )
            for number in range(times)
        ]

    # --- fields -------------------------------------------------------------------------------

    def _kind(self) -> Kind:
        value = self._table.get("kind")
        if value not in set(Kind):
            raise self._wrong("kind", f"one of {', '.join(Kind)}")
        return Kind(value)

    def _check_names(self, kind: Kind) -> None:
        allowed = (*_OF_ALL, *_FIELDS[kind])
        for name in self._table:
            if name not in allowed:
                hint = meant(name, allowed) or f"; it has {', '.join(_FIELDS[kind])}"
                raise ConfigError(f"{self._place}: a {kind} has no {name}{hint}")

    def _number(
        self,
        name: str,
        *,
        default: float = 0.0,
        least: float = -math.inf,
        above: float = -math.inf,
        finite: bool = True,
        required: bool = False,
    ) -> float:
        if name not in self._table and not required:
            return default
        value = self._table.get(name)
        is_number = isinstance(value, int | float) and not isinstance(value, bool)
        number = float(value) if is_number else math.nan  # type: ignore[arg-type]
        if not (number >= least and number > above) or (finite and math.isinf(number)):
            bound = "0 or more" if least == 0.0 else f"above {above:g}"
            raise self._wrong(name, f"a number {bound}" + ("" if finite else ", or inf"))
        return number

    def _factor(self, kind: Kind) -> float:
        if kind is not Kind.SLOW_LINK:
            return 1.0
        return self._number("factor", above=1.0, required=True)

    def _role(self, kind: Kind) -> Role | None:
        if kind is not Kind.ROLE:
            return None
        value = self._table.get("role")
        if value not in set(Role):
            raise self._wrong("role", f"one of {', '.join(Role)}")
        return Role(value)

    def _targets(self, kind: Kind) -> tuple[str, ...]:
        between = self._table.get("between")
        if "worker" in self._table:
            if between is not None:
                raise ConfigError(f"{self._place}: worker and between: give one of them")
            worker = self._selector("worker", self._table["worker"])
            return (worker, EVERYBODY_ELSE) if kind.is_of_links else (worker,)
        if not kind.is_of_links:
            raise self._wrong("worker", _SELECTORS)
        if not isinstance(between, list) or len(between) != 2:
            raise self._wrong("between", 'two sides, as ["prefill-0", "decode"], or give worker')
        sides = tuple(self._selector("between", side) for side in between)
        if "random" not in sides[0] and sides[0] == sides[1]:
            raise ConfigError(f"{self._place}: between has {sides[0]} on both sides")
        return sides

    def _selector(self, name: str, value: object) -> str:
        if not isinstance(value, str) or _SELECTOR.fullmatch(value) is None:
            raise self._wrong(name, _SELECTORS, value)
        return value

    def _wrong(self, name: str, allowed: str, value: object = None) -> ConfigError:
        if value is None and name not in self._table:
            return ConfigError(f"{self._place}: {name} is missing; it must be {allowed}")
        shown = self._table[name] if value is None else value
        return ConfigError(f"{self._place}: {name} is {shown!r}; it must be {allowed}")


_SELECTORS = "a worker: decode-0, decode/0, decode/random, decode (all of them) or random"
