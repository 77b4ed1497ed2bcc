"""Who comes in: the API key of a request, what it may do, and how much of it.

`KeyCheck` stands outside the routes, so that a request without a key is refused before a byte of
its body is read, whether its path is known or not. Inside, ``callers`` tells who asks. Paths in
`OPEN_PATHS` need no key: probes, and scrapes whose tools have none; they show nothing of a request
or of a key. With a key that may watch, ``/metrics`` has the keys' own figures too.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from pdserve.api.callers import NOBODY, VISIT, Caller, Visit
from pdserve.api.errors import failure_of
from pdserve.api.key_file import Rights
from pdserve.api.keys import KeyStore
from pdserve.core.errors import AuthError, ForbiddenError, RateLimitError
from pdserve.obs.key_metrics import KeyMetrics

OPEN_PATHS = frozenset(
    {"/health", "/ping", "/metrics", "/version", "/openapi.json", "/docs", "/redoc"}
)
"""What needs no key. Every other path does, known or not."""

_OPERATED = "/cluster"
_WATCHED = "/cluster/traffic"
_LOOKING = ("GET", "HEAD")


class KeyCheck:
    """Lets through what carries ``Authorization: Bearer <key>``, and the open paths."""

    def __init__(
        self,
        app: ASGIApp,
        *,
        keys: KeyStore,
        metrics: KeyMetrics,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._app = app
        self._keys = keys
        self._metrics = metrics
        self._clock = clock

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        header = Headers(scope=scope).get("Authorization")
        if scope["path"] in OPEN_PATHS:
            scope[VISIT] = Visit(NOBODY)
            with contextlib.suppress(AuthError):
                scope[VISIT] = Visit(self._caller(header))
            await self._app(scope, receive, send)
            return
        try:
            caller = self._caller(header)
        except AuthError:
            self._metrics.on_unauthorized()
            raise
        _check_rights(caller, scope)
        await self._visit(caller, scope, receive, send)

    async def _visit(self, caller: Caller, scope: Scope, receive: Receive, send: Send) -> None:
        visit = scope[VISIT] = Visit(caller)
        allowance = caller.allowance
        is_counted = scope["method"] not in _LOOKING and not scope["path"].startswith(_OPERATED)

        async def send_with_limits(message: Message) -> None:
            if allowance is not None and message["type"] == "http.response.start":
                limits = allowance.headers(self._clock())
                message["headers"] = [*message["headers"], *limits]
                if message["status"] == 429 and visit.refused is not None:
                    self._metrics.on_refusal(caller.tenant, visit.refused)
            await send(message)

        try:
            if is_counted:
                self._metrics.on_request(caller.tenant)
                if allowance is not None:
                    allowance.take_request(self._clock())
            await self._app(scope, receive, send_with_limits)
        except RateLimitError as error:
            visit.refused = error.limit
            await failure_of(error).response()(scope, receive, send_with_limits)
        finally:
            visit.end()

    def _caller(self, header: str | None) -> Caller:
        if header is None:
            raise AuthError(
                "this server needs an API key: send the header 'Authorization: Bearer <key>'"
            )
        scheme, _, key = header.partition(" ")
        if scheme.lower() != "bearer":
            raise AuthError("the header 'Authorization' must be 'Bearer <key>'")
        return self._keys.caller(key.strip().encode("latin-1"))


def _check_rights(caller: Caller, scope: Scope) -> None:
    """Raises `ForbiddenError`."""
    path = scope["path"]
    if path.startswith(_OPERATED) and scope["method"] not in _LOOKING:
        if caller.rights < Rights.OPERATE:
            raise ForbiddenError(
                "this API key may not move workers about; the key of --api-key may, and those with "
                "rights=operate in the key file"
            )
    elif path.startswith(_WATCHED) and caller.rights < Rights.WATCH:
        raise ForbiddenError(
            "this API key may not see what others ask for; those with rights=watch may"
        )
