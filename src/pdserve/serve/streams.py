"""A request's tokens on their way from the router to whoever reads them.

The gateway makes one `TokenStream` per request and puts in what the router delivers; the HTTP edge
iterates. The stream ends by itself when each choice has finished or was stopped, raises what the
router refused, and aborts the request if it is closed, or its reader cancelled, before that.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncIterator, Callable, Iterable

from pdserve.core.effects import Fail, Refusal
from pdserve.core.errors import (
    ContextLengthError,
    GenerationError,
    OverloadedError,
    PdserveError,
    UnavailableError,
)
from pdserve.core.messages import TokenDelta
from pdserve.core.request import Request

DEFAULT_RETRY_AFTER_S = 1.0


class TokenStream(AsyncIterator[TokenDelta]):
    """Tokens of one request for one reader. ``gone`` is called once, if the reader leaves early.

    Everything is kept until it is read: a request's answer is bounded, and the tokens have been
    computed already.
    """

    def __init__(self, request: Request, gone: Callable[[], None]) -> None:
        self.request = request
        self._gone = gone
        self._deltas: deque[TokenDelta] = deque()
        self._running = set(range(request.num_choices))
        self._error: PdserveError | None = None
        self._closed = False
        self._has_tokens = False
        self._waiter: asyncio.Future[None] | None = None

    @property
    def is_over(self) -> bool:
        """True if nothing more will be put in."""
        return self._closed or self._error is not None or not self._running

    # --- the gateway's side -------------------------------------------------------------------

    def put(self, deltas: Iterable[TokenDelta]) -> None:
        """Tokens that the router took, in index order per choice."""
        for delta in deltas:
            if delta.choice in self._running:
                self._has_tokens = True
                self._deltas.append(delta)
                if delta.finish is not None:
                    self._running.discard(delta.choice)
        self._wake()

    def stop(self, choice: int) -> None:
        """No more of this choice, not even what is here already."""
        self._running.discard(choice)
        self._deltas = deque(delta for delta in self._deltas if delta.choice != choice)
        self._wake()

    def fail(self, error: PdserveError) -> None:
        """The answer ends here, after what was put in."""
        if not self.is_over:
            self._error = error
            self._wake()

    def refuse(self, fail: Fail) -> None:
        """The router gave the request up."""
        self.fail(error_of(fail, has_tokens=self._has_tokens))

    # --- the reader's side --------------------------------------------------------------------

    def __aiter__(self) -> TokenStream:
        return self

    async def __anext__(self) -> TokenDelta:
        try:
            while not self._deltas:
                if self._error is not None:
                    raise self._error
                if self.is_over:
                    raise StopAsyncIteration
                await self._news()
        except asyncio.CancelledError:
            await self.aclose()
            raise
        return self._deltas.popleft()

    def _news(self) -> asyncio.Future[None]:
        """Done as soon as something has changed. There is one reader, so one future will do."""
        self._waiter = asyncio.get_running_loop().create_future()
        return self._waiter

    def _wake(self) -> None:
        waiter, self._waiter = self._waiter, None
        if waiter is not None and not waiter.done():
            waiter.set_result(None)

    async def aclose(self) -> None:
        """The reader wants no more. Aborts what still runs."""
        left_early = not self.is_over
        self._closed = True
        self._deltas.clear()
        self._wake()
        if left_early:
            self._gone()


def error_of(fail: Fail, *, has_tokens: bool) -> PdserveError:
    """The error for the client. Once it has tokens, every failure is a broken answer."""
    if has_tokens or fail.kind == Refusal.INTERNAL:
        return GenerationError(fail.detail)
    match fail.kind:
        case Refusal.OVERLOADED:
            return OverloadedError(fail.detail, fail.retry_after_s or DEFAULT_RETRY_AFTER_S)
        case Refusal.TOO_LONG:
            return ContextLengthError(fail.detail)
        case Refusal.UNAVAILABLE | Refusal.DRAINING:
            return UnavailableError(fail.detail)
    return GenerationError(f"{fail.kind}: {fail.detail}")
