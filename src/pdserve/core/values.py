"""Values: what machines hear, say and decide by. Once made, they never change."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TypeVar, dataclass_transform

T = TypeVar("T")


@dataclass_transform(frozen_default=True, field_specifiers=(field,))
def value(*, kw_only: bool = False) -> Callable[[type[T]], type[T]]:
    """A dataclass with slots, equality and a hash, frozen as far as types are checked.

    While the program runs nothing keeps its fields from being set: what does so in a dataclass that
    is ``frozen`` makes one cost 0.8 to 1.9 us in place of 0.2 to 0.6, and a request makes a hundred
    and fifty.
    """
    return dataclass(slots=True, unsafe_hash=True, kw_only=kw_only)
