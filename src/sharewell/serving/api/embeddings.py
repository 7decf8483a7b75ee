"""POST /v1/embeddings."""

from __future__ import annotations

import asyncio
import base64

import numpy as np
from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse, Response

from .errors import ApiError
from .schemas import EmbeddingsRequest, refuse_unsupported
from .service import Service, new_id

router = APIRouter()


@router.post("/v1/embeddings")
async def embeddings(request: Request, body: EmbeddingsRequest) -> Response:
    """Unit vectors of texts. ``model`` is the embedding model's name (or anything starting with its id)."""
    service: Service = request.app.state.service
    key = service.authorize(request.headers.get("authorization"), spend=True)
    refuse_unsupported(body)
    names = embedding_names(service)
    if body.model not in names:
        raise ApiError(
            404,
            f"embedding model {body.model!r} does not exist; there are: {', '.join(names)}",
            param="model",
            code="model_not_found",
        )
    given = body.input
    if isinstance(given, str):
        texts = [given]
    elif given and isinstance(given[0], int):
        texts = [service.tokenizer.decode(given)]  # pyright: ignore[reportArgumentType]
    else:
        texts = [t if isinstance(t, str) else service.tokenizer.decode(t) for t in given]  # pyright: ignore[reportArgumentType]
    if not texts or any(not t for t in texts):
        raise ApiError(400, "input must hold at least one text, none of them empty", param="input")
    if any(0xD800 <= ord(c) <= 0xDFFF for t in texts for c in t):
        raise ApiError(400, "input must be valid Unicode, got a lone surrogate", param="input")
    embedder = await service.embedder()
    counts = await asyncio.to_thread(embedder.count_tokens, texts)
    vectors = await asyncio.to_thread(embedder.embed, texts)
    service.store.record(new_id("embd"), key, sum(counts), 0, 0)

    def encoded(vector: np.ndarray) -> object:
        if body.encoding_format == "base64":
            return base64.b64encode(vector.astype("<f4").tobytes()).decode()
        return vector.tolist()

    return JSONResponse(
        {
            "object": "list",
            "model": body.model,
            "data": [
                {"object": "embedding", "index": i, "embedding": encoded(v)} for i, v in enumerate(vectors)
            ],
            "usage": {"prompt_tokens": sum(counts), "total_tokens": sum(counts)},
        }
    )


def embedding_names(service: Service) -> list[str]:
    """Names that requests may use for the embedding model."""
    name = service.config.embedding_model
    return ["all-MiniLM-L6-v2", "minilm"] if name == "minilm" else [name.rstrip("/").rsplit("/", 1)[-1]]
