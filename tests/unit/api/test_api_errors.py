"""One error, one status: the whole tree."""

from __future__ import annotations

import pytest
from starlette.exceptions import HTTPException

from pdserve.api.errors import failure_of, is_bug
from pdserve.core import errors


@pytest.mark.parametrize(
    ("error", "status", "type_", "code"),
    [
        (errors.RequestError("m", "p"), 400, "invalid_request_error", "invalid_value"),
        (
            errors.ContextLengthError("m", "p"),
            400,
            "invalid_request_error",
            "context_length_exceeded",
        ),
        (errors.AuthError("m", "p"), 401, "authentication_error", "invalid_api_key"),
        (errors.NotFoundError("m", "p"), 404, "invalid_request_error", "not_found"),
        (errors.OverloadedError("m", 1.5), 429, "overloaded_error", "overloaded"),
        (errors.UnavailableError("m"), 503, "service_unavailable_error", "unavailable"),
        (errors.GenerationError("m"), 500, "server_error", "generation_failed"),
        (errors.TransferError("inside"), 500, "server_error", "internal_error"),
        (HTTPException(405, "m"), 405, "invalid_request_error", "method_not_allowed"),
        (HTTPException(418), 418, "invalid_request_error", None),
        (HTTPException(502, "m"), 502, "server_error", None),
        (KeyError("inside"), 500, "server_error", "internal_error"),
    ],
)
def test_status_and_shape(error, status, type_, code):
    failure = failure_of(error)
    assert (failure.status, failure.type, failure.code) == (status, type_, code)
    assert list(failure.document["error"]) == ["message", "type", "param", "code"]
    assert failure.param == ("p" if isinstance(error, errors.RequestError) else None)
    assert "inside" not in failure.message
    assert failure.message


@pytest.mark.parametrize(("wait_s", "header"), [(0.0, "1"), (0.2, "1"), (1.0, "1"), (1.1, "2")])
def test_retry_after_is_a_whole_number_of_seconds(wait_s, header):
    assert failure_of(errors.OverloadedError("m", wait_s)).headers["Retry-After"] == header


def test_only_our_errors_are_no_bugs():
    assert not is_bug(errors.GenerationError("m"))
    assert not is_bug(HTTPException(404))
    assert is_bug(KeyError("k"))
