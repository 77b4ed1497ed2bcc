"""Prompts of simulated requests."""

from __future__ import annotations

from pdserve.core.token_ids import NamedTokens
from pdserve.workload.request import TraceRequest


def prompt_of(asked: TraceRequest) -> NamedTokens:
    """Its tokens by name: equal names of segments, equal tokens."""
    return NamedTokens.of([(segment.name, segment.num_tokens) for segment in asked.segments])
