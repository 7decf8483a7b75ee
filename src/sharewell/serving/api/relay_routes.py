"""How the prompt of a request that relayed was computed: as JSON, and as a page."""

from __future__ import annotations

from collections import Counter
from dataclasses import asdict
from html import escape
from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import HTMLResponse, Response

from .service import Service
from .service_routes import PAGE_HEADERS
from .strict_json import JsonResponse, StrictRoute

router = APIRouter(route_class=StrictRoute)
MEANING = {
    "prefix": "shared prefix",
    "computed": "computed",
    "relayed": "relayed from an earlier answer",
    "deviation": "computed anew: the new prefix changes it",
    "influence": "computed anew: later tokens look at it",
    "edge": "computed anew: an edge of the answer",
}


async def _explained(request: Request, request_id: str) -> dict[str, Any]:
    service: Service = request.app.state.service
    key = request.scope["sharewell.key"]
    found = asdict(service.relays.explained(request_id, key, await service.engine.stats()))
    del found["owner"]
    ids = found.pop("token_ids")
    text = service.tokenizer
    found["spans"] = [
        {
            "first": a, "end": b, "origin": origin, "from": source,
            "text": b"".join(text.token_bytes(t) for t in ids[a:b]).decode("utf-8", "replace"),
        }
        for a, b, origin, source in found["spans"]
    ]  # fmt: skip
    counts = Counter[str]()
    for span in found["spans"]:
        counts[span["origin"]] += span["end"] - span["first"]
    return {**found, "prompt_tokens": len(ids), "tokens": dict(counts), "meaning": MEANING}


@router.get("/v1/sharewell/explain/{request_id}")
async def explain(request: Request, request_id: str) -> Response:
    """Which tokens of a request's prompt came from where, and why others were computed anew."""
    return JsonResponse(await _explained(request, request_id))


@router.get("/explain/{request_id}", include_in_schema=False)
async def explain_page(request: Request, request_id: str) -> Response:
    """The same as a picture: the prompt coloured by origin."""
    found = await _explained(request, request_id)
    total = max(1, found["prompt_tokens"])
    bars = "".join(
        f'<rect class="{s["origin"]}" x="{s["first"]}" width="{s["end"] - s["first"]}" height="10"/>'
        for s in found["spans"]
    )
    legend = "".join(
        f'<li><span class="{name}">&nbsp;{n}&nbsp;</span> {MEANING[name]}</li>'
        for name, n in found["tokens"].items()
    )
    text = "".join(
        f'<span class="{s["origin"]}" title="{escape(MEANING[s["origin"]])}">{escape(s["text"])}</span>'
        for s in found["spans"]
    )
    kl = found["sampled_kl"]
    measured = "not measured" if kl is None else f"{kl:.3g} nats"
    page = (
        '<!doctype html><html lang="en"><head><meta charset="utf-8"><title>Where a prompt came from</title>'
        '<link rel="stylesheet" href="../page/explain.css"></head><body>'
        f"<h1>{escape(found['request_id'])}</h1><p>{total} prompt tokens; divergence from full computation: "
        f"{measured}. {escape(found['note'])}</p>"
        f'<svg viewBox="0 0 {total} 10" preserveAspectRatio="none" role="img" aria-label="Prompt by origin">'
        f"{bars}</svg>"
        f"<ul>{legend}</ul><pre>{text}</pre></body></html>"
    )
    return HTMLResponse(page, headers=PAGE_HEADERS)
