"""/v1/responses: text in, text out, streamed or whole, with ``previous_response_id``."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse, Response

from ...models import TemplateError
from ..core.messages import EngineRequest, GrammarSpec
from .chat import _failed
from .errors import ApiError
from .keys import ApiKey
from .schemas import Generation, ResponsesRequest, refuse_unsupported
from .service import Service, Usage, new_id
from .streaming import event, stream, unless_gone

router = APIRouter()


def input_messages(items: str | list[dict[str, Any]]) -> list[dict[str, str]]:
    """Input items as chat messages. Raises ApiError 400 for items that are not text messages."""
    if isinstance(items, str):
        return [{"role": "user", "content": items}]
    messages = []
    for i, item in enumerate(items):
        where = f"input.{i}"
        if item.get("type", "message") != "message" or item.get("role") not in (
            "user",
            "assistant",
            "system",
            "developer",
        ):
            raise ApiError(
                400,
                f"{where}: only messages of user, assistant, system or developer are supported",
                param=where,
            )
        content = item.get("content")
        if isinstance(content, list):
            texts = []
            for part in content:
                if not isinstance(part, dict) or part.get("type") not in (
                    "input_text",
                    "output_text",
                    "text",
                ):
                    raise ApiError(
                        400, f"{where}.content: only text parts are supported", param=f"{where}.content"
                    )
                texts.append(part.get("text"))
            content = "".join(t for t in texts if isinstance(t, str))
        if not isinstance(content, str):
            raise ApiError(
                400, f"{where}.content must be a string or a list of text parts", param=f"{where}.content"
            )
        messages.append(
            {"role": "system" if item["role"] == "developer" else item["role"], "content": content}
        )
    if not messages:
        raise ApiError(400, "input must not be empty", param="input")
    return messages


class Answer:
    """One response on its way."""

    def __init__(self, service: Service, body: ResponsesRequest, key: ApiKey) -> None:
        self.service, self.body, self.key = service, body, key
        self.id, self.message_id = new_id("resp"), new_id("msg")
        self.created = int(service.clock.unix())
        self.usage = Usage()
        self.adapter = service.resolve(body.model)
        self.history = self._history() + input_messages(body.input)

    def _history(self) -> list[dict[str, str]]:
        previous = self.body.previous_response_id
        if previous is None:
            return []
        stored = self.service.store.response(previous, self.key)
        if stored is None:
            raise ApiError(
                404,
                f"previous response {previous!r} does not exist",
                param="previous_response_id",
                code="previous_response_not_found",
            )
        return json.loads(stored[1])

    async def request(self) -> EngineRequest:
        """The engine request. Raises ApiError 400. Instructions are of this response only, as OpenAI has it."""
        service, body = self.service, self.body
        messages = self.history
        if body.instructions:
            messages = [{"role": "system", "content": body.instructions}, *messages]
        try:
            prompt = await service.encode(service.template.render(messages))
        except TemplateError as error:
            raise ApiError(400, str(error), param="input", code="invalid_messages") from None
        common = Generation(model=body.model, temperature=body.temperature, top_p=body.top_p)
        sampling = service.sampling(common, len(prompt), body.max_output_tokens, grammar=self._grammar())
        return service.request(self.id, prompt, sampling, self.key, adapter=self.adapter)

    def _grammar(self) -> GrammarSpec | None:
        format = (self.body.text.format if self.body.text else None) or {"type": "text"}
        kind = format.get("type")
        if kind == "text":
            return None
        if kind == "json_object":
            return GrammarSpec("json_object")
        if kind == "json_schema" and isinstance(format.get("schema"), dict):
            return GrammarSpec("json_schema", json.dumps(format["schema"]))
        raise ApiError(
            400, "text.format must be text, json_object, or json_schema with a schema", param="text.format"
        )

    def item(self, text: str, status: str) -> dict[str, Any]:
        part = {"type": "output_text", "text": text, "annotations": [], "logprobs": []}
        content = [part] if status != "in_progress" else []
        return {
            "id": self.message_id,
            "type": "message",
            "role": "assistant",
            "status": status,
            "content": content,
        }

    def object(self, status: str, text: str | None = None, reason: str | None = None) -> dict[str, Any]:
        """The response object in ``status``."""
        body = self.body
        usage = None
        if status != "in_progress":
            usage = {
                "input_tokens": self.usage.prompt_tokens,
                "input_tokens_details": {"cached_tokens": self.usage.cached_tokens},
                "output_tokens": self.usage.completion_tokens,
                "output_tokens_details": {"reasoning_tokens": 0},
                "total_tokens": self.usage.prompt_tokens + self.usage.completion_tokens,
            }
        return {
            "id": self.id,
            "object": "response",
            "created_at": self.created,
            "status": status,
            "background": False,
            "error": None,
            "incomplete_details": {"reason": "max_output_tokens"} if reason == "length" else None,
            "instructions": body.instructions,
            "max_output_tokens": body.max_output_tokens,
            "metadata": body.metadata or {},
            "model": body.model,
            "output": [] if text is None else [self.item(text, status)],
            "parallel_tool_calls": True,
            "previous_response_id": body.previous_response_id,
            "reasoning": {"effort": None, "summary": None},
            "store": body.store is not False,
            "temperature": 1.0 if body.temperature is None else body.temperature,
            "text": {"format": (body.text.format if body.text else None) or {"type": "text"}},
            "tool_choice": "auto",
            "tools": [],
            "top_p": 1.0 if body.top_p is None else body.top_p,
            "truncation": "disabled",
            "usage": usage,
            "user": body.user,
        }

    def finished(self, text: str, reason: str | None) -> dict[str, Any]:
        """The final object, stored unless the request says otherwise."""
        answer = self.object("incomplete" if reason == "length" else "completed", text, reason)
        if self.body.store is not False:
            messages = [*self.history, {"role": "assistant", "content": text}]
            self.service.store.store_response(self.id, self.key, json.dumps(answer), json.dumps(messages))
        return answer

    async def whole(self) -> dict[str, Any]:
        """The complete answer."""
        text, reason = "", None
        async for piece in self.service.generate(await self.request(), [], self.key, self.usage):
            if piece.finish_reason == "error":
                raise _failed(piece)
            text += piece.text
            reason = piece.finish_reason
        return self.finished(text, reason)

    async def events(self) -> AsyncIterator[bytes]:
        """The event sequence of OpenAI's streamed responses."""
        number = -1

        def send(kind: str, **fields: Any) -> bytes:
            nonlocal number
            number += 1
            return event({"type": kind, "sequence_number": number, **fields}, kind)

        request = await self.request()
        place = {"item_id": self.message_id, "output_index": 0, "content_index": 0}
        empty = {"type": "output_text", "text": "", "annotations": [], "logprobs": []}
        text, reason, begun = "", None, False
        try:
            async for piece in self.service.generate(request, [], self.key, self.usage):
                if not begun:
                    begun = True
                    yield send("response.created", response=self.object("in_progress"))
                    yield send("response.in_progress", response=self.object("in_progress"))
                    yield send(
                        "response.output_item.added", output_index=0, item=self.item("", "in_progress")
                    )
                    yield send("response.content_part.added", **place, part=empty)
                if piece.finish_reason == "error":
                    raise _failed(piece)
                if piece.text:
                    text += piece.text
                    yield send("response.output_text.delta", **place, delta=piece.text, logprobs=[])
                reason = piece.finish_reason
        except ApiError as error:
            if not begun:
                raise
            failed = self.object("failed", text) | {
                "error": {"code": "server_error", "message": error.message}
            }
            yield send("response.failed", response=failed)
            return
        answer = self.finished(text, reason)
        yield send("response.output_text.done", **place, text=text, logprobs=[])
        yield send("response.content_part.done", **place, part={**empty, "text": text})
        yield send("response.output_item.done", output_index=0, item=self.item(text, answer["status"]))
        yield send("response.incomplete" if reason == "length" else "response.completed", response=answer)


@router.post("/v1/responses")
async def create(request: Request, body: ResponsesRequest) -> Response:
    """Answer text with text; OpenAI's responses."""
    service: Service = request.app.state.service
    key = service.authorize(request.headers.get("authorization"), spend=True)
    refuse_unsupported(body)
    answer = Answer(service, body, key)
    if body.stream:
        return await stream(answer.events())
    return JSONResponse(await unless_gone(request, answer.whole()))


def _stored(request: Request, response_id: str) -> tuple[Service, ApiKey, str]:
    service: Service = request.app.state.service
    key = service.authorize(request.headers.get("authorization"), spend=False)
    stored = service.store.response(response_id, key)
    if stored is None:
        raise ApiError(404, f"response {response_id!r} does not exist", code="response_not_found")
    return service, key, stored[0]


@router.get("/v1/responses/{response_id}")
async def retrieve(request: Request, response_id: str) -> Response:
    """A stored response of this key."""
    return JSONResponse(json.loads(_stored(request, response_id)[2]))


@router.delete("/v1/responses/{response_id}")
async def delete(request: Request, response_id: str) -> Response:
    """Forget a stored response of this key."""
    service, key, _ = _stored(request, response_id)
    service.store.delete_response(response_id, key)
    return JSONResponse({"id": response_id, "object": "response", "deleted": True})
