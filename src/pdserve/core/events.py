"""The life-event log: one closed list of things that happen to a request.

Metrics, timelines, the recorder and (later) the simulator's report derive from these events and
from nothing else. Times are seconds on the monotonic clock of the emitting host.
"""

from __future__ import annotations

from enum import StrEnum

from pdserve.core.ids import Epoch, RequestId, WorkerId
from pdserve.core.values import value

Scalar = str | int | float | bool


class LifeName(StrEnum):
    """Moments of a request's life, in the order in which a split request meets them."""

    SUBMITTED = "submitted"
    ROUTED = "routed"
    PREFIX_FETCHED = "prefix_fetched"
    PREFILL_QUEUED = "prefill_queued"
    PREFILL_STARTED = "prefill_started"
    HANDOFF_OPENED = "handoff_opened"
    HANDOFF_GRANTED = "handoff_granted"
    PREFILL_ENDED = "prefill_ended"
    FIRST_TOKEN = "first_token"
    HANDOFF_CLOSED = "handoff_closed"
    DECODE_QUEUED = "decode_queued"
    DECODE_STARTED = "decode_started"
    PREEMPTED = "preempted"
    MOVING = "moving"
    MOVE_FAILED = "move_failed"
    RESUMED = "resumed"
    FINISHED = "finished"
    FAILED = "failed"


@value(kw_only=True)
class LifeEvent:
    """One moment. ``detail`` is sorted by key; docs/request-life.md lists the keys."""

    name: LifeName
    request_id: RequestId
    epoch: Epoch
    at_s: float
    node: WorkerId
    detail: tuple[tuple[str, Scalar], ...] = ()


def detail(**values: Scalar) -> tuple[tuple[str, Scalar], ...]:
    """Key-value detail in its canonical order."""
    return tuple(sorted(values.items()))
