"""The tokens of all prompts of one HTTP request, as one stream that can be closed at any moment."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Sequence
from contextlib import aclosing

from pdserve.api.gateway import Gateway
from pdserve.core.messages import TokenDelta
from pdserve.core.request import Request

_QUEUED_DELTAS = 256
"""Deltas that wait for a slow client before the gateway's streams are no longer read."""


async def token_deltas(
    gateway: Gateway, requests: Sequence[Request]
) -> AsyncGenerator[tuple[int, TokenDelta], None]:
    """(index of the prompt, delta) as they come. The first error of any prompt ends all of them.

    Whoever iterates must close it: closing aborts every request that is still running, and is done
    only when the gateway has heard so.
    """
    if len(requests) > 1:
        async with aclosing(_merged(gateway, requests)) as merged:
            async for item in merged:
                yield item
        return
    stream = gateway.submit(requests[0])
    try:
        async for delta in stream:
            yield 0, delta
    finally:
        await _close(stream)


async def _merged(
    gateway: Gateway, requests: Sequence[Request]
) -> AsyncGenerator[tuple[int, TokenDelta], None]:
    queue: asyncio.Queue[tuple[int, TokenDelta | BaseException | None]] = asyncio.Queue(
        _QUEUED_DELTAS
    )
    readers = [
        asyncio.create_task(_read(gateway, request, index, queue))
        for index, request in enumerate(requests)
    ]
    try:
        num_open = len(requests)
        while num_open:
            index, item = await queue.get()
            if isinstance(item, BaseException):
                raise item
            if item is None:
                num_open -= 1
            else:
                yield index, item
    finally:
        for reader in readers:
            reader.cancel()
        await asyncio.gather(*readers, return_exceptions=True)


async def _read(
    gateway: Gateway,
    request: Request,
    index: int,
    queue: asyncio.Queue[tuple[int, TokenDelta | BaseException | None]],
) -> None:
    """Owns one of the gateway's streams: nobody else reads or closes it."""
    stream = None
    try:
        stream = gateway.submit(request)
        async for delta in stream:
            await queue.put((index, delta))
        await queue.put((index, None))
    except Exception as error:
        await queue.put((index, error))
    finally:
        if stream is not None:
            await _close(stream)


async def _close(stream: AsyncIterator[TokenDelta]) -> None:
    aclose = getattr(stream, "aclose", None)
    if aclose is not None:
        await aclose()
