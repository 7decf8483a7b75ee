"""POST /v1/completions: prompts as text or token ids, several at once, echo with log-probabilities."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse, Response

from ..core.messages import EngineRequest, TokenLogprob
from .chat import _failed
from .errors import ApiError
from .keys import ApiKey
from .schemas import CompletionRequest, refuse_unsupported
from .service import Piece, Service, Usage, new_id, stop_list
from .streaming import DONE, event, stream, unless_gone

router = APIRouter()


class Completion:
    """One request of one or more prompts, each with n choices; choice numbers run over prompts, then n."""

    def __init__(self, service: Service, body: CompletionRequest, key: ApiKey) -> None:
        self.service, self.body, self.key = service, body, key
        self.id, self.created = new_id("cmpl"), int(service.clock.unix())
        self.adapter = service.resolve(body.model)
        self.usages: list[Usage] = []

    async def requests(self) -> list[EngineRequest]:
        """One engine request a prompt. Raises ApiError 400."""
        body, service = self.body, self.service
        prompts = body.prompt
        if isinstance(prompts, str) or (prompts and isinstance(prompts[0], int)):
            prompts = [prompts]
        if not prompts:
            raise ApiError(400, "prompt must not be empty", param="prompt", code="empty_prompt")
        requests = []
        for i, prompt in enumerate(prompts):
            ids = await service.encode(prompt) if isinstance(prompt, str) else list(prompt)  # pyright: ignore[reportArgumentType]
            if not ids and isinstance(prompt, str):  # an empty text has no token to go on from
                ids = [service.engine.info.eos_token_ids[0] if service.engine.info.eos_token_ids else 0]
            asked = (
                body.max_tokens
                if body.max_tokens is not None
                else min(16, max(0, service.engine.info.context_length - len(ids)))
            )
            sampling = service.sampling(
                body,
                len(ids),
                asked,
                logprobs=body.logprobs,
                prompt_logprobs=body.logprobs if body.echo and body.logprobs is not None else None,
                grammar=service.grammar(body.response_format),
            )
            requests.append(
                service.request(
                    f"{self.id}-{i}",
                    ids,
                    sampling,
                    self.key,
                    n=body.n or 1,
                    adapter=self.adapter,
                    priority=body.priority,
                )
            )
        self.usages = [Usage() for _ in requests]
        return requests

    def usage(self) -> dict[str, Any]:
        total = Usage()
        for usage in self.usages:
            total.prompt_tokens += usage.prompt_tokens
            total.completion_tokens += usage.completion_tokens
            total.cached_tokens += usage.cached_tokens
        return total.body()

    def _pieces(self, i: int, request: EngineRequest) -> AsyncIterator[Piece]:
        return self.service.generate(request, stop_list(self.body.stop), self.key, self.usages[i])

    def logprobs(self, scored: list[TokenLogprob | None], ids: list[int], start: int) -> dict[str, Any]:
        """OpenAI's four parallel lists. ``ids[i]`` is the token that ``scored[i]`` speaks of."""
        tokenizer = self.service.tokenizer

        def text(token: int) -> str:
            return tokenizer.token_bytes(token).decode("utf-8", "replace")

        tokens, offsets, at = [text(t) for t in ids], [], start
        for token in tokens:
            offsets.append(at)
            at += len(token)
        return {
            "tokens": tokens,
            "token_logprobs": [None if s is None else max(s.logprob, -9999.0) for s in scored],
            "top_logprobs": [
                None if s is None else {text(t): max(v, -9999.0) for t, v in s.top} for s in scored
            ],
            "text_offset": offsets,
        }

    async def _whole_prompt(self, i: int, request: EngineRequest) -> list[dict[str, Any]]:
        texts, scored = [""] * request.n, [[] for _ in range(request.n)]
        reasons: list[str | None] = [None] * request.n
        prompt_scores: list[TokenLogprob | None] = []
        async for piece in self._pieces(i, request):
            if piece.finish_reason == "error":
                raise _failed(piece)
            texts[piece.index] += piece.text
            scored[piece.index] += piece.logprobs
            reasons[piece.index] = piece.finish_reason or reasons[piece.index]
            if piece.prompt_logprobs is not None:
                prompt_scores = list(piece.prompt_logprobs)
        echo = (
            self.service.tokenizer.decode(request.prompt_ids, skip_special_tokens=False)
            if self.body.echo
            else ""
        )
        choices = []
        for j in range(request.n):
            logprobs = None
            if self.body.logprobs is not None:
                values: list[TokenLogprob | None] = [*prompt_scores, *scored[j]]
                ids = [*(request.prompt_ids if prompt_scores else ()), *(s.token_id for s in scored[j])]
                logprobs = self.logprobs(values, ids, 0 if prompt_scores else len(echo))
            choices.append(
                {
                    "index": i * request.n + j,
                    "text": echo + texts[j],
                    "logprobs": logprobs,
                    "finish_reason": reasons[j],
                }
            )
        return choices

    async def whole(self) -> dict[str, Any]:
        """The complete answer to all prompts."""
        requests = await self.requests()
        tasks = [asyncio.ensure_future(self._whole_prompt(i, r)) for i, r in enumerate(requests)]
        try:
            answers = await asyncio.gather(*tasks)
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.wait(tasks)
        return {
            "id": self.id,
            "object": "text_completion",
            "created": self.created,
            "model": self.body.model,
            "choices": [choice for answer in answers for choice in answer],
            "usage": self.usage(),
        }

    async def events(self) -> AsyncIterator[bytes]:
        """Chunks of all prompts as they come, usage when asked for, [DONE]."""
        requests = await self.requests()
        queue: asyncio.Queue[tuple[int, Piece] | Exception | None] = asyncio.Queue()

        async def pump(i: int, request: EngineRequest) -> None:
            try:
                async for piece in self._pieces(i, request):
                    queue.put_nowait((i, piece))
                queue.put_nowait(None)
            except Exception as error:  # handed to the consumer, which raises it
                queue.put_nowait(error)

        with_usage = bool(self.body.stream_options and self.body.stream_options.include_usage)
        common: dict[str, Any] = {
            "id": self.id,
            "object": "text_completion",
            "created": self.created,
            "model": self.body.model,
        }
        if with_usage:
            common["usage"] = None
        tasks = [asyncio.ensure_future(pump(i, r)) for i, r in enumerate(requests)]
        offsets: dict[int, int] = {}
        left = len(tasks)
        try:
            while left:
                item = await queue.get()
                if item is None:
                    left -= 1
                    continue
                if isinstance(item, Exception):
                    raise item
                i, piece = item
                if piece.finish_reason == "error":
                    raise _failed(piece)
                index, text = i * requests[i].n + piece.index, piece.text
                scored: list[TokenLogprob | None] = list(piece.logprobs)
                ids = [s.token_id for s in piece.logprobs]
                if index not in offsets:
                    offsets[index] = 0
                    if self.body.echo:
                        text = (
                            self.service.tokenizer.decode(requests[i].prompt_ids, skip_special_tokens=False)
                            + text
                        )
                        if piece.prompt_logprobs is not None:
                            scored, ids = [*piece.prompt_logprobs, *scored], [*requests[i].prompt_ids, *ids]
                logprobs = (
                    self.logprobs(scored, ids, offsets[index]) if self.body.logprobs is not None else None
                )
                offsets[index] += len(text)
                yield event(
                    {
                        **common,
                        "choices": [
                            {
                                "index": index,
                                "text": text,
                                "logprobs": logprobs,
                                "finish_reason": piece.finish_reason,
                            }
                        ],
                    }
                )
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.wait(tasks)
        if with_usage:
            yield event({**common, "choices": [], "usage": self.usage()})
        yield DONE


@router.post("/v1/completions")
async def completions(request: Request, body: CompletionRequest) -> Response:
    """Continue texts; OpenAI's completions."""
    service: Service = request.app.state.service
    key = service.authorize(request.headers.get("authorization"), spend=True)
    refuse_unsupported(body)
    completion = Completion(service, body, key)
    if body.stream:
        return await stream(completion.events())
    return JSONResponse(await unless_gone(request, completion.whole()))
