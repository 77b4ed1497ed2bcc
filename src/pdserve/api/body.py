"""Reading a JSON body: its type, its size, its syntax and its fields, in that order.

The routes read bodies through here rather than through the framework, so that a body is measured
while it arrives, every mistake has OpenAI's shape and status 400 (never 422), and the message names
the field as the client wrote it.
"""

from __future__ import annotations

from typing import Any, TypeVar

import msgspec
from fastapi import Request
from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails
from starlette.exceptions import HTTPException

from pdserve.core.errors import RequestError

ModelT = TypeVar("ModelT", bound=BaseModel)

MAX_CONTAINERS = 2**18
"""Lists and objects in a body, brackets in its texts counted with them: reading so many takes some
tenths of a second, and nobody's tokens are sent meanwhile."""


async def read_body(request: Request, model: type[ModelT], max_bytes: int) -> ModelT:
    """The validated body.

    Raises `RequestError` (400: not JSON, or a field is wrong) and `HTTPException` (413, 415).
    """
    content_type = request.headers.get("Content-Type", "").partition(";")[0].strip().lower()
    if content_type != "application/json" and not content_type.endswith("+json"):
        raise HTTPException(415, "send the header 'Content-Type: application/json'")
    document = _parse(await _read(request, max_bytes))
    return validated(document, model)


def validated(document: Any, model: type[ModelT]) -> ModelT:
    """The document as this model. Raises `RequestError` naming the first field that is wrong."""
    try:
        return model.model_validate(document)
    except ValidationError as error:
        raise _request_error(error.errors(include_url=False), document) from None


async def _read(request: Request, max_bytes: int) -> bytes:
    message = f"the body is larger than {max_bytes} bytes, the most that this server takes"
    declared = request.headers.get("Content-Length", "")
    if declared.isdecimal() and int(declared) > max_bytes:
        raise HTTPException(413, message)
    body = bytearray()
    async for chunk in request.stream():
        body += chunk
        if len(body) > max_bytes:
            raise HTTPException(413, message)
    return bytes(body)


def _parse(body: bytes) -> dict[str, Any]:
    if body.count(b"[") + body.count(b"{") > MAX_CONTAINERS:
        raise RequestError(
            f"the body has more than {MAX_CONTAINERS} opening brackets, the most that are served"
        )
    try:
        document = msgspec.json.decode(body)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise RequestError(f"the body is not valid JSON: {error}") from None
    if not isinstance(document, dict):
        raise RequestError("the body must be a JSON object")
    return document


def _request_error(details: list[ErrorDetails], document: dict[str, Any]) -> RequestError:
    """The deepest error: of a value that fits no member of a union, it names the nearest miss."""
    paths = [
        _path_in(document, detail["loc"], is_missing=detail["type"] == "missing")
        for detail in details
    ]
    index = max(range(len(paths)), key=lambda i: (len(paths[i]), -i))
    text = details[index]["msg"]
    text = text[:1].lower() + text[1:]
    names = [str(part) for part in paths[index]]
    path = "".join(name if name.startswith("[") else f".{name}" for name in names).removeprefix(".")
    return RequestError(f"{path}: {text}" if path else text, names[0] if names else None)


def _path_in(document: Any, loc: tuple[int | str, ...], *, is_missing: bool) -> list[str]:
    """The part of pydantic's location that is in the document: it also names types and unions."""
    path: list[str] = []
    for position, part in enumerate(loc):
        if isinstance(part, str) and isinstance(document, dict):
            if part in document:
                path.append(part)
                document = document[part]
            elif is_missing and position == len(loc) - 1:
                path.append(part)
        elif isinstance(part, int) and isinstance(document, list) and part < len(document):
            path.append(f"[{part}]")
            document = document[part]
    return path
