"""POST /v1/chat/completions."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Sequence
from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import Response

from ..core.messages import EngineRequest, TokenLogprob
from .errors import ApiError
from .keys import ApiKey
from .prompts import chat_prompt
from .relays import extension
from .schemas import ChatRequest, refuse_unsupported
from .service import Fields, Piece, Service, Usage, json_grammar, new_id, stop_list
from .streaming import DONE, EITHER, event, stream, unless_gone
from .strict_json import JsonResponse, StrictRoute
from .tools import Delta, Mode, ToolCallParser, chosen, constraint, syntax_of

router = APIRouter(route_class=StrictRoute)
LEAST_LOGPROB = -9999.0  # stands for minus infinity, which JSON lacks


class Chat:
    """One chat request on its way: prompt, engine request, and its answer in both forms."""

    def __init__(
        self, service: Service, body: ChatRequest, key: ApiKey, cache_control: str | None = None
    ) -> None:
        self.service, self.body, self.key = service, body, key
        self.id, self.created = new_id("chatcmpl"), int(service.clock.unix())
        self.usage = Usage()
        self.adapter = service.resolve(body.model)
        self.mode: Mode
        self.mode, self.tool = chosen(body.tools, body.tool_choice)
        self.syntax = syntax_of(service.template.source)
        forced = self.mode in ("required", "named")
        named = "max_tokens" if body.max_completion_tokens is None else "max_completion_tokens"
        self.sharing = service.relays.wish(body.sharewell, key)
        self.fields = Fields("messages", "tools" if forced else "response_format", named)
        self._parsers: dict[int, ToolCallParser] = {}
        asked = body.max_tokens if body.max_completion_tokens is None else body.max_completion_tokens
        question, history = _question(body)
        self.ask = service.answers.ask(
            body, cache_control, question=question, history=history, max_tokens=asked
        )

    async def request(self) -> EngineRequest:
        """The engine request. Raises ApiError 400."""
        body, service = self.body, self.service
        if body.top_logprobs is not None and not body.logprobs:
            message = "top_logprobs needs logprobs to be true"
            raise ApiError(400, message, param="top_logprobs", code="invalid_value")
        tools = body.tools or []
        shown = tools if self.mode != "none" else []
        text = chat_prompt(service.template, body.messages, shown, body.chat_template_kwargs)
        prompt = await service.encode_quoting(text, "messages", self.sharing, self.key)
        asked = body.max_tokens if body.max_completion_tokens is None else body.max_completion_tokens
        grammar = constraint(tools, self.mode, self.tool)
        if grammar is None and (format := body.response_format) is not None:
            schema = format.json_schema.schema_ if format.json_schema else None
            grammar = json_grammar(format.type, schema, "response_format.json_schema")
        scored = (body.top_logprobs or 0) if body.logprobs else None
        sampling = service.sampling(body, len(prompt), asked, self.fields, grammar=grammar, logprobs=scored)
        return service.request(
            self.id, prompt, sampling, self.key, self.fields,
            n=body.n or 1, adapter=self.adapter, priority=body.priority, sharing=self.sharing,
        )  # fmt: skip

    def _pieces(self, request: EngineRequest) -> AsyncGenerator[Piece]:
        special = self.mode == "auto" and self.syntax.special
        return self.service.generate(
            request, stop_list(self.body.stop), self.key, self.usage, self.fields, keep_special=special,
            ask=self.ask,
        )  # fmt: skip

    def _deltas(self, piece: Piece) -> list[Delta]:
        """The piece's text, split into what is shown and calls."""
        if self.mode == "none":
            return [Delta(text=piece.text)] if piece.text else []
        parser = self._parsers.get(piece.index)
        if parser is None:
            names = [t.function.name for t in ([self.tool] if self.tool else self.body.tools or [])]
            parallel = self.body.parallel_tool_calls is not False
            parser = ToolCallParser(self.mode, names, syntax=self.syntax, parallel=parallel)
            self._parsers[piece.index] = parser
        deltas = parser.push(piece.text)
        return deltas + parser.finish() if piece.finish_reason is not None else deltas

    def _reason(self, piece: Piece) -> str:
        parser = self._parsers.get(piece.index)
        called = parser is not None and parser.calls > 0 and piece.finish_reason == "stop"
        return "tool_calls" if called else str(piece.finish_reason)

    def _logprobs(self, scored: Sequence[TokenLogprob]) -> dict[str, Any] | None:
        if not self.body.logprobs:
            return None
        tokenizer = self.service.tokenizer

        def entry(token: int, value: float) -> dict[str, Any]:
            raw = tokenizer.token_bytes(token)
            return {
                "token": raw.decode("utf-8", "replace"),
                "logprob": max(value, LEAST_LOGPROB),
                "bytes": list(raw),
            }

        content = [
            {**entry(s.token_id, s.logprob), "top_logprobs": [entry(t, v) for t, v in s.top]} for s in scored
        ]
        return {"content": content, "refusal": None}

    # Streamed

    async def events(self) -> AsyncGenerator[bytes]:
        """Chunks, usage when asked for, [DONE]."""
        request = await self.request()
        options = self.body.stream_options
        with_usage = options is not None and options.include_usage
        common: dict[str, Any] = {
            "id": self.id,
            "object": "chat.completion.chunk",
            "created": self.created,
            "model": self.body.model,
        }
        if with_usage:
            common["usage"] = None

        def chunk(index: int, delta: dict[str, Any], reason: str | None = None, scored: Any = None) -> bytes:
            choice = {"index": index, "delta": delta, "logprobs": scored, "finish_reason": reason}
            return event({**common, "choices": [choice]})

        begun: set[int] = set()
        async for piece in self._pieces(request):
            if piece.index not in begun:
                begun.add(piece.index)
                yield chunk(piece.index, {"role": "assistant", "content": ""})
            scored = self._logprobs(piece.logprobs) if piece.logprobs else None
            for delta in self._deltas(piece):
                yield chunk(piece.index, _delta_body(delta), None, scored)
                scored = None
            if scored is not None:
                yield chunk(piece.index, {}, None, scored)
            if piece.finish_reason is not None:
                yield chunk(piece.index, {}, self._reason(piece))
        if with_usage:
            more = extension(self.usage.sharing)
            yield event({**common, "choices": [], "usage": self.usage.body(), **more})
        yield DONE

    # Whole

    async def whole(self) -> dict[str, Any]:
        """The complete answer."""
        request = await self.request()
        texts = [""] * request.n
        calls: list[list[dict[str, Any]]] = [[] for _ in texts]
        scored: list[list[TokenLogprob]] = [[] for _ in texts]
        reasons = [""] * request.n
        async for piece in self._pieces(request):
            i = piece.index
            scored[i] += piece.logprobs
            for delta in self._deltas(piece):
                texts[i] += delta.text
                if delta.call is None:
                    continue
                if delta.name is not None:
                    function = {"name": delta.name, "arguments": ""}
                    calls[i].append({"id": delta.id, "type": "function", "function": function})
                calls[i][delta.call]["function"]["arguments"] += delta.arguments
            if piece.finish_reason is not None:
                reasons[i] = self._reason(piece)
        choices = []
        for i, text in enumerate(texts):
            message: dict[str, Any] = {"role": "assistant", "content": text, "refusal": None}
            if calls[i]:
                message |= {"content": text.strip() or None, "tool_calls": calls[i]}
            choices.append(
                {
                    "index": i,
                    "message": message,
                    "logprobs": self._logprobs(scored[i]),
                    "finish_reason": reasons[i],
                }
            )
        return {
            "id": self.id,
            "object": "chat.completion",
            "created": self.created,
            "model": self.body.model,
            "choices": choices,
            "usage": self.usage.body(),
            **extension(self.usage.sharing),
        }


def _question(body: ChatRequest) -> tuple[str, Any]:
    """What may be asked in other words (the last message, when a user wrote it in a chat without tools), and
    what the answer depends on besides."""
    last = body.messages[-1]
    text = last.content
    if isinstance(text, list):
        text = "".join(part.text for part in text)
    if last.role != "user" or body.tools or not text:
        return "", None
    earlier = [m.model_dump(mode="json", exclude_none=True) for m in body.messages[:-1]]
    return text, [earlier, last.name, body.chat_template_kwargs]


def _delta_body(delta: Delta) -> dict[str, Any]:
    if delta.call is None:
        return {"content": delta.text}
    call: dict[str, Any] = {"index": delta.call, "function": {"arguments": delta.arguments}}
    if delta.name is not None:
        call |= {"id": delta.id, "type": "function"}
        call["function"]["name"] = delta.name
    return {"tool_calls": [call]}


@router.post("/v1/chat/completions", responses=EITHER)
async def chat_completions(request: Request, body: ChatRequest) -> Response:
    """Answer a conversation; OpenAI's chat completions."""
    service: Service = request.app.state.service
    key: ApiKey = request.scope["sharewell.key"]
    refuse_unsupported(body)
    chat = Chat(service, body, key, request.headers.get("cache-control"))
    service.admit(key)
    note = chat.ask.note
    if body.stream:
        return await stream(request, chat.events(), note.headers)
    answer = await unless_gone(request, chat.whole())
    return JsonResponse(answer, headers=note.headers())
