"""Reading a gateway: streams are closed when the edge is done, and late tokens are dropped."""

from __future__ import annotations

import asyncio
from contextlib import aclosing

import pytest

from pdserve.api.fake import FakeGateway
from pdserve.api.openai.generation import Generation
from pdserve.api.openai.requests import Order, OutputOptions
from pdserve.api.openai.streams import token_deltas
from pdserve.core.ids import Epoch, RequestId
from pdserve.core.messages import TokenDelta
from pdserve.core.request import FinishReason, Request, SamplingParams

pytestmark = pytest.mark.anyio


def request(name="r", num_choices=1):
    return Request(
        request_id=RequestId(name),
        prompt_token_ids=(65,),
        params=SamplingParams(max_tokens=5, seed=0),
        num_choices=num_choices,
    )


class LingeringStream:
    """Gives its tokens and then neither ends nor is collected: it must be closed."""

    def __init__(self, deltas):
        self._deltas = iter(deltas)
        self.is_closed = False

    def __aiter__(self):
        return self

    async def __anext__(self):
        for delta in self._deltas:
            return delta
        return await asyncio.Future()

    async def aclose(self):
        self.is_closed = True


class LingeringGateway(FakeGateway):
    def __init__(self, card):
        super().__init__(card)
        self.streams = []

    def submit(self, request):
        self.streams.append(LingeringStream(self._deltas(request)))
        return self.streams[-1]


@pytest.mark.parametrize("num_prompts", [1, 3])
@pytest.mark.parametrize("num_read", [0, 1, 3])
async def test_closing_closes_every_stream(card, num_prompts, num_read):
    gateway = LingeringGateway(card)
    requests = [request(f"r-{index}") for index in range(num_prompts)]
    async with aclosing(token_deltas(gateway, requests)) as deltas:
        for _ in range(num_read):
            await anext(deltas)
    assert len(gateway.streams) == (num_prompts if num_read else 0)
    assert all(stream.is_closed for stream in gateway.streams)


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("prompt", [[65], [[65], [66]]])
async def test_an_answer_waits_for_tokens_and_not_for_the_streams_end(
    client_of, card, prompt, stream
):
    gateway = LingeringGateway(card)
    async with client_of(gateway) as client, asyncio.timeout(20):
        body = {"prompt": prompt, "max_tokens": 3, "stream": stream}
        response = await client.post("/v1/completions", json=body)
    assert response.status_code == 200
    assert all(stream.is_closed for stream in gateway.streams)


async def test_a_gateway_that_refuses_at_once_is_no_different(client_of, card):
    gateway = FakeGateway(card)

    def refuse(request):
        raise ZeroDivisionError

    gateway.submit = refuse
    async with client_of(gateway) as client:
        for prompt in ([65], [[65], [66]]):
            response = await client.post("/v1/completions", json={"prompt": prompt})
            assert response.status_code == 500


def test_tokens_on_their_way_to_a_stopped_choice_are_dropped(tokenizer):
    stopped = []
    order = Order(
        name="r",
        response_id="cmpl-r",
        requests=(request(num_choices=2),),
        options=OutputOptions(stops=("b",)),
        stream=True,
    )
    generation = Generation(order, tokenizer, lambda *choice: stopped.append(choice))

    def push(choice, index, text, finish=None):
        [token_id] = tokenizer.encode(text)
        return generation.take(
            0,
            TokenDelta(
                request_id=RequestId("r"),
                epoch=Epoch(1),
                choice=choice,
                index=index,
                token_id=token_id,
                finish=finish,
            ),
        )

    assert push(0, 0, "a").text == "a"
    assert push(0, 1, "b").stop_reason == "b"
    assert push(0, 2, "a") is None
    assert push(0, 3, "b") is None
    assert stopped == [("r", 0)]
    assert not generation.is_complete
    assert push(1, 0, "c", FinishReason.LENGTH).finish_reason == "length"
    assert generation.is_complete
    assert generation.usage()["completion_tokens"] == 3
    assert stopped == [("r", 0)], "a choice that ended by itself needs no stopping"
