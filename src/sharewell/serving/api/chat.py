"""POST /v1/chat/completions."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse, Response

from ...models import TemplateError
from ..core.messages import EngineRequest, TokenLogprob
from .errors import ApiError
from .keys import ApiKey
from .schemas import ChatRequest, Message, refuse_unsupported
from .service import Piece, Service, Usage, new_id, stop_list
from .streaming import DONE, event, stream, unless_gone
from .tools import Delta, ToolCallParser, chosen, constraint, system_text

router = APIRouter()


def plain_messages(messages: list[Message]) -> list[dict[str, Any]]:
    """Messages as chat templates take them: text parts joined, "developer" as "system". Raises ApiError 400."""
    plain = []
    for i, message in enumerate(messages):
        content = message.content
        if isinstance(content, list):
            texts = []
            for part in content:
                if part.get("type") not in ("text", "input_text", "output_text") or not isinstance(
                    part.get("text"), str
                ):
                    raise ApiError(
                        400,
                        f"messages.{i}.content: only text parts are supported, got {part.get('type')!r}",
                        param=f"messages.{i}.content",
                    )
                texts.append(part["text"])
            content = "".join(texts)
        role = "system" if message.role == "developer" else message.role
        entry: dict[str, Any] = {"role": role, "content": content or ""}
        for name in ("name", "tool_calls", "tool_call_id"):
            if getattr(message, name) is not None:
                entry[name] = getattr(message, name)
        plain.append(entry)
    return plain


def _show_tools(service: Service, messages: list[dict[str, Any]], body: ChatRequest) -> list[dict[str, Any]]:
    """Put tools into the system message, and earlier calls into text, for a template that has no place for them."""
    import json

    shown = []
    for message in messages:
        if message.get("tool_calls"):
            calls = [c.get("function", {}) for c in message["tool_calls"]]
            text = "\n".join(
                f"<tool_call>\n{json.dumps({'name': c.get('name'), 'arguments': c.get('arguments')})}\n</tool_call>"
                for c in calls
            )
            message = {"role": "assistant", "content": (message["content"] + "\n" + text).strip()}
        elif message["role"] == "tool":
            message = {"role": "user", "content": f"<tool_response>\n{message['content']}\n</tool_response>"}
        shown.append(message)
    if body.tools:
        text = system_text(body.tools)
        if shown and shown[0]["role"] == "system":
            shown[0] = {**shown[0], "content": shown[0]["content"] + "\n\n" + text}
        else:
            shown.insert(0, {"role": "system", "content": text})
    return shown


class Chat:
    """One chat request on its way: prompt, engine request, and its answer in both forms."""

    def __init__(self, service: Service, body: ChatRequest, key: ApiKey) -> None:
        self.service, self.body, self.key = service, body, key
        self.id, self.created = new_id("chatcmpl"), int(service.clock.unix())
        self.usage = Usage()
        self.adapter = service.resolve(body.model)
        self.mode, self.tool = chosen(body.tools, body.tool_choice)
        self.parsers: dict[int, ToolCallParser] = {}

    def parser(self, index: int) -> ToolCallParser | None:
        """The reader of choice ``index``'s tool calls, if it may have any."""
        if self.mode == "none":
            return None
        if index not in self.parsers:
            name = self.tool.function.name if self.tool else None
            self.parsers[index] = ToolCallParser(self.mode, name, self.body.parallel_tool_calls is not False)
        return self.parsers[index]

    def prompt(self) -> str:
        """The text that the model sees. Raises ApiError 400 when the template refuses the messages."""
        messages = plain_messages(self.body.messages)
        tools = None
        if self.mode != "none" and self.service.template.supports_tools:
            tools = [t.model_dump(exclude_none=True) for t in self.body.tools or ()]
        elif self.mode != "none" or any(m.get("tool_calls") or m["role"] == "tool" for m in messages):
            messages = _show_tools(
                self.service,
                messages,
                self.body if self.mode != "none" else self.body.model_copy(update={"tools": None}),
            )
        try:
            return self.service.template.render(messages, tools, **(self.body.chat_template_kwargs or {}))
        except TemplateError as error:
            raise ApiError(400, str(error), param="messages", code="invalid_messages") from None

    async def request(self) -> EngineRequest:
        """The engine request. Raises ApiError 400."""
        body, service = self.body, self.service
        if body.top_logprobs is not None and not body.logprobs:
            raise ApiError(400, "top_logprobs needs logprobs to be true", param="top_logprobs")
        prompt = await service.encode(self.prompt())
        asked = body.max_completion_tokens if body.max_completion_tokens is not None else body.max_tokens
        grammar = constraint(body.tools or [], self.mode, self.tool) or service.grammar(body.response_format)
        sampling = service.sampling(
            body,
            len(prompt),
            asked,
            grammar=grammar,
            logprobs=(body.top_logprobs or 0) if body.logprobs else None,
        )
        return service.request(
            self.id, prompt, sampling, self.key, n=body.n or 1, adapter=self.adapter, priority=body.priority
        )

    def pieces(self, request: EngineRequest) -> AsyncIterator[Piece]:
        return self.service.generate(request, stop_list(self.body.stop), self.key, self.usage)

    def reason(self, piece: Piece) -> str:
        parser = self.parsers.get(piece.index)
        return (
            "tool_calls"
            if parser and parser.calls and piece.finish_reason == "stop"
            else str(piece.finish_reason)
        )

    def logprobs(self, scored: tuple[TokenLogprob, ...]) -> dict[str, Any]:
        tokenizer = self.service.tokenizer

        def entry(token: int, value: float) -> dict[str, Any]:
            raw = tokenizer.token_bytes(token)
            return {
                "token": raw.decode("utf-8", "replace"),
                "logprob": max(value, -9999.0),
                "bytes": list(raw),
            }

        return {
            "content": [
                {**entry(s.token_id, s.logprob), "top_logprobs": [entry(t, v) for t, v in s.top]}
                for s in scored
            ],
            "refusal": None,
        }

    # Streamed

    async def events(self) -> AsyncIterator[bytes]:
        """Chunks, usage when asked for, [DONE]."""
        request = await self.request()
        body = self.body
        common = {
            "id": self.id,
            "object": "chat.completion.chunk",
            "created": self.created,
            "model": body.model,
        }
        with_usage = bool(body.stream_options and body.stream_options.include_usage)
        if with_usage:
            common = {**common, "usage": None}

        def chunk(
            index: int, delta: dict[str, Any], reason: str | None = None, logprobs: Any = None
        ) -> bytes:
            return event(
                {
                    **common,
                    "choices": [
                        {"index": index, "delta": delta, "logprobs": logprobs, "finish_reason": reason}
                    ],
                }
            )

        begun: set[int] = set()
        async for piece in self.pieces(request):
            if piece.finish_reason == "error":
                raise _failed(piece)
            if piece.index not in begun:
                begun.add(piece.index)
                yield chunk(
                    piece.index, {"role": "assistant", "content": "" if self.mode == "none" else None}
                )
            scored = self.logprobs(piece.logprobs) if body.logprobs else None
            for delta in self._deltas(piece):
                yield chunk(piece.index, _delta_body(delta), None, scored)
                scored = None
            if scored and scored["content"]:
                yield chunk(piece.index, {}, None, scored)
            if piece.finish_reason is not None:
                yield chunk(piece.index, {}, self.reason(piece))
        if with_usage:
            yield event({**common, "choices": [], "usage": self.usage.body()})
        yield DONE

    def _deltas(self, piece: Piece) -> list[Delta]:
        parser = self.parser(piece.index)
        if parser is None:
            return [Delta(text=piece.text)] if piece.text else []
        deltas = parser.push(piece.text) if piece.text else []
        return deltas + (parser.finish() if piece.finish_reason is not None else [])

    # Whole

    async def whole(self) -> dict[str, Any]:
        """The complete answer."""
        request = await self.request()
        texts = dict.fromkeys(range(request.n), "")
        calls: dict[int, list[dict[str, Any]]] = {i: [] for i in range(request.n)}
        scored: dict[int, list[TokenLogprob]] = {i: [] for i in range(request.n)}
        reasons: dict[int, str] = {}
        async for piece in self.pieces(request):
            if piece.finish_reason == "error":
                raise _failed(piece)
            scored[piece.index] += piece.logprobs
            for delta in self._deltas(piece):
                texts[piece.index] += delta.text
                if delta.call is not None:
                    if delta.name is not None:
                        calls[piece.index].append(
                            {
                                "id": delta.id,
                                "type": "function",
                                "function": {"name": delta.name, "arguments": ""},
                            }
                        )
                    calls[piece.index][delta.call]["function"]["arguments"] += delta.arguments
            if piece.finish_reason is not None:
                reasons[piece.index] = self.reason(piece)
        choices = []
        for i, text in texts.items():
            message: dict[str, Any] = {"role": "assistant", "content": text, "refusal": None}
            if calls[i]:
                message |= {"content": text.strip() or None, "tool_calls": calls[i]}
            logprobs = self.logprobs(tuple(scored[i])) if self.body.logprobs else None
            choices.append(
                {"index": i, "message": message, "logprobs": logprobs, "finish_reason": reasons[i]}
            )
        return {
            "id": self.id,
            "object": "chat.completion",
            "created": self.created,
            "model": self.body.model,
            "choices": choices,
            "usage": self.usage.body(),
        }


def _delta_body(delta: Delta) -> dict[str, Any]:
    if delta.call is None:
        return {"content": delta.text}
    call: dict[str, Any] = {"index": delta.call, "function": {"arguments": delta.arguments}}
    if delta.name is not None:
        call |= {"id": delta.id, "type": "function"}
        call["function"]["name"] = delta.name
    return {"tool_calls": [call]}


def _failed(piece: Piece) -> ApiError:
    return ApiError(500, f"generation failed: {piece.stop_text}", code=piece.stop_text)


@router.post("/v1/chat/completions")
async def chat_completions(request: Request, body: ChatRequest) -> Response:
    """Answer a conversation; OpenAI's chat completions."""
    service: Service = request.app.state.service
    key = service.authorize(request.headers.get("authorization"), spend=True)
    refuse_unsupported(body)
    chat = Chat(service, body, key)
    if body.stream:
        return await stream(chat.events())
    return JSONResponse(await unless_gone(request, chat.whole()))
