"""Objects of a schema are closed, unless it says otherwise: what it does not list is not made up.

JSON Schema lets any further properties be added, and a small model that may add some is apt to go
on doing so until it is cut. vLLM, by its default backend, allows none; so do we. What still can be
written fits the schema as it was sent.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

_ONE = ("items", "additionalItems", "contains", "additionalProperties")
_LISTS = ("prefixItems", "anyOf", "oneOf", "allOf")
_NAMED = ("properties", "patternProperties", "$defs", "definitions")
_COMBINERS = ("$ref", "allOf", "anyOf", "oneOf", "patternProperties")
_BEYOND = ("not", "if", "then", "else", "dependentSchemas", "unevaluatedProperties")


def closed(schema: dict[str, Any]) -> dict[str, Any]:
    """The schema with ``additionalProperties`` false wherever properties are listed and nothing is
    said of others. Unchanged if a part of it adds to what another part lists."""
    if any(map(_is_composed, _parts(schema))):
        return schema
    done = _closed(schema)
    assert isinstance(done, dict)
    return done


def _is_composed(part: dict[str, Any]) -> bool:
    """Closing this part, or one that it names, could forbid what another part asks for."""
    if any(key in part for key in _BEYOND) or len(part.get("allOf", ())) > 1:
        return True
    listed = part.get("properties")
    if not isinstance(listed, dict):
        return False
    required = part.get("required", ())
    return any(key in part for key in _COMBINERS) or not set(required) <= listed.keys()


def _parts(schema: Any) -> Iterator[dict[str, Any]]:
    waiting = [schema]
    while waiting:
        part = waiting.pop()
        if isinstance(part, dict):
            yield part
            waiting += (inner for _, _, inner in _inner(part))


def _inner(schema: dict[str, Any]) -> Iterator[tuple[str, Any, Any]]:
    """Schemas in this one: the keyword, the place under it (None: it is the value), the schema."""
    for key in _ONE:
        if isinstance(schema.get(key), dict):
            yield key, None, schema[key]
    for key in _LISTS:
        if isinstance(schema.get(key), list):
            yield from ((key, place, part) for place, part in enumerate(schema[key]))
    for key in _NAMED:
        if isinstance(schema.get(key), dict):
            yield from ((key, name, part) for name, part in schema[key].items())


def _closed(schema: Any) -> Any:
    if not isinstance(schema, dict):
        return schema
    done = {key: value.copy() if key in _LISTS + _NAMED else value for key, value in schema.items()}
    for key, place, part in _inner(schema):
        if place is None:
            done[key] = _closed(part)
        else:
            done[key][place] = _closed(part)
    if isinstance(schema.get("properties"), dict):
        done.setdefault("additionalProperties", False)
    return done
