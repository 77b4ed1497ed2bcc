"""What surrounds every route: the request's id, and the net under everything.

`EdgeMiddleware` takes the client's ``X-Request-Id`` (or makes one), puts it on the scope and on the
response, beside what tells browsers to neither guess nor keep it, and turns an error that nobody
expected into a 500. Inside it, ``time_limits`` and ``key_check``. All are plain ASGI: nothing is
buffered, and the server's word that a client has gone reaches the routes untouched.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable
from typing import Any

from starlette.datastructures import Headers
from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from pdserve.api.errors import failure_of
from pdserve.api.request_ids import check_request_id, new_request_id
from pdserve.core.errors import RequestError

logger = logging.getLogger(__name__)

REQUEST_ID_HEADER = "X-Request-Id"
_REQUEST_ID_FIELD = REQUEST_ID_HEADER.lower().encode()
CLIENT_REQUEST_ID = "pdserve.client_request_id"
"""Scope key: the valid id that the client gave in the header, or None."""

_SAFE_FIELDS = (
    (b"x-content-type-options", b"nosniff"),
    (b"cache-control", b"no-store"),
    (b"referrer-policy", b"no-referrer"),
    (b"x-frame-options", b"DENY"),
    (b"content-security-policy", b"default-src 'none'; frame-ancestors 'none'"),
)
_PAGES = ("/docs", "/redoc")
"""Pages for browsers, with scripts of their own."""


class EdgeMiddleware:
    """Outermost: ids and unexpected errors."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        given = Headers(scope=scope).get(REQUEST_ID_HEADER)
        began = False

        async def send_with_id(message: Message) -> None:
            nonlocal began
            if message["type"] == "http.response.start":
                began = True
                message["headers"] = _with_own_fields(message["headers"], scope)
            await send(message)

        scope[CLIENT_REQUEST_ID] = None
        try:
            if given is not None:
                scope[CLIENT_REQUEST_ID] = check_request_id(given, REQUEST_ID_HEADER)
            await self._app(scope, receive, send_with_id)
        except RequestError as error:
            await failure_of(error).response()(scope, receive, send_with_id)
        except ClientDisconnect:
            return  # it left before its body was here: nothing was begun, nobody waits
        except Exception as error:
            logger.exception("%s %s failed", scope["method"], scope["path"])
            if began:
                raise
            await failure_of(error).response()(scope, receive, send_with_id)


def _with_own_fields(fields: Iterable[tuple[bytes, bytes]], scope: Scope) -> list[Any]:
    """A route's own values stay."""
    found = list(fields)
    names = {name.lower() for name, _ in found}
    if _REQUEST_ID_FIELD not in names:
        request_id = scope[CLIENT_REQUEST_ID] or new_request_id()
        found.append((_REQUEST_ID_FIELD, request_id.encode()))
    own = _SAFE_FIELDS[:-1] if scope["path"] in _PAGES else _SAFE_FIELDS
    found += [field for field in own if field[0] not in names]
    return found
