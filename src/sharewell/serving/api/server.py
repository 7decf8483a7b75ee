"""The HTTP server: uvicorn with bounds on what a connection may do before it has sent a request, and a real
drain."""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import resource
import signal
import socket
from collections.abc import Callable
from typing import Any

import uvicorn
from fastapi import FastAPI
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol, RequestResponseCycle

from ..core.cores import pin
from .config import ServerConfig
from .errors import ApiError
from .service import Service

log = logging.getLogger(__name__)
MAX_HEAD_BYTES = 64 << 10
MAX_PIPELINED = 32


def _raw(status: str, error: ApiError) -> bytes:
    body = json.dumps(error.body()).encode()
    head = f"HTTP/1.1 {status}\r\ncontent-type: application/json\r\ncontent-length: {len(body)}\r\n"
    return head.encode() + b"connection: close\r\n\r\n" + body


_INVALID = _raw("400 Bad Request", ApiError(400, "this is not an HTTP request", code="invalid_http"))
_HEAD_TOO_LARGE = _raw(
    "431 Request Header Fields Too Large",
    ApiError(431, f"the request's head has more than {MAX_HEAD_BYTES} bytes", code="head_too_large"),
)


class BoundedHttpProtocol(HttpToolsProtocol):
    """A connection whose request heads are bounded in size and time.

    Uvicorn waits for a request's head as long as the client likes and keeps whatever arrives of it. Here a
    head must be complete ``head_timeout_s`` after the connection was made or its first byte came (so
    half-open and trickling connections end), within MAX_HEAD_BYTES. A client that takes none of its answer
    for ``write_timeout_s`` is cut off, and so is one that asks for more than MAX_PIPELINED answers ahead:
    uvicorn would read on after every answer, and keep all these requests.
    """

    head_timeout_s = 30.0
    write_timeout_s = 60.0
    max_connections = 1000

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._head_bytes = 0
        self._in_head = True
        self._head_timer: asyncio.TimerHandle | None = self.loop.call_later(
            self.head_timeout_s, self._head_late
        )
        self._write_timer: asyncio.TimerHandle | None = None
        self._answering: RequestResponseCycle | None = None
        if len(self.connections) > 2 * self.max_connections:
            self._abort()  # up to there the others are told, by the 503 of the gate

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop_timer()
        self._stop_write_timer()
        self._disconnect_cycles()
        super().connection_lost(exc)

    def _start_asgi_task(self, cycle: RequestResponseCycle, app: Any) -> None:
        self._answering = cycle  # ``self.cycle`` is the request that was read last
        super()._start_asgi_task(cycle, app)

    def _disconnect_cycles(self) -> None:
        """Let the endpoints see that the client has gone; uvicorn tells only the one of the last request."""
        for cycle in (self._answering, *(cycle for cycle, _ in self.pipeline)):
            if cycle is not None:
                cycle.disconnected = True
                cycle.message_event.set()
        self.pipeline.clear()

    def _abort(self) -> None:
        self._disconnect_cycles()
        self.transport.abort()

    def pause_writing(self) -> None:
        super().pause_writing()
        # close() would wait for the client to read what is buffered
        self._write_timer = self.loop.call_later(self.write_timeout_s, self._abort)

    def resume_writing(self) -> None:
        self._stop_write_timer()
        super().resume_writing()

    def _stop_write_timer(self) -> None:
        if self._write_timer is not None:
            self._write_timer.cancel()
            self._write_timer = None

    def data_received(self, data: bytes) -> None:
        if self._in_head:
            self._head_bytes += len(data)
        super().data_received(data)
        # One read may end a head and carry its body; a head that is still open after so many bytes is too
        # large.
        if self._in_head and self._head_bytes > MAX_HEAD_BYTES and not self.transport.is_closing():
            self._refuse(_HEAD_TOO_LARGE)

    def on_message_begin(self) -> None:
        if len(self.pipeline) >= MAX_PIPELINED:
            raise ValueError("too many requests ahead of their answers")  # ends the parsing
        super().on_message_begin()
        if not self._in_head:
            self._in_head, self._head_bytes = True, 0
            self._head_timer = self.loop.call_later(self.head_timeout_s, self._head_late)
        scope: Any = self.scope
        scope["sharewell.overloaded"] = len(self.connections) > self.max_connections

    def on_headers_complete(self) -> None:
        self._in_head = False
        self._stop_timer()
        super().on_headers_complete()

    def on_response_complete(self) -> None:
        super().on_response_complete()
        if self.pipeline and not self.transport.is_closing():
            self.flow.pause_reading()

    def send_400_response(self, msg: str) -> None:
        self._refuse(_INVALID)

    def _refuse(self, answer: bytes) -> None:
        answering = (
            self.cycle is not None and self.cycle.response_started and not self.cycle.response_complete
        )
        if not answering and not self.pipeline:
            self.transport.write(answer)
            self.transport.close()
        else:
            self._abort()  # in the middle of another answer this one would be nonsense

    def _stop_timer(self) -> None:
        if self._head_timer is not None:
            self._head_timer.cancel()
            self._head_timer = None

    def _head_late(self) -> None:
        self._head_timer = None
        if self.transport is not None and not self.transport.is_closing():
            self.transport.close()


def bounded_protocol(config: ServerConfig) -> type[BoundedHttpProtocol]:
    """The protocol with the bounds of ``config``."""
    bounds = {
        "head_timeout_s": config.body_timeout_s,
        "write_timeout_s": config.write_timeout_s,
        "max_connections": config.max_connections,
    }
    return type("BoundedHttpProtocol", (BoundedHttpProtocol,), bounds)


class Server(uvicorn.Server):
    """Uvicorn that drains: on the first SIGTERM or SIGINT new requests get 503 while those under way are
    finished, for at most ``drain_timeout_s``; then it closes. A second signal ends it at once. The exit code
    is 0 either way."""

    def __init__(self, config: uvicorn.Config, service: Service) -> None:
        super().__init__(config)
        self._service = service
        self._drain_until: float | None = None

    def handle_exit(self, sig: int, frame: Any) -> None:
        if self._drain_until is not None or not self.started:
            self.should_exit = self.force_exit = True
            return
        log.warning("%s: finishing what is under way; again to end at once", signal.Signals(sig).name)
        self._service.draining = True
        clock = self._service.clock
        self._drain_until = clock.monotonic() + self._service.config.drain_timeout_s

    async def on_tick(self, counter: int) -> bool:
        if self._drain_until is not None:
            busy = any(c.cycle is not None and not c.cycle.response_complete for c in self._connections())
            if not busy:
                self.should_exit = True
            elif self._service.clock.monotonic() > self._drain_until:
                log.warning("%d requests are not finished: ending them", self._service.engine.live)
                self._service.engine.abandon()  # their streams end with an error, which uvicorn still sends
                self.should_exit = True
        return await super().on_tick(counter)

    def _connections(self) -> list[BoundedHttpProtocol]:
        return [c for c in self.server_state.connections if isinstance(c, BoundedHttpProtocol)]


def bind(config: ServerConfig) -> socket.socket:
    """The listening socket. Raises ValueError naming host or port when the address cannot be had."""
    family = socket.AF_INET6 if ":" in config.host else socket.AF_INET
    listener = socket.socket(family, socket.SOCK_STREAM)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((config.host, config.port))
    except OSError as error:
        listener.close()
        raise ValueError(
            f"cannot listen on {config.host} port {config.port}: {error.strerror or error};"
            " try another --port"
        ) from None
    return listener


def run(
    config: ServerConfig, app: FastAPI, listener: socket.socket, announce: Callable[[str], None] = log.info
) -> None:
    """Serve ``app`` until SIGTERM or SIGINT, then finish what is under way. Raises EngineFailed or
    ModelError.

    ``announce`` gets one line, with the address, when requests are taken.
    """
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    with contextlib.suppress(ValueError, OSError):  # half-open connections take a descriptor each
        resource.setrlimit(resource.RLIMIT_NOFILE, (min(hard, 65536), hard))
    service: Service = app.state.service
    settings = uvicorn.Config(
        app,
        loop="uvloop",
        http=bounded_protocol(config),
        ws="none",
        access_log=False,
        log_level="warning",
        lifespan="off",
        server_header=False,
        backlog=2048,
        timeout_keep_alive=max(1, round(config.keep_alive_s)),
        timeout_graceful_shutdown=2,  # what was under way has been waited for by then
    )
    factory = settings.get_loop_factory()
    with asyncio.Runner(loop_factory=factory) as runner:
        runner.run(_serve(Server(settings, service), service, listener, announce))


async def _serve(
    server: Server, service: Service, listener: socket.socket, announce: Callable[[str], None]
) -> None:
    await service.start()
    pin(service.engine.budget.api)
    try:
        info, config = service.engine.info, service.config
        host = f"[{config.host}]" if ":" in config.host else config.host
        listener.listen(2048)
        address = f"http://{host}:{listener.getsockname()[1]}"
        announce(
            f"serving {config.names[0]} ({info.dtype}, {info.runner} runner, {info.threads} threads, context"
            f" {info.context_length}) at {address} - the page is at /, the API at /v1"
        )
        await server.serve(sockets=[listener])
    finally:
        await service.stop(0)
