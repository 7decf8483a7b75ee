"""POST /v1/embeddings."""

from __future__ import annotations

import base64
from collections.abc import Sequence

import numpy as np
from fastapi import APIRouter, Request
from fastapi.responses import Response
from numpy.typing import NDArray

from ...models import Embedder
from .errors import ApiError
from .keys import ApiKey
from .schemas import EmbeddingsRequest, refuse_unsupported
from .service import Service, new_id
from .streaming import unless_gone
from .strict_json import JsonResponse, StrictRoute

router = APIRouter(route_class=StrictRoute)
MAX_CHARACTERS = 1 << 20
GROUP = 64  # texts between two looks at whether the client is still there


def embedding_names(service: Service) -> list[str]:
    """Names that requests may use for the embedding model; the first is the one that is listed."""
    name = service.config.embedding_model
    if name == "minilm":
        return ["all-MiniLM-L6-v2", "minilm", "sentence-transformers/all-MiniLM-L6-v2"]
    return [name.rstrip("/").rsplit("/", 1)[-1]]


def _texts(body: EmbeddingsRequest, embedder: Embedder) -> list[str]:
    """The request's texts; token ids are those of the embedding model. Raises ApiError 400."""
    given: Sequence[object] = [body.input] if isinstance(body.input, str) else body.input
    if given and isinstance(given[0], int):
        given = [given]
    try:
        texts = [t if isinstance(t, str) else embedder.decode(t) for t in given]  # pyright: ignore[reportArgumentType]
    except ValueError as error:
        raise ApiError(400, str(error), param="input", code="invalid_value") from None
    long = next((i for i, text in enumerate(texts) if len(text) > MAX_CHARACTERS), None)
    if long is not None:
        message = f"input {long} has {len(texts[long])} characters; at most {MAX_CHARACTERS} are taken"
        raise ApiError(400, message, param="input", code="context_length_exceeded")
    if not all(texts):
        raise ApiError(400, "input must hold no empty text", param="input", code="invalid_value")
    return texts


def _checked(body: EmbeddingsRequest, embedder: Embedder) -> tuple[list[str], list[int]]:
    """Texts, and the tokens of each that count. Raises ApiError 400."""
    if body.dimensions is not None and body.dimensions > embedder.dim:
        message = f"the model has {embedder.dim} dimensions, got {body.dimensions}"
        raise ApiError(400, message, param="dimensions", code="invalid_value")
    texts = _texts(body, embedder)
    counts = embedder.count_tokens(texts)
    longest, most = max(counts), embedder.max_tokens
    if longest > most and not body.truncate:
        raise ApiError(
            400,
            f"input {counts.index(longest)} has {longest} tokens, but the model takes {most};"
            " truncate=true cuts it",
            param="input",
            code="context_length_exceeded",
        )
    return texts, [min(count, most) for count in counts]


async def _embed(service: Service, body: EmbeddingsRequest) -> tuple[NDArray[np.float32], int]:
    """Vectors [n, dimensions] of norm 1 and the number of tokens. Raises ApiError 400."""
    texts, counts = await service.with_embedder(lambda embedder: _checked(body, embedder))
    groups = []
    for start in range(0, len(texts), GROUP):
        group = texts[start : start + GROUP]
        groups.append(await service.with_embedder(lambda embedder, group=group: embedder.embed(group)))
    vectors = np.concatenate(groups)[:, : body.dimensions]
    if body.dimensions is not None:
        norms = np.linalg.norm(vectors, axis=1, keepdims=True)
        vectors = (vectors / np.maximum(norms, 1e-12)).astype(np.float32)
    return vectors, sum(counts)


@router.post("/v1/embeddings")
async def embeddings(request: Request, body: EmbeddingsRequest) -> Response:
    """Unit vectors of texts. Fewer ``dimensions`` keep the first ones, brought back to length 1."""
    service: Service = request.app.state.service
    key: ApiKey = request.scope["sharewell.key"]
    refuse_unsupported(body)
    names = embedding_names(service)
    if body.model not in names:
        message = f"embedding model {body.model[:200]!r} does not exist; there are: {', '.join(names)}"
        raise ApiError(404, message, param="model", code="model_not_found")
    service.admit(key)
    vectors, tokens = await unless_gone(request, _embed(service, body))
    service.store.record(new_id("embd"), key, tokens, 0, 0)
    rows = np.ascontiguousarray(vectors)
    as_text = body.encoding_format == "base64"
    data = [
        {
            "object": "embedding",
            "index": i,
            "embedding": base64.b64encode(row.astype("<f4").tobytes()).decode() if as_text else row,
        }
        for i, row in enumerate(rows)
    ]
    usage = {"prompt_tokens": tokens, "total_tokens": tokens}
    return JsonResponse({"object": "list", "model": body.model, "data": data, "usage": usage})
