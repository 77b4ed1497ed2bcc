"""From an error to what the client sees of it: the one place where the error tree meets HTTP.

Every error, wherever it was raised, leaves as OpenAI's
``{"error": {"message", "type", "param", "code"}}``: as the body of a response with the right
status while none has begun, as an event inside the stream afterwards. An error that is not in the
tree is a bug: the client gets a 500 without its details, which go to the log.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from http import HTTPStatus
from typing import Any

import msgspec
from fastapi import FastAPI, Request
from starlette.exceptions import HTTPException
from starlette.responses import Response

from pdserve.core.errors import (
    AuthError,
    ConflictError,
    ContextLengthError,
    DeadlineError,
    ForbiddenError,
    GenerationError,
    NotFoundError,
    OverloadedError,
    PdserveError,
    RateLimitError,
    RequestError,
    UnavailableError,
)

logger = logging.getLogger(__name__)

_INVALID = "invalid_request_error"
_CODES = {
    404: "not_found",
    405: "method_not_allowed",
    408: "request_timeout",
    413: "request_too_large",
    415: "unsupported_media_type",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class HttpFailure:
    """An error in HTTP's terms."""

    status: int
    message: str
    type: str
    param: str | None = None
    code: str | None = None
    headers: Mapping[str, str] = field(default_factory=dict)

    @property
    def document(self) -> dict[str, Any]:
        """The JSON document of OpenAI's error shape."""
        return {
            "error": {
                "message": self.message,
                "type": self.type,
                "param": self.param,
                "code": self.code,
            }
        }

    def response(self) -> Response:
        return Response(
            msgspec.json.encode(self.document),
            status_code=self.status,
            headers=dict(self.headers),
            media_type="application/json",
        )


def failure_of(error: BaseException) -> HttpFailure:
    """What a client sees of this error. Never raises; unknown errors show nothing of themselves."""
    if isinstance(error, RequestError):
        return _client_failure(error)
    if isinstance(error, HTTPException):
        return _http_failure(error)
    if isinstance(error, OverloadedError):
        limit = error.limit if isinstance(error, RateLimitError) else None
        return HttpFailure(
            status=429,
            message=str(error),
            type=limit or "overloaded_error",  # OpenAI's type is the limit that was met
            code="rate_limit_exceeded" if limit else "overloaded",
            headers={"Retry-After": str(max(1, math.ceil(error.retry_after_s)))},
        )
    if isinstance(error, DeadlineError):
        return HttpFailure(
            status=504,
            message=str(error),
            type="timeout_error",
            code="deadline_exceeded",
            headers={"X-Should-Retry": "false"},  # OpenAI's clients would, up to three times
        )
    if isinstance(error, UnavailableError):
        return HttpFailure(
            status=503, message=str(error), type="service_unavailable_error", code="unavailable"
        )
    if isinstance(error, GenerationError):
        return HttpFailure(
            status=500, message=str(error), type="server_error", code="generation_failed"
        )
    return HttpFailure(
        status=500,
        message="internal error; the server's log has the details",
        type="server_error",
        code="internal_error",
    )


def _client_failure(error: RequestError) -> HttpFailure:
    message, param = str(error), error.param
    if isinstance(error, AuthError):
        return HttpFailure(
            status=401,
            message=message,
            type="authentication_error",
            param=param,
            code="invalid_api_key",
            headers={"WWW-Authenticate": "Bearer"},
        )
    if isinstance(error, ForbiddenError):
        return HttpFailure(
            status=403, message=message, type="permission_error", param=param, code="forbidden"
        )
    if isinstance(error, NotFoundError):
        code = "model_not_found" if param == "model" else "not_found"
        return HttpFailure(status=404, message=message, type=_INVALID, param=param, code=code)
    if isinstance(error, ConflictError):
        return HttpFailure(status=409, message=message, type=_INVALID, param=param, code="conflict")
    code = "context_length_exceeded" if isinstance(error, ContextLengthError) else "invalid_value"
    return HttpFailure(status=400, message=message, type=_INVALID, param=param, code=code)


def _http_failure(error: HTTPException) -> HttpFailure:
    """Errors of the web framework and of ``api.body``: no route, wrong method, too large."""
    type_ = _INVALID if error.status_code < 500 else "server_error"
    message = error.detail or HTTPStatus(error.status_code).phrase
    return HttpFailure(
        status=error.status_code,
        message=message,
        type=type_,
        code=_CODES.get(error.status_code),
        headers=error.headers or {},
    )


def is_bug(error: BaseException) -> bool:
    """True if the error is none that pdserve raises on purpose, so that the log must tell of it."""
    return not isinstance(error, PdserveError | HTTPException)


def install(app: FastAPI) -> None:
    """Answer errors that leave a route, before its response began, in OpenAI's shape."""

    async def answer(request: Request, error: Exception) -> Response:
        return failure_of(error).response()

    app.add_exception_handler(PdserveError, answer)
    app.add_exception_handler(HTTPException, answer)
