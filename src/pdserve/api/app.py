"""Putting the edge together."""

from __future__ import annotations

from fastapi import FastAPI
from starlette.middleware.cors import CORSMiddleware

import pdserve
from pdserve.api import documentation, errors
from pdserve.api.allowances import RATE_LIMIT_HEADERS
from pdserve.api.constraint_check import ConstraintCheck
from pdserve.api.edge import Edge
from pdserve.api.faults import HoldBody, LinksBody, faults_router
from pdserve.api.gateway import Gateway
from pdserve.api.key_check import KeyCheck
from pdserve.api.keys import KeyStore, key_store
from pdserve.api.middleware import REQUEST_ID_HEADER, EdgeMiddleware
from pdserve.api.openai.chat import chat_router
from pdserve.api.openai.completions import completions_router
from pdserve.api.openai.models import models_router
from pdserve.api.openai.responses_body import ResponsesBody
from pdserve.api.openai.responses_route import responses_router
from pdserve.api.openai.schema import ChatBody, CompletionBody
from pdserve.api.operations import operations_router
from pdserve.api.request_ids import RequestDirectory
from pdserve.api.settings import ApiSettings
from pdserve.api.time_limits import TimeLimits
from pdserve.api.tokenization import DetokenizeBody, TokenizeBody, tokenization_router
from pdserve.api.workers import DrainBody, EmptyBody, RoleBody, workers_router
from pdserve.obs.key_metrics import KeyMetrics
from pdserve.text.chat import ChatTemplate
from pdserve.text.tokenizer import Tokenizer


def create_app(
    gateway: Gateway,
    tokenizer: Tokenizer,
    chat_template: ChatTemplate,
    settings: ApiSettings,
    keys: KeyStore | None = None,
) -> FastAPI:
    """The ASGI application in front of ``gateway``. Owns nothing that needs closing.

    ``keys`` are those of the settings, if they have been read already. Raises `ConfigError` if they
    cannot be.
    """
    keys = keys or key_store(settings)
    key_metrics = KeyMetrics()
    edge = Edge(
        gateway=gateway,
        tokenizer=tokenizer,
        chat_template=chat_template,
        settings=settings,
        directory=RequestDirectory(settings.num_remembered_ids),
        check_constraint=ConstraintCheck(tokenizer, gateway.card),
        keys=keys,
        key_metrics=key_metrics,
    )
    app = FastAPI(
        title="pdserve",
        version=pdserve.__version__,
        description="Large language models, prefill and decode on different servers.",
    )
    for make_router in (
        completions_router,
        chat_router,
        responses_router,
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
            *(CompletionBody, ChatBody, ResponsesBody, TokenizeBody, DetokenizeBody),
            *(RoleBody, DrainBody, EmptyBody, LinksBody, HoldBody),
        ),
    )
    errors.install(app)
    _surround(app, settings, keys, key_metrics)
    return app


def _surround(app: FastAPI, settings: ApiSettings, keys: KeyStore, key_metrics: KeyMetrics) -> None:
    """From the inside out: the last one added is the outermost."""
    if keys:
        app.add_middleware(KeyCheck, keys=keys, metrics=key_metrics)
    app.add_middleware(
        TimeLimits, read_s=settings.read_timeout_s, request_s=settings.request_timeout_s
    )
    app.add_middleware(EdgeMiddleware)
    if settings.cors_origins:
        app.add_middleware(
            CORSMiddleware,
            allow_origins=settings.cors_origins,
            allow_methods=("GET", "POST"),
            allow_headers=("*",),
            expose_headers=(REQUEST_ID_HEADER, "Retry-After", *RATE_LIMIT_HEADERS),
        )
