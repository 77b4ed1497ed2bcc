"""The routes of those who want to see the server fail. They answer only if it was started so."""

from __future__ import annotations

from typing import Annotated, Any

from fastapi import APIRouter, Request
from pydantic import BaseModel, ConfigDict, Field

from pdserve.api.body import read_body
from pdserve.api.documentation import json_route, may_answer
from pdserve.api.edge import Edge
from pdserve.api.gateway import FaultHooks
from pdserve.core.errors import ConflictError
from pdserve.core.ids import WorkerId

Seconds = Annotated[float, Field(gt=0, allow_inf_nan=False)]


class LinksBody(BaseModel):
    """``pairs``: links between two workers each. ``factor``: so many times slower; without it they
    are cut. ``for_s``: for how long; without it until all is healed."""

    model_config = ConfigDict(extra="forbid")

    pairs: list[tuple[str, str]]
    factor: Annotated[float, Field(gt=1, allow_inf_nan=False)] | None = None
    for_s: Seconds | None = None


class HoldBody(BaseModel):
    """``for_s``: how long after its end a process is started again; without it not until all is
    healed."""

    model_config = ConfigDict(extra="forbid")

    worker: str
    for_s: Annotated[float, Field(ge=0, allow_inf_nan=False)] | None = None


def faults_router(edge: Edge) -> APIRouter:
    router = APIRouter(tags=["Faults"], prefix="/cluster/faults")
    max_bytes = edge.settings.max_body_bytes

    def hooks() -> FaultHooks:
        found = edge.gateway.faults
        if found is None:
            raise ConflictError(
                "this server takes no faults; start it with --allow-faults where nobody minds"
            )
        return found

    @router.post("/links", **json_route(LinksBody, None, 403, 409))
    async def links(request: Request) -> dict[str, Any]:
        """Cut or slow down links between workers. 409 unless the server was started with
        --allow-faults."""
        body = await read_body(request, LinksBody, max_bytes)
        pairs = [(WorkerId(one), WorkerId(other)) for one, other in body.pairs]
        hooks().disturb(pairs, body.factor, body.for_s)
        return {"faults": hooks().shown()}

    @router.post("/holds", **json_route(HoldBody, None, 403, 409))
    async def holds(request: Request) -> dict[str, Any]:
        """Once the worker's process ends, start no other for so long. 409 as above."""
        body = await read_body(request, HoldBody, max_bytes)
        hooks().hold(WorkerId(body.worker), body.for_s)
        return {"worker": body.worker, "for_s": body.for_s}

    @router.delete("", **may_answer(401, 403, 409))
    async def heal() -> dict[str, Any]:
        """End every fault now. 409 as above."""
        hooks().heal()
        return {"faults": hooks().shown()}

    return router
