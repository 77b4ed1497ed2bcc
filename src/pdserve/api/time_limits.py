"""How long a client may take to send its body, and a request to be answered.

`TimeLimits` stands around everything that a request does. A body that is not here in time is a
408. A request has a deadline if the server has one (``--request-timeout``), or the client gives one
in ``X-Pdserve-Timeout``; the sooner counts. It runs from the end of the headers to the last byte of
the response. What is left of a request then is cancelled, which frees its blocks, and the client is
told: by a 504 while nothing has been sent, else by an error event at the end of the stream.
"""

from __future__ import annotations

import asyncio
import math

import msgspec
from starlette.datastructures import Headers
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from pdserve.api.errors import failure_of
from pdserve.core.errors import DeadlineError, RequestError

TIMEOUT_HEADER = "X-Pdserve-Timeout"
_OPERATED = "/cluster"
"""A drain takes as long as it takes."""
_LAST_WORDS_S = 1.0
"""How long a client that reads nothing may keep the last event from being sent."""


class TimeLimits:
    """``read_s``: for a body. ``request_s``: for everything; None: as long as it takes."""

    def __init__(self, app: ASGIApp, *, read_s: float, request_s: float | None) -> None:
        self._app = app
        self._read_s = read_s
        self._request_s = request_s

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["method"] in ("GET", "HEAD"):
            await self._app(scope, receive, send)
            return
        body = _Body(receive, self._read_s)
        timeout_s = self._timeout_s(scope)
        if timeout_s is None:
            await self._app(scope, body, send)
            return
        response = _Response(send)
        try:
            async with asyncio.timeout(timeout_s) as limit:
                await self._app(scope, body, response)
        except TimeoutError:
            if not limit.expired():
                raise
            await response.end_late(scope, receive, timeout_s)

    def _timeout_s(self, scope: Scope) -> float | None:
        if scope["path"].startswith(_OPERATED):
            return None
        given = Headers(scope=scope).get(TIMEOUT_HEADER)
        if given is None:
            return self._request_s
        try:
            wanted_s = float(given)
        except ValueError:
            wanted_s = 0.0
        if not (math.isfinite(wanted_s) and wanted_s > 0):
            raise RequestError(
                f"the header {TIMEOUT_HEADER} is {given!r}; it must be seconds, more than 0",
                TIMEOUT_HEADER,
            )
        return wanted_s if self._request_s is None else min(wanted_s, self._request_s)


class _Body:
    """The server's ``receive``, until the body is here within its time."""

    def __init__(self, receive: Receive, read_s: float) -> None:
        self._receive = receive
        self._read_s = read_s
        self._until_s: float | None = None
        self._is_here = False

    async def __call__(self) -> Message:
        if self._is_here:
            return await self._receive()
        if self._until_s is None:
            self._until_s = asyncio.get_running_loop().time() + self._read_s
        try:
            async with asyncio.timeout_at(self._until_s) as limit:
                message = await self._receive()
        except TimeoutError:
            if not limit.expired():
                raise
            raise HTTPException(
                408,
                f"the body was not here after {self._read_s:g} s, as long as this server waits",
                headers={"Connection": "close"},
            ) from None
        self._is_here = message["type"] != "http.request" or not message.get("more_body", False)
        return message


class _Response:
    """The server's ``send``; knows how far the response is."""

    def __init__(self, send: Send) -> None:
        self._send = send
        self._has_begun = False
        self._is_stream = False
        self._is_over = False

    async def __call__(self, message: Message) -> None:
        await self._send(message)
        if message["type"] == "http.response.start":
            self._has_begun = True
            kind = Headers(raw=message["headers"]).get("Content-Type", "")
            self._is_stream = kind.startswith("text/event-stream")
        elif not message.get("more_body", False):
            self._is_over = True

    async def end_late(self, scope: Scope, receive: Receive, timeout_s: float) -> None:
        """The time is over, and whatever wrote the response has ended."""
        failure = failure_of(
            DeadlineError(f"the answer was not complete after {timeout_s:g} s, as long as it had")
        )
        if not self._has_begun:
            await failure.response()(scope, receive, self._send)
        elif self._is_stream and not self._is_over:
            event = b"data: %b\n\ndata: [DONE]\n\n" % msgspec.json.encode(failure.document)
            # A client that does not read is cut off by the server: its response has no end.
            try:
                async with asyncio.timeout(_LAST_WORDS_S):
                    await self._send({"type": "http.response.body", "body": event})
            except TimeoutError:
                return
