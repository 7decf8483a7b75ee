"""What passes between the API process and the engine: plain, bounded, msgpack-able records.

The API side owns text (templates, tokenising, detokenising, stop strings); the engine owns tokens.
Everything here converts to and from builtin types with ``to_wire``/``from_wire`` so that no pickle ever
crosses a process boundary.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

FinishReason = Literal["stop", "length", "cancelled", "error"]


def _require(condition: bool, name: str, allowed: str, value: object) -> None:
    if not condition:
        raise ValueError(f"{name} must be {allowed}, got {value!r}")


@dataclass(frozen=True)
class GrammarSpec:
    """A constraint on the output. ``kind``: json_object | json_schema | regex | lark | choice (source as JSON
    text)."""

    kind: Literal["json_object", "json_schema", "regex", "lark", "choice"]
    source: str = ""


@dataclass(frozen=True)
class SamplingParams:
    """How tokens are chosen. Temperature 0 is greedy. Raises ValueError naming the field and its range.

    Noise is a function of (seed, choice index, position), so no generator state exists and a request can be
    resumed on another engine from its tokens alone. ``logprobs=None`` returns none, ``k`` the k best.
    """

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0  # 0: off
    min_p: float = 0.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    seed: int = 0
    max_tokens: int = 16
    min_tokens: int = 0
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    grammar: GrammarSpec | None = None

    def __post_init__(self) -> None:
        def finite(x: float) -> bool:
            return isinstance(x, int | float) and math.isfinite(x)

        _require(
            finite(self.temperature) and 0 <= self.temperature <= 2,
            "temperature",
            "in [0, 2]",
            self.temperature,
        )
        _require(finite(self.top_p) and 0 < self.top_p <= 1, "top_p", "in (0, 1]", self.top_p)
        _require(self.top_k >= 0, "top_k", "0 (off) or positive", self.top_k)
        _require(finite(self.min_p) and 0 <= self.min_p <= 1, "min_p", "in [0, 1]", self.min_p)
        for name in ("presence_penalty", "frequency_penalty"):
            value = getattr(self, name)
            _require(finite(value) and -2 <= value <= 2, name, "in [-2, 2]", value)
        _require(
            finite(self.repetition_penalty) and 0.01 <= self.repetition_penalty <= 10,
            "repetition_penalty",
            "in [0.01, 10]",
            self.repetition_penalty,
        )
        _require(0 <= self.seed < 2**64, "seed", "in [0, 2**64)", self.seed)
        _require(self.max_tokens >= 0, "max_tokens", "at least 0", self.max_tokens)
        _require(0 <= self.min_tokens <= self.max_tokens, "min_tokens", "in [0, max_tokens]", self.min_tokens)
        for name in ("logprobs", "prompt_logprobs"):
            value = getattr(self, name)
            _require(value is None or 0 <= value <= 20, name, "None or in [0, 20]", value)
        _require(len(self.logit_bias) <= 1024, "logit_bias", "at most 1024 entries", len(self.logit_bias))
        for token, bias in self.logit_bias.items():
            _require(finite(bias) and -100 <= bias <= 100, f"logit_bias[{token}]", "in [-100, 100]", bias)

    @property
    def greedy(self) -> bool:
        return self.temperature == 0


@dataclass(frozen=True)
class EngineRequest:
    """One request of tokens. ``emitted[i]`` are tokens that choice i has already produced (recovery on
    another engine).

    ``cache_salt`` scopes prefix sharing (per API key unless the operator widens it). Smaller ``priority`` is
    served first and preempted last. ``deadline_s`` is on the engine clock's monotonic axis, None for none.
    ``sharing`` opts in to approximate sharing of keys and values; its entries are the planner's.
    """

    request_id: str
    prompt_ids: tuple[int, ...]
    sampling: SamplingParams = field(default_factory=SamplingParams)
    n: int = 1
    adapter: str | None = None
    priority: int = 0
    cache_salt: str = ""
    arrival_s: float = 0.0
    deadline_s: float | None = None
    emitted: tuple[tuple[int, ...], ...] = ()
    finished: tuple[int, ...] = ()  # choices that need no more tokens (recovery)
    sharing: Mapping[str, Any] | None = None  # what the engine's planner may do for it; None: nothing

    def __post_init__(self) -> None:
        _require(bool(self.request_id), "request_id", "a non-empty string", self.request_id)
        _require(len(self.prompt_ids) > 0, "prompt_ids", "at least one token", self.prompt_ids)
        _require(1 <= self.n <= 128, "n", "in [1, 128]", self.n)
        _require(
            len(self.emitted) in (0, self.n), "emitted", "empty or one list per choice", len(self.emitted)
        )


@dataclass(frozen=True)
class TokenLogprob:
    """Log-probability (natural) of one emitted or prompt token, with the best alternatives, best first."""

    token_id: int
    logprob: float
    top: tuple[tuple[int, float], ...] = ()


@dataclass(frozen=True)
class TokenOutput:
    """What one step produced for one choice. ``finish_reason`` set exactly once, on the last output of a
    choice."""

    request_id: str
    index: int
    token_ids: tuple[int, ...] = ()
    logprobs: tuple[TokenLogprob, ...] = ()
    finish_reason: FinishReason | None = None
    stop_token_id: int | None = None
    error: str | None = (
        None  # code, with finish_reason == "error": nan_logits | grammar_error | deadline_exceeded | ...
    )
    cached_tokens: int = 0  # prompt tokens not computed because they were shared; on the first output
    prompt_logprobs: tuple[TokenLogprob | None, ...] | None = None  # on the first output when asked for
    sharing: Mapping[str, Any] | None = None  # on the first output: what the planner did with the prompt


@dataclass(frozen=True)
class EngineStats:
    """A snapshot for metrics, the page and routers. Counters count since the engine's first start."""

    running: int = 0
    waiting: int = 0
    blocks_total: int = 0
    blocks_used: int = 0
    blocks_shared: int = 0
    blocks_cached: int = 0
    blocks_free: int = 0
    prompt_tokens: int = 0  # submitted
    computed_prompt_tokens: int = 0
    cached_prompt_tokens: int = 0
    generated_tokens: int = 0
    steps: int = 0
    preemptions: int = 0
    restarts: int = 0
    step_s: float = 0.0  # total wall seconds in steps
    forward_s: float = 0.0  # of these, in the model's forward pass
    prefill_s_per_token: float = 0.0  # recent average: cached tokens times this = seconds saved
    competing_cpu: float = 0.0  # cores of this machine that other processes used recently
    adapters: tuple[str, ...] = ()
    planned_prompts: int = 0  # prompts whose keys and values followed a plan
    planned_token_layers: int = 0  # of their (token, layer) pairs, those that were computed
    reused_token_layers: int = 0  # and those that were not
    relayed_prompts: int = 0  # prompts in which tokens of earlier answers were reused
    relayed_tokens: int = 0  # such tokens
    relay_recomputed_tokens: int = 0  # tokens of earlier answers that were computed anew in part
    relay_declined: int = 0  # plans given up for full computation
    relay_missing: int = 0  # segments evicted between lookup and use
    relay_damaged: int = 0  # segments dropped for NaN or infinite values
    relay_fallbacks: int = 0  # requests that the guard kept from relaying
    relay_evictions: int = 0
    relay_segments: int = 0
    relay_segment_bytes: int = 0
    relay_samples: int = 0  # relayed requests that were computed in full as well
    relay_kl_sum: float = 0.0  # their divergences (nats) together
    relay_fallen_back: bool = False
    relay_recent: tuple[tuple[str, float], ...] = ()  # request, measured divergence


@dataclass(frozen=True)
class EngineInfo:
    """What the API side needs to know of the engine's model, sent once when the engine is ready."""

    model: str
    dtype: str
    device: str
    context_length: int
    vocab_size: int
    eos_token_ids: tuple[int, ...]
    block_size: int
    num_blocks: int
    max_seqs: int
    threads: int
    revision: str
    adapters: tuple[str, ...] = ()
    runner: str = ""


_TYPES: dict[str, type] = {
    t.__name__: t
    for t in (GrammarSpec, SamplingParams, EngineRequest, TokenLogprob, TokenOutput, EngineStats, EngineInfo)
}


def to_wire(value: Any) -> Any:
    """A record (or a container of records) as builtin types that msgpack can carry; defaults are left out."""
    name = type(value).__name__
    if name in _TYPES:
        fields = {}
        for f in dataclasses.fields(value):
            v = getattr(value, f.name)
            default = f.default if f.default_factory is dataclasses.MISSING else f.default_factory()
            if v != default:
                fields[f.name] = to_wire(v)
        return {"$": name, **fields}
    if isinstance(value, list | tuple):
        return (
            list(value) if set(map(type, value)) <= {int} else [to_wire(v) for v in value]
        )  # prompts are long
    if isinstance(value, Mapping):
        return {"$map": [[to_wire(k), to_wire(v)] for k, v in value.items()]}
    return value


def from_wire(value: Any) -> Any:
    """Inverse of :func:`to_wire`; lists become tuples. Raises ValueError for an unknown record type."""
    if isinstance(value, list | tuple):
        return tuple(value) if set(map(type, value)) <= {int} else tuple(from_wire(v) for v in value)
    if isinstance(value, Mapping):
        if "$map" in value:
            return {from_wire(k): from_wire(v) for k, v in value["$map"]}
        kind = _TYPES.get(value["$"])
        if kind is None:
            raise ValueError(f"unknown record type {value['$']!r}")
        return kind(**{k: from_wire(v) for k, v in value.items() if k != "$"})
    return value
