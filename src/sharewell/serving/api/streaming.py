"""Server-sent events, and noticing that a client has gone."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Awaitable, Callable
from typing import Any, TypeVar

import orjson
from fastapi import Request
from fastapi.responses import Response
from starlette.types import Receive, Scope, Send

from .errors import ApiError

T = TypeVar("T")
DONE = b"data: [DONE]\n\n"
EITHER: dict[int | str, dict[str, Any]] = {  # for the OpenAPI document of endpoints that may stream
    200: {"content": {"application/json": {}, "text/event-stream": {}}, "description": "The answer"}
}
_HEADERS = [
    (b"content-type", b"text/event-stream; charset=utf-8"),
    (b"cache-control", b"no-cache"),
    (b"x-accel-buffering", b"no"),
]


def event(value: Any, name: str | None = None) -> bytes:
    """One event with ``value`` as JSON."""
    head = b"event: " + name.encode() + b"\ndata: " if name else b"data: "
    return head + orjson.dumps(value) + b"\n\n"


async def stream(
    request: Request, events: AsyncGenerator[bytes], headers: Callable[[], dict[str, str]] = dict
) -> Response:
    """Answer with events. The first is awaited before the status is sent: a refusal is a plain error, and
    ``headers`` may tell what it found."""
    try:
        first = await unless_gone(request, anext(events, None))
    except BaseException:
        await events.aclose()
        raise
    answer = EventStream(events, first)
    answer.raw_headers += [(name.encode(), value.encode()) for name, value in headers().items()]
    return answer


class EventStream(Response):
    """Sends events as they come; ends, and with it the request in the engine, when the client goes away."""

    def __init__(self, events: AsyncGenerator[bytes], first: bytes | None) -> None:
        super().__init__(None, 200)
        self.raw_headers = list(_HEADERS)
        self._events, self._first = events, first

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        sender = asyncio.ensure_future(self._send_all(send))
        watch = asyncio.ensure_future(_disconnect(receive))
        try:
            await asyncio.wait({sender, watch}, return_when=asyncio.FIRST_COMPLETED)
            if sender.done():
                sender.result()
        finally:
            watch.cancel()
            if not sender.done():
                sender.cancel()
                await asyncio.wait({sender})
            await self._events.aclose()

    async def _send_all(self, send: Send) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
        try:
            if self._first is not None:
                await send({"type": "http.response.body", "body": self._first, "more_body": True})
            async for chunk in self._events:
                await send({"type": "http.response.body", "body": chunk, "more_body": True})
        except ApiError as error:
            last = event(error.body()) + DONE
            await send({"type": "http.response.body", "body": last, "more_body": True})
        await send({"type": "http.response.body", "body": b"", "more_body": False})


async def _disconnect(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


async def unless_gone(request: Request, work: Awaitable[T]) -> T:
    """The result of ``work``, which is cancelled as soon as the client disconnects (ApiError 499)."""
    task = asyncio.ensure_future(work)
    watch = asyncio.ensure_future(_disconnect(request.receive))
    try:
        await asyncio.wait({task, watch}, return_when=asyncio.FIRST_COMPLETED)
        if task.done():
            return task.result()
        raise ApiError(499, "the client closed the connection", code="client_closed")
    finally:
        watch.cancel()
        if not task.done():
            task.cancel()
            await asyncio.wait({task})
