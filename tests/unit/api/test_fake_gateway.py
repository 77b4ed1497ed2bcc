"""The shipped fake keeps the promises of the Gateway protocol."""

from __future__ import annotations

import asyncio
from contextlib import aclosing

import pytest

from pdserve.api.fake import FakeGateway
from pdserve.core.errors import GenerationError
from pdserve.core.ids import RequestId
from pdserve.core.request import FinishReason, Request, SamplingParams

pytestmark = pytest.mark.anyio


def request(prompt=(5, 6, 7), num_choices=1, **params):
    return Request(
        request_id=RequestId("r"),
        prompt_token_ids=prompt,
        params=SamplingParams(**{"max_tokens": 4, "seed": 0, **params}),
        num_choices=num_choices,
    )


async def collect(stream):
    return [delta async for delta in stream]


async def test_choices_come_in_turn_and_each_in_index_order(gateway):
    deltas = await collect(gateway.submit(request(num_choices=2)))
    assert [(d.choice, d.index) for d in deltas] == [(c, i) for i in range(4) for c in range(2)]
    assert [d.token_id for d in deltas if d.choice == 0] == [5, 6, 7, 5]
    assert [d.token_id for d in deltas if d.choice == 1] == [6, 7, 5, 6]
    finishes = [d.finish for d in deltas if d.choice == 0]
    assert finishes == [None, None, None, FinishReason.LENGTH]
    assert gateway.finished == ["r"]


async def test_it_says_the_same_every_time(gateway):
    first = await collect(gateway.submit(request(logprobs=2)))
    assert first == await collect(gateway.submit(request(logprobs=2)))


async def test_ending_tokens_end_but_not_before_min_tokens(gateway):
    ended = await collect(gateway.submit(request(stop_token_ids=(6,))))
    assert [d.token_id for d in ended] == [5, 6]
    assert ended[-1].finish is FinishReason.STOP
    later = await collect(gateway.submit(request(stop_token_ids=(6,), min_tokens=3)))
    assert [d.token_id for d in later] == [5, 7, 5, 6]


async def test_a_stopped_choice_yields_no_more(gateway):
    choices = []
    async with aclosing(gateway.submit(request(num_choices=2))) as stream:
        async for delta in stream:
            choices.append(delta.choice)
            if delta.choice == 0:
                gateway.stop_choice(RequestId("r"), 0)
    assert choices == [0, 1, 1, 1, 1]
    assert gateway.finished == ["r"]


async def test_closing_aborts_what_runs_and_only_that(gateway):
    async with aclosing(gateway.submit(request())) as stream:
        await anext(stream)
    assert (gateway.aborted, gateway.finished) == (["r"], [])
    async with aclosing(gateway.submit(request(max_tokens=1))) as stream:
        await anext(stream)
    assert (gateway.aborted, gateway.finished) == (["r"], ["r"])


async def test_cancelling_the_reader_aborts(card):
    gateway = FakeGateway(card, permits=1)
    reader = asyncio.create_task(collect(gateway.submit(request())))
    await gateway.until(lambda: len(gateway.timeline(RequestId("r")) or ()) == 2)
    reader.cancel()
    with pytest.raises(asyncio.CancelledError):
        await reader
    assert gateway.aborted == ["r"]
    assert gateway.num_running == 0


@pytest.mark.parametrize("num_tokens", [0, 2])
async def test_failures_come_when_told(card, num_tokens):
    gateway = FakeGateway(card, fail_after=(num_tokens, GenerationError("lost")))
    stream = gateway.submit(request())
    for _ in range(num_tokens):
        await anext(stream)
    with pytest.raises(GenerationError, match="lost"):
        await anext(stream)
    assert gateway.failed == ["r"]
    assert [event.name for event in gateway.timeline(RequestId("r"))][-1] == "failed"


async def test_unknown_requests_have_no_timeline(gateway):
    assert gateway.timeline(RequestId("nobody")) is None
