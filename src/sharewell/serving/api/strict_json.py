"""JSON as RFC 8259 has it: no NaN, no lone surrogates, UTF-8 only, bounded nesting; and answers as JSON.

Python's own parser takes all of these, and each of them fails later, where it is nobody's mistake any more.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Coroutine
from typing import Any

import orjson
from fastapi import Request, Response
from fastapi.routing import APIRoute

MAX_DEPTH = 100  # of brackets; templates, validators and the grammar compiler recurse


class StrictRequest(Request):
    """A request whose JSON is parsed strictly."""

    async def json(self) -> Any:
        """The body. Raises json.JSONDecodeError, also for what is nested deeper than MAX_DEPTH."""
        body = await self.body()
        value = orjson.loads(body)
        if body.count(b"[") + body.count(b"{") > MAX_DEPTH and _too_deep(value):
            raise json.JSONDecodeError(f"more than {MAX_DEPTH} levels of nesting", "", 0)
        return value


def _too_deep(value: Any) -> bool:
    level = [value] if isinstance(value, dict | list) else []
    for _ in range(MAX_DEPTH):
        children = [c for v in level for c in (v.values() if isinstance(v, dict) else v)]
        level = [c for c in children if isinstance(c, dict | list)]
        if not level:
            return False
    return True


class StrictRoute(APIRoute):
    """A route that reads its body as a :class:`StrictRequest`."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        handle = super().get_route_handler()

        async def strict(request: Request) -> Response:
            return await handle(StrictRequest(request.scope, request.receive))

        return strict


class JsonResponse(Response):
    """An answer as JSON; numpy arrays are lists, float32 in as few digits as give it back exactly."""

    media_type = "application/json"

    def render(self, content: Any) -> bytes:
        return orjson.dumps(content, option=orjson.OPT_SERIALIZE_NUMPY)
