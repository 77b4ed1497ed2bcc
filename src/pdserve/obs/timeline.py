"""The document of ``/v1/requests/{id}/timeline``: where the time of one request went, and why.

`describe` turns the life events of a request into attempts (one per epoch), each with the router's
decision, the candidates that it compared (what each would cost, in ms, best first), and phases::

    queue        submitted (or resumed)  -> prefill started
    prefill      prefill started         -> prefill ended
    handoff      hand-off opened         -> hand-off closed
    decode_wait  decode queued           -> decode started
    decode       decode started          -> the attempt's end
    total        the attempt's start     -> the attempt's end

and for the whole request ``ttft`` and ``total``. A phase that has not begun is left out; one that
has not ended, in an attempt that goes on, has the duration None. An attempt that broke off ends
when a later one starts. Events may be missing and may come in any order.

Times are milliseconds since submission (or since the earliest event that is known). They compare
clocks of different nodes, which on one host is the same clock; a driver that talks to other hosts
puts their events onto its own clock before it appends them.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from typing import Any

from pdserve.core.events import LifeEvent, LifeName, Scalar
from pdserve.core.ids import Epoch
from pdserve.obs.life import ENDS

_OUTSIDE_ATTEMPTS = ENDS | {LifeName.SUBMITTED}
_STARTS = frozenset({LifeName.RESUMED, LifeName.ROUTED})


def describe(events: Sequence[LifeEvent]) -> dict[str, Any]:
    """JSON document of one request. ``events`` must not be empty and belong to one request."""
    assert events, "a timeline without events"
    ordered = sorted(events, key=lambda event: event.at_s)
    submitted = _first(ordered, LifeName.SUBMITTED)
    origin_s = (submitted or ordered[0]).at_s
    end = next((event for event in ordered if event.name in ENDS), None)
    first_token = _first(ordered, LifeName.FIRST_TOKEN)
    document: dict[str, Any] = {
        "request_id": ordered[0].request_id,
        "status": end.name.value if end else "running",
        "request": dict(submitted.detail) if submitted else {},
        "result": dict(end.detail) if end else {},
        "phases": {"total": _phase(origin_s, origin_s, end.at_s if end else None)},
        "attempts": [],
    }
    if first_token is not None:
        document["phases"]["ttft"] = _phase(origin_s, origin_s, first_token.at_s)
    epochs = sorted({event.epoch for event in ordered if event.name not in _OUTSIDE_ATTEMPTS})
    for number, epoch in enumerate(epochs):
        starts_at = submitted if number == 0 else None
        document["attempts"].append(_attempt(ordered, epoch, starts_at, end, origin_s))
    document["events"] = [
        {
            "name": event.name.value,
            "at_ms": _ms(event.at_s - origin_s),
            "node": event.node,
            "epoch": event.epoch,
            "detail": dict(event.detail),
        }
        for event in ordered
    ]
    return document


def _attempt(
    ordered: Sequence[LifeEvent],
    epoch: Epoch,
    submitted: LifeEvent | None,
    end: LifeEvent | None,
    origin_s: float,
) -> dict[str, Any]:
    """One attempt. ``submitted`` is given for the first one, whose queue starts there."""
    own = [
        event for event in ordered if event.epoch == epoch and event.name not in _OUTSIDE_ATTEMPTS
    ]
    start = submitted or own[0]
    next_start = _next_start(ordered, epoch, own[-1].at_s)
    end_s = min((event.at_s for event in (next_start, end) if event is not None), default=None)
    routed = _details(own, LifeName.ROUTED)
    document: dict[str, Any] = {
        "epoch": epoch,
        "route": _route(routed),
        "prefill_worker": routed.get("prefill"),
        "decode_worker": routed.get("decode"),
        "reason": routed.get("reason"),
        "candidates": json.loads(str(routed.get("candidates", "[]"))),
        "moves": [dict(event.detail) for event in own if event.name is LifeName.MOVING],
        "resumed": _details(own, LifeName.RESUMED) or None,
        "preemptions": sum(event.name is LifeName.PREEMPTED for event in own),
        "phases": _phases(own, start, end_s, origin_s),
    }
    document["phases"]["total"] = _phase(origin_s, start.at_s, end_s)
    return document


def _phases(
    own: Sequence[LifeEvent], start: LifeEvent, end_s: float | None, origin_s: float
) -> dict[str, Any]:
    phases: dict[str, Any] = {}
    prefill = _first(own, LifeName.PREFILL_STARTED)
    phases["queue"] = _phase(origin_s, start.at_s, prefill.at_s if prefill else end_s)
    phases["queue"]["worker"] = _node(prefill or _first(own, LifeName.PREFILL_QUEUED))
    if prefill is not None:
        ended = _first(own, LifeName.PREFILL_ENDED) or _first(own, LifeName.FIRST_TOKEN)
        phases["prefill"] = {
            **_details(own, LifeName.PREFILL_STARTED, LifeName.PREFILL_ENDED),
            **_phase(origin_s, prefill.at_s, ended.at_s if ended else end_s),
            "worker": prefill.node,
        }
    opened = _first(own, LifeName.HANDOFF_OPENED)
    if opened is not None:
        closed = _first(own, LifeName.HANDOFF_CLOSED)
        phases["handoff"] = {
            **_details(
                own, LifeName.HANDOFF_OPENED, LifeName.HANDOFF_GRANTED, LifeName.HANDOFF_CLOSED
            ),
            **_phase(origin_s, opened.at_s, closed.at_s if closed else end_s),
            "worker": opened.node,
        }
    queued = _first(own, LifeName.DECODE_QUEUED)
    decode = _first(own, LifeName.DECODE_STARTED)
    if queued is not None:
        phases["decode_wait"] = {
            **_phase(origin_s, queued.at_s, decode.at_s if decode else end_s),
            "worker": queued.node,
        }
    if decode is not None:
        phases["decode"] = {**_phase(origin_s, decode.at_s, end_s), "worker": decode.node}
    return phases


def _next_start(ordered: Iterable[LifeEvent], epoch: Epoch, after_s: float) -> LifeEvent | None:
    """Start of the first later attempt that began after this one was last heard of.

    Attempts of diverged choices run side by side, so a later epoch alone says nothing.
    """
    for event in ordered:
        if event.epoch > epoch and event.name in _STARTS and event.at_s > after_s:
            return event
    return None


def _first(ordered: Iterable[LifeEvent], name: LifeName) -> LifeEvent | None:
    return next((event for event in ordered if event.name is name), None)


def _details(ordered: Sequence[LifeEvent], *names: LifeName) -> dict[str, Scalar]:
    """Details of the first event of each name, in one mapping."""
    merged: dict[str, Scalar] = {}
    for name in names:
        event = _first(ordered, name)
        merged |= dict(event.detail) if event else {}
    return merged


def _route(routed: dict[str, Scalar]) -> str | None:
    if not {"local", "prefill", "decode"} & routed.keys():
        return None
    local = routed.get("local", routed.get("prefill") == routed.get("decode"))
    return "local" if local else "split"


def _node(event: LifeEvent | None) -> str | None:
    return event.node if event else None


def _phase(origin_s: float, start_s: float, end_s: float | None) -> dict[str, Any]:
    """A phase in ms since ``origin_s``; clocks that disagree make it empty, never negative."""
    duration_ms = None if end_s is None else _ms(max(0.0, end_s - start_s))
    return {"start_ms": _ms(start_s - origin_s), "duration_ms": duration_ms}


def _ms(seconds: float) -> float:
    return round(seconds * 1000.0, 3)
