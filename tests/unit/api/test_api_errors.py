"""One error, one status: the whole tree, and the router's `Fail`."""

from __future__ import annotations

import pytest
from starlette.exceptions import HTTPException

from pdserve.api.errors import error_of_fail, failure_of, is_bug
from pdserve.core import errors
from pdserve.core.effects import Fail, Refusal
from pdserve.core.ids import RequestId


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


@pytest.mark.parametrize(
    ("kind", "error"),
    [
        (Refusal.OVERLOADED, errors.OverloadedError),
        (Refusal.UNAVAILABLE, errors.UnavailableError),
        (Refusal.DRAINING, errors.UnavailableError),
        (Refusal.TOO_LONG, errors.ContextLengthError),
        (Refusal.INTERNAL, errors.GenerationError),
    ],
)
def test_every_refusal_of_the_router_is_an_error(kind, error):
    fail = Fail(request_id=RequestId("r"), kind=kind, detail="because", retry_after_s=4.0)
    raised = error_of_fail(fail)
    assert type(raised) is error
    assert str(raised) == "because"
    if error is errors.OverloadedError:
        assert raised.retry_after_s == 4.0


def test_no_refusal_is_forgotten():
    kinds = {value for name, value in vars(Refusal).items() if name.isupper()}
    mapped = {
        kind: type(error_of_fail(Fail(request_id=RequestId("r"), kind=kind, detail="d")))
        for kind in kinds
    }
    assert [kind for kind, error in mapped.items() if error is errors.GenerationError] == [
        Refusal.INTERNAL
    ]


def test_only_our_errors_are_no_bugs():
    assert not is_bug(errors.GenerationError("m"))
    assert not is_bug(HTTPException(404))
    assert is_bug(KeyError("k"))
