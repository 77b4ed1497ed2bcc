"""Ids of requests: what the client calls them, and what the server calls them.

A client may name its request (header ``X-Request-Id``, or ``request_id`` in the body) and may use
one name twice, at the same time even. Inside, an id is used once and never again, because epochs,
leases and life events are told apart by it. So the response carries the client's name, the server
works under that name with a random end, and `RequestDirectory` leads back from the one to the
other.
"""

from __future__ import annotations

import re
import secrets
from collections import OrderedDict

from pdserve.core.errors import RequestError
from pdserve.core.ids import RequestId

MAX_ID_CHARS = 128
_VALID = re.compile(r"[A-Za-z0-9._:+=@-]+")


def new_request_id() -> str:
    """128 random bits, as hex."""
    return secrets.token_hex(16)


def check_request_id(value: str, param: str) -> str:
    """The client's id, unchanged. Raises `RequestError` that names ``param``."""
    if len(value) > MAX_ID_CHARS:
        raise RequestError(f"{param} is longer than {MAX_ID_CHARS} characters", param)
    if _VALID.fullmatch(value) is None:
        raise RequestError(
            f"{param} may hold letters, digits and the characters . _ : + = @ - only", param
        )
    return value


class RequestDirectory:
    """The latest ``capacity`` names and the ids behind them. Event loop's thread only."""

    def __init__(self, capacity: int) -> None:
        self._capacity = capacity
        self._ids: OrderedDict[str, tuple[RequestId, ...]] = OrderedDict()

    def assign(
        self, kind: str, client_id: str | None, num_prompts: int | None
    ) -> tuple[str, str, tuple[RequestId, ...]]:
        """Name one HTTP request: (client's id, response id, ids of its requests).

        ``kind`` is the response id's prefix (``cmpl``, ``chatcmpl``). ``num_prompts`` is None for a
        single prompt; the prompts of a list are numbered, ``<id>-0``, ``<id>-1``, ...
        """
        name = client_id if client_id is not None else new_request_id()
        public = f"{kind}-{name}"
        # '~' cannot stand in a client's id, so no other id can be equal to these.
        unique = public if client_id is None else f"{public}~{secrets.token_hex(4)}"
        if num_prompts is None:
            ids: tuple[RequestId, ...] = (RequestId(unique),)
        else:
            ids = tuple(RequestId(f"{unique}-{index}") for index in range(num_prompts))
            for index, request_id in enumerate(ids):
                self._remember((request_id,), f"{name}-{index}", f"{public}-{index}", request_id)
        self._remember(ids, name, public, unique)
        return name, public, ids

    def find(self, name: str) -> tuple[RequestId, ...]:
        """Ids behind a name: the client's, the response's or the server's own. () if forgotten."""
        return self._ids.get(name, ())

    def _remember(self, ids: tuple[RequestId, ...], *names: str) -> None:
        for name in names:
            self._ids[name] = ids
            self._ids.move_to_end(name)
        while len(self._ids) > self._capacity:
            self._ids.popitem(last=False)
