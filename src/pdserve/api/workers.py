"""The routes of those who move workers about: roles, drains, restarts."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter, Request
from pydantic import BaseModel, ConfigDict

from pdserve.api.body import read_body
from pdserve.api.documentation import json_route
from pdserve.api.edge import Edge
from pdserve.core.commands import ChangeRole, DrainOne, UndrainOne
from pdserve.core.ids import WorkerId
from pdserve.core.request import Role


class RoleBody(BaseModel):
    """``epoch``: change it only if the worker's role epoch (in ``/cluster``) is still this one."""

    model_config = ConfigDict(extra="forbid")

    role: Role
    epoch: int | None = None


class EmptyBody(BaseModel):
    """An empty object. What a web page of another origin can send without asking is not JSON."""

    model_config = ConfigDict(extra="forbid")


class DrainBody(BaseModel):
    """``restart``: replace the worker's process once it holds nothing."""

    model_config = ConfigDict(extra="forbid")

    restart: bool = False


def workers_router(edge: Edge) -> APIRouter:
    router = APIRouter(tags=["Workers"], prefix="/cluster/workers/{worker}")
    gateway = edge.gateway
    max_bytes = edge.settings.max_body_bytes

    @router.post("/role", **json_route(RoleBody, None, 403, 409))
    async def role(worker: str, request: Request) -> dict[str, Any]:
        """Put a worker into another pool. It takes effect at the next routing decision; what runs
        there finishes. 404 for an unknown worker, 409 if its role epoch is not the given one."""
        body = await read_body(request, RoleBody, max_bytes)
        asked = ChangeRole(
            command=0, worker=WorkerId(worker), role=body.role, expected_epoch=body.epoch
        )
        return {"worker": worker, "role": body.role, "detail": await gateway.command(asked)}

    @router.post("/drain", **json_route(DrainBody, None, 403, 409))
    async def drain(worker: str, request: Request) -> dict[str, Any]:
        """Send a worker nothing new. Answers when no request, lease or unsent KV is left there."""
        body = await read_body(request, DrainBody, max_bytes)
        asked = DrainOne(command=0, worker=WorkerId(worker), restart=body.restart)
        return {"worker": worker, "detail": await gateway.command(asked)}

    @router.post("/undrain", **json_route(EmptyBody, None, 403, 409))
    async def undrain(worker: str, request: Request) -> dict[str, Any]:
        """Let a drained worker take work again."""
        await read_body(request, EmptyBody, max_bytes)
        asked = UndrainOne(command=0, worker=WorkerId(worker))
        return {"worker": worker, "detail": await gateway.command(asked)}

    return router
