"""The published OpenAPI document.

Bodies are read by ``api.body``, not by the framework, so their schemas are put into the document
here. The framework's own validation error (422) never happens and is not in it.
"""

from __future__ import annotations

from typing import Any

from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi
from pydantic import BaseModel, Field
from pydantic.json_schema import models_json_schema

_TEMPLATE = "#/components/schemas/{model}"
_ERRORS = {
    400: "A field is wrong, not served, or more than the model can take.",
    401: "The API key is missing or wrong.",
    403: "The API key may not do that.",
    404: "There is no such model, worker or request here.",
    409: "The server, or the worker, is not in a state that allows it.",
    408: "The body did not come in time.",
    413: "The body is too large.",
    415: "The body is not declared as JSON.",
    429: "No room now, or a limit of the API key; try again after the seconds in Retry-After.",
    500: "The answer broke off.",
    503: "Nobody is left to serve.",
    504: "The answer was not complete before its deadline.",
}


class ErrorDetail(BaseModel):
    message: str
    type: str
    param: str | None = Field(description="The field at fault.")
    code: str | None


class ErrorDocument(BaseModel):
    """OpenAI's error shape."""

    error: ErrorDetail


def may_answer(*statuses: int) -> dict[str, Any]:
    """Keyword arguments of a route that may answer with these errors."""
    described = {
        status: {"model": ErrorDocument, "description": _ERRORS[status]} for status in statuses
    }
    return {"responses": described}


def json_route(
    body: type[BaseModel], response: type[BaseModel] | None, *statuses: int
) -> dict[str, Any]:
    """Keyword arguments of a route that reads ``body`` and answers ``response`` (None: as its
    function is annotated), or, beside the errors that a body can have, with these."""
    schema = {"$ref": _TEMPLATE.format(model=body.__name__)}
    arguments = may_answer(400, 401, 404, 408, 413, 415, *statuses)
    arguments["openapi_extra"] = {
        "requestBody": {"required": True, "content": {"application/json": {"schema": schema}}}
    }
    if response is not None:
        arguments["responses"][200] = {"model": response}
    return arguments


def generating_route(body: type[BaseModel], response: type[BaseModel]) -> dict[str, Any]:
    """As `json_route`, for a route that also streams and may be refused for lack of room."""
    arguments = json_route(body, response, 429, 500, 503, 504)
    stream: dict[str, Any] = {"text/event-stream": {}}  # JSON in events: OpenAPI has no word for it
    arguments["responses"][200]["content"] = stream
    arguments["openapi_extra"]["parameters"] = [
        _header("X-Request-Id", "The client's name for the request.", {"type": "string"}),
        _header(
            "X-Pdserve-Route",
            "Whether two workers or one are to serve the request.",
            {"type": "string", "enum": ["auto", "split", "local"]},
        ),
        _header(
            "X-Pdserve-Class",
            "The class of service, one of those that the server was started with.",
            {"type": "string", "default": "default"},
        ),
    ]
    return arguments


def _header(name: str, description: str, schema: dict[str, Any]) -> dict[str, Any]:
    return {"name": name, "in": "header", "description": description, "schema": schema}


def publish(app: FastAPI, bodies: tuple[type[BaseModel], ...]) -> None:
    """Make ``/openapi.json`` include the schemas of ``bodies``."""

    def document() -> dict[str, Any]:
        if app.openapi_schema is None:
            schema = get_openapi(
                title=app.title,
                version=app.version,
                description=app.description,
                routes=app.routes,
            )
            _, definitions = models_json_schema(
                [(body, "validation") for body in bodies], ref_template=_TEMPLATE
            )
            components = schema.setdefault("components", {}).setdefault("schemas", {})
            components.update(definitions["$defs"])
            for name in ("HTTPValidationError", "ValidationError"):
                components.pop(name, None)
            for operations in schema["paths"].values():
                for operation in operations.values():
                    operation["responses"].pop("422", None)
            app.openapi_schema = schema
        return app.openapi_schema

    app.openapi = document  # type: ignore[method-assign]
