"""Prompts of simulated requests."""

from __future__ import annotations

from pdserve.workload.prompts import token_ids
from pdserve.workload.request import TraceRequest


def prompt_of(asked: TraceRequest) -> tuple[int, ...]:
    """Its token ids: equal names of segments, equal tokens."""
    return tuple(token_ids(asked.segments, 0, 1 << 20))
