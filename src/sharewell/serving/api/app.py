"""The FastAPI application, and the uvicorn server that drains on SIGTERM."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import resource
from collections.abc import AsyncIterator
from typing import Any

import uvicorn
from fastapi import FastAPI, Request
from fastapi.middleware.cors import CORSMiddleware
from starlette.responses import Response

from ... import __version__
from ...simulation import WallClock
from . import chat, completions, embeddings, responses, service_routes
from .config import ServerConfig
from .errors import ErrorBody, install
from .limits import BodyLimit
from .service import Service

log = logging.getLogger(__name__)
_ERRORS: dict[int | str, dict[str, Any]] = {
    status: {"model": ErrorBody, "description": text}
    for status, text in {
        400: "The request is not valid; the error names the field",
        401: "A valid API key is needed",
        404: "No such model, response or path",
        408: "The body did not arrive in time",
        413: "The body is too large",
        422: "Not used; invalid fields are 400",
        429: "The server is busy or a budget is used up",
        500: "Generation failed",
        503: "Shutting down or restarting",
    }.items()
}


class NotReady(RuntimeError):
    """The server may not start as configured; the message says what to do."""


def create_app(config: ServerConfig) -> FastAPI:
    """The application; its lifespan starts and stops the engine. Raises NotReady when it would be open to everyone."""
    service = Service(config, WallClock())
    if not config.loopback and not service.store.any_key:
        raise NotReady(
            f"host {config.host} can be reached from other machines and no API key exists:"
            " create one with `sharewell keys add NAME`, or serve 127.0.0.1"
        )

    @contextlib.asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        await service.start()
        try:
            yield
        finally:
            await service.stop()

    app = FastAPI(
        title="Sharewell",
        version=__version__,
        lifespan=lifespan,
        responses=_ERRORS,
        docs_url=None,  # the interactive pages load scripts from elsewhere; the server works offline
        redoc_url=None,
    )
    app.state.service = service
    install(app)
    for module in (chat, completions, responses, embeddings, service_routes):
        app.include_router(module.router)

    @app.middleware("http")
    async def count(request: Request, call_next: Any) -> Response:
        answer = await call_next(request)
        route = request.scope.get("route")
        service.metrics.requests.labels(getattr(route, "path", "other"), str(answer.status_code)).inc()
        return answer

    app.add_middleware(BodyLimit, max_bytes=config.max_body_bytes, timeout_s=config.body_timeout_s)
    if config.cors_origins:
        app.add_middleware(
            CORSMiddleware, allow_origins=list(config.cors_origins), allow_methods=["*"], allow_headers=["*"]
        )
    return app


class Server(uvicorn.Server):
    """Uvicorn that tells the service to refuse new work as soon as a stop is asked for, and closes idle half-open connections."""

    def __init__(self, config: uvicorn.Config, service: Service) -> None:
        super().__init__(config)
        self._service = service
        self._seen: dict[Any, int] = {}

    def handle_exit(self, sig: int, frame: Any) -> None:
        self._service.draining = True
        super().handle_exit(sig, frame)

    async def on_tick(self, counter: int) -> bool:
        if counter % 10 == 0:
            self._close_silent(counter)
        return await super().on_tick(counter)

    def _close_silent(self, counter: int) -> None:
        """Close connections on which no complete request head has arrived for ``body_timeout_s``."""
        limit = 10 * self._service.config.body_timeout_s
        connections = self.server_state.connections
        self._seen = {c: self._seen.get(c, counter) for c in connections if getattr(c, "cycle", None) is None}
        for connection, since in self._seen.items():
            if counter - since > limit and connection.transport is not None:
                connection.transport.close()


def run(config: ServerConfig) -> None:
    """Serve until SIGTERM or SIGINT, then finish what is under way. Raises NotReady, EngineFailed or ModelError."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    with contextlib.suppress(ValueError, OSError):
        resource.setrlimit(resource.RLIMIT_NOFILE, (min(hard, 65536), hard))
    app = create_app(config)
    settings = uvicorn.Config(
        app,
        host=config.host,
        port=config.port,
        loop="uvloop",
        http="httptools",
        access_log=False,
        log_level="warning",
        lifespan="on",
        limit_concurrency=config.max_connections,
        timeout_keep_alive=int(config.keep_alive_s),
        timeout_graceful_shutdown=int(config.drain_timeout_s) + 1,
        h11_max_incomplete_event_size=64 << 10,
    )
    server = Server(settings, app.state.service)
    asyncio.run(_serve(server, config))


async def _serve(server: Server, config: ServerConfig) -> None:
    async def announce() -> None:
        while not server.started:
            if server.should_exit:
                return
            await asyncio.sleep(0.05)
        info = server._service.engine.info
        port = server.servers[0].sockets[0].getsockname()[1]
        log.warning(
            "serving %s (%s, %s runner, %d threads, context %d) at http://%s:%d  -  the page is at /, the API at /v1",
            config.names[0], info.dtype, info.runner, info.threads, info.context_length, config.host, port,
        )  # fmt: skip

    task = asyncio.create_task(announce())
    await server.serve()
    task.cancel()
