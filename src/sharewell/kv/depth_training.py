"""Training with random cross-layer attention, for any transformers causal LM.

Stochastic KV routing (R-CLA, arXiv 2604.22782): in each pass a layer attends to its own keys and values or,
with probability ``p_cross``, to those of a random layer below, so that later any set of layers can do without
a cache. Nothing else changes: no parameters, no second pass. Attention calls ``update(k, v, layer)`` after
RoPE and uses what it returns, so the routing is a cache and no model code is touched."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from torch import nn
from transformers import Cache, TrainerCallback
from transformers.cache_utils import DynamicLayer

from .depth_sharing import DepthShareError, cache_argument, layer_types, note_training

# Routing of a pass: for each layer its source, or one source per sequence of the batch.
Routing = list[int] | list[list[int]]


@dataclass(frozen=True)
class DepthShareConfig:
    """How layers are routed in training.

    ``p_cross``: probability of another layer's keys and values (0.5 for pre-training, 0.6 for fine-tuning);
    ``granularity``: one draw per layer and micro-batch, or per layer and sequence; ``protect_layers`` always
    use their own; ``same_type_only``: sources have the layer's attention type (sliding, full). With
    ``all_gradients`` layers whose keys and values nobody reads in a pass get zero gradients instead of none
    (DistributedDataParallel wants that; it is switched on there by itself)."""

    p_cross: float = 0.5
    granularity: Literal["layer", "sequence"] = "layer"
    seed: int = 0
    protect_layers: tuple[int, ...] = (0,)
    same_type_only: bool = True
    all_gradients: bool = False

    def __post_init__(self) -> None:
        if not 0 <= self.p_cross < 1:
            raise ValueError(f"p_cross must be in [0, 1), got {self.p_cross}")
        if self.granularity not in ("layer", "sequence"):
            raise ValueError(f"granularity must be layer or sequence, got {self.granularity!r}")
        if self.seed < 0:
            raise ValueError(f"seed must be at least 0, got {self.seed}")
        if any(layer < 0 for layer in self.protect_layers):
            raise ValueError(f"protect_layers must be at least 0, got {self.protect_layers}")


def draw_routing(
    config: DepthShareConfig, types: Sequence[str], step: int, micro: int = 0, batch: int = 1
) -> Routing:
    """The sources of pass ``micro`` of optimizer step ``step``: a function of these and the seed alone, so
    that a resumed run and a recomputation in the backward pass see the same."""
    rng = np.random.default_rng((config.seed, step, micro))
    per_pass = config.granularity == "layer"
    rows = 1 if per_pass else batch
    cross = rng.random((rows, len(types))) < config.p_cross
    pick = rng.random((rows, len(types)))
    routing: list[list[int]] = []
    for layer, kind in enumerate(types):
        below = [
            j for j in range(layer) if types[j] != "none" and (types[j] == kind or not config.same_type_only)
        ]
        fixed = layer in config.protect_layers or kind == "none" or not below
        routing.append(
            [
                layer if fixed or not cross[b, layer] else below[int(pick[b, layer] * len(below))]
                for b in range(rows)
            ]
        )
    return [sources[0] for sources in routing] if per_pass else routing


def _many_processes() -> bool:
    distributed = torch.distributed
    return distributed.is_available() and distributed.is_initialized() and distributed.get_world_size() > 1


class RandomCrossLayerCache(Cache):
    """``past_key_values`` of a training pass: keeps keys and values of all layers and returns those of each
    layer's source. :meth:`resample` before every pass.

    ``model``: what :func:`sharewell.kv.layer_types` takes. ``routing`` may be set by hand."""

    def __init__(self, config: DepthShareConfig, model: Any) -> None:
        super().__init__(layers=[DynamicLayer()])
        self.config, self.types = config, layer_types(model)
        if config.protect_layers and max(config.protect_layers) >= len(self.types):
            raise ValueError(
                f"protect_layers must be below the number of layers, {len(self.types)}, "
                f"got {config.protect_layers}"
            )
        self.routing: Routing = list(range(len(self.types)))
        self.recomputes = False  # True: a second update of a layer is a recomputation, not a second pass
        self._kv: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}

    def resample(self, step: int, micro: int = 0, batch: int = 1) -> Routing:
        """Draw the routing of a new pass, and forget the last one's keys and values."""
        self.routing = draw_routing(self.config, self.types, step, micro, batch)
        self.clear()
        return self.routing

    def clear(self) -> None:
        """Forget keys and values."""
        self._kv = {}

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values ``[batch, kv_heads, tokens, head_dim]`` of the source of ``layer_idx``."""
        first = layer_idx not in self._kv
        if first:
            self._kv[layer_idx] = key_states, value_states
        elif not self.recomputes:
            raise DepthShareError(
                f"layer {layer_idx} is updated a second time: call resample() before each pass"
            )
        elif key_states.requires_grad and not self._kv[layer_idx][0].requires_grad:
            raise DepthShareError(
                "gradient checkpointing with use_reentrant=True loses the gradients of other layers' keys "
                "and values: use gradient_checkpointing_kwargs={'use_reentrant': False}"
            )
        source = self.routing[layer_idx]
        if isinstance(source, int):
            k, v = (
                (key_states, value_states) if source == layer_idx else self._of(source, layer_idx, key_states)
            )
        else:
            if len(source) != len(key_states):
                raise DepthShareError(
                    f"the routing was drawn for {len(source)} sequences, the batch has {len(key_states)}"
                )
            pairs = [
                (key_states, value_states) if s == layer_idx else self._of(s, layer_idx, key_states)
                for s in source
            ]
            k = torch.stack([pair[0][b] for b, pair in enumerate(pairs)])
            v = torch.stack([pair[1][b] for b, pair in enumerate(pairs)])
        if self._unread(layer_idx) and (self.config.all_gradients or _many_processes()):
            k = k + (0.0 * key_states).sum() + (0.0 * value_states).sum()
        return k, v

    def _unread(self, layer: int) -> bool:
        """True when no layer of this pass attends to the keys and values of ``layer``."""
        return not any(layer == s if isinstance(s, int) else layer in s for s in self.routing)

    def _of(self, source: int, layer: int, k: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        if source not in self._kv:
            raise DepthShareError(
                f"layer {layer} cannot read layer {source}: it has not been computed before"
            )
        found = self._kv[source]
        if found[0].shape != k.shape:
            raise DepthShareError(
                f"layer {layer} with keys {tuple(k.shape)} cannot read those of layer {source}, "
                f"{tuple(found[0].shape)}"
            )
        return found

    def get_seq_length(self, *args: Any, **kwargs: Any) -> int:
        """0: a training pass has no past."""
        return 0

    def get_mask_sizes(self, query_length: int, *args: Any, **kwargs: Any) -> tuple[int, int]:
        """The pass itself."""
        return query_length, 0


class RoutedTraining:
    """Routing switched on in a model (see :func:`enable_rcla`); :meth:`remove` switches it off.

    ``step`` and ``micro`` name the next pass. Each forward of the model in training mode with gradients is a
    pass; with none but this object, every pass is a step."""

    def __init__(self, model: nn.Module, config: DepthShareConfig) -> None:
        self.cache = RandomCrossLayerCache(config, model)
        self.cache.recomputes = True
        self.step, self.micro = 0, 0
        self._by_pass = True
        self._active = False
        modules = attention_modules(model)
        missing = [
            i
            for i, kind in enumerate(self.cache.types)
            if kind != "none" and i not in {m.layer_idx for m, _ in modules}
        ]
        if missing:
            raise DepthShareError(
                f"layers {missing} of {type(model).__name__} have no attention that takes a cache"
            )
        self._hooks = [model.register_forward_pre_hook(self._begin, with_kwargs=True)]
        for module, argument in modules:
            if self.cache.types[module.layer_idx] != "none":
                self._hooks.append(module.register_forward_pre_hook(self._giving(argument), with_kwargs=True))

    def begin_step(self, step: int) -> None:
        """The next passes are the micro-batches of optimizer step ``step``."""
        self.step, self.micro, self._by_pass = step, 0, False

    def _begin(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self._active = model.training and torch.is_grad_enabled()
        if not self._active:
            return
        given = kwargs.get("input_ids", kwargs.get("inputs_embeds", args[0] if args else None))
        self.cache.resample(self.step, self.micro, 1 if given is None else len(given))
        if self._by_pass:
            self.step += 1
        else:
            self.micro += 1

    def _giving(self, argument: str) -> Any:
        # Inside a checkpointed layer, too: transformers takes caches away there, and the recomputation, which
        # comes after the forward pass, must see the routing and the sources of that pass.
        def give(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            if self._active and module.training:
                kwargs[argument] = self.cache
            return args, kwargs

        return give

    def remove(self) -> None:
        """Switch routing off and forget the last pass."""
        for hook in self._hooks:
            hook.remove()
        self._hooks = []
        self.cache.clear()
        self._active = False


def attention_modules(model: nn.Module) -> list[tuple[Any, str]]:
    """The modules of ``model`` that update a cache, in layer order, with the name of that argument."""
    found: dict[str, tuple[Any, str]] = {}
    for name, module in model.named_modules():
        if not isinstance(getattr(module, "layer_idx", None), int):
            continue
        argument = cache_argument(module.forward)
        if argument is not None:
            found[name] = module, argument
    # a decoder layer that also knows its number holds the attention that we mean
    inner = [pair for name, pair in found.items() if not any(other.startswith(name + ".") for other in found)]
    return sorted(inner, key=lambda pair: pair[0].layer_idx)


def enable_rcla(model: nn.Module, config: DepthShareConfig | None = None) -> RoutedTraining:
    """Route keys and values at random in every training pass of ``model``, a transformers causal LM (bare or
    wrapped by peft); evaluation mode is left alone. Works under non-reentrant gradient checkpointing with one
    forward pass per backward pass. Raises DepthShareError."""
    return RoutedTraining(model, config or DepthShareConfig())


class CrossLayerCallback(TrainerCallback):
    """The same for transformers' Trainer: ``Trainer(..., callbacks=[CrossLayerCallback(config)])``.

    Routing is a function of the seed and the global step, so a resumed run goes on as if it had not stopped.
    What was done is noted in the model's configuration."""

    def __init__(self, config: DepthShareConfig | None = None) -> None:
        self.config = config or DepthShareConfig()
        self.routed: RoutedTraining | None = None

    def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        """Switch routing on."""
        self.routed = enable_rcla(model, self.config)
        note_training(model, self.config.p_cross)

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Name the step."""
        assert self.routed is not None
        self.routed.begin_step(state.global_step)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Switch routing off."""
        if self.routed is not None:
            self.routed.remove()
