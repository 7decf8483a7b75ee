"""Which layers keep keys and values, and which read those of a layer below: the choice and the plan.

Inference side of stochastic KV routing (R-CLA; Filippova, Grangier, Cuturi, Monteiro, arXiv 2604.22782): one
checkpoint, trained with random cross-layer attention (:mod:`sharewell.kv.depth_training`), runs with a cache
in all, half or a quarter of its layers."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

from .plans import KVPlan, PlanError, SourcePlan

if TYPE_CHECKING:
    import torch

# Kinds of transformers' ``layer_types`` whose keys and values can be another layer's of the same kind.
_ATTENTION_TYPES = ("full_attention", "sliding_attention", "chunked_attention")
NOTE = "sharewell_p_cross"  # in the configuration of a model that was trained for sharing


class DepthShareError(ValueError):
    """Layers that cannot share keys and values; the message names them."""


def groups(n_layers: int, g: int) -> tuple[int, ...]:
    """The first layer of every ``g`` consecutive ones: g = 2 keeps half of the layers, g = 4 a quarter."""
    if n_layers < 1 or not 1 <= g <= n_layers:
        raise ValueError(f"g must be in [1, {n_layers}], the number of layers, got {g}")
    return tuple(range(0, n_layers, g))


def layer_types(model: Any) -> tuple[str, ...]:
    """The kind of each layer: attention type and the shape of its keys, or "none" where nothing can be shared
    (linear attention, state spaces). ``model``: a transformers model or configuration, a Decoder, or the
    number of equal layers."""
    if isinstance(model, int):
        if model < 1:
            raise ValueError(f"the number of layers must be at least 1, got {model}")
        return ("full_attention",) * model
    config = getattr(model, "config", model)
    if hasattr(config, "get_text_config"):
        config = config.get_text_config()
    count = getattr(config, "num_hidden_layers", None) or getattr(config, "n_layers", None)
    if not isinstance(count, int):
        raise DepthShareError(f"{type(model).__name__} does not say how many layers it has")
    kinds = list(getattr(config, "layer_types", None) or ["full_attention"] * count)
    if getattr(config, "kv_lora_rank", None):  # latent attention keeps no keys and values of heads
        kinds = ["latent_attention"] * count
    shared = getattr(config, "num_kv_shared_layers", 0) or 0
    if shared:
        raise DepthShareError(
            f"layers {count - shared} to {count - 1} of {type(config).__name__} share keys and values "
            "by design already"
        )
    return tuple(kind if kind in _ATTENTION_TYPES else "none" for kind in kinds)


def sources_of(layers: Iterable[int], model: Any) -> tuple[int, ...]:
    """The layer that each layer reads: itself if it is in ``layers``, else the nearest of them below that has
    its type (mu of the paper).

    ``model`` as for :func:`layer_types`. Raises ValueError for an empty set, one out of range or without
    layer 0, and DepthShareError naming a layer with nothing of its type below."""
    types = layer_types(model)
    kept = _checked(layers, len(types))
    sources: list[int] = []
    for layer, kind in enumerate(types):
        if layer in kept or kind == "none":
            sources.append(layer)
            continue
        below = [j for j in range(layer) if j in kept and types[j] == kind]
        if not below:
            first = types.index(kind)
            raise DepthShareError(
                f"layer {layer} ({kind}) has no retained layer of its type below it: also retain {first}"
            )
        sources.append(below[-1])
    return tuple(sources)


def _checked(layers: Iterable[int], n_layers: int) -> set[int]:
    kept = list(layers)
    if not kept:
        raise ValueError("layers must name at least layer 0, got none")
    for layer in kept:
        if not isinstance(layer, int) or isinstance(layer, bool) or not 0 <= layer < n_layers:
            raise ValueError(f"layers must be whole numbers in [0, {n_layers}), got {layer!r}")
    if 0 not in kept:
        raise ValueError(f"layers must hold layer 0, whose cache also carries the length, got {sorted(kept)}")
    return set(kept)


class DepthSharePlan(SourcePlan):
    """Layers outside ``layers`` neither compute nor keep keys and values: they read those of the nearest
    retained layer below, of their type. ``model`` as for :func:`layer_types`."""

    def __init__(self, layers: Iterable[int], model: Any) -> None:
        super().__init__(sources_of(layers, model))

    @property
    def layers(self) -> tuple[int, ...]:
        """The retained layers, ascending."""
        return tuple(i for i, source in enumerate(self.sources) if i == source)


class CheckedDepthPlan(DepthSharePlan):
    """The same, and refuses NaN and infinities in what a retained layer hands to others: PlanError naming the
    layer. For debugging; costs a pass over keys and values."""

    def observe(
        self,
        layer: int,
        slots: torch.Tensor,
        k: torch.Tensor | None,
        v: torch.Tensor | None,
        mass: list[torch.Tensor] | None = None,
    ) -> None:
        for name, x in (("keys", k), ("values", v)):
            if x is not None and not bool(x.isfinite().all()):
                raise PlanError(f"layer {layer}: {name} that other layers read hold NaN or infinite values")


def kv_bytes_per_token(model: Any, n_retained: int | None = None, itemsize: int | None = None) -> int:
    """2 * retained layers * kv_heads * head_dim * bytes of an element. ``model``: a transformers model or a
    Decoder; ``itemsize`` defaults to that of its dtype."""
    config = model.config.get_text_config() if hasattr(model.config, "get_text_config") else model.config
    if hasattr(config, "kv_width"):
        width, count = config.kv_width, config.n_layers
    else:
        heads = config.num_attention_heads
        dim = getattr(config, "head_dim", None) or config.hidden_size // heads
        width, count = (getattr(config, "num_key_value_heads", None) or heads) * dim, config.num_hidden_layers
    return 2 * (count if n_retained is None else n_retained) * width * (itemsize or model.dtype.itemsize)


def retained_count(
    model: Any,
    *,
    retention: float | None = None,
    budget_bytes: int | None = None,
    tokens: int | None = None,
    itemsize: int | None = None,
) -> int:
    """How many layers may keep a cache: a share of them, or what ``budget_bytes`` hold for ``tokens`` tokens
    (all sequences together). Raises ValueError when not even one layer fits."""
    types = layer_types(model)
    if (retention is None) == (budget_bytes is None):
        raise ValueError("give either retention or budget_bytes")
    if retention is not None:
        if not 0 < retention <= 1:
            raise ValueError(f"retention must be in (0, 1], got {retention}")
        return max(1, math.floor(retention * len(types) + 1e-9))
    if tokens is None or tokens < 1:
        raise ValueError(f"tokens must be at least 1: how many the budget has to hold, got {tokens}")
    assert budget_bytes is not None
    layer = kv_bytes_per_token(model, 1, itemsize) * tokens
    if budget_bytes < layer:
        raise ValueError(
            f"budget_bytes must be at least {layer}: one layer's keys and values of {tokens} tokens, "
            f"got {budget_bytes}"
        )
    return min(len(types), budget_bytes // layer)


def choose_layers(
    model: Any,
    *,
    retention: float | None = None,
    budget_bytes: int | None = None,
    tokens: int | None = None,
    itemsize: int | None = None,
    calibration: torch.Tensor | None = None,
    loss: Callable[[tuple[int, ...]], float] | None = None,
) -> tuple[int, ...]:
    """The layers that keep a cache within a budget (see :func:`retained_count`).

    Without calibration: the finest uniform groups that fit. With ``calibration`` (token ids ``[n, length]``)
    or a function ``loss`` of retained layers: greedy removal, that is, the layer whose removal raises the
    loss least goes first (about L^2 / 2 evaluations). Raises ValueError, and DepthShareError when the model's
    kinds of layers need more than fit."""
    types = layer_types(model)
    count = retained_count(
        model, retention=retention, budget_bytes=budget_bytes, tokens=tokens, itemsize=itemsize
    )
    firsts = tuple(dict.fromkeys(types.index(kind) for kind in types))
    fixed = tuple(i for i, kind in enumerate(types) if kind == "none" or i in firsts)
    if len(fixed) > count:
        raise DepthShareError(f"layers {list(fixed)} must keep their own, and only {count} fit")
    if loss is not None:
        measure = loss
    elif calibration is not None:
        measure = partial(depth_loss, model, calibration)
    else:
        return _uniform(types, count)
    kept = tuple(range(len(types)))
    while len(kept) > count:
        candidates = [tuple(i for i in kept if i != gone) for gone in kept if gone not in fixed]
        kept = min(candidates, key=measure)
    return kept


def _uniform(types: Sequence[str], count: int) -> tuple[int, ...]:
    """The finest groups, counted within each type, with at most ``count`` leaders."""
    for g in range(1, len(types) + 1):
        seen: dict[str, int] = {}
        kept = []
        for layer, kind in enumerate(types):
            if kind == "none" or seen.get(kind, 0) % g == 0:
                kept.append(layer)
            seen[kind] = seen.get(kind, 0) + 1
        if len(kept) <= count:
            return tuple(kept)
    raise AssertionError("the first layer of each type always fits")


def cache_argument(forward: Callable[..., Any]) -> str | None:
    """The name under which a forward takes its cache, which transformers renames in 5.40; None for none."""
    names = inspect.signature(forward).parameters
    return next((name for name in ("cache", "past_key_values", "past_key_value") if name in names), None)


def note_training(model: Any, p_cross: float) -> None:
    """Write into ``model.config`` that it was trained with cross-layer attention; ``save_pretrained`` keeps
    it."""
    setattr(model.config, NOTE, p_cross)


def trained_for_sharing(model: Any) -> bool:
    """True when the model's configuration says so."""
    return bool(getattr(getattr(model, "config", model), NOTE, 0))


def depth_loss(
    model: Any, ids: torch.Tensor, layers: Iterable[int] | None = None, *, batch: int = 16
) -> float:
    """Mean next-token loss in nats on ``ids`` int64 ``[n, length]`` with a cache in ``layers`` only (None: in
    all), through a transformers model's own code."""
    import torch
    import torch.nn.functional as F

    from .hf_cache import PlanCache

    if ids.ndim != 2 or not len(ids) or ids.shape[1] < 2:
        raise ValueError(f"ids must be [n, length] with n >= 1 and length >= 2, got {tuple(ids.shape)}")
    n_layers = len(layer_types(model))
    plan: KVPlan | None = None if layers is None else DepthSharePlan(layers, model)
    argument, total = cache_argument(model.forward) or "past_key_values", 0.0
    with torch.no_grad():
        for rows in ids.split(batch):
            rows = rows.to(model.device)
            logits = model(input_ids=rows, use_cache=True, **{argument: PlanCache(n_layers, plan)}).logits
            total += float(
                F.cross_entropy(logits[:, :-1].flatten(0, 1).float(), rows[:, 1:].flatten(), reduction="sum")
            )
    return total / (len(ids) * (ids.shape[1] - 1))
