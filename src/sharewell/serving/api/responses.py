"""/v1/responses: text in, text out, streamed or whole, with ``previous_response_id``."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from typing import Any

import orjson
from fastapi import APIRouter, Request
from fastapi.responses import Response

from ...models import TemplateError
from ..core.messages import EngineRequest
from .errors import ApiError
from .keys import ApiKey
from .relays import extension
from .schemas import Generation, ResponseFormatFlat, ResponseInput, ResponsesRequest, refuse_unsupported
from .service import Fields, Piece, Service, Usage, json_grammar, new_id
from .streaming import EITHER, event, stream, unless_gone
from .strict_json import JsonResponse, StrictRoute

router = APIRouter(route_class=StrictRoute)
FIELDS = Fields("input", "text.format", "max_output_tokens")


def input_messages(given: str | list[ResponseInput]) -> list[dict[str, str]]:
    """Input items as chat messages."""
    if isinstance(given, str):
        return [{"role": "user", "content": given}]
    messages = []
    for item in given:
        content = item.content
        if isinstance(content, list):
            content = "".join(part.text for part in content)
        messages.append({"role": "system" if item.role == "developer" else item.role, "content": content})
    return messages


class Answer:
    """One response on its way."""

    def __init__(
        self, service: Service, body: ResponsesRequest, key: ApiKey, cache_control: str | None = None
    ) -> None:
        self.service, self.body, self.key = service, body, key
        self.id, self.message_id = new_id("resp"), new_id("msg")
        self.created = int(service.clock.unix())
        self.usage = Usage()
        self.adapter = service.resolve(body.model)
        self.sharing = service.relays.wish(body.sharewell, key)
        self.format = (body.text.format if body.text else None) or ResponseFormatFlat()
        self.history = [*self._earlier(), *input_messages(body.input)]
        last = self.history[-1]
        self.ask = service.answers.ask(
            body, cache_control, question=last["content"] if last["role"] == "user" else "",
            history=[body.instructions, self.history[:-1]], max_tokens=body.max_output_tokens,
        )  # fmt: skip

    def _earlier(self) -> list[dict[str, str]]:
        """The conversation up to ``previous_response_id``. Raises ApiError 404."""
        previous = self.body.previous_response_id
        if previous is None:
            return []
        stored = self.service.store.response(previous, self.key)
        if stored is None:
            raise ApiError(
                404,
                f"previous response {previous[:200]!r} does not exist",
                param="previous_response_id",
                code="previous_response_not_found",
            )
        return orjson.loads(stored[1])

    async def request(self) -> EngineRequest:
        """The engine request. Raises ApiError 400. Instructions are of this response only, as with OpenAI."""
        service, body = self.service, self.body
        messages = self.history
        if body.instructions:
            messages = [{"role": "system", "content": body.instructions}, *messages]
        try:
            text = service.template.render(messages)
        except TemplateError as error:
            raise ApiError(400, str(error), param="input", code="invalid_messages") from None
        prompt = await service.encode_quoting(text, "input", self.sharing, self.key)
        common = Generation(model=body.model, temperature=body.temperature, top_p=body.top_p, seed=body.seed)
        grammar = json_grammar(self.format.type, self.format.schema_, "text.format.schema")
        sampling = service.sampling(common, len(prompt), body.max_output_tokens, FIELDS, grammar=grammar)
        return service.request(
            self.id, prompt, sampling, self.key, FIELDS, adapter=self.adapter, priority=body.priority,
            sharing=self.sharing,
        )  # fmt: skip

    def _pieces(self, request: EngineRequest) -> AsyncGenerator[Piece]:
        return self.service.generate(request, [], self.key, self.usage, FIELDS, ask=self.ask)

    def _item(self, text: str, status: str) -> dict[str, Any]:
        part = {"type": "output_text", "text": text, "annotations": [], "logprobs": []}
        return {
            "id": self.message_id,
            "type": "message",
            "role": "assistant",
            "status": status,
            "content": [] if status == "in_progress" else [part],
        }

    def _object(self, status: str, text: str | None = None) -> dict[str, Any]:
        """The response object in ``status``."""
        body, usage = self.body, None
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
            "incomplete_details": {"reason": "max_output_tokens"} if status == "incomplete" else None,
            "instructions": body.instructions,
            "max_output_tokens": body.max_output_tokens,
            "metadata": body.metadata or {},
            "model": body.model,
            "output": [] if text is None else [self._item(text, status)],
            "parallel_tool_calls": True,
            "previous_response_id": body.previous_response_id,
            "reasoning": {"effort": None, "summary": None},
            "store": body.store is not False,
            "temperature": 1.0 if body.temperature is None else body.temperature,
            "text": {"format": self.format.model_dump(by_alias=True, exclude_none=True)},
            "tool_choice": "auto",
            "tools": [],
            "top_p": 1.0 if body.top_p is None else body.top_p,
            "truncation": "disabled",
            "usage": usage,
            "user": body.user,
            **extension(self.usage.sharing),
        }

    def _finished(self, text: str, reason: str | None) -> dict[str, Any]:
        """The final object, stored unless the request says otherwise."""
        answer = self._object("incomplete" if reason == "length" else "completed", text)
        if self.body.store is not False:
            messages = [*self.history, {"role": "assistant", "content": text}]
            self.service.store.store_response(
                self.id, self.key, orjson.dumps(answer).decode(), orjson.dumps(messages).decode()
            )
        return answer

    async def whole(self) -> dict[str, Any]:
        """The complete answer."""
        text, reason = "", None
        async for piece in self._pieces(await self.request()):
            text += piece.text
            reason = piece.finish_reason
        return self._finished(text, reason)

    async def events(self) -> AsyncGenerator[bytes]:
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
            async for piece in self._pieces(request):
                if not begun:
                    begun = True
                    yield send("response.created", response=self._object("in_progress"))
                    yield send("response.in_progress", response=self._object("in_progress"))
                    item = self._item("", "in_progress")
                    yield send("response.output_item.added", output_index=0, item=item)
                    yield send("response.content_part.added", **place, part=empty)
                if piece.text:
                    text += piece.text
                    yield send("response.output_text.delta", **place, delta=piece.text, logprobs=[])
                reason = piece.finish_reason
        except ApiError as error:
            if not begun:
                raise
            problem = {"code": "server_error", "message": error.message}
            yield send("response.failed", response=self._object("failed", text) | {"error": problem})
            return
        answer = self._finished(text, reason)
        yield send("response.output_text.done", **place, text=text, logprobs=[])
        yield send("response.content_part.done", **place, part={**empty, "text": text})
        yield send("response.output_item.done", output_index=0, item=answer["output"][0])
        yield send("response.incomplete" if reason == "length" else "response.completed", response=answer)


@router.post("/v1/responses", responses=EITHER)
async def create(request: Request, body: ResponsesRequest) -> Response:
    """Answer text with text; OpenAI's responses."""
    service: Service = request.app.state.service
    key: ApiKey = request.scope["sharewell.key"]
    refuse_unsupported(body)
    answer = Answer(service, body, key, request.headers.get("cache-control"))
    service.admit(key)
    note = answer.ask.note
    if body.stream:
        return await stream(request, answer.events(), note.headers)
    whole = await unless_gone(request, answer.whole())
    return JsonResponse(whole, headers=note.headers())


def _missing(response_id: str) -> ApiError:
    return ApiError(404, f"response {response_id[:200]!r} does not exist", code="response_not_found")


@router.get("/v1/responses/{response_id}")
async def retrieve(request: Request, response_id: str) -> Response:
    """A stored response of this key."""
    service: Service = request.app.state.service
    stored = service.store.response(response_id, request.scope["sharewell.key"])
    if stored is None:
        raise _missing(response_id)
    return Response(stored[0], media_type="application/json")


@router.delete("/v1/responses/{response_id}")
async def delete(request: Request, response_id: str) -> Response:
    """Forget a stored response of this key."""
    service: Service = request.app.state.service
    if not service.store.delete_response(response_id, request.scope["sharewell.key"]):
        raise _missing(response_id)
    return JsonResponse({"id": response_id, "object": "response", "deleted": True})
