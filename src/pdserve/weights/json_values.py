"""Numbers and flags out of a model's JSON files, each checked and named where it is wrong."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pdserve.core.errors import ModelError


def read_json_object(path: Path) -> dict[str, Any]:
    """The JSON object in a file of the model folder, or `ModelError`."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ModelError(
            f"{path.parent} has no {path.name}; a model folder in Hugging Face layout needs it"
        ) from None
    except (OSError, ValueError, RecursionError) as error:
        raise ModelError(f"cannot read {path}: {error}; copy or pull the model again") from error
    if not isinstance(value, dict):
        raise ModelError(f"{path} must hold a JSON object; copy or pull the model again")
    return value


def size(values: Mapping[str, Any], key: str, default: int | None = None) -> int:
    """A count of at least one. Null is as good as missing; without a default that is an error."""
    value = values.get(key)
    if value is None:
        value = default
    if value is None:
        raise ModelError(f"config.json lacks {key!r}")
    if type(value) is not int or value < 1:
        raise ModelError(f"{key} is {value!r}; it must be a positive integer")
    return value


def positive(value: Any, key: str) -> float:
    """A number above zero."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ModelError(f"{key} is {value!r}; it must be a number")
    if not math.isfinite(value) or value <= 0:
        raise ModelError(f"{key} is {value!r}; it must be positive")
    return float(value)


def flag(values: Mapping[str, Any], key: str, default: bool = False) -> bool:
    """True or false, and nothing that stands for them."""
    value = values.get(key, default)
    if not isinstance(value, bool):
        raise ModelError(f"{key} is {value!r}; it must be true or false")
    return value
