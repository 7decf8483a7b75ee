"""What a client may ask of the server before any endpoint sees the request: a key, a body bounded in size and
time."""

from __future__ import annotations

import asyncio
import re
from collections.abc import Callable
from typing import Any

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from .config import ServerConfig
from .errors import ApiError
from .keys import ApiKey

_PUBLIC = re.compile(r"/(page/.*|health|openapi\.json)?")


class Gate:
    """ASGI middleware in front of every endpoint.

    In this order: 503 above ``max_connections`` or while draining; 401 without a key where one is needed; 413
    for a body above ``max_body_bytes``; 503 when all bodies that are arriving together exceed
    ``max_buffered_bytes``; 408 for a body that is not there after ``body_timeout_s``. A body is read whole
    here, so endpoints never wait for one. The caller's key is ``scope["sharewell.key"]``.
    """

    def __init__(
        self,
        app: ASGIApp,
        config: ServerConfig,
        find_key: Callable[[str | None], ApiKey],
        draining: Callable[[], bool],
    ) -> None:
        self.app, self.config, self._find_key, self._draining = app, config, find_key, draining
        self._buffered = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        held = 0
        has_body = scope["method"] not in ("GET", "HEAD", "OPTIONS")
        try:
            try:
                self._admit(scope)
                if has_body:
                    body = await self._body(scope, receive)
                    if body is None:
                        return  # the client went away
                    held = len(body)
                    receive = _replay(body, receive)
                    del body
            except ApiError as error:
                answer = error.response()
                if has_body:
                    # What is left of the body must not be read as a request.
                    answer.headers["Connection"] = "close"
                await answer(scope, receive, send)
                return
            await self.app(scope, receive, send)
        finally:
            self._buffered -= held

    def _admit(self, scope: Scope) -> None:
        if scope.get("sharewell.overloaded"):
            raise ApiError(503, "too many connections", code="overloaded", retry_after_s=2)
        if self._draining() and scope["method"] == "POST":
            raise ApiError(503, "the server is shutting down", code="draining", retry_after_s=5)
        if scope["method"] != "OPTIONS" and not _PUBLIC.fullmatch(scope["path"]):
            header = next((v for k, v in scope["headers"] if k == b"authorization"), None)
            scope["sharewell.key"] = self._find_key(header.decode("latin-1") if header is not None else None)

    async def _body(self, scope: Scope, receive: Receive) -> bytes | None:
        """The body, counted in ``_buffered``; None when the client went away. Raises ApiError 408, 413 or
        503."""
        limit = self.config.max_body_bytes
        declared = next((v for k, v in scope["headers"] if k == b"content-length"), b"")
        size = int(declared) if declared.isdigit() else 0
        try:
            async with asyncio.timeout(self.config.body_timeout_s):
                if size > limit:
                    if not _expects_continue(scope):
                        # A client that is still sending would see a reset connection instead of the answer.
                        await _discard(receive, 4 * limit)
                    raise _too_large(f"the body has {size} bytes", limit)
                return await self._read(receive, limit)
        except TimeoutError:
            message = f"the body did not arrive within {self.config.body_timeout_s:g} s"
            raise ApiError(408, message, code="body_timeout") from None

    async def _read(self, receive: Receive, limit: int) -> bytes | None:
        parts: list[bytes] = []
        size = 0
        done = False
        try:
            while True:
                message = await receive()
                if message["type"] != "http.request":
                    return None
                part = message.get("body", b"")
                size += len(part)
                self._buffered += len(part)
                if size > limit:
                    parts.clear()
                    if message.get("more_body"):
                        await _discard(receive, 4 * limit)
                    raise _too_large(f"the body has more than {limit} bytes", limit)
                if self._buffered > self.config.max_buffered_bytes:
                    raise ApiError(503, "too many large bodies at once", code="overloaded", retry_after_s=2)
                parts.append(part)
                if not message.get("more_body"):
                    done = True
                    return b"".join(parts)
        finally:
            if not done:
                self._buffered -= size


def _too_large(what: str, limit: int) -> ApiError:
    return ApiError(413, f"{what}; at most {limit} are taken", code="body_too_large")


def _expects_continue(scope: Scope) -> bool:
    return any(k == b"expect" and v.lower() == b"100-continue" for k, v in scope["headers"])


async def _discard(receive: Receive, most: int) -> None:
    """Read and forget up to ``most`` bytes of a body."""
    while most > 0:
        message = await receive()
        if message["type"] != "http.request" or not message.get("more_body"):
            return
        most -= len(message.get("body", b""))


def _replay(body: bytes, receive: Receive) -> Receive:
    pending: list[Message] = [{"type": "http.request", "body": body, "more_body": False}]

    async def replay() -> Any:
        return pending.pop() if pending else await receive()

    return replay
