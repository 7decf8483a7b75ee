"""Depth sharing for ``generate``: a cache that keeps some layers only, and projections that are not computed
for the others.

Inference side of stochastic KV routing (arXiv 2604.22782) on the plans of :mod:`sharewell.kv.depth_sharing`.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from .depth_sharing import (
    CheckedDepthPlan,
    DepthShareError,
    DepthSharePlan,
    depth_loss,
    layer_types,
    sources_of,
    trained_for_sharing,
)
from .depth_training import attention_modules
from .hf_cache import PlanCache


class NotTrainedForSharing(UserWarning):
    """A cache with fewer layers for a model that was not trained for it."""


class DepthSharedCache(PlanCache):
    """``past_key_values`` that keeps keys and values of ``layers`` only; each other layer reads those of the
    nearest of them below, of its attention type. Holds exactly ``len(layers) / n_layers`` of the bytes.

    ``model``: a transformers model or configuration, or the number of equal layers. For a model that was not
    trained for sharing it warns, with the ratio of perplexities when ``calibration`` (token ids ``[n,
    length]``) is given. ``debug`` refuses NaN in a retained layer. Raises ValueError for layers out of range
    or without layer 0, and DepthShareError naming layers that cannot share."""

    def __init__(
        self,
        model: Any,
        layers: Iterable[int],
        *,
        calibration: torch.Tensor | None = None,
        debug: bool = False,
    ) -> None:
        none = [i for i, kind in enumerate(layer_types(model)) if kind == "none"]
        if none:
            raise DepthShareError(f"layers {none} keep a state that is no keys and values of heads")
        plan = (CheckedDepthPlan if debug else DepthSharePlan)(layers, model)
        super().__init__(len(plan.sources), plan)
        self.retained = plan.layers
        known = not isinstance(model, int)
        if known and len(plan.layers) < len(plan.sources) and not trained_for_sharing(model):
            text = (
                f"the model was not trained for a cache in {len(plan.layers)} of {len(plan.sources)} layers"
            )
            if calibration is not None:
                more = depth_loss(model, calibration, plan.layers) - depth_loss(model, calibration)
                text += f": its perplexity on the given text is {math.exp(min(more, 700)):.3g} times as high"
            warnings.warn(text, NotTrainedForSharing, stacklevel=2)

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        source = self.plan.source(layer_idx)
        if source != layer_idx:
            kept: Any = getattr(self.layers[source], "keys", None)
            assert kept is not None, "layers are updated in order"
            ours, theirs = (tuple(x.shape[i] for i in (0, 1, 3)) for x in (key_states, kept))
            if ours != theirs:
                raise DepthShareError(
                    f"layer {layer_idx} with keys of {ours[1]} heads and width {ours[2]} (batch {ours[0]}) "
                    f"cannot read those of layer {source}: {theirs[1]} heads, width {theirs[2]} "
                    f"(batch {theirs[0]})"
                )
        return super().update(key_states, value_states, layer_idx, *args, **kwargs)


class _NotComputed(nn.Module):
    """Stands in for a projection whose output nobody reads: zeros without memory."""

    def __init__(self, projection: nn.Module) -> None:
        super().__init__()
        weight: Any = projection.weight
        self.width, self.dtype = int(weight.shape[0]), weight.dtype

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.new_zeros((), dtype=self.dtype).expand(*x.shape[:-1], self.width)


class SkippedProjections:
    """What :func:`skip_follower_projections` did; :meth:`remove` undoes it.

    ``layers``: the followers; ``saved_bytes``: of weights that a model frozen at this choice needs no more.
    """

    def __init__(self, model: nn.Module, layers: Iterable[int]) -> None:
        sources = sources_of(layers, model)
        self.layers = tuple(i for i, source in enumerate(sources) if source != i)
        self._put: list[tuple[nn.Module, str, nn.Module]] = []
        self._hooks: list[Any] = []
        self.saved_bytes = 0
        modules = {module.layer_idx: (module, argument) for module, argument in attention_modules(model)}
        for layer in self.layers:
            module, argument = modules.get(layer, (None, ""))
            if module is None or not all(isinstance(getattr(module, p, None), nn.Module) for p in _PAIR):
                raise DepthShareError(
                    f"layer {layer} of {type(model).__name__} has no k_proj and v_proj of its own to skip"
                )
        for layer in self.layers:
            module, argument = modules[layer]
            for name in _PAIR:
                projection = getattr(module, name)
                self.saved_bytes += sum(p.nbytes for p in projection.parameters())
                self._put.append((module, name, projection))
                setattr(module, name, _NotComputed(projection))
            self._hooks.append(
                module.register_forward_pre_hook(_only_with(argument, sources[layer]), with_kwargs=True)
            )

    def remove(self) -> None:
        """Put the projections back."""
        for module, name, projection in self._put:
            setattr(module, name, projection)
        for hook in self._hooks:
            hook.remove()
        self._put, self._hooks = [], []


_PAIR = ("k_proj", "v_proj")


def _only_with(argument: str, source: int) -> Any:
    def check(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        cache, layer = kwargs.get(argument), module.layer_idx
        if not isinstance(cache, PlanCache) or cache.plan.source(layer) != source:
            raise DepthShareError(
                f"layer {layer} computes no keys and values of its own: call the model with a "
                f"DepthSharedCache in which it reads layer {source}, or remove() the skipping first"
            )

    return check


def skip_follower_projections(model: nn.Module, layers: Iterable[int]) -> SkippedProjections:
    """Let every layer outside ``layers`` skip its key and value projection: two products a token and layer
    less. The model then runs with a :class:`DepthSharedCache` of the same layers only, until ``remove()``.

    Raises ValueError, and DepthShareError for attention without separate k_proj and v_proj."""
    return SkippedProjections(model, layers)
