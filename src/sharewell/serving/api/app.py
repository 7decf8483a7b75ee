"""The FastAPI application: endpoints, what stands in front of them, and its OpenAPI document."""

from __future__ import annotations

from typing import Any

from fastapi import FastAPI
from fastapi.middleware.cors import CORSMiddleware

from ... import __version__
from ...simulation import Clock, WallClock
from . import chat, completions, embeddings, relay_routes, responses, service_routes
from .config import ServerConfig
from .errors import ErrorBody, install
from .limits import Gate
from .metrics import CountAnswers
from .service import Service

_ERRORS: dict[int | str, dict[str, Any]] = {
    status: {"model": ErrorBody, "description": text}
    for status, text in {
        400: "The request is not valid; the error names the field",
        401: "A valid API key is needed",
        404: "No such model, response or path",
        405: "The path does not take this method",
        408: "The body did not arrive in time",
        413: "The body is too large",
        429: "The server is busy or a budget is used up; Retry-After says when to come back",
        500: "Generation failed",
        503: "Shutting down, restarting or overloaded",
    }.items()
}


class NotReady(ValueError):
    """The server may not start as configured; the message says what to do."""


def create_app(config: ServerConfig, clock: Clock | None = None) -> FastAPI:
    """The application with its :class:`Service` as ``app.state.service``, which is not started yet.

    Raises NotReady when it would be open to everyone, ModelError for a model that cannot be read.
    """
    service = Service(config, clock or WallClock())
    if not config.loopback and not service.store.any_key:
        service.store.close()
        raise NotReady(
            f"host {config.host} can be reached from other machines and no API key exists:"
            " create one with `sharewell keys add NAME`, or serve 127.0.0.1"
        )
    app = FastAPI(
        title="Sharewell",
        version=__version__,
        responses=_ERRORS,
        docs_url=None,  # the interactive pages load scripts from elsewhere; the server works offline
        redoc_url=None,
    )
    app.state.service = service
    install(app)
    for module in (chat, completions, responses, embeddings, relay_routes, service_routes):
        app.include_router(module.router)
    _describe(app)
    # The last that is added is the first that a request meets.
    app.add_middleware(Gate, config=config, find_key=service.find_key, draining=lambda: service.draining)
    app.add_middleware(CountAnswers, metrics=service.metrics)
    if config.cors_origins:
        app.add_middleware(
            CORSMiddleware,
            allow_origins=list(config.cors_origins),
            allow_methods=["*"],
            allow_headers=["*"],
            expose_headers=["Retry-After"],
        )
    return app


def _describe(app: FastAPI) -> None:
    """Take out of the OpenAPI document what this server never answers: a 422."""
    original = app.openapi

    def openapi() -> dict[str, Any]:
        document = original()
        for path in document["paths"].values():
            for operation in path.values():
                operation["responses"].pop("422", None)
        return document

    app.openapi = openapi  # type: ignore[method-assign]
