"""Lives of requests, as the nodes log them."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from pdserve.core.events import LifeEvent, LifeName, Scalar, detail
from pdserve.core.ids import GATEWAY, Epoch, RequestId, WorkerId

MakeEvent = Callable[..., LifeEvent]


def make_event(
    name: str,
    at_s: float,
    node: str = GATEWAY,
    *,
    request: str = "req-1",
    epoch: int = 1,
    **values: Scalar,
) -> LifeEvent:
    return LifeEvent(
        name=LifeName(name),
        request_id=RequestId(request),
        epoch=Epoch(epoch),
        at_s=at_s,
        node=WorkerId(node),
        detail=detail(**values),
    )


@pytest.fixture(scope="session")
def event() -> MakeEvent:
    return make_event


@pytest.fixture(scope="session")
def split_life() -> tuple[LifeEvent, ...]:
    """An undisturbed split request: 100 prompt tokens, 11 output tokens, 2 s."""
    e = make_event
    return (
        e("submitted", 10.0, prompt_tokens=100, choices=1, max_tokens=11, route="auto"),
        e("routed", 10.01, prefill="p0", decode="d0", local=False, reason="fewest tokens"),
        e("prefill_queued", 10.02, "p0"),
        e("prefill_started", 10.1, "p0", cached_tokens=32),
        e("handoff_opened", 10.11, "p0", peer="d0"),
        e("handoff_granted", 10.12, "d0", blocks=7, reused_blocks=2),
        e("prefill_ended", 10.4, "p0", tokens=68),
        e("first_token", 10.45),
        e("handoff_closed", 10.5, "d0", ok=True, bytes=4096, detail=""),
        e("decode_queued", 10.51, "d0"),
        e("decode_started", 10.6, "d0"),
        e("finished", 12.0, reason="length", output_tokens=11, choices=1),
    )


@pytest.fixture(scope="session")
def resumed_life() -> tuple[LifeEvent, ...]:
    """The decode worker dies after 5 tokens; the prefill worker takes over; then the client goes.

    The first attempt closes no hand-off and says nothing of its end.
    """
    e = make_event
    return (
        e("submitted", 0.0, prompt_tokens=20, choices=1, max_tokens=50, route="split"),
        e("routed", 0.0, prefill="p0", decode="d0", local=False, reason="asked for"),
        e("prefill_queued", 0.001, "p0"),
        e("prefill_started", 0.002, "p0", cached_tokens=0),
        e("handoff_opened", 0.002, "p0", peer="d0"),
        e("prefill_ended", 0.05, "p0", tokens=20),
        e("first_token", 0.06),
        e("handoff_closed", 0.07, "d0", ok=True, bytes=100, detail=""),
        e("decode_started", 0.1, "d0"),
        e("preempted", 0.2, "d0", choice=0),
        e("resumed", 1.0, epoch=2, reason="worker_lost", taken_tokens=5),
        e("routed", 1.0, epoch=2, prefill="p0", decode="p0", local=True, reason="nobody else"),
        e("prefill_started", 1.1, "p0", epoch=2, cached_tokens=16),
        e("prefill_ended", 1.2, "p0", epoch=2, tokens=9),
        e("decode_started", 1.2, "p0", epoch=2),
        e("finished", 3.0, epoch=2, reason="abort", output_tokens=30, choices=1),
    )


@pytest.fixture(scope="session")
def failed_life() -> tuple[LifeEvent, ...]:
    e = make_event
    return (
        e("submitted", 5.0, prompt_tokens=9, choices=2, max_tokens=4, route="auto"),
        e("failed", 5.5, kind="overloaded", detail="no room"),
    )
