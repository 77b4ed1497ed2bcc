"""Putting the edge together."""

from __future__ import annotations

from fastapi import FastAPI

import pdserve
from pdserve.api import documentation, errors
from pdserve.api.callers import KeyRing
from pdserve.api.edge import Edge
from pdserve.api.faults import HoldBody, LinksBody, faults_router
from pdserve.api.gateway import Gateway
from pdserve.api.middleware import BearerMiddleware, EdgeMiddleware
from pdserve.api.openai.chat import chat_router
from pdserve.api.openai.completions import completions_router
from pdserve.api.openai.models import models_router
from pdserve.api.openai.schema import ChatBody, CompletionBody
from pdserve.api.operations import operations_router
from pdserve.api.request_ids import RequestDirectory
from pdserve.api.settings import ApiSettings
from pdserve.api.tokenization import DetokenizeBody, TokenizeBody, tokenization_router
from pdserve.api.workers import DrainBody, RoleBody, workers_router
from pdserve.text.chat import ChatTemplate
from pdserve.text.tokenizer import Tokenizer


def create_app(
    gateway: Gateway,
    tokenizer: Tokenizer,
    chat_template: ChatTemplate,
    settings: ApiSettings,
) -> FastAPI:
    """The ASGI application in front of ``gateway``. Owns nothing that needs closing."""
    edge = Edge(
        gateway=gateway,
        tokenizer=tokenizer,
        chat_template=chat_template,
        settings=settings,
        directory=RequestDirectory(settings.num_remembered_ids),
    )
    app = FastAPI(
        title="pdserve",
        version=pdserve.__version__,
        description="Large language models, prefill and decode on different servers.",
    )
    for make_router in (
        completions_router,
        chat_router,
        models_router,
        tokenization_router,
        operations_router,
        workers_router,
        faults_router,
    ):
        app.include_router(make_router(edge))
    documentation.publish(
        app,
        (
            *(CompletionBody, ChatBody, TokenizeBody, DetokenizeBody),
            *(RoleBody, DrainBody, LinksBody, HoldBody),
        ),
    )
    errors.install(app)
    keys = KeyRing(settings.api_key, settings.class_of_key)
    if keys:
        app.add_middleware(BearerMiddleware, keys=keys)
    app.add_middleware(EdgeMiddleware)  # the last one added is the outermost
    return app
