"""Routes that FastAPI documents and does not run.

For each request the framework resolves dependencies, looks at the signature and opens exit stacks:
a tenth of what a request costs here, for an endpoint that takes the request as it is and answers
with a response of its own. A `DirectRoute` is found and published as any other, and then called.
"""

from __future__ import annotations

from fastapi import Request
from fastapi.routing import APIRoute
from starlette.types import Receive, Scope, Send


class DirectRoute(APIRoute):
    """Its endpoint takes a `Request` and nothing else, and returns a response."""

    async def handle(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["method"] not in (self.methods or ()):
            await super().handle(scope, receive, send)  # which refuses it
            return
        response = await self.endpoint(Request(scope, receive))
        await response(scope, receive, send)
