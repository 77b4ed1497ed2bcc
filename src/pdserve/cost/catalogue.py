"""All that is known by name, and what a user adds to it in a TOML file.

::

    [hardware.h100-ours]
    like = "h100"              # what is not said below is as there
    price_per_hour = 2.1
    cap_w = 500

    [model.our-13b]
    num_layers = 40
    hidden_size = 5120
    intermediate_size = 13824
    num_heads = 40
    num_kv_heads = 40
    head_dim = 128
    vocab_size = 32000
    max_model_tokens = 8192
    source = "our config.json"

    [link.rack]
    like = "eth-100"
    share = 0.9

Keys and units are the fields of `Hardware`, `ModelShape` (with ``max_model_tokens``) and `Link`;
of `Hardware.pool` it is ``pool_share``. An entry of a known name takes its place.
"""

from __future__ import annotations

import re
import tomllib
from collections.abc import Mapping
from dataclasses import MISSING, asdict, dataclass, field, fields, replace
from math import isfinite
from typing import Any, TypeVar

from pdserve.core.capacity import PoolRule
from pdserve.core.errors import ConfigError, UnknownNameError
from pdserve.cost.hardware import HARDWARE, Hardware
from pdserve.cost.links import LINKS, Link
from pdserve.cost.models import MODELS, KnownModel
from pdserve.cost.roofline_timer import RUNTIMES
from pdserve.cost.shape import ModelShape

TP_NAME = re.compile(r"(.+?)-tp(\d+)")
"""Hardware and its number of devices, as a cluster's specification has them."""
_NAME = re.compile(r"[A-Za-z0-9][\w.+-]*")
Entry = TypeVar("Entry")


@dataclass(frozen=True, slots=True)
class Catalogue:
    """What is known by name."""

    hardware: Mapping[str, Hardware] = field(default_factory=lambda: HARDWARE)
    models: Mapping[str, KnownModel] = field(default_factory=lambda: MODELS)
    links: Mapping[str, Link] = field(default_factory=lambda: LINKS)


CATALOGUE = Catalogue()


def find(known: Mapping[str, Entry], name: str, kind: str) -> Entry:
    """The entry of that name. Raises `UnknownNameError`."""
    if name not in known:
        raise UnknownNameError(kind, name, known)
    return known[name]


def parse_catalogue(text: str, source: str, known: Catalogue = CATALOGUE) -> Catalogue:
    """What is known, and what the TOML ``text`` adds. ``source`` names it in errors: every one is a
    `ConfigError` that says which entry and key, and what is expected there."""
    try:
        document = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(f"{source} is no TOML: {error}") from None
    for kind, entries in document.items():
        if kind not in ("hardware", "model", "link") or not isinstance(entries, dict):
            raise ConfigError(
                f"{source} has {kind!r}; a catalogue has [hardware.NAME], [model.NAME] and "
                "[link.NAME]"
            )
    links, models, hardware = dict(known.links), dict(known.models), dict(known.hardware)
    for name, entry in document.get("link", {}).items():
        links[name] = _link(_Table(source, "link", name, entry), links)
    for name, entry in document.get("model", {}).items():
        models[name] = _model(_Table(source, "model", name, entry), models)
    for name, entry in document.get("hardware", {}).items():
        hardware[name] = _hardware(_Table(source, "hardware", name, entry), hardware, links)
    return Catalogue(hardware=hardware, models=models, links=links)


# --- inside -----------------------------------------------------------------------------------

_COUNTS = frozenset(
    {
        *("max_devices", "num_layers", "hidden_size", "intermediate_size", "num_heads"),
        *("num_kv_heads", "head_dim", "vocab_size", "mlp_matrices", "max_model_tokens"),
    }
)
_SHARES = frozenset({"compute_share", "memory_share", "peer_share", "pool_share", "share"})
_MAY_BE_ZERO = frozenset({"peer_bytes_per_s", "idle_w", "host_w", "price_per_hour", "fixed_s"})
_WORDS = frozenset({"network", "runtime", "source", "like"})
_FLAGS = frozenset({"per_device", "tied"})


class _Table:
    """One entry of the file, and how to complain about it."""

    def __init__(self, source: str, kind: str, name: str, entry: Any) -> None:
        self.title = f"{source}, [{kind}.{name}]"
        self.kind = kind
        if not isinstance(entry, dict):
            raise self.error("is no table")
        if _NAME.fullmatch(name) is None or TP_NAME.fullmatch(name) is not None:
            raise self.error(
                "has a name that a cluster's specification cannot have: letters, digits, ._+- and "
                "no -tpN at the end"
            )
        self.entry: dict[str, Any] = {}
        for key, value in entry.items():
            self.entry[key] = self._checked(key, value)

    def error(self, what: str) -> ConfigError:
        return ConfigError(f"{self.title} {what}")

    def base(self, known: Mapping[str, Entry]) -> Entry | None:
        """The entry that this one is like."""
        name = self.entry.pop("like", None)
        if name is None:
            return None
        if name not in known:
            raise self.error(f"is like {name!r}; there are {', '.join(sorted(known))}")
        return known[name]

    def values(self, base: Mapping[str, Any], allowed: Mapping[str, bool]) -> dict[str, Any]:
        """All fields: the entry's own over the base's. ``allowed``: which fields must be there."""
        for key in self.entry:
            if key not in allowed:
                raise self.error(f"has {key!r}; its keys are {', '.join(allowed)} and like")
        values = {**base, **self.entry}
        missing = [key for key, needed in allowed.items() if needed and key not in values]
        if missing:
            raise self.error(f"lacks {', '.join(missing)} (or say what it is like)")
        return values

    def _checked(self, key: str, value: Any) -> Any:
        if key in _WORDS:
            if isinstance(value, str):
                return value
            raise self.error(f"has {key} = {value!r}; it is a text")
        if key in _FLAGS:
            if isinstance(value, bool):
                return value
            raise self.error(f"has {key} = {value!r}; it is true or false")
        number = isinstance(value, int | float) and not isinstance(value, bool)
        if key in _COUNTS:
            if number and isinstance(value, int) and value >= 1:
                return value
            raise self.error(f"has {key} = {value!r}; it is a whole number from 1")
        if not number or not isfinite(value) or value < 0:
            raise self.error(f"has {key} = {value!r}; it is a number, not below 0")
        if value == 0 and key not in _MAY_BE_ZERO:
            raise self.error(f"has {key} = 0; it is above 0")
        if key in _SHARES and value > 1:
            raise self.error(f"has {key} = {value!r}; it is a share, from 0 to 1")
        return float(value)


def _needed(kind: type, *without: str) -> dict[str, bool]:
    """The fields of a dataclass, and which of them have no default."""
    return {
        each.name: each.default is MISSING and each.default_factory is MISSING
        for each in fields(kind)
        if each.name not in without
    }


def _own(entry: Link | Hardware | None, keys: Mapping[str, bool]) -> dict[str, Any]:
    return {} if entry is None else {key: getattr(entry, key) for key in keys}


def _link(table: _Table, known: Mapping[str, Link]) -> Link:
    base = table.base(known)
    allowed = _needed(Link)
    return Link(**table.values(_own(base, allowed), allowed))


def _model(table: _Table, known: Mapping[str, KnownModel]) -> KnownModel:
    base = table.base(known)
    allowed = _needed(ModelShape)
    inherited = {}
    if base is not None:
        inherited = {**asdict(base.shape), "max_model_tokens": base.max_model_tokens}
    values = table.values(inherited, {**allowed, "max_model_tokens": True, "source": False})
    max_model_tokens = values.pop("max_model_tokens")
    source = values.pop("source", table.title)
    shape = ModelShape(**values)
    if shape.num_heads % shape.num_kv_heads:
        raise table.error("has a num_heads that is no multiple of its num_kv_heads")
    return KnownModel(shape=shape, max_model_tokens=max_model_tokens, source=source)


def _hardware(table: _Table, known: Mapping[str, Hardware], links: Mapping[str, Link]) -> Hardware:
    base = table.base(known)
    source = table.entry.pop("source", table.title)
    share = table.entry.pop("pool_share", None)
    allowed = _needed(Hardware, "pool", "sources")
    own = set(table.entry)
    values = table.values(_own(base, allowed), allowed)
    for key, names in (("network", links), ("runtime", RUNTIMES)):
        if key in values and values[key] not in names:
            raise table.error(f"has {key} = {values[key]!r}; there are {', '.join(sorted(names))}")
    sources = dict(base.sources) if base is not None else {}
    made = Hardware(**values, sources={**sources, **dict.fromkeys(own, source)})
    if base is not None:
        made = replace(made, pool=base.pool)
    if share is not None:
        made = replace(made, pool=PoolRule(share=share))
    if made.idle_w > made.limit_w:
        raise table.error(f"draws {made.idle_w:g} W idle and at most {made.limit_w:g} W")
    return made
