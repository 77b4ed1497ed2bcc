"""The server behaves as its published schema says, whatever is sent to it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import schemathesis
from fastapi import FastAPI
from hypothesis import HealthCheck, Phase, given, settings
from schemathesis.checks import (
    content_type_conformance,
    not_a_server_error,
    response_schema_conformance,
    status_code_conformance,
)

from pdserve.api.fake import FakeGateway
from pdserve.api.gateway import ModelCard

CHECKS = [
    not_a_server_error,
    status_code_conformance,
    content_type_conformance,
    response_schema_conformance,
]
GENERATING = ("/v1/completions", "/v1/chat/completions", "/v1/responses")


@pytest.mark.parametrize("with_wrong_input", [False, True])
def test_no_input_makes_it_fail(
    with_wrong_input: bool, make_app: Callable[..., FastAPI], card: ModelCard
) -> None:
    app = make_app(FakeGateway(card))
    schema: Any = schemathesis.openapi.from_asgi("/openapi.json", app)
    mode = schemathesis.GenerationMode
    for result in schema.get_all_operations():
        operation = result.ok()
        if with_wrong_input and not operation.body:
            continue
        cases = operation.as_strategy(
            generation_mode=mode.NEGATIVE if with_wrong_input else mode.POSITIVE
        )

        @settings(
            max_examples=12 if operation.path in GENERATING else 5,
            derandomize=True,
            database=None,
            phases=[Phase.generate],
            suppress_health_check=list(HealthCheck),
        )
        @given(case=cases)
        def holds(case: schemathesis.Case) -> None:
            case.call_and_validate(checks=CHECKS)

        holds()
