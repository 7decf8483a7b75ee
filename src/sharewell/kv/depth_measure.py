"""What a model loses and saves with a cache in fewer layers: perplexity, bytes, first token, speed."""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from statistics import median
from typing import TYPE_CHECKING, Any

import torch

from .depth_cache import DepthSharedCache, NotTrainedForSharing, skip_follower_projections
from .depth_sharing import (
    DepthShareError,
    cache_argument,
    choose_layers,
    depth_loss,
    layer_types,
    trained_for_sharing,
)

if TYPE_CHECKING:
    from collections.abc import Iterator

    from ..simulation import Clock


@dataclass(frozen=True)
class DepthReportConfig:
    """``windows`` of ``context`` tokens for the perplexity; a prompt of ``prompt`` tokens and ``new_tokens``
    decoded ones for times, ``repeats`` of each in turn; ``greedy``: layers chosen by greedy removal on
    ``calibration`` other windows of the text, instead of uniform groups."""

    context: int = 256
    windows: int = 32
    prompt: int = 256
    new_tokens: int = 32
    repeats: int = 3
    greedy: bool = False
    calibration: int = 64

    def __post_init__(self) -> None:
        for name in ("context", "windows", "prompt", "new_tokens", "repeats", "calibration"):
            value, least = getattr(self, name), 2 if name == "context" else 1
            if value < least:
                raise ValueError(f"{name} must be at least {least}, got {value}")


@dataclass(frozen=True)
class DepthRow:
    """One choice of layers. ``kv_bytes`` are what the cache held after prompt and decoded tokens;
    ``perplexity_ratio`` is to all layers."""

    retention: float
    layers: tuple[int, ...]
    perplexity: float
    perplexity_ratio: float
    kv_bytes: int
    ttft_s: float
    tokens_per_s: float


@dataclass(frozen=True)
class DepthReport:
    """Rows in the order that was asked for; ``trained``: whether the model was trained for sharing;
    ``skipped``: whether the followers' projections could be left out."""

    rows: tuple[DepthRow, ...]
    trained: bool
    skipped: bool


def windows_of(ids: Sequence[int], n: int, length: int) -> torch.Tensor:
    """``n`` windows spread evenly over a text, int64 ``[n, length]``. Raises ValueError when it is shorter
    than one."""
    if len(ids) < length:
        raise ValueError(f"the text must have at least {length} tokens, got {len(ids)}")
    text = torch.as_tensor(ids, dtype=torch.int64)
    starts = torch.linspace(0, len(text) - length, n).long()
    return torch.stack([text[s : s + length] for s in starts.tolist()])


def depth_report(
    model: Any,
    ids: Sequence[int],
    retentions: Sequence[float],
    clock: Clock,
    config: DepthReportConfig | None = None,
) -> DepthReport:
    """Measure ``model`` (a transformers causal LM) at shares of its layers on the text ``ids``.

    Raises ValueError for a retention outside (0, 1] or a text that is too short."""
    config = config or DepthReportConfig()
    if not retentions:
        raise ValueError("retention must name at least one share, got none")
    n_layers = len(layer_types(model))
    calibration = None
    if config.greedy:  # on the first third of the text, measured on the rest
        cut = len(ids) // 3
        calibration = windows_of(ids[:cut], config.calibration, config.context)
        ids = ids[cut:]
    choices = [choose_layers(model, retention=r, calibration=calibration) for r in retentions]
    test = windows_of(ids, config.windows, config.context)
    prompt = torch.as_tensor(ids[: config.prompt], dtype=torch.int64)[None].to(model.device)
    full = depth_loss(model, test)
    losses = [full if len(c) == n_layers else depth_loss(model, test, c) for c in choices]
    times: list[list[tuple[float, float, int]]] = [[] for _ in choices]
    skipped = True
    for _ in range(config.repeats):
        for row, layers in enumerate(choices):
            with _skipping(model, layers) as did:
                skipped &= did
                times[row].append(_generate(model, prompt, layers, config.new_tokens, clock))
    rows = [
        DepthRow(
            retention=len(layers) / n_layers,
            layers=layers,
            perplexity=math.exp(min(loss, 700)),
            perplexity_ratio=math.exp(min(loss - full, 700)),
            kv_bytes=taken[0][2],
            ttft_s=median(t for t, _, _ in taken),
            tokens_per_s=median(config.new_tokens / s for _, s, _ in taken),
        )
        for layers, loss, taken in zip(choices, losses, times, strict=True)
    ]
    return DepthReport(tuple(rows), trained_for_sharing(model), skipped)


@contextmanager
def _skipping(model: Any, layers: tuple[int, ...]) -> Iterator[bool]:
    """Without the followers' projections where the model allows that; says whether."""
    try:
        handle = skip_follower_projections(model, layers)
    except DepthShareError:
        yield False
        return
    try:
        yield True
    finally:
        handle.remove()


def _generate(
    model: Any, prompt: torch.Tensor, layers: tuple[int, ...], new_tokens: int, clock: Clock
) -> tuple[float, float, int]:
    """Seconds to the first token, seconds of the others, bytes held at the end."""
    import warnings

    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore", NotTrainedForSharing)
        cache = DepthSharedCache(model, layers)
        argument = cache_argument(model.forward) or "past_key_values"
        begun = clock.monotonic()
        token = _next(model, prompt, argument, cache)
        first = clock.monotonic()
        for _ in range(new_tokens):
            token = _next(model, token, argument, cache)
        return first - begun, max(clock.monotonic() - first, 1e-9), cache.nbytes


def _next(model: Any, ids: torch.Tensor, argument: str, cache: DepthSharedCache) -> torch.Tensor:
    return model(input_ids=ids, use_cache=True, **{argument: cache}).logits[:, -1:].argmax(-1)
