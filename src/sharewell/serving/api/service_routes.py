"""The small endpoints: models, tokenize, detokenize, health, metrics, stats, and the page."""

from __future__ import annotations

from ipaddress import ip_address
from pathlib import Path
from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import FileResponse, PlainTextResponse, Response

from ...semantic_cache import AUDIT_PATH, NONCE_HEADER, AuditRefused, grant
from .embeddings import embedding_names
from .errors import ApiError
from .prompts import chat_prompt
from .schemas import DetokenizeRequest, TokenizeRequest
from .service import Service
from .strict_json import JsonResponse, StrictRoute

router = APIRouter(route_class=StrictRoute)
PAGE = Path(__file__).parent / "page"
PAGE_HEADERS = {
    "Content-Security-Policy": (
        "default-src 'self'; base-uri 'none'; frame-ancestors 'none'; form-action 'none'"
    ),
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-cache",
}


def _service(request: Request) -> Service:
    return request.app.state.service


def _model(service: Service, name: str) -> dict[str, Any]:
    entry: dict[str, Any] = {
        "id": name,
        "object": "model",
        "created": service.started_unix,
        "owned_by": "sharewell",
    }
    if name not in embedding_names(service):
        info = service.engine.info
        base = name.rpartition(":")[0] if service.resolve(name) is not None else None
        entry |= {"max_model_len": info.context_length, "dtype": info.dtype, "parent": base}
    return entry


@router.get("/v1/models")
async def list_models(request: Request) -> Response:
    """Every name that requests may use."""
    service = _service(request)
    names = [*service.model_names(), embedding_names(service)[0]]
    return JsonResponse({"object": "list", "data": [_model(service, n) for n in names]})


@router.get("/v1/models/{model_id:path}")
async def get_model(request: Request, model_id: str) -> Response:
    """One of them."""
    return JsonResponse(_model(_service(request), model_id))


@router.post("/tokenize")
async def tokenize(request: Request, body: TokenizeRequest) -> Response:
    """Token ids of a prompt as completions take it, or of messages through the chat template."""
    service = _service(request)
    if body.model is not None:
        service.resolve(body.model)
    if body.messages is not None and body.prompt is None:
        text = chat_prompt(
            service.template,
            body.messages,
            body.tools or [],
            body.chat_template_kwargs,
            add_generation_prompt=body.add_generation_prompt,
        )
        ids = await service.encode(text, "messages")
    elif body.prompt is not None and body.messages is None:
        ids = await service.encode(body.prompt, "prompt", special=body.add_special_tokens)
    else:
        raise ApiError(400, "give either prompt or messages", param="prompt", code="invalid_value")
    limit = service.engine.info.context_length
    return JsonResponse({"count": len(ids), "max_model_len": limit, "tokens": ids})


@router.post("/detokenize")
async def detokenize(request: Request, body: DetokenizeRequest) -> Response:
    """Text of token ids, special tokens included."""
    service = _service(request)
    if body.model is not None:
        service.resolve(body.model)
    size = service.tokenizer.vocab_size
    bad = next((t for t in body.tokens if t >= size), None)
    if bad is not None:
        message = f"token ids must be in [0, {size}), got {bad}"
        raise ApiError(400, message, param="tokens", code="invalid_value")
    return JsonResponse({"prompt": service.tokenizer.decode(body.tokens, skip_special_tokens=False)})


@router.get("/health")
async def health(request: Request) -> Response:
    """200 when requests are taken, 503 while draining."""
    if _service(request).draining:
        raise ApiError(503, "the server is shutting down", code="draining", retry_after_s=5)
    return JsonResponse({"status": "ok"})


@router.get("/metrics", response_class=PlainTextResponse)
async def metrics(request: Request) -> Response:
    """Prometheus text."""
    service = _service(request)
    text = service.metrics.exposition(await service.engine.stats())
    return Response(text, media_type="text/plain; version=0.0.4")


@router.get("/stats")
async def stats(request: Request) -> Response:
    """What the page shows."""
    return JsonResponse(await _service(request).stats())


@router.get(AUDIT_PATH, include_in_schema=False)
async def cache_audit(request: Request) -> Response:
    """Where the cache's file lies, for an auditor on this machine who gave the owner's token to both sides.
    404 for anyone else, and where no token is set."""
    config = _service(request).config
    peer = request.client.host if request.client else ""
    nonce = request.headers.get(NONCE_HEADER, "")
    if config.audit_token is None or not ip_address(peer.partition("%")[0] or "::").is_loopback:
        raise ApiError(404, "there is no audit here", code="not_found")
    try:
        return JsonResponse(grant(config.audit_token, nonce, config.cache_path))
    except AuditRefused as error:
        raise ApiError(400, str(error), param=NONCE_HEADER, code="invalid_value") from None


@router.get("/", include_in_schema=False)
async def index() -> Response:
    """The page."""
    return FileResponse(PAGE / "index.html", headers=PAGE_HEADERS)


@router.get("/page/{name}", include_in_schema=False)
async def page_file(name: str) -> Response:
    """Its files."""
    known = {p.name for p in PAGE.iterdir() if p.is_file()}
    if name not in known:
        raise ApiError(404, f"there is no {name[:200]!r}", code="not_found")
    return FileResponse(PAGE / name, headers=PAGE_HEADERS)
