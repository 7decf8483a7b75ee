"""What every endpoint needs: the engine, the model's text side, keys and metrics, and one stream of answer text."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import hashlib
import logging
import secrets
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ...models import ChatTemplate, Embedder, IncrementalDetokenizer, Tokenizer, load_embedder, resolve_model
from ...simulation import Clock
from ..core.messages import EngineRequest, GrammarSpec, SamplingParams, TokenLogprob
from ..core.process import AsyncEngine, Draining, EngineFailed, QueueFull, Refused
from .config import ServerConfig
from .errors import ApiError, from_engine
from .keys import ApiKey, StateStore
from .metrics import Metrics
from .schemas import Generation, ResponseFormat
from .text import StopScanner

log = logging.getLogger(__name__)
ENGINE_ERRORS = (QueueFull, Refused, Draining, EngineFailed)


@dataclass
class Usage:
    """Tokens of one request, updated while it streams."""

    prompt_tokens: int = 0
    completion_tokens: int = 0
    cached_tokens: int = 0

    def body(self) -> dict[str, Any]:
        return {
            "prompt_tokens": self.prompt_tokens,
            "completion_tokens": self.completion_tokens,
            "total_tokens": self.prompt_tokens + self.completion_tokens,
            "prompt_tokens_details": {"cached_tokens": self.cached_tokens},
        }


@dataclass
class Piece:
    """Something to show of one choice: text that is certain, its tokens, and at the end the reason."""

    index: int
    text: str
    logprobs: tuple[TokenLogprob, ...] = ()
    finish_reason: str | None = None
    prompt_logprobs: tuple[TokenLogprob | None, ...] | None = None
    stop_text: str | None = None


@dataclass
class _Choice:
    detokenizer: IncrementalDetokenizer
    scanner: StopScanner
    tokens: int = 0
    pending: list[TokenLogprob] = field(default_factory=list)
    last_at: float | None = None
    first_at: float | None = None
    done: bool = False


class Service:
    """The server's parts. ``engine`` is set when it has started."""

    def __init__(self, config: ServerConfig, clock: Clock) -> None:
        self.config, self.clock = config, clock
        folder = resolve_model(config.engine.model, allow_pull=True)
        self.folder: Path = folder
        self.tokenizer = Tokenizer(folder)
        self.template = ChatTemplate(folder)
        self.store = StateStore(config.state_path, clock)
        self.metrics = Metrics()
        self.engine: AsyncEngine
        self.draining = False
        self.started_unix = int(clock.unix())
        self.started = clock.monotonic()
        self._embedder: Embedder | None = None
        self._embedder_lock = asyncio.Lock()
        self._any_key: tuple[float, bool] = (-1.0, False)

    async def start(self) -> None:
        """Start the engine. Raises EngineFailed with its message."""
        self.engine = await AsyncEngine.start(
            self.config.engine, recover_timeout_s=self.config.recover_timeout_s, clock=self.clock
        )

    async def stop(self) -> None:
        """Stop the engine and close the state file."""
        await self.engine.drain(self.config.drain_timeout_s)
        await self.engine.close()
        self.store.close()

    # Who asks, and for what

    def key_required(self) -> bool:
        """True when requests must carry an API key; looked up at most once a second."""
        now = self.clock.monotonic()
        if now - self._any_key[0] > 1 or self._any_key[0] < 0:
            self._any_key = (now, self.store.any_key)
        return self._any_key[1]

    def authorize(self, header: str | None, *, spend: bool) -> ApiKey:
        """The key of an Authorization header. Raises ApiError 401, or 429 when ``spend`` and a budget is used up."""
        if not self.key_required():
            return ApiKey(0, "local")
        secret = header[7:].strip() if header and header[:7].lower() == "bearer " else ""
        key = self.store.find(secret) if secret else None
        if key is None:
            raise ApiError(
                401, "a valid API key is needed in the Authorization header", code="invalid_api_key"
            )
        if spend and (over := self.store.exceeded(key)):
            code = "rate_limit_exceeded" if over.retry_after_s is not None else "insufficient_quota"
            raise ApiError(429, f"budget used up: {over.what}", code=code, retry_after_s=over.retry_after_s)
        return key

    def model_names(self) -> list[str]:
        """Names that requests may use: served names and ``<base>:<adapter>``."""
        bases = self.config.names
        return [*bases, *(f"{bases[0]}:{adapter}" for adapter in self.engine.adapters)]

    def resolve(self, name: str) -> str | None:
        """The adapter that model ``name`` means, None for the base model. Raises ApiError 404."""
        base, _, adapter = name.partition(":")
        if base in (*self.config.names, self.config.engine.model) and (
            not adapter or adapter in self.engine.adapters
        ):
            return adapter or None
        known = ", ".join(self.model_names())
        raise ApiError(
            404, f"model {name!r} does not exist; there are: {known}", param="model", code="model_not_found"
        )

    # Text and tokens

    async def encode(self, text: str) -> list[int]:
        """Token ids; long texts off the event loop."""
        if len(text) < 4096:
            return self.tokenizer.encode(text)
        return await asyncio.to_thread(self.tokenizer.encode, text)

    async def embedder(self) -> Embedder:
        """The embedding model, loaded at first use."""
        async with self._embedder_lock:
            if self._embedder is None:
                self._embedder = await asyncio.to_thread(load_embedder, self.config.embedding_model, 1)
        return self._embedder

    def grammar(self, format: ResponseFormat | None) -> GrammarSpec | None:
        """The constraint of a ``response_format``."""
        import json

        if format is None or format.type == "text":
            return None
        if format.type == "json_object":
            return GrammarSpec("json_object")
        if format.json_schema is None:
            raise ApiError(
                400, "response_format.json_schema is required", param="response_format.json_schema"
            )
        return GrammarSpec("json_schema", json.dumps(format.json_schema.schema_))

    def sampling(
        self, body: Generation, n_prompt: int, max_tokens: int | None, **more: Any
    ) -> SamplingParams:
        """Sampling parameters of a request; what is not given has OpenAI's default. Raises ApiError 400."""
        room = self.engine.info.context_length - n_prompt
        limit = max(0, room) if max_tokens is None else max_tokens
        if max_tokens is not None and n_prompt < self.engine.info.context_length < n_prompt + max_tokens:
            raise ApiError(
                400,
                f"the model's context is {self.engine.info.context_length} tokens, but the prompt has {n_prompt} and"
                f" max_tokens asks for {max_tokens}",
                param="max_tokens",
                code="context_length_exceeded",
            )
        try:
            biases = {int(k): v for k, v in (body.logit_bias or {}).items()}
        except ValueError:
            raise ApiError(400, "logit_bias must have token ids as keys", param="logit_bias") from None
        seed = body.seed % 2**64 if body.seed is not None else secrets.randbits(64)
        given = {
            "temperature": body.temperature, "top_p": body.top_p, "min_p": body.min_p, "min_tokens": body.min_tokens,
            "presence_penalty": body.presence_penalty, "frequency_penalty": body.frequency_penalty,
            "repetition_penalty": body.repetition_penalty, "top_k": None if body.top_k is None else max(0, body.top_k),
        }  # fmt: skip
        try:
            return SamplingParams(
                seed=seed,
                max_tokens=limit,
                logit_bias=biases,
                ignore_eos=body.ignore_eos,
                stop_token_ids=tuple(body.stop_token_ids or ()),
                **{k: v for k, v in given.items() if v is not None},
                **more,
            )
        except ValueError as error:
            raise ApiError(400, str(error), param=str(error).split(" ", 1)[0], code="invalid_value") from None

    def request(
        self, request_id: str, prompt: Sequence[int], sampling: SamplingParams, key: ApiKey, *, n: int = 1,
        adapter: str | None = None, priority: int = 0,
    ) -> EngineRequest:  # fmt: skip
        """An engine request whose shared prefixes stay within the key unless the operator widened ``share_scope``."""
        if not prompt:
            raise ApiError(
                400, "the prompt must have at least one token", param="prompt", code="empty_prompt"
            )
        if len(prompt) + 1 > self.engine.info.context_length:
            raise ApiError(
                400,
                f"the prompt has {len(prompt)} tokens, but the model's context is {self.engine.info.context_length} tokens",
                param="messages",
                code="context_length_exceeded",
            )
        salt = (
            ""
            if self.config.share_scope == "all"
            else hashlib.blake2b(str(key.id).encode(), digest_size=8).hexdigest()
        )
        return EngineRequest(
            request_id, tuple(prompt), sampling, n, adapter, priority, salt, arrival_s=self.clock.monotonic()
        )

    async def generate(
        self,
        request: EngineRequest,
        stops: Sequence[str],
        key: ApiKey,
        usage: Usage,
        *,
        keep_special: bool = False,
    ) -> AsyncIterator[Piece]:
        """The answer's pieces, all choices mixed. ``usage`` is kept current and in the ledger before the last piece.

        Raises ApiError before the first piece; a failure in the middle is a piece with finish_reason "error".
        """
        if self.draining:
            raise ApiError(503, "the server is shutting down", code="draining", retry_after_s=5)
        usage.prompt_tokens += len(request.prompt_ids)
        choices = {
            i: _Choice(
                IncrementalDetokenizer(self.tokenizer, request.prompt_ids[-4:], not keep_special),
                StopScanner(stops),
            )
            for i in range(request.n)
        }
        left = set(choices)
        first = True
        stream = self.engine.submit(request)
        try:
            async with contextlib.aclosing(stream) as outputs:  # pyright: ignore[reportArgumentType]
                async for output in outputs:
                    choice = choices[output.index]
                    if choice.done:
                        continue
                    now = self.clock.monotonic()
                    if output.token_ids:
                        if choice.last_at is not None:
                            self.metrics.next_token(now - choice.last_at)
                        elif first:
                            self.metrics.first_token(now - request.arrival_s)
                        choice.first_at = choice.first_at or now
                        choice.last_at = now
                    if first and output.cached_tokens:
                        usage.cached_tokens += output.cached_tokens
                    first = False
                    choice.tokens += len(output.token_ids)
                    usage.completion_tokens += len(output.token_ids)
                    choice.pending += output.logprobs
                    text = choice.scanner.push(choice.detokenizer.push(output.token_ids))
                    reason = output.finish_reason
                    if choice.scanner.stopped is not None:
                        reason = "stop"
                    elif reason is not None:
                        text += choice.scanner.push(choice.detokenizer.flush())
                        if choice.scanner.stopped is None:
                            text += choice.scanner.flush()
                        else:
                            reason = "stop"
                    if reason is not None:
                        choice.done = True
                        left.discard(output.index)
                        if choice.tokens > 1 and choice.first_at is not None and choice.last_at is not None:
                            self.metrics.tpot.observe(
                                (choice.last_at - choice.first_at) / (choice.tokens - 1)
                            )
                        if not left:
                            self.store.record(
                                request.request_id,
                                key,
                                usage.prompt_tokens,
                                usage.completion_tokens,
                                usage.cached_tokens,
                            )
                    if text or reason is not None or output.prompt_logprobs is not None or choice.pending:
                        if reason == "error":
                            log.warning("request %s failed: %s", request.request_id, output.error)
                        scored, choice.pending = tuple(choice.pending), []
                        yield Piece(
                            output.index, text, scored, reason, output.prompt_logprobs,
                            output.error if reason == "error" else choice.scanner.stopped,
                        )  # fmt: skip
                    if not left:
                        return
        except ENGINE_ERRORS as error:
            raise from_engine(error) from None
        finally:
            if left and usage.completion_tokens:  # the client went away: what was computed still counts
                self.store.record(
                    request.request_id, key, usage.prompt_tokens, usage.completion_tokens, usage.cached_tokens
                )

    async def stats(self) -> dict[str, Any]:
        """What the page shows."""
        from ... import __version__

        stats = await self.engine.stats()
        now = self.clock.monotonic()
        return {
            "engine": dataclasses.asdict(stats),
            "info": dataclasses.asdict(self.engine.info),
            "rates": self.metrics.rates(now, stats),
            "latency": self.metrics.latency(),
            "saved": {
                "tokens": stats.cached_prompt_tokens,
                "seconds": stats.cached_prompt_tokens * stats.prefill_s_per_token,
            },
            "uptime_s": now - self.started,
            "auth_required": self.key_required(),
            "version": __version__,
        }


def new_id(prefix: str) -> str:
    """A random id such as ``chatcmpl-...``."""
    return f"{prefix}-{secrets.token_hex(12)}"


def stop_list(stop: str | list[str] | None) -> list[str]:
    """``stop`` as a list."""
    return [] if stop is None else [stop] if isinstance(stop, str) else stop
