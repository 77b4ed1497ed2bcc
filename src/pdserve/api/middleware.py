"""What surrounds every route: the request's id, the API key, and the net under everything.

`EdgeMiddleware` is outermost. It takes the client's ``X-Request-Id`` (or makes one), puts it on the
scope and on the response, and turns an error that nobody expected into a 500. Inside it,
`BearerMiddleware` asks for the key, before a byte of the body is read. Both are plain ASGI: nothing
is buffered, and the server's word that a client has gone reaches the routes untouched.
"""

from __future__ import annotations

import logging

from starlette.datastructures import Headers
from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from pdserve.api.callers import CALLER, OPERATED, Caller, KeyRing
from pdserve.api.errors import failure_of
from pdserve.api.request_ids import check_request_id, new_request_id
from pdserve.core.errors import AuthError, RequestError

logger = logging.getLogger(__name__)

REQUEST_ID_HEADER = "X-Request-Id"
_REQUEST_ID_FIELD = REQUEST_ID_HEADER.lower().encode()
CLIENT_REQUEST_ID = "pdserve.client_request_id"
"""Scope key: the valid id that the client gave in the header, or None."""

OPEN_PATHS = frozenset(
    {"/health", "/ping", "/metrics", "/version", "/openapi.json", "/docs", "/redoc"}
)
"""What needs no key: probes, scrapes and documentation. Every other path does, known or not."""


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
                if all(name != _REQUEST_ID_FIELD for name, _ in message["headers"]):
                    name = scope[CLIENT_REQUEST_ID] or new_request_id()
                    message["headers"] = [*message["headers"], (_REQUEST_ID_FIELD, name.encode())]
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


class BearerMiddleware:
    """Lets through what carries ``Authorization: Bearer <key>``, and the open paths. Puts the
    caller on the scope."""

    def __init__(self, app: ASGIApp, keys: KeyRing) -> None:
        self._app = app
        self._keys = keys

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and scope["path"] not in OPEN_PATHS:
            caller = self._caller(Headers(scope=scope).get("Authorization"))
            operates = scope["path"].startswith(OPERATED) and scope["method"] not in ("GET", "HEAD")
            if operates and caller.class_name is not None:
                raise AuthError(
                    "this API key is bound to a class of service; workers are moved about with the "
                    "key of --api-key"
                )
            scope[CALLER] = caller
        await self._app(scope, receive, send)

    def _caller(self, header: str | None) -> Caller:
        if header is None:
            raise AuthError(
                "this server needs an API key: send the header 'Authorization: Bearer <key>'"
            )
        scheme, _, key = header.partition(" ")
        if scheme.lower() != "bearer":
            raise AuthError("the header 'Authorization' must be 'Bearer <key>'")
        return self._keys.caller(key.strip().encode("latin-1"))
