"""Classes of service as the user writes them: what each is promised, and whose keys belong to it.

On the command line and in the environment they are one text, classes separated by semicolons::

    --classes "interactive:ttft=500,tpot=50,weight=4; batch:weight=1"

and in the configuration file tables::

    [[serve.classes]]
    name = "interactive"
    ttft_ms = 500
    tpot_ms = 50
    weight = 4
    api_keys = ["..."]

Bounds are milliseconds; one that is left out promises nothing. Class ``default`` is always there:
with weight 1 and no bounds, unless it is given too. Keys can stand in the file only, where others
do not see them as they see a command line.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from math import inf, isfinite
from typing import Any

from pdserve.core.errors import ConfigError
from pdserve.core.request import DEFAULT_SERVICE, ServiceClass

_NAME = re.compile(r"[A-Za-z0-9._-]{1,64}")
_SHORT = {"ttft": "ttft_ms", "tpot": "tpot_ms"}
_NUMBERS = ("ttft_ms", "tpot_ms", "weight")


@dataclass(frozen=True, slots=True)
class ServiceClasses:
    """All classes, ``default`` among them. ``class_of_key``: the name of the class to which an API
    key is bound."""

    classes: tuple[ServiceClass, ...] = (DEFAULT_SERVICE,)
    class_of_key: Mapping[str, str] = field(default_factory=dict, repr=False)

    @property
    def are_bounded(self) -> bool:
        """True if some class is promised anything."""
        return any(service.is_bounded for service in self.classes)

    def __str__(self) -> str:
        """In the form of the command line, without keys."""
        return "; ".join(map(_text_of, self.classes))


ONE_CLASS = ServiceClasses()


def parse_classes(value: object) -> ServiceClasses:
    """Of a text, or of the tables of a file. Raises `ConfigError` that names the class."""
    if isinstance(value, str):
        tables = [_table_of(text) for text in value.split(";") if text.strip()]
    elif isinstance(value, list) and all(isinstance(table, dict) for table in value):
        tables = value
    else:
        raise ConfigError("classes must be tables, [[serve.classes]], or a text")
    classes: dict[str, ServiceClass] = {}
    class_of_key: dict[str, str] = {}
    for table in tables:
        service = _service(table)
        if service.name in classes:
            raise ConfigError(f"class {service.name!r} is given twice")
        classes[service.name] = service
        for key in _keys(table, service.name):
            if class_of_key.setdefault(key, service.name) != service.name:
                raise ConfigError(f"one API key is bound to two classes, {service.name!r} is one")
    classes.setdefault(DEFAULT_SERVICE.name, DEFAULT_SERVICE)
    return ServiceClasses(tuple(classes.values()), class_of_key)


def _table_of(text: str) -> dict[str, Any]:
    """``name:key=value,key=value``"""
    name, _, rest = text.partition(":")
    table: dict[str, Any] = {"name": name.strip()}
    for item in rest.split(",") if rest.strip() else ():
        key, equals, number = (part.strip() for part in item.partition("="))
        key = _SHORT.get(key, key)
        if not equals or key not in _NUMBERS or key in table:
            raise ConfigError(
                f"class {table['name']!r}: {item.strip()!r} is none of ttft=MS, tpot=MS and "
                "weight=NUMBER, each at most once"
            )
        table[key] = number
    return table


def _service(table: Mapping[str, Any]) -> ServiceClass:
    name = table.get("name")
    if not isinstance(name, str) or _NAME.fullmatch(name) is None:
        raise ConfigError(
            f"the name of a class is {name!r}; it may hold letters, digits and . _ - only"
        )
    strangers = sorted(set(table) - {"name", "api_keys", *_NUMBERS})
    if strangers:
        raise ConfigError(
            f"class {name!r} has {', '.join(strangers)}; a class has name, ttft_ms, tpot_ms, "
            "weight and api_keys"
        )
    return ServiceClass(
        name=name,
        ttft_s=_positive(table, "ttft_ms", name, inf) / 1000,
        tpot_s=_positive(table, "tpot_ms", name, inf) / 1000,
        weight=_positive(table, "weight", name, 1.0),
    )


def _positive(table: Mapping[str, Any], key: str, name: str, default: float) -> float:
    if key not in table:
        return default
    value = table[key]
    try:
        number = float(value) if not isinstance(value, bool) else 0.0
    except (TypeError, ValueError):
        number = 0.0
    if not (isfinite(number) and number > 0):
        raise ConfigError(f"class {name!r}: {key} is {value!r}; it must be a number above 0")
    return number


def _keys(table: Mapping[str, Any], name: str) -> list[str]:
    keys = table.get("api_keys", [])
    if not isinstance(keys, list) or not all(isinstance(key, str) and key for key in keys):
        raise ConfigError(f"class {name!r}: api_keys must be a list of texts that are not empty")
    return keys


def _text_of(service: ServiceClass) -> str:
    parts = []
    if service.ttft_s < inf:
        parts.append(f"ttft={service.ttft_s * 1000:g}")
    if service.tpot_s < inf:
        parts.append(f"tpot={service.tpot_s * 1000:g}")
    parts.append(f"weight={service.weight:g}")
    return f"{service.name}:{','.join(parts)}"
