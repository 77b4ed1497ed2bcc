"""What was asked of a server lately, out of its log of life events: when, how long, how it ended.

Only the numbers of tokens are told, never a prompt.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from pdserve.core.events import LifeEvent, LifeName, Scalar
from pdserve.obs.life import LifeLog


def recent_traffic(log: LifeLog) -> list[dict[str, Any]]:
    """Requests that have ended, in the order in which they came.

    ``at_s`` on the host's monotonic clock. ``cached_tokens``: of the prompt, found by the worker
    that prefilled it first. ``output_tokens`` of one choice (of several, their mean). ``failure``:
    the kind of it, or None.
    """
    found = [_request(events) for events in log.timelines()]
    return sorted((one for one in found if one is not None), key=lambda one: one["at_s"])


def _request(events: Sequence[LifeEvent]) -> dict[str, Any] | None:
    submitted = _first(events, LifeName.SUBMITTED)
    finished, failed = _first(events, LifeName.FINISHED), _first(events, LifeName.FAILED)
    end = finished or failed
    if submitted is None or end is None:
        return None
    asked, got = dict(submitted.detail), dict(end.detail)
    started = _first(events, LifeName.PREFILL_STARTED)
    cached = 0 if started is None else _number(dict(started.detail).get("cached_tokens"))
    choices = max(1, _number(got.get("choices", asked.get("choices"))))
    return {
        "at_s": submitted.at_s,
        "prompt_tokens": _number(asked.get("prompt_tokens")),
        "cached_tokens": cached,
        "output_tokens": round(_number(got.get("output_tokens")) / choices),
        "failure": None if finished is not None else str(got.get("kind", "failed")),
    }


def _first(events: Iterable[LifeEvent], name: LifeName) -> LifeEvent | None:
    return next((event for event in events if event.name is name), None)


def _number(value: Scalar | None) -> int:
    return int(value) if isinstance(value, int | float) else 0
