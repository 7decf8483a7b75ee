"""Plans as Hugging Face caches: ``model.generate(..., past_key_values=PlanCache(plan))`` on any causal LM.

Attention in transformers calls ``update(k, v, layer)`` once a layer, after RoPE, and attends to what that
returns. So a plan that changes only where keys and values come from needs nothing of the model's code; a plan
that leaves out tokens needs :class:`~sharewell.kv.PlannedForward`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from transformers import Cache
from transformers.cache_utils import CacheLayerMixin, DynamicLayer

from .plans import KVPlan, OwnPlan, PlanError, PlanStats, SegmentSource
from .rope import move_keys, rope_of
from .segments import TensorKV

_GROWTH = 64


class GrowingLayer(DynamicLayer):
    """Keys and values of one layer in a buffer with room ahead, so that a decoded token is written, not
    concatenated."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self._buffers: tuple[torch.Tensor, torch.Tensor] | None = None
        self._views: tuple[Any, Any] = (None, None)

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        if torch.is_grad_enabled() and key_states.requires_grad:  # writing in place would cut the gradient
            return super().update(key_states, value_states)
        old = self.get_seq_length()
        new = old + key_states.shape[-2]
        # reordering, cropping and selecting rows put other tensors in place of our views
        mine = self._buffers is not None and self.keys is self._views[0] and self.values is self._views[1]
        if not mine or self._buffers[0].shape[-2] < new:  # pyright: ignore[reportOptionalSubscript]
            room = new + max(_GROWTH, new // 4)
            buffers = []
            for past, fresh in ((self.keys, key_states), (self.values, value_states)):
                buffer = fresh.new_empty(*fresh.shape[:-2], room, fresh.shape[-1])
                if old and past is not None:
                    buffer[..., :old, :] = past
                buffers.append(buffer)
            self._buffers = buffers[0], buffers[1]
        assert self._buffers is not None
        for buffer, fresh in zip(self._buffers, (key_states, value_states), strict=True):
            buffer[..., old:new, :] = fresh
        self.keys, self.values = (b[..., :new, :] for b in self._buffers)
        self._views = self.keys, self.values
        return self.keys, self.values

    def reset(self) -> None:
        """Drop everything."""
        self._buffers, self._views = None, (None, None)
        super().reset()


class FollowerLayer(CacheLayerMixin):
    """A layer that keeps nothing and answers with another layer's keys and values."""

    is_sliding = False
    is_croppable = True
    supports_early_init = False

    def __init__(self, leader: CacheLayerMixin) -> None:
        super().__init__()
        self.leader = leader

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        """Nothing to prepare."""

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        keys, values = self.leader.keys, self.leader.values
        assert keys is not None and values is not None, "layers are updated in order"
        if keys.shape[1] != key_states.shape[1] or keys.shape[-1] != key_states.shape[-1]:
            raise PlanError(
                f"keys of heads and width {key_states.shape[1]}, {key_states.shape[-1]} cannot be those of a "
                f"layer with {keys.shape[1]}, {keys.shape[-1]}"
            )
        return keys, values

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.leader.get_mask_sizes(query_length)

    def get_seq_length(self) -> int:
        return self.leader.get_seq_length()

    def get_max_length(self) -> int:
        return self.leader.get_max_length()

    def crop(self, tokens_to_remove: int) -> None:
        """The leader crops."""

    def reset(self) -> None:
        """The leader is reset."""

    def reorder_cache(self, beam_idx: torch.LongTensor) -> None:
        """The leader reorders."""

    def batch_repeat_interleave(self, repeats: int) -> None:
        """The leader repeats."""

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        """The leader selects."""

    def offload(self) -> None:
        """Nothing to move."""

    def prefetch(self) -> None:
        """Nothing to move."""


class PlanCache(Cache):
    """``past_key_values`` that follows the sources of ``plan`` (default: its own keys and values) for a model
    of ``n_layers``.

    ``observe`` of the plan is called with keys and values of each update, flattened to packed slots in batch
    order; ``active``, ``read``, ``hidden`` and ``low_rank`` need :class:`~sharewell.kv.PlannedForward`, and a
    plan that overrides one of them is refused with PlanError. ``stats`` counts as the engine does, but the
    model still calls every projection."""

    def __init__(self, n_layers: int, plan: KVPlan | None = None) -> None:
        plan = plan or OwnPlan()
        for moment in ("active", "read", "hidden", "low_rank"):
            if getattr(type(plan), moment) is not getattr(KVPlan, moment):
                raise PlanError(
                    f"{type(plan).__name__} decides {moment}(), which a cache cannot do: use PlannedForward"
                )
        if plan.mask != "causal":
            raise PlanError(f"a cache cannot change the mask, which the plan wants {plan.mask}")
        self.plan = plan
        layers: list[CacheLayerMixin] = []
        for layer in range(n_layers):
            source = plan.source(layer)
            if not 0 <= source <= layer or (source < layer and isinstance(layers[source], FollowerLayer)):
                raise PlanError(
                    f"layer {layer}: source must be a layer below that keeps its own, got {source}"
                )
            layers.append(GrowingLayer() if source == layer else FollowerLayer(layers[source]))
        super().__init__(layers=layers)  # pyright: ignore[reportArgumentType]
        self.stats = PlanStats.of(n_layers)

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        k, v = super().update(key_states, value_states, layer_idx, *args, **kwargs)
        tokens = key_states.shape[0] * key_states.shape[-2]
        self.stats.computed[layer_idx] += tokens
        if type(self.plan).observe is not KVPlan.observe:
            own = isinstance(self.layers[layer_idx], GrowingLayer)
            packed = [x.transpose(1, 2).flatten(0, 1) if own else None for x in (key_states, value_states)]
            self.plan.observe(layer_idx, torch.arange(tokens, device=key_states.device), packed[0], packed[1])
        return k, v

    @property
    def nbytes(self) -> int:
        """Bytes of the keys and values held, room ahead not counted."""
        return sum(k.nbytes + v.nbytes for k, v in self._kept())

    def _kept(self) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """Keys and values of the layers that keep their own."""
        own = [layer for layer in self.layers if isinstance(layer, GrowingLayer)]
        return [(x.keys, x.values) for x in own if x.keys is not None and x.values is not None]

    def segment(self, row: int, first: int, end: int) -> TensorKV:
        """A copy of the cache's entries ``first ... end - 1`` of batch row ``row``, for a
        :class:`~sharewell.kv.KVSegmentStore`. Raises PlanError where a layer keeps nothing of its own."""
        if any(isinstance(layer, FollowerLayer) for layer in self.layers):
            raise PlanError("layers that read from others have no keys and values of their own to store")
        pairs = self._kept()
        k, v = (
            torch.stack([pair[i][row, :, first:end].transpose(0, 1).clone() for pair in pairs])
            for i in (0, 1)
        )
        return TensorKV(k, v)

    @classmethod
    def begun_with(cls, model: Any, pieces: Sequence[tuple[SegmentSource, torch.Tensor]]) -> PlanCache:
        """A cache (batch 1) that begins with tokens of segments, one piece behind the other, their keys moved
        to positions 0, 1, ...: ``generate`` goes on from there when its ids begin with those tokens."""
        config = model.config.get_text_config()
        cache = cls(config.num_hidden_layers)
        at, device, dtype = 0, model.device, model.dtype
        rope = rope_of(model)
        for segment, tokens in pieces:
            to = torch.arange(at, at + len(tokens))
            start = segment.positions[tokens]
            for layer in range(config.num_hidden_layers):
                k, v = segment.read(layer, tokens)
                k = move_keys(k, start.to(k.device), to.to(k.device), rope)
                k, v = (x.to(device, dtype).transpose(0, 1)[None] for x in (k, v))
                cache.layers[layer].update(k, v)  # pyright: ignore[reportAttributeAccessIssue]
            at += len(tokens)
        return cache
