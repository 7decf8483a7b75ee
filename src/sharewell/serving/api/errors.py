"""Errors in OpenAI's schema: ``{"error": {"message", "type", "param", "code"}}``."""

from __future__ import annotations

import logging
import re
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from pydantic import BaseModel
from starlette.exceptions import HTTPException

from ..core.process import Draining, EngineFailed, QueueFull, Refused

log = logging.getLogger(__name__)

_TYPES = {
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    429: "rate_limit_error",
}


class ErrorDetail(BaseModel):
    message: str
    type: str
    param: str | None = None
    code: str | None = None


class ErrorBody(BaseModel):
    """The body of every error answer."""

    error: ErrorDetail


class ApiError(Exception):
    """An answer with ``status`` and OpenAI's error body."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        retry_after_s: float | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.message, self.param, self.code = status, message, param, code
        self.retry_after_s = retry_after_s

    def body(self) -> dict[str, Any]:
        kind = _TYPES.get(self.status) or ("invalid_request_error" if self.status < 500 else "server_error")
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}

    def response(self) -> JSONResponse:
        headers = {}
        if self.retry_after_s is not None:
            headers["Retry-After"] = str(max(1, round(self.retry_after_s)))
        if self.status == 401:
            headers["WWW-Authenticate"] = "Bearer"
        return JSONResponse(self.body(), self.status, headers)


def from_engine(error: Exception, *, prompt: str = "messages", grammar: str | None = None) -> ApiError:
    """What an engine's refusal means to a client. Errors that are not the engine's own are raised again.

    ``prompt`` and ``grammar`` name the request's fields that hold the prompt and the constraint.
    """
    if isinstance(error, QueueFull):
        return ApiError(429, "the server is busy: " + str(error), code="queue_full", retry_after_s=2)
    if isinstance(error, Draining):
        return ApiError(503, str(error), code="draining", retry_after_s=5)
    if isinstance(error, EngineFailed):
        return ApiError(503, str(error), code="engine_unavailable", retry_after_s=10)
    if isinstance(error, Refused):
        params = {
            "context_length_exceeded": prompt,
            "invalid_prompt": prompt,
            "invalid_grammar": grammar,
            "model_not_found": "model",
        }
        status = 404 if error.code == "model_not_found" else 400
        return ApiError(status, str(error), code=error.code, param=params.get(error.code))
    raise error


def from_failure(code: str | None) -> ApiError:
    """What it means to a client that the engine ended an answer with error ``code``."""
    if code == "grammar_error":
        return ApiError(400, "no token can continue an answer that the given schema allows", code=code)
    if code in ("engine_lost", "engine_closed"):
        return ApiError(503, "the engine stopped and could not go on with this answer", code=code)
    return ApiError(500, f"generation failed: {code}", code=code)


_FIELD = re.compile(r"[a-z_][A-Za-z0-9_]*|\d+")
_NOT_FIELDS = frozenset(
    {"body", "query", "path", "str", "int", "float", "bool"}
)  # the rest are union branches


def _place(location: tuple[Any, ...]) -> str | None:
    parts = [str(p) for p in location if _FIELD.fullmatch(str(p)) and p not in _NOT_FIELDS]
    return ".".join(parts) or None


def _nearest(problems: list[Any]) -> Any:
    """Of the complaints about one field, the one that got furthest: a union lists those of all its forms."""
    top = [p for p in problems if p["loc"][:2] == problems[0]["loc"][:2]]
    return max(top, key=lambda p: len(p["loc"]))


def install(app: FastAPI) -> None:
    """Answer the API's own errors and the framework's in one form. Bugs stay 500."""

    async def api_error(request: Request, error: Exception) -> JSONResponse:
        assert isinstance(error, ApiError)
        return error.response()

    async def invalid(request: Request, error: Exception) -> JSONResponse:
        assert isinstance(error, RequestValidationError)
        problem = _nearest(list(error.errors()))
        if problem["type"] == "json_invalid":
            why = problem.get("ctx", {}).get("error", "")
            return ApiError(400, f"the body is not valid JSON: {why}", code="invalid_json").response()
        if isinstance(error.body, bytes) and error.body and problem["loc"] == ("body",):
            message = "the body must be JSON, sent with Content-Type: application/json"
            return ApiError(400, message, code="invalid_json").response()
        place = _place(problem["loc"])
        message = f"{place}: {problem['msg']}" if place else f"body: {problem['msg']}"
        return ApiError(400, message, param=place, code="invalid_value").response()

    async def http_error(request: Request, error: Exception) -> JSONResponse:
        assert isinstance(error, HTTPException)
        code = "not_found" if error.status_code == 404 else None
        message = f"{error.detail}: {request.method} {request.url.path}"
        answer = ApiError(error.status_code, message, code=code).response()
        answer.headers.update(error.headers or {})
        return answer

    async def bug(request: Request, error: Exception) -> JSONResponse:
        log.error("unexpected error at %s %s", request.method, request.url.path, exc_info=error)
        return ApiError(500, "internal error", code="internal_error").response()

    app.add_exception_handler(ApiError, api_error)
    app.add_exception_handler(RequestValidationError, invalid)
    app.add_exception_handler(HTTPException, http_error)
    app.add_exception_handler(Exception, bug)
