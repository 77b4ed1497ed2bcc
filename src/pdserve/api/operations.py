"""The routes of those who run the server: is it up, what does it do, where did the time go."""

from __future__ import annotations

from typing import Any

import msgspec
from fastapi import APIRouter, Request
from starlette.responses import PlainTextResponse, Response

import pdserve
from pdserve.api.callers import caller_of, check_owner
from pdserve.api.documentation import may_answer
from pdserve.api.edge import Edge
from pdserve.api.gateway import Gateway
from pdserve.api.key_file import Rights
from pdserve.core.errors import NotFoundError, UnavailableError
from pdserve.core.ids import RequestId
from pdserve.obs.timeline import describe

_METRICS_TYPE = "text/plain; version=0.0.4; charset=utf-8"


def operations_router(edge: Edge) -> APIRouter:
    router = APIRouter(tags=["Operations"])
    gateway = edge.gateway

    @router.get("/health", **may_answer(503))
    @router.get("/ping", **may_answer(503))
    @router.post("/ping", **may_answer(503))
    async def health() -> dict[str, str]:
        """200 if a new request would find workers, else 503. ``/ping`` is the same."""
        if not gateway.is_ready():
            raise UnavailableError("not ready: no worker can take a request now")
        return {"status": "ready"}

    @router.get("/version")
    async def version() -> dict[str, str]:
        """Version of the server."""
        return {"version": pdserve.__version__}

    @router.get("/metrics", response_class=PlainTextResponse)
    async def metrics(request: Request) -> Response:
        """Metrics in Prometheus' text format. Those of API keys need a key that may watch."""
        text = gateway.metrics_text()
        if edge.keys and edge.key_metrics and caller_of(request).rights >= Rights.WATCH:
            text += edge.key_metrics.exposition(edge.keys.tokens_in_flight())
        return Response(text, headers={"Content-Type": _METRICS_TYPE})

    _add_cluster(router, gateway)

    @router.get("/v1/requests/{request_id}/timeline", **may_answer(401, 404))
    async def timeline(request_id: str, request: Request) -> Response:
        """Phases of a recent request: times, workers, and the router's reasons.

        The id is the response's, or the one that the client gave. With API keys, a key sees its own
        requests; one that may watch sees all. For a list of prompts the answer
        has one timeline per prompt, in ``requests``; ``<id>-<i>`` is one of them.
        """
        ids = edge.directory.find(request_id) or (RequestId(request_id),)
        found = [events for events in map(gateway.timeline, ids) if events]
        check_owner(request, found)
        timelines = [describe(events) for events in found]
        if not timelines:
            raise NotFoundError(
                f"no recent request has the id {request_id!r}; only the latest are remembered",
                "request_id",
            )
        if len(ids) == 1:
            return _json(timelines[0])
        return _json({"request_id": request_id, "requests": timelines})

    return router


def _add_cluster(router: APIRouter, gateway: Gateway) -> None:
    @router.get("/cluster", **may_answer(401))
    async def cluster() -> Response:
        """Workers with their roles, load and blocks."""
        return _json(gateway.cluster())

    @router.get("/cluster/traffic", **may_answer(401, 403))
    async def traffic() -> Response:
        """Recent requests by size and time, and what is known of the workers' speed.

        ``pdserve plan --live`` reads it.
        """
        return _json(gateway.traffic())


def _json(document: Any) -> Response:
    return Response(msgspec.json.encode(document), media_type="application/json")
