"""The cache in front of an ``openai`` client: ``client = cached(OpenAI(), cache)``, and nothing else changes.

Requests that ask for fresh samples (a temperature above 0 without a seed) and requests with tools go past the
semantic tier; the former go past the cache altogether unless ``sampled=True``.
"""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Iterator, Mapping
from typing import Any

from .cache import SemanticCache
from .lookup import Lookup
from .namespace import Namespace, Request, fingerprint

# what says how to talk to the server, and nothing about the answer
_TRANSPORT = frozenset(
    {
        "stream", "stream_options", "timeout", "extra_headers", "extra_query", "user", "metadata", "store",
        "service_tier", "safety_identifier", "prompt_cache_key",
    }
)  # fmt: skip


def cached(
    client: Any, cache: SemanticCache, *, owner: str = "local", tenant: str = "local", sampled: bool = False
) -> Any:
    """``client`` (OpenAI or AsyncOpenAI) whose ``chat.completions.create`` asks ``cache`` first.

    Answers carry ``sharewell_cache``: a dict of status, similarity and age. ``owner`` and ``tenant`` are whom
    answers may be shared with. Everything else of the client is as it was.
    """
    return _Through(
        client,
        {"chat": _Through(client.chat, {"completions": _Completions(client, cache, owner, tenant, sampled)})},
    )


class _Through:
    """``inner``, with some attributes replaced."""

    def __init__(self, inner: Any, replaced: Mapping[str, Any]) -> None:
        self._inner, self._replaced = inner, replaced

    def __getattr__(self, name: str) -> Any:
        replaced = self.__dict__["_replaced"]
        return replaced[name] if name in replaced else getattr(self.__dict__["_inner"], name)


class _Completions(_Through):
    def __init__(self, client: Any, cache: SemanticCache, owner: str, tenant: str, sampled: bool) -> None:
        super().__init__(client.chat.completions, {})
        self._cache, self._sampled = cache, sampled
        self._owner, self._tenant = owner, tenant
        self._base_url = str(getattr(client, "base_url", ""))
        self._asynchronous = hasattr(type(client), "__aenter__")

    def create(self, **fields: Any) -> Any:
        plan = _Plan.of(fields, self._base_url, self._owner, self._tenant, self._sampled)
        if self._asynchronous:
            return self._create_async(fields, plan)
        if plan is None:
            return self._inner.create(**fields)
        found = self._cache.lookup(plan.request, namespace=plan.namespace, semantic=plan.semantic)
        if found.hit:
            return _replay(found) if fields.get("stream") else _whole(found)
        start = self._cache.clock.monotonic()
        answer = self._inner.create(**fields)
        if fields.get("stream"):
            return self._watch(answer, plan, found, start)
        self._keep(answer.model_dump(mode="json", exclude_unset=True), plan, found, start)
        return _marked(answer, found)

    async def _create_async(self, fields: dict[str, Any], plan: _Plan | None) -> Any:
        import asyncio

        if plan is None:
            return await self._inner.create(**fields)
        found = await asyncio.to_thread(
            self._cache.lookup, plan.request, namespace=plan.namespace, semantic=plan.semantic
        )
        if found.hit:
            return _replay_async(found) if fields.get("stream") else _whole(found)
        start = self._cache.clock.monotonic()
        answer = await self._inner.create(**fields)
        if fields.get("stream"):
            return self._watch_async(answer, plan, found, start)
        body = answer.model_dump(mode="json", exclude_unset=True)
        await asyncio.to_thread(self._keep, body, plan, found, start)
        return _marked(answer, found)

    def _watch(self, chunks: Any, plan: _Plan, found: Lookup, start: float) -> Iterator[Any]:
        gathered = _Gathered()
        for chunk in chunks:
            gathered.add(chunk)
            yield _marked(chunk, found)
        self._keep(gathered.body(), plan, found, start)

    async def _watch_async(self, chunks: Any, plan: _Plan, found: Lookup, start: float) -> AsyncIterator[Any]:
        gathered = _Gathered()
        async for chunk in chunks:
            gathered.add(chunk)
            yield _marked(chunk, found)
        self._keep(gathered.body(), plan, found, start)

    def _keep(self, body: dict[str, Any] | None, plan: _Plan, found: Lookup, start: float) -> None:
        """Store a complete answer; what was cut off is nobody's answer."""
        reasons = [choice.get("finish_reason") for choice in (body or {}).get("choices", [])]
        if body is None or not reasons or not set(reasons) <= {"stop", "length", "tool_calls"}:
            return
        text = " ".join(choice["message"].get("content") or "" for choice in body["choices"])
        self._cache.put(
            plan.request, json.dumps(body), namespace=plan.namespace, answer_text=text, looked=found,
            cost_s=self._cache.clock.monotonic() - start, semantic=plan.semantic and set(reasons) == {"stop"},
        )  # fmt: skip


class _Plan:
    """What of a request is its question and what its namespace."""

    def __init__(self, request: Request, namespace: Namespace, semantic: bool) -> None:
        self.request, self.namespace, self.semantic = request, namespace, semantic

    @classmethod
    def of(
        cls, fields: dict[str, Any], base_url: str, owner: str, tenant: str, sampled: bool
    ) -> _Plan | None:
        """None for what must not be answered from a cache."""
        extra = (fields.get("extra_body") or {}).get("sharewell") or {}
        if extra.get("cache") == "off":
            return None
        temperature = fields.get("temperature")
        fresh = (temperature is None or temperature > 0) and fields.get("seed") is None
        if fresh and not (sampled or extra.get("cache")):
            return None
        shaping = {k: v for k, v in fields.items() if k not in _TRANSPORT and k != "messages"}
        try:
            messages = json.loads(json.dumps([_plain(m) for m in fields.get("messages") or []]))
            context = fingerprint(
                base_url=base_url, shaping=json.loads(json.dumps(shaping)), history=messages[:-1]
            )
        except (TypeError, ValueError):  # not JSON: nothing that could be compared later
            return None
        last = messages[-1] if messages else {}
        question = last.get("content")
        if not isinstance(question, str) or not question.strip() or last.get("role") != "user":
            return None
        semantic = not fields.get("tools") and (fields.get("n") or 1) == 1 and not fields.get("logprobs")
        namespace = Namespace(owner, tenant, str(fields.get("model", "")), context)
        return cls(Request(question, json.dumps(last)), namespace, semantic)


def _plain(message: Any) -> Any:
    return message.model_dump(mode="json", exclude_unset=True) if hasattr(message, "model_dump") else message


class _Gathered:
    """Chunks of a stream, put together again."""

    def __init__(self) -> None:
        self._head: dict[str, Any] = {}
        self._choices: dict[int, dict[str, Any]] = {}
        self._usage: Any = None
        self._plain = True

    def add(self, chunk: Any) -> None:
        body = chunk.model_dump(mode="json", exclude_unset=True)
        self._head = self._head or {k: v for k, v in body.items() if k not in ("choices", "usage", "object")}
        self._usage = body.get("usage") or self._usage
        for choice in body.get("choices", []):
            kept = self._choices.setdefault(
                choice["index"], {"index": choice["index"], "message": {"role": "assistant", "content": ""}}
            )
            delta = choice.get("delta") or {}
            # calls and scores of a stream would have to be merged piece by piece: such a stream is not stored
            self._plain &= not (delta.get("tool_calls") or choice.get("logprobs"))
            kept["message"]["content"] += delta.get("content") or ""
            kept["finish_reason"] = choice.get("finish_reason") or kept.get("finish_reason")

    def body(self) -> dict[str, Any] | None:
        """The whole answer, None when it cannot be put together."""
        if not self._choices or not self._plain:
            return None
        choices = [{"logprobs": None, **self._choices[i]} for i in sorted(self._choices)]
        whole = {**self._head, "object": "chat.completion", "choices": choices}
        return whole | ({"usage": self._usage} if self._usage else {})


def _marked(answer: Any, found: Lookup) -> Any:
    note = {"status": found.status, "reason": found.reason, "category": found.category}
    if found.hit:
        note |= {"tier": found.tier, "similarity": found.similarity, "age_s": found.age_s}
    answer.sharewell_cache = note
    return answer


def _whole(found: Lookup) -> Any:
    from openai.types.chat import ChatCompletion

    return _marked(ChatCompletion.model_validate(json.loads(found.response)), found)


def _chunks(found: Lookup) -> Iterator[Any]:
    from openai.types.chat import ChatCompletionChunk

    body = json.loads(found.response)
    common = {k: body.get(k) for k in ("id", "created", "model")} | {"object": "chat.completion.chunk"}
    for choice in body["choices"]:
        message = choice["message"]
        calls = [{"index": i, **call} for i, call in enumerate(message.get("tool_calls") or [])]
        delta = {"role": "assistant", "content": message.get("content")}
        delta |= {"tool_calls": calls} if calls else {}
        for part, reason in ((delta, None), ({}, choice["finish_reason"])):
            one = {"index": choice["index"], "delta": part, "finish_reason": reason}
            yield _marked(ChatCompletionChunk.model_validate({**common, "choices": [one]}), found)


def _replay(found: Lookup) -> Iterator[Any]:
    return _chunks(found)


async def _replay_async(found: Lookup) -> AsyncIterator[Any]:
    for chunk in _chunks(found):
        yield chunk
