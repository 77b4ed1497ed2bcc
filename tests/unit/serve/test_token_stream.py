"""A request's tokens on their way to the reader: order, ends, refusals and leaving early."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable

import pytest

from pdserve.core.effects import Fail, Refusal
from pdserve.core.errors import (
    ContextLengthError,
    GenerationError,
    OverloadedError,
    PdserveError,
    UnavailableError,
)
from pdserve.core.ids import Epoch, RequestId
from pdserve.core.messages import TokenDelta
from pdserve.core.request import FinishReason, Request, SamplingParams
from pdserve.serve.streams import TokenStream

ID = RequestId("r")


def delta(index: int, choice: int = 0, *, last: bool = False) -> TokenDelta:
    return TokenDelta(
        request_id=ID,
        epoch=Epoch(1),
        choice=choice,
        index=index,
        token_id=index,
        finish=FinishReason.LENGTH if last else None,
    )


class Reader:
    """A stream with a count of how often its reader was reported gone."""

    def __init__(self, num_choices: int = 1) -> None:
        self.num_gone = 0
        request = Request(
            request_id=ID,
            prompt_token_ids=(1,),
            params=SamplingParams(max_tokens=9, seed=0),
            num_choices=num_choices,
        )
        self.stream = TokenStream(request, self._gone)

    def _gone(self) -> None:
        self.num_gone += 1

    async def read(self) -> list[tuple[int, int]]:
        return [(delta.choice, delta.index) async for delta in self.stream]


def run(work: Callable[[], Awaitable[None]]) -> None:
    async def bounded() -> None:
        await asyncio.wait_for(work(), 10)

    asyncio.run(bounded())


def test_tokens_come_in_order_and_the_last_one_ends_the_stream() -> None:
    async def work() -> None:
        reader = Reader(num_choices=2)
        reading = asyncio.ensure_future(reader.read())
        reader.stream.put([delta(0), delta(0, 1)])
        await asyncio.wait((reading,), timeout=0)
        reader.stream.put([delta(1, 1, last=True)])
        assert not reader.stream.is_over
        reader.stream.put([delta(1, last=True), delta(2)])
        assert reader.stream.is_over
        assert await reading == [(0, 0), (1, 0), (1, 1), (0, 1)]
        await reader.stream.aclose()
        assert reader.num_gone == 0

    run(work)


def test_a_stopped_choice_is_heard_of_no_more_and_the_last_stop_ends_the_stream() -> None:
    async def work() -> None:
        reader = Reader(num_choices=2)
        reader.stream.put([delta(0), delta(0, 1), delta(1)])
        reader.stream.stop(0)
        reader.stream.put([delta(2), delta(1, 1)])
        reader.stream.stop(1)
        assert reader.stream.is_over
        assert await reader.read() == []
        assert reader.num_gone == 0

    run(work)


def test_closing_early_aborts_once() -> None:
    async def work() -> None:
        reader = Reader()
        reader.stream.put([delta(0)])
        await reader.stream.aclose()
        await reader.stream.aclose()
        assert reader.num_gone == 1
        assert await reader.read() == []
        reader.stream.refuse(Fail(request_id=ID, kind=Refusal.INTERNAL, detail="late"))
        assert await reader.read() == []

    run(work)


def test_cancelling_the_reader_aborts() -> None:
    async def work() -> None:
        reader = Reader()
        reading = asyncio.ensure_future(reader.read())
        await asyncio.wait((reading,), timeout=0)
        reading.cancel()
        with pytest.raises(asyncio.CancelledError):
            await reading
        assert reader.num_gone == 1

    run(work)


@pytest.mark.parametrize(
    ("kind", "error"),
    [
        (Refusal.OVERLOADED, OverloadedError),
        (Refusal.UNAVAILABLE, UnavailableError),
        (Refusal.DRAINING, UnavailableError),
        (Refusal.TOO_LONG, ContextLengthError),
        (Refusal.INTERNAL, GenerationError),
        ("unheard of", GenerationError),
    ],
)
def test_a_refusal_is_an_error_and_after_a_token_always_a_broken_answer(
    kind: str, error: type[PdserveError]
) -> None:
    async def work() -> None:
        fail = Fail(request_id=ID, kind=kind, detail="because", retry_after_s=3.0)
        early, late = Reader(), Reader()
        early.stream.refuse(fail)
        with pytest.raises(error, match="because") as refused:
            await early.read()
        if isinstance(refused.value, OverloadedError):
            assert refused.value.retry_after_s == 3.0

        late.stream.put([delta(0)])
        late.stream.refuse(fail)
        assert await anext(late.stream) == delta(0)  # what was taken is still given out
        with pytest.raises(GenerationError, match="because"):
            await anext(late.stream)
        assert (early.num_gone, late.num_gone) == (0, 0)

    run(work)
