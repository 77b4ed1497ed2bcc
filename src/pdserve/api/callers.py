"""Who sends a request, and which class of service it gets.

The caller is known by its API key: the tenant is a short digest of it, so that the key itself goes
no further than the edge. (Not by OpenAI's ``user`` field: whoever writes it could be as many as he
likes.) A key that is bound to a class has no choice; everybody else names the class in a header, or
gets ``default``.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass

from starlette.requests import Request as HttpRequest

from pdserve.core.errors import AuthError, RequestError
from pdserve.core.request import DEFAULT_SERVICE, ServiceClass

CLASS_HEADER = "X-Pdserve-Class"
CALLER = "pdserve.caller"
"""Scope key: the `Caller`, if keys are asked for."""

OPERATED = "/cluster"
"""Paths under which workers are moved about: not with a key that is bound to a class."""

_TENANT_CHARS = 12


@dataclass(frozen=True, slots=True)
class Caller:
    """``class_name``: of the class to which the key is bound."""

    tenant: str = ""
    class_name: str | None = None


_ANYBODY = Caller()


class KeyRing:
    """The keys that this server takes: its own, and those of classes."""

    def __init__(self, api_key: str | None, class_of_key: Mapping[str, str]) -> None:
        self._callers: dict[bytes, Caller] = {}
        for key, class_name in class_of_key.items():
            self._add(key.encode(), class_name)
        if api_key is not None:
            self._add(api_key.encode(), None)

    def __bool__(self) -> bool:
        """False if no key is asked for."""
        return bool(self._callers)

    def caller(self, key: bytes) -> Caller:
        """Whose key it is. Raises `AuthError`."""
        # By its digest: how long the look-up takes tells nothing about a key.
        caller = self._callers.get(hashlib.sha256(key).digest())
        if caller is None:
            raise AuthError("the API key is not one that this server was started with")
        return caller

    def _add(self, key: bytes, class_name: str | None) -> None:
        digest = hashlib.sha256(key).digest()
        self._callers[digest] = Caller(digest.hex()[:_TENANT_CHARS], class_name)


def caller_of(request: HttpRequest) -> Caller:
    """Who sent the request; nobody in particular if no keys are asked for."""
    caller: Caller = request.scope.get(CALLER, _ANYBODY)
    return caller


def service_of(request: HttpRequest, classes: Mapping[str, ServiceClass]) -> ServiceClass:
    """The class of the key, or of the header. Raises `RequestError` for one that is not there."""
    wanted = request.headers.get(CLASS_HEADER)
    bound = caller_of(request).class_name
    if wanted is None:
        return classes[bound or DEFAULT_SERVICE.name]
    wanted = wanted.strip()
    if wanted not in classes:
        raise RequestError(
            f"the header {CLASS_HEADER} is {wanted!r}; the classes here are: {', '.join(classes)}",
            CLASS_HEADER,
        )
    if bound is not None and wanted != bound:
        raise RequestError(
            f"the header {CLASS_HEADER} is {wanted!r}, and this API key is bound to class "
            f"{bound!r}: leave the header out",
            CLASS_HEADER,
        )
    return classes[wanted]
