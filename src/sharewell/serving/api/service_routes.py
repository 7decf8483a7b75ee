"""The small endpoints: models, tokenize, detokenize, health, metrics, stats, and the page."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import FileResponse, JSONResponse, Response

from ...models import TemplateError
from .chat import plain_messages
from .embeddings import embedding_names
from .errors import ApiError
from .schemas import DetokenizeRequest, TokenizeRequest
from .service import Service

router = APIRouter()
PAGE = Path(__file__).parent / "page"
PAGE_HEADERS = {
    "Content-Security-Policy": "default-src 'self'; base-uri 'none'; frame-ancestors 'none'; form-action 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-cache",
}


def _service(request: Request) -> Service:
    return request.app.state.service


def _model(service: Service, name: str) -> dict[str, Any]:
    info = service.engine.info
    entry: dict[str, Any] = {
        "id": name,
        "object": "model",
        "created": service.started_unix,
        "owned_by": "sharewell",
    }
    if name not in embedding_names(service):
        base, _, adapter = name.partition(":")
        entry |= {
            "max_model_len": info.context_length,
            "dtype": info.dtype,
            "parent": base if adapter else None,
        }
    return entry


@router.get("/v1/models")
async def list_models(request: Request) -> Response:
    """Every name that requests may use."""
    service = _service(request)
    service.authorize(request.headers.get("authorization"), spend=False)
    names = [*service.model_names(), *embedding_names(service)[:1]]
    return JSONResponse({"object": "list", "data": [_model(service, n) for n in names]})


@router.get("/v1/models/{model_id:path}")
async def get_model(request: Request, model_id: str) -> Response:
    """One of them."""
    service = _service(request)
    service.authorize(request.headers.get("authorization"), spend=False)
    if model_id not in embedding_names(service):
        service.resolve(model_id)
    return JSONResponse(_model(service, model_id))


@router.post("/tokenize")
async def tokenize(request: Request, body: TokenizeRequest) -> Response:
    """Token ids of a prompt, or of messages through the chat template."""
    service = _service(request)
    service.authorize(request.headers.get("authorization"), spend=False)
    if (body.prompt is None) == (body.messages is None):
        raise ApiError(400, "give either prompt or messages", param="prompt")
    text = body.prompt
    if body.messages is not None:
        try:
            text = service.template.render(
                plain_messages(body.messages), add_generation_prompt=body.add_generation_prompt
            )
        except TemplateError as error:
            raise ApiError(400, str(error), param="messages") from None
    ids = await service.encode(text or "")
    return JSONResponse(
        {"count": len(ids), "max_model_len": service.engine.info.context_length, "tokens": ids}
    )


@router.post("/detokenize")
async def detokenize(request: Request, body: DetokenizeRequest) -> Response:
    """Text of token ids, special tokens included."""
    service = _service(request)
    service.authorize(request.headers.get("authorization"), spend=False)
    bad = next((t for t in body.tokens if t >= service.tokenizer.vocab_size), None)
    if bad is not None:
        raise ApiError(400, f"tokens must be below {service.tokenizer.vocab_size}, got {bad}", param="tokens")
    return JSONResponse({"prompt": service.tokenizer.decode(body.tokens, skip_special_tokens=False)})


@router.get("/health")
async def health(request: Request) -> Response:
    """200 when requests are taken, 503 while draining."""
    service = _service(request)
    if service.draining:
        raise ApiError(503, "the server is shutting down", code="draining", retry_after_s=5)
    return JSONResponse({"status": "ok"})


@router.get("/metrics")
async def metrics(request: Request) -> Response:
    """Prometheus text."""
    service = _service(request)
    service.authorize(request.headers.get("authorization"), spend=False)
    text = service.metrics.exposition(await service.engine.stats())
    return Response(text, media_type="text/plain; version=0.0.4")


@router.get("/stats")
async def stats(request: Request) -> Response:
    """What the page shows."""
    service = _service(request)
    service.authorize(request.headers.get("authorization"), spend=False)
    return JSONResponse(await service.stats())


@router.get("/", include_in_schema=False)
async def index() -> Response:
    """The page."""
    return FileResponse(PAGE / "index.html", headers=PAGE_HEADERS)


@router.get("/page/{name}", include_in_schema=False)
async def page_file(name: str) -> Response:
    """Its files."""
    known = {p.name for p in PAGE.iterdir() if p.is_file()}
    if name not in known:
        raise ApiError(404, f"there is no {name!r}", code="not_found")
    return FileResponse(PAGE / name, headers=PAGE_HEADERS)
