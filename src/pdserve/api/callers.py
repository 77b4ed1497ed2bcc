"""Who sends a request, what he may do, and which class of service it gets.

The caller is known by its API key. The tenant is the key's name in the key file, or a short digest
of the key, so that the key itself goes no further than the edge. (Not by OpenAI's ``user`` field:
whoever writes it could be as many as he likes.) A key that is bound to a class has no choice;
everybody else names the class in a header, or gets ``default``.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from starlette.requests import Request as HttpRequest
from starlette.types import Scope

from pdserve.api.allowances import Allowance
from pdserve.api.key_file import Rights
from pdserve.core.errors import NotFoundError, RateLimitError, RequestError
from pdserve.core.events import LifeEvent
from pdserve.core.request import DEFAULT_SERVICE, ServiceClass

CLASS_HEADER = "X-Pdserve-Class"
VISIT = "pdserve.visit"
"""Scope key: the `Visit`, if keys are asked for."""

TENANT_DETAIL = "tenant"
"""In the detail of a request's first event: whose it is."""


@dataclass(frozen=True, slots=True)
class Caller:
    """``tenant``: the name by which it is known in logs and metrics, and to the scheduler.
    ``class_name``: of the class to which the key is bound. ``digest``: of the key."""

    tenant: str = ""
    class_name: str | None = None
    rights: Rights = Rights.OPERATE
    digest: bytes = field(default=b"", repr=False)
    allowance: Allowance | None = None


_ANYBODY = Caller()
NOBODY = Caller(rights=Rights.GENERATE)
"""Who shows no key where keys are asked for, on a path that is open."""


@dataclass(slots=True)
class Visit:
    """One HTTP request of a caller, until its response has ended. ``num_tokens`` are reserved;
    ``refused``: by which limit it was."""

    caller: Caller
    num_tokens: int = 0
    refused: str | None = None

    def reserve(self, num_tokens: int) -> None:
        """Raises as `Allowance.reserve`."""
        if self.caller.allowance is not None:
            try:
                self.caller.allowance.reserve(num_tokens)
            except RateLimitError as error:
                self.refused = error.limit
                raise
            self.num_tokens += num_tokens

    def end(self) -> None:
        if self.caller.allowance is not None:
            self.caller.allowance.release(self.num_tokens)
            self.num_tokens = 0


def caller_in(scope: Scope) -> Caller:
    """Who sent the request; nobody in particular, who may do all, if no keys are asked for."""
    visit: Visit | None = scope.get(VISIT)
    return _ANYBODY if visit is None else visit.caller


def caller_of(request: HttpRequest) -> Caller:
    """The same of a request."""
    return caller_in(request.scope)


def reserve_tokens(request: HttpRequest, num_tokens: int) -> None:
    """Count these tokens as in flight for the caller until the response has ended.

    Raises `RateLimitError`, or `RequestError` if there are too many for this key ever.
    """
    visit: Visit | None = request.scope.get(VISIT)
    if visit is not None:
        visit.reserve(num_tokens)


def salt_of(request: HttpRequest, wanted: str, *, per_key: bool) -> str:
    """The salt of the request's cached prefixes: what the client ``wanted``, and ``per_key`` the
    tenant before it, so that no client's salt can be that of another one's key."""
    tenant = caller_of(request).tenant if per_key else ""
    return f"{len(tenant)}:{tenant}:{wanted}" if tenant else wanted


def check_owner(request: HttpRequest, timelines: Iterable[Sequence[LifeEvent]]) -> None:
    """Raises `NotFoundError`, as for a request that never was, if one of these is not the caller's
    to see."""
    caller = caller_of(request)
    for events in timelines:
        tenant = dict(events[0].detail).get(TENANT_DETAIL)
        if caller.rights < Rights.WATCH and tenant != caller.tenant:
            raise NotFoundError("no recent request of this API key has this id", "request_id")


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
