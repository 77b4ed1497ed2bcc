"""What all bodies have in common."""

from __future__ import annotations

from typing import Annotated, Any, TypeVar

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator
from pydantic_core import PydanticCustomError

MAX_ITEMS = 16_384
"""Of a list of anything but token ids, and of a table: checking one takes some tens of ms."""

ItemT = TypeVar("ItemT")
ValueT = TypeVar("ValueT")
KeyT = TypeVar("KeyT")


def _not_too_many(value: Any) -> Any:
    """Before a table's entries are looked at: each that is wrong would be an error of its own."""
    if isinstance(value, dict) and len(value) > MAX_ITEMS:
        raise PydanticCustomError("too_long", f"at most {MAX_ITEMS} entries are served")
    return value


Items = Annotated[list[ItemT], Field(max_length=MAX_ITEMS, fail_fast=True)]
"""A list that a client may send. One that is wrong from the start is not searched further: a body
of a million wrong items would take minutes and gigabytes for its errors alone."""

Table = Annotated[dict[KeyT, ValueT], Field(max_length=MAX_ITEMS), BeforeValidator(_not_too_many)]
"""The same of a JSON object with keys of the client's."""


class Body(BaseModel):
    """Base of every body: unknown fields are ignored, null means left out."""

    model_config = ConfigDict(extra="ignore", allow_inf_nan=False)

    @model_validator(mode="before")
    @classmethod
    def _drop_nulls(cls, document: Any) -> Any:
        if isinstance(document, dict):
            return {key: value for key, value in document.items() if value is not None}
        return document
