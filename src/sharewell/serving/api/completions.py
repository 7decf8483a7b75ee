"""POST /v1/completions: prompts as text or token ids, several at once, echo with log-probabilities."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Sequence
from dataclasses import dataclass, field
from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import Response

from ..core.messages import EngineRequest, TokenLogprob
from .answers import Ask
from .chat import LEAST_LOGPROB
from .errors import ApiError
from .keys import ApiKey
from .relays import extension
from .schemas import CompletionRequest, refuse_unsupported
from .service import Fields, Piece, Service, Usage, json_grammar, new_id, stop_list
from .streaming import DONE, EITHER, event, stream, unless_gone
from .strict_json import JsonResponse, StrictRoute

router = APIRouter(route_class=StrictRoute)
FIELDS = Fields("prompt", "response_format")
MAX_CHOICES = 512
DEFAULT_MAX_TOKENS = 16  # OpenAI's


@dataclass
class _Prompt:
    """One of the request's prompts: its engine request, its tokens so far and what of it was shown."""

    number: int
    request: EngineRequest
    echo: str
    ask: Ask
    usage: Usage = field(default_factory=Usage)


class Completion:
    """One request of one or more prompts, each with n choices; choice numbers run over prompts, then n."""

    def __init__(
        self, service: Service, body: CompletionRequest, key: ApiKey, cache_control: str | None = None
    ) -> None:
        self.service, self.body, self.key = service, body, key
        self.id, self.created = new_id("cmpl"), int(service.clock.unix())
        self.adapter = service.resolve(body.model)
        self._cache_control = cache_control
        self._asks: list[Ask] = []
        self.sharing = service.relays.wish(body.sharewell, key)
        # A request that scores one given token reads the last of its scores as the token that came after: an
        # end token counts there as any other (lm-eval-harness drops that last one).
        self.scoring = bool(body.echo) and body.logprobs is not None and body.max_tokens == 1

    async def prompts(self) -> list[_Prompt]:
        """The prompts with their engine requests. Raises ApiError 400."""
        body = self.body
        given: Any = [body.prompt] if isinstance(body.prompt, str) else body.prompt
        if isinstance(given[0], int):
            given = [given]
        n = body.n or 1
        if n * len(given) > MAX_CHOICES:
            message = (
                f"{len(given)} prompts of {n} choices are {n * len(given)}; at most {MAX_CHOICES} are taken"
            )
            raise ApiError(400, message, param="n", code="invalid_value")
        return [await self._prompt(i, prompt) for i, prompt in enumerate(given)]

    async def _prompt(self, number: int, prompt: str | list[int]) -> _Prompt:
        body, service = self.body, self.service
        if isinstance(prompt, str):
            echo = prompt
            ids = await service.encode_quoting(prompt, "prompt", self.sharing, self.key, special=True)
            if not ids:  # an empty text has no token to go on from
                ids = list(service.engine.info.eos_token_ids[:1]) or [0]
        else:
            ids, size = prompt, service.tokenizer.vocab_size
            bad = next((t for t in ids if t >= size), None)
            if bad is not None:
                message = f"token ids must be in [0, {size}), got {bad}"
                raise ApiError(400, message, param="prompt", code="invalid_prompt")
            echo = service.tokenizer.decode(ids, skip_special_tokens=False) if body.echo else ""
        asked = body.max_tokens
        if asked is None:
            asked = min(DEFAULT_MAX_TOKENS, max(0, service.engine.info.context_length - len(ids)))
        format = body.response_format
        schema = format.json_schema.schema_ if format and format.json_schema else None
        more: dict[str, Any] = {"ignore_eos": True} if self.scoring else {}
        sampling = service.sampling(
            body, len(ids), asked, FIELDS,
            logprobs=body.logprobs,
            prompt_logprobs=body.logprobs if body.echo else None,
            grammar=json_grammar(format.type, schema, "response_format.json_schema") if format else None,
            **more,
        )  # fmt: skip
        request = service.request(
            f"{self.id}-{number}", ids, sampling, self.key, FIELDS,
            n=body.n or 1, adapter=self.adapter, priority=body.priority, sharing=self.sharing,
        )  # fmt: skip
        # a text to go on from is no question: the exact tier only
        ask = service.answers.ask(body, self._cache_control, max_tokens=asked)
        self._asks.append(ask)
        return _Prompt(number, request, echo if body.echo else "", ask)

    def _pieces(self, prompt: _Prompt) -> AsyncGenerator[Piece]:
        return self.service.generate(
            prompt.request, stop_list(self.body.stop), self.key, prompt.usage, FIELDS, ask=prompt.ask
        )

    def headers(self) -> dict[str, str]:
        """Of several prompts it is a hit only when all are."""
        notes = [ask.note for ask in self._asks]
        other = next((note for note in notes if note.status != "hit"), None)
        return (other or notes[0]).headers() if notes else {}

    def _usage(self, prompts: Sequence[_Prompt]) -> dict[str, Any]:
        total = Usage()
        for prompt in prompts:
            total.add(prompt.usage)
        return total.body()

    def _reason(self, piece: Piece) -> str | None:
        if not self.scoring or piece.finish_reason != "length" or not piece.logprobs:
            return piece.finish_reason
        ended = piece.logprobs[-1].token_id in self.service.engine.info.eos_token_ids
        return "stop" if ended and not self.body.ignore_eos else "length"

    def _logprobs(self, scored: Sequence[TokenLogprob | None], ids: Sequence[int], start: int) -> Any:
        """OpenAI's four parallel lists. ``ids[i]`` is the token that ``scored[i]`` speaks of."""
        if self.body.logprobs is None:
            return None
        tokenizer = self.service.tokenizer

        def text(token: int) -> str:
            return tokenizer.token_bytes(token).decode("utf-8", "replace")

        def best(score: TokenLogprob | None) -> dict[str, float] | None:
            if score is None:
                return None
            named: dict[str, float] = {}
            for token, value in (
                *score.top,
                (score.token_id, score.logprob),
            ):  # best first: of equal texts it stays
                named.setdefault(text(token), max(value, LEAST_LOGPROB))
            return named

        tokens, offsets = [text(t) for t in ids], []
        for token in tokens:
            offsets.append(start)
            start += len(token)
        return {
            "tokens": tokens,
            "token_logprobs": [None if s is None else max(s.logprob, LEAST_LOGPROB) for s in scored],
            "top_logprobs": [best(s) for s in scored],
            "text_offset": offsets,
        }

    # Whole

    async def _choices(self, prompt: _Prompt) -> list[dict[str, Any]]:
        n = prompt.request.n
        texts, reasons = [prompt.echo] * n, [""] * n
        ids: list[list[int]] = [[] for _ in texts]
        scored: list[list[TokenLogprob | None]] = [[] for _ in texts]
        async for piece in self._pieces(prompt):
            i = piece.index
            if piece.prompt_logprobs is not None:
                scored[i] += piece.prompt_logprobs
                ids[i] += prompt.request.prompt_ids
            texts[i] += piece.text
            scored[i] += piece.logprobs
            ids[i] += (s.token_id for s in piece.logprobs)
            if piece.finish_reason is not None:
                reasons[i] = self._reason(piece) or ""
        return [
            {
                "index": prompt.number * n + i,
                "text": texts[i],
                "logprobs": self._logprobs(scored[i], ids[i], 0),
                "finish_reason": reasons[i],
            }
            for i in range(n)
        ]

    async def whole(self) -> dict[str, Any]:
        """The complete answer to all prompts."""
        prompts = await self.prompts()
        tasks = [asyncio.ensure_future(self._choices(prompt)) for prompt in prompts]
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
            "usage": self._usage(prompts),
            **extension(prompts[0].usage.sharing),
        }

    # Streamed

    async def events(self) -> AsyncGenerator[bytes]:
        """Chunks of all prompts as they come, usage when asked for, [DONE]."""
        prompts = await self.prompts()
        arrived: asyncio.Queue[tuple[_Prompt, Piece] | Exception | None] = asyncio.Queue()

        async def pump(prompt: _Prompt) -> None:
            try:
                async for piece in self._pieces(prompt):
                    arrived.put_nowait((prompt, piece))
                arrived.put_nowait(None)
            except Exception as error:  # handed to the consumer, which raises it
                arrived.put_nowait(error)

        options = self.body.stream_options
        with_usage = options is not None and options.include_usage
        common: dict[str, Any] = {
            "id": self.id,
            "object": "text_completion",
            "created": self.created,
            "model": self.body.model,
        }
        if with_usage:
            common["usage"] = None
        tasks = [asyncio.ensure_future(pump(prompt)) for prompt in prompts]
        offsets: dict[int, int] = {}
        left = len(tasks)
        try:
            while left:
                item = await arrived.get()
                if item is None:
                    left -= 1
                elif isinstance(item, Exception):
                    raise item
                else:
                    yield event({**common, "choices": [self._chunk(*item, offsets)]})
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.wait(tasks)
        if with_usage:
            more = extension(prompts[0].usage.sharing)
            yield event({**common, "choices": [], "usage": self._usage(prompts), **more})
        yield DONE

    def _chunk(self, prompt: _Prompt, piece: Piece, offsets: dict[int, int]) -> dict[str, Any]:
        """One choice of a chunk; ``offsets`` are the characters shown of each choice so far."""
        index, text = prompt.number * prompt.request.n + piece.index, piece.text
        scored: list[TokenLogprob | None] = list(piece.logprobs)
        ids = [s.token_id for s in piece.logprobs]
        if index not in offsets:
            offsets[index] = 0
            text = prompt.echo + text
            if piece.prompt_logprobs is not None:
                scored, ids = [*piece.prompt_logprobs, *scored], [*prompt.request.prompt_ids, *ids]
        logprobs = self._logprobs(scored, ids, offsets[index])
        offsets[index] += len(text)
        return {"index": index, "text": text, "logprobs": logprobs, "finish_reason": self._reason(piece)}


@router.post("/v1/completions", responses=EITHER)
async def completions(request: Request, body: CompletionRequest) -> Response:
    """Continue texts; OpenAI's completions."""
    service: Service = request.app.state.service
    key: ApiKey = request.scope["sharewell.key"]
    refuse_unsupported(body)
    completion = Completion(service, body, key, request.headers.get("cache-control"))
    service.admit(key)
    if body.stream:
        return await stream(request, completion.events(), completion.headers)
    answer = await unless_gone(request, completion.whole())
    return JsonResponse(answer, headers=completion.headers())
