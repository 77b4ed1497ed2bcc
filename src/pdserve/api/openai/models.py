"""``GET /v1/models``: the one model that is served."""

from __future__ import annotations

from typing import Literal

from fastapi import APIRouter
from pydantic import BaseModel

from pdserve.api.documentation import may_answer
from pdserve.api.edge import Edge
from pdserve.api.gateway import ModelCard
from pdserve.api.openai.requests import check_model


class Model(BaseModel):
    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: str = "pdserve"
    root: str
    parent: None = None
    max_model_len: int


class ModelList(BaseModel):
    object: Literal["list"] = "list"
    data: list[Model]


def models_router(edge: Edge) -> APIRouter:
    router = APIRouter(tags=["OpenAI"])

    @router.get("/v1/models")
    async def list_models() -> ModelList:
        """The served model."""
        return ModelList(data=[_model(edge.gateway.card)])

    @router.get("/v1/models/{model:path}", **may_answer(401, 404))
    async def retrieve_model(model: str) -> Model:
        """The served model, if this is its name."""
        check_model(model, edge.gateway.card)
        return _model(edge.gateway.card)

    return router


def _model(card: ModelCard) -> Model:
    return Model(
        id=card.name, created=card.created, root=card.name, max_model_len=card.max_model_tokens
    )
