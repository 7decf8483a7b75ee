"""What every endpoint needs: engine, text side of the model, keys, metrics, and one stream of answer text."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import hashlib
import logging
import secrets
import sys
from collections.abc import AsyncGenerator, Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import orjson

from ...models import ChatTemplate, Embedder, IncrementalDetokenizer, Tokenizer, load_embedder, resolve_model
from ...simulation import Clock
from ..core.messages import EngineRequest, GrammarSpec, SamplingParams, TokenLogprob, TokenOutput
from ..core.process import AsyncEngine, Draining, EngineFailed, QueueFull, Refused
from .answers import Answers, Ask, model_identity
from .config import ServerConfig
from .errors import ApiError, from_engine, from_failure
from .keys import ApiKey, StateStore
from .metrics import Metrics
from .relays import Relays, Sharing
from .schemas import Generation
from .text import StopScanner

log = logging.getLogger(__name__)
T = TypeVar("T")
ENGINE_ERRORS = (QueueFull, Refused, Draining, EngineFailed)
LOWEST_PRIORITY = 2**31 - 1
LONG_TEXT = 4096  # characters; longer ones are tokenised off the event loop
MOST_CHARACTERS_A_TOKEN = 64  # of a text that is tokenised at all; ordinary texts have three to five


@dataclass
class Usage:
    """Tokens of one request, updated while it streams."""

    prompt_tokens: int = 0
    completion_tokens: int = 0
    cached_tokens: int = 0
    sharing: Mapping[str, Any] | None = None  # what relaying did, for requests that opted in

    def add(self, other: Usage) -> None:
        self.prompt_tokens += other.prompt_tokens
        self.completion_tokens += other.completion_tokens
        self.cached_tokens += other.cached_tokens
        self.sharing = self.sharing or other.sharing

    def body(self) -> dict[str, Any]:
        """OpenAI's form."""
        return {
            "prompt_tokens": self.prompt_tokens,
            "completion_tokens": self.completion_tokens,
            "total_tokens": self.prompt_tokens + self.completion_tokens,
            "prompt_tokens_details": {"cached_tokens": self.cached_tokens},
        }


@dataclass(frozen=True)
class Fields:
    """The request's fields that hold prompt, constraint and limit: what errors about them name."""

    prompt: str
    grammar: str
    max_tokens: str = "max_tokens"


@dataclass
class Piece:
    """Something to show of one choice: certain text, its tokens' scores, and at the end the reason."""

    index: int
    text: str
    logprobs: tuple[TokenLogprob, ...] = ()
    finish_reason: str | None = None
    prompt_logprobs: tuple[TokenLogprob | None, ...] | None = None


@dataclass
class _Choice:
    """One choice on its way from tokens to text."""

    detokenizer: IncrementalDetokenizer
    scanner: StopScanner
    tokens: int = 0
    first_at: float | None = None
    last_at: float | None = None
    reason: str | None = None
    said: str = ""  # of requests that relay
    token_ids: list[int] = field(default_factory=list)

    def take(self, output: TokenOutput) -> str:
        """The text that ``output`` makes certain; sets ``reason`` at the end."""
        self.tokens += len(output.token_ids)
        text = self.scanner.push(self.detokenizer.push(output.token_ids))
        self.reason = output.finish_reason
        if self.reason is not None and self.scanner.stopped is None:
            text += self.scanner.push(self.detokenizer.flush())
        if self.scanner.stopped is not None:
            self.reason = "stop"
        elif self.reason is not None:
            text += self.scanner.flush()
        return text


class Service:
    """The server's parts. ``engine`` is there from :meth:`start` on. Raises ModelError for a model without a
    readable tokenizer or template."""

    def __init__(self, config: ServerConfig, clock: Clock) -> None:
        self.config, self.clock = config, clock
        self.folder: Path = resolve_model(config.engine.model)
        self.tokenizer = Tokenizer(self.folder)
        self.template = ChatTemplate(self.folder)
        self.store = StateStore(config.state_path, clock)
        self.metrics = Metrics()
        self.relays = Relays(config, self.tokenizer, self.store)
        identity = model_identity(self.folder, config)
        self.answers = Answers(config, clock, identity, lambda: load_embedder(config.embedding_model, 1))
        self.metrics.registry.register(self.answers.collector())
        self.engine: AsyncEngine
        self.draining = False
        self.started_unix = int(clock.unix())
        self._started = clock.monotonic()
        self._embedder: Embedder | None = None
        # One thread, however many ask: the other cores are the engine's. Requests take turns group by group.
        self._embedding = ThreadPoolExecutor(1, "sharewell-embedding")
        self._key_required: tuple[float, bool] | None = None

    async def start(self) -> None:
        """Start the engine. Raises EngineFailed with its message."""
        self.engine = await AsyncEngine.start(
            self.config.engine, recover_timeout_s=self.config.recover_timeout_s, clock=self.clock
        )
        if self.answers.cache is not None:
            self.answers.upkeep.watch(self.engine.stats, self.config.cache_queue or self.engine.info.max_seqs)

    async def stop(self, drain_timeout_s: float) -> None:
        """Wait for what is under way, stop the engine and close the state file."""
        self.draining = True
        if self.answers.cache is not None:
            await self.answers.upkeep.rest()
        await self.engine.drain(drain_timeout_s)
        await self.engine.close()
        self._embedding.shutdown(cancel_futures=True)
        await self.answers.stop()
        self.store.close()

    # Who asks, and for what

    def key_required(self) -> bool:
        """True when requests must carry an API key; looked up at most once a second."""
        now = self.clock.monotonic()
        if self._key_required is None or now - self._key_required[0] > 1:
            self._key_required = (now, self.store.ever_key)
        return self._key_required[1]

    def find_key(self, header: str | None) -> ApiKey:
        """The key of an Authorization header; the keyless user while no key exists. Raises ApiError 401."""
        if not self.key_required():
            return ApiKey(0, "local")
        secret = header[7:].strip() if header and header[:7].lower() == "bearer " else ""
        key = self.store.find(secret) if secret else None
        if key is None:
            message = "a valid API key is needed in the Authorization header"
            raise ApiError(401, message, code="invalid_api_key")
        return key

    def admit(self, key: ApiKey) -> None:
        """Count one request that costs tokens against the key's budgets. Raises ApiError 429."""
        over = self.store.admit(key)
        if over is not None:
            code = "insufficient_quota" if over.retry_after_s is None else "rate_limit_exceeded"
            raise ApiError(429, f"budget used up: {over.what}", code=code, retry_after_s=over.retry_after_s)

    def model_names(self) -> list[str]:
        """Names that requests may use: served names and ``<base>:<adapter>``."""
        bases = self.config.names
        return [*bases, *(f"{bases[0]}:{adapter}" for adapter in self.engine.adapters)]

    def resolve(self, name: str) -> str | None:
        """The adapter that model ``name`` means, None for the base model. Raises ApiError 404."""
        if name in (*self.config.names, self.config.engine.model):
            return None
        base, _, adapter = name.partition(":")
        if base in self.config.names and adapter in self.engine.adapters:
            return adapter
        known = ", ".join(self.model_names())
        raise ApiError(
            404,
            f"model {name[:200]!r} does not exist; there are: {known}",
            param="model",
            code="model_not_found",
        )

    # Text and tokens

    async def encode(self, text: str, param: str, *, special: bool = False) -> list[int]:
        """Token ids. ``special`` adds what the tokenizer itself puts around a text, such as a first token.

        Raises ApiError 400 about field ``param`` for a text that is far beyond the model's context: making
        tokens of many megabytes takes a hundred times their memory.
        """
        context = self.engine.info.context_length
        most = max(1 << 20, MOST_CHARACTERS_A_TOKEN * context)
        if len(text) > most:
            raise ApiError(
                400,
                f"the prompt has {len(text)} characters, but the model's context is {context} tokens; at most"
                f" {most} characters are taken",
                param=param,
                code="context_length_exceeded",
            )
        if len(text) < LONG_TEXT:
            return self.tokenizer.encode(text, special)
        return await asyncio.to_thread(self.tokenizer.encode, text, special)

    async def encode_quoting(
        self, text: str, param: str, sharing: Sharing | None, key: ApiKey, *, special: bool = False
    ) -> list[int]:
        """:meth:`encode`; where a request that relays quotes earlier answers, those have the ids they were
        decoded as."""
        if sharing is None:
            return await self.encode(text, param, special=special)
        ids: list[int] = []
        for piece in self.relays.weave(text, sharing, key):
            if isinstance(piece, str):
                ids += await self.encode(piece, param, special=special and not ids)
            else:
                ids += piece
        return ids

    async def with_embedder(self, work: Callable[[Embedder], T]) -> T:
        """``work`` on the embedding model, off the event loop; the model is loaded at first use."""

        def run() -> T:
            if self._embedder is None:
                self._embedder = load_embedder(self.config.embedding_model, 1)
                if "torch" in sys.modules:
                    sys.modules["torch"].set_num_threads(1)
            return work(self._embedder)

        return await asyncio.get_running_loop().run_in_executor(self._embedding, run)

    def sampling(
        self, body: Generation, n_prompt: int, max_tokens: int | None, fields: Fields, **more: Any
    ) -> SamplingParams:
        """Sampling parameters of a request; what is not given has OpenAI's default. Raises ApiError 400."""
        limit = self.engine.info.context_length
        if max_tokens is not None and n_prompt < limit < n_prompt + max_tokens:
            raise ApiError(
                400,
                f"the model's context is {limit} tokens, but the prompt has {n_prompt} and"
                f" {fields.max_tokens} asks for {max_tokens}",
                param=fields.max_tokens,
                code="context_length_exceeded",
            )
        given = {
            "temperature": body.temperature, "top_p": body.top_p, "min_p": body.min_p,
            "top_k": None if body.top_k is None else max(0, body.top_k), "min_tokens": body.min_tokens,
            "presence_penalty": body.presence_penalty, "frequency_penalty": body.frequency_penalty,
            "repetition_penalty": body.repetition_penalty, "ignore_eos": body.ignore_eos,
        }  # fmt: skip
        known = {name: value for name, value in given.items() if value is not None}
        try:
            return SamplingParams(
                seed=secrets.randbits(64) if body.seed is None else body.seed % 2**64,
                max_tokens=max(0, limit - n_prompt) if max_tokens is None else max_tokens,
                logit_bias={int(token): bias for token, bias in (body.logit_bias or {}).items()},
                stop_token_ids=tuple(body.stop_token_ids or ()),
                **{**known, **more},
            )
        except ValueError as error:
            field = str(error).partition(" ")[0].partition("[")[0]
            raise ApiError(400, str(error), param=field, code="invalid_value") from None

    def request(
        self, request_id: str, prompt: Sequence[int], sampling: SamplingParams, key: ApiKey,
        fields: Fields, *, n: int = 1, adapter: str | None = None, priority: int = 0,
        sharing: Sharing | None = None,
    ) -> EngineRequest:  # fmt: skip
        """An engine request whose shared prefixes stay within the key unless the operator widened
        ``share_scope``. Raises ApiError 400 for a prompt of no tokens or too many."""
        limit = self.engine.info.context_length
        if not prompt:
            message = "the prompt must have at least one token"
            raise ApiError(400, message, param=fields.prompt, code="empty_prompt")
        if len(prompt) + 1 > limit:
            raise ApiError(
                400,
                f"the prompt has {len(prompt)} tokens, but the model's context is {limit}, answer included",
                param=fields.prompt,
                code="context_length_exceeded",
            )
        salt = "" if self.config.share_scope == "all" else key_salt(key)
        return EngineRequest(
            request_id, tuple(prompt), sampling, n, adapter, priority, salt, arrival_s=self.clock.monotonic(),
            sharing=None if sharing is None else sharing.wire(),
        )  # fmt: skip

    async def generate(
        self, request: EngineRequest, stops: Sequence[str], key: ApiKey, usage: Usage, fields: Fields, *,
        keep_special: bool = False, ask: Ask | None = None,
    ) -> AsyncGenerator[Piece]:  # fmt: skip
        """The answer's pieces, all choices mixed, from the cache where ``ask`` allows it and it has them;
        closing the generator cancels the request.

        ``usage`` is kept current, and is in the ledger before the last piece. Raises as :meth:`_compute`.
        """

        def compute() -> AsyncGenerator[Piece]:
            return self._compute(request, stops, key, usage, fields, keep_special=keep_special)

        def again() -> AsyncGenerator[Piece]:
            """The same once more when nobody else wants the engine, and on nobody's bill."""
            later = dataclasses.replace(
                request,
                request_id=new_id("recheck"),
                priority=LOWEST_PRIORITY,
                arrival_s=self.clock.monotonic(),
            )
            return self._compute(later, stops, key, Usage(), fields, keep_special=keep_special, counts=False)

        if ask is None or ask.mode == "off":
            self.answers.bypassed += 1
            pieces = compute()
        else:
            pieces = self.answers.through(request, stops, keep_special, key, ask, usage, compute, again)
        told = False
        async with contextlib.aclosing(pieces):
            async for piece in pieces:
                if hit := not told and ask is not None and ask.note.status == "hit":
                    self._record(request, key, usage)  # what the engine computes it records itself
                    self.relays.alias(request.request_id, ask.note.source, key)  # pyright: ignore[reportOptionalMemberAccess]
                told = told or hit
                yield piece

    async def _compute(
        self, request: EngineRequest, stops: Sequence[str], key: ApiKey, usage: Usage, fields: Fields, *,
        keep_special: bool, counts: bool = True,
    ) -> AsyncGenerator[Piece]:  # fmt: skip
        """The answer's pieces as the engine makes them.

        ``usage`` is kept current, and is in the ledger before the last piece, unless it does not count (then
        no latency is recorded either). Raises ApiError: before the
        first piece when the engine refuses, later when it fails.
        """
        tail = request.prompt_ids[-4:]
        choices = [
            _Choice(IncrementalDetokenizer(self.tokenizer, tail, not keep_special), StopScanner(stops))
            for _ in range(request.n)
        ]
        left = set(range(request.n))
        usage.prompt_tokens += len(request.prompt_ids)
        begun = False
        if counts:
            self._record(request, key, usage)
        try:
            # The engine's iterator cancels the request when it is left early.
            async with contextlib.aclosing(self.engine.submit(request)) as outputs:  # pyright: ignore[reportArgumentType]
                async for output in outputs:
                    choice = choices[output.index]
                    if choice.reason is not None:
                        continue  # stopped by its text; what came meanwhile is not wanted
                    if not begun:
                        usage.cached_tokens += output.cached_tokens
                    if output.sharing is not None and counts and usage.sharing is None:
                        usage.sharing = output.sharing
                        self.relays.explain(request.request_id, key, request.prompt_ids, output.sharing)
                    if output.token_ids and counts:
                        self._time(request, choice, first=not begun)
                    begun = True
                    usage.completion_tokens += len(output.token_ids)
                    if output.finish_reason == "error":
                        log.warning("request %s failed: %s", request.request_id, output.error)
                        raise from_failure(output.error)
                    text = choice.take(output)
                    if request.sharing is not None and counts:
                        choice.said += text
                        choice.token_ids += output.token_ids
                        if choice.reason is not None:
                            self._keep(request, key, choice)
                    if choice.reason is not None:
                        if output.finish_reason is None:  # a stop string, which the engine knows nothing of
                            self.engine.cancel_choice(request.request_id, output.index)
                        left.discard(output.index)
                        if counts:
                            self._time_whole(choice)
                        if not left and counts:
                            self._record(request, key, usage)
                    if text or output.logprobs or choice.reason or output.prompt_logprobs is not None:
                        yield Piece(
                            output.index, text, output.logprobs, choice.reason, output.prompt_logprobs
                        )
                    if not left:
                        return
        except ENGINE_ERRORS as error:
            raise from_engine(error, prompt=fields.prompt, grammar=fields.grammar) from None
        finally:
            if not counts:
                pass
            elif left and begun:  # the client went away or the engine failed: what was computed still counts
                self._record(request, key, usage)
            elif left:
                self.store.forget(request.request_id, key)

    def _record(self, request: EngineRequest, key: ApiKey, usage: Usage) -> None:
        self.store.record(
            request.request_id, key, usage.prompt_tokens, usage.completion_tokens, usage.cached_tokens
        )

    def _keep(self, request: EngineRequest, key: ApiKey, choice: _Choice) -> None:
        name = request.request_id
        response = name.rpartition("-")[0] if name.startswith("cmpl-") else name  # one of several prompts
        self.relays.keep(response, name, key, choice.said, choice.token_ids)

    def _time(self, request: EngineRequest, choice: _Choice, *, first: bool) -> None:
        now = self.clock.monotonic()
        if choice.last_at is not None:
            self.metrics.next_token(now - choice.last_at)
        else:
            choice.first_at = now
            if first:
                self.metrics.first_token(now - request.arrival_s)
        choice.last_at = now

    def _time_whole(self, choice: _Choice) -> None:
        if choice.tokens > 1 and choice.first_at is not None and choice.last_at is not None:
            self.metrics.tpot.observe((choice.last_at - choice.first_at) / (choice.tokens - 1))

    async def stats(self) -> dict[str, Any]:
        """What the page shows."""
        from ... import __version__

        stats = await self.engine.stats()
        now = self.clock.monotonic()
        return {
            "engine": {k: v for k, v in dataclasses.asdict(stats).items() if k != "relay_recent"},
            "info": dataclasses.asdict(self.engine.info),
            "rates": self.metrics.rates(now, stats),
            "latency": self.metrics.latency(),
            "saved": {
                "tokens": stats.cached_prompt_tokens,
                "seconds": stats.cached_prompt_tokens * stats.prefill_s_per_token,
            },
            "uptime_s": now - self._started,
            "cache": self.answers.stats(),
            "auth_required": self.key_required(),
            "version": __version__,
        }


def key_salt(key: ApiKey) -> str:
    """What keeps this key's shared prefixes apart from those of others."""
    return hashlib.blake2b(str(key.id).encode(), digest_size=8).hexdigest()


def json_grammar(kind: str, schema: dict[str, Any] | None, param: str) -> GrammarSpec | None:
    """The constraint of a ``response_format``: text, json_object or json_schema. Raises ApiError 400."""
    if kind == "text":
        return None
    if kind == "json_object":
        return GrammarSpec("json_object")
    if schema is None:
        raise ApiError(400, f"{param} is needed for type json_schema", param=param, code="invalid_value")
    return GrammarSpec("json_schema", orjson.dumps(schema).decode())


def new_id(prefix: str) -> str:
    """A random id such as ``chatcmpl-...``."""
    return f"{prefix}-{secrets.token_hex(12)}"


def stop_list(stop: str | list[str] | None) -> list[str]:
    """``stop`` as a list."""
    return [] if stop is None else [stop] if isinstance(stop, str) else stop
