"""One cache of keys and values for agents that differ only by their LoRA adapters.

Source: LRAgent, arXiv 2602.01053. With LoRA on q_proj and v_proj the values of agent i are X W0 + s (X A_i)
B_i. Agents that work on one transcript share keys and X W0, which barely differ between them, and keep the
narrow Z = X A_i apart ("base"), or share it too when their A is the same ("base_lr"). B_i is applied behind
attention (:func:`sharewell.kernels.flash_lora_attention`).

What an agent reads from another was computed from that agent's hidden states: above the first layer it is an
approximation. It is exact for one agent alone, for equal adapters, and where B is zero."""

from __future__ import annotations

import hashlib
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import combinations
from typing import Any, Literal

import torch
from torch import nn
from transformers import AttentionInterface, AttentionMaskInterface, Cache
from transformers.cache_utils import CacheLayerMixin
from transformers.masking_utils import sdpa_mask

from ..kernels import flash_lora_attention
from .depth_training import attention_modules

Mode = Literal["base_lr", "base", "full", "none"]
MODES: tuple[Mode, ...] = ("none", "base", "base_lr", "full")
_ATTENTION = "sharewell_lora"
_GROWTH = 64


class LoraShareError(ValueError):
    """Adapters or a model that cannot share; the message names them and what to do."""


@dataclass(frozen=True)
class LoraShareConfig:
    """How agents share: ``base_lr`` one cache for all (their A on v_proj must be the same), ``base`` keys and
    base values for all and a low-rank part each, ``full`` one cache with whatever adapter wrote it, ``none``
    a cache each.

    ``targets``: whose adapter part is kept apart; only v_proj can. ``check_similarity``: warn when the base
    values of two agents differ by more than the method supposes (one extra pass of the transcript an agent,
    when the second one takes over)."""

    mode: Mode = "base_lr"
    targets: tuple[str, ...] = ("v_proj",)
    check_similarity: bool = False

    def __post_init__(self) -> None:
        if self.mode not in MODES:
            raise ValueError(f"mode must be base_lr, base, full or none, got {self.mode!r}")
        if tuple(self.targets) != ("v_proj",):
            raise ValueError(f"targets must be ('v_proj',), got {self.targets!r}")


def shareable_layers(model: Any, agents: Mapping[str, str], mode: Mode) -> list[Any]:
    """The attention modules of a peft ``model``, in layer order, whose ``agents`` (name to adapter) can share
    in ``mode``. Raises LoraShareError."""
    known = getattr(model, "peft_config", None)
    if not isinstance(known, dict) or not hasattr(model, "get_base_model"):
        raise LoraShareError(f"{type(model).__name__} has no adapters: pass a peft model")
    if not agents:
        raise LoraShareError("agents must name at least one agent and its adapter, got none")
    for agent, adapter in agents.items():
        settings = known.get(adapter)
        if settings is None:
            raise LoraShareError(
                f"agent {agent!r}: adapter {adapter!r} is not loaded, only {', '.join(sorted(known))}"
            )
        kind = str(getattr(settings.peft_type, "value", settings.peft_type))
        if kind != "LORA":
            raise LoraShareError(f"adapter {adapter!r} must be LoRA, got {kind}")
        for option in ("use_dora", "lora_bias", "alora_invocation_tokens", "arrow_config"):
            if getattr(settings, option, None):
                raise LoraShareError(
                    f"adapter {adapter!r}: {option} changes values by more than a low-rank part"
                )
        if settings.bias != "none":
            raise LoraShareError(f"adapter {adapter!r}: bias must be 'none', got {settings.bias!r}")
    attentions = [module for module, _ in attention_modules(model)]
    if not attentions:
        raise LoraShareError(f"{type(model.get_base_model()).__name__} has no attention that updates a cache")
    if mode in ("base", "base_lr"):
        _check_projections(attentions, list(agents.values()))
        _warn_of_drift(model, agents.values())
    if mode == "base_lr":
        for a, b in combinations(dict.fromkeys(agents.values()), 2):
            _check_pair(attentions, a, b)
    return attentions


def _check_projections(attentions: list[Any], adapters: list[str]) -> None:
    from peft.tuners.lora import Linear

    for attention in attentions:
        where = f"layer {attention.layer_idx}"
        values = getattr(attention, "v_proj", None)
        if values is None:
            raise LoraShareError(f"{where}: {type(attention).__name__} has no v_proj of its own")
        if type(values) is not Linear:
            kind = type(values).__name__
            raise LoraShareError(f"{where}: v_proj must carry plain LoRA on an unquantised layer, got {kind}")
        if type(values.base_layer) is not nn.Linear:
            kind = type(values.base_layer).__name__
            raise LoraShareError(f"{where}: v_proj must be an unquantised Linear layer, got {kind}")
        if values.merged:
            raise LoraShareError(f"{where}: adapters are merged into v_proj: call unmerge_adapter() first")
        keys = getattr(attention, "k_proj", None)
        for adapter in adapters:
            if adapter not in values.lora_A:
                raise LoraShareError(f"{where}: adapter {adapter!r} has no LoRA on v_proj")
            if adapter in getattr(keys, "lora_A", {}):
                raise LoraShareError(
                    f"{where}: adapter {adapter!r} has LoRA on k_proj, so keys differ between agents: train "
                    "it without k_proj"
                )


def _warn_of_drift(model: Any, adapters: Any) -> None:
    for adapter in dict.fromkeys(adapters):
        mine = {
            name.rsplit(".", 1)[-1]
            for name, module in model.named_modules()
            if adapter in getattr(module, "lora_A", {})
        }
        others = sorted(mine - {"q_proj", "v_proj"})
        if others:
            warnings.warn(
                f"adapter {adapter!r} also changes {', '.join(others)}: hidden states of agents drift apart "
                "more than with q_proj and v_proj alone; look at similarity_report()",
                stacklevel=4,
            )


def _check_pair(attentions: list[Any], a: str, b: str) -> None:
    for attention in attentions:
        values, where = attention.v_proj, f"adapters {a!r} and {b!r}, layer {attention.layer_idx}"
        if values.r[a] != values.r[b]:
            raise LoraShareError(
                f"{where}: base_lr needs one rank, got {values.r[a]} and {values.r[b]}; mode 'base' does not"
            )
        if values.scaling[a] != values.scaling[b]:
            raise LoraShareError(
                f"{where}: base_lr needs one scale (alpha), got {values.scaling[a]} and {values.scaling[b]}; "
                "mode 'base' does not"
            )
        left, right = values.lora_A[a].weight, values.lora_A[b].weight
        if not torch.equal(left, right):
            most = float((left.float() - right.float()).abs().max())
            raise LoraShareError(
                f"{where}: base_lr needs the same A on v_proj, they differ by up to {most:.3g}: train with "
                "share_A, or take mode 'base'"
            )


class _Held:
    """What one layer holds for all agents: buffers with room ahead along the axis of tokens."""

    def __init__(self) -> None:
        self.length = 0  # tokens with keys and base values
        self.seen: dict[str, int] = {}  # tokens with a low-rank part, by its owner
        self.skipped = 0  # tokens whose key and value projections were not computed
        self._buffers: dict[str, torch.Tensor] = {}

    def write(self, name: str, start: int, x: torch.Tensor) -> None:
        """``x [..., tokens, width]`` at ``start``."""
        end, old = start + x.shape[-2], self._buffers.get(name)
        if old is None or old.shape[-2] < end or old.shape[0] != x.shape[0]:
            if old is not None and start and old.shape[0] != x.shape[0]:
                raise LoraShareError(f"the cache holds a batch of {old.shape[0]}, got one of {x.shape[0]}")
            room = end + max(_GROWTH, end // 4)
            new = x.new_zeros(*x.shape[:-2], room, x.shape[-1])
            if old is not None and start:
                new[..., :start, :] = old[..., :start, :]
            self._buffers[name] = old = new
        old[..., start:end, :] = x

    def read(self, name: str, end: int) -> torch.Tensor:
        return self._buffers[name][..., :end, :]

    def nbytes(self) -> dict[str, int]:
        """Bytes of tokens held, room ahead not counted."""
        sizes = {"k": 0, "v": 0, "z": 0}
        for name, buffer in self._buffers.items():
            tokens = self.length if name in ("k", "v") else self.seen[name[2:]]
            sizes[name[0]] += buffer[..., :tokens, :].numel() * buffer.element_size()
        return sizes


class _AgentLayer(CacheLayerMixin):
    """One layer of the cache as one agent sees it."""

    is_sliding = False
    supports_early_init = False

    def __init__(self, held: _Held, owner: str) -> None:
        super().__init__()
        self.held, self.owner = held, owner
        self.pending: torch.Tensor | None = None
        held.seen.setdefault(owner, 0)

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        """Nothing to prepare."""

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        if self.pending is None:
            raise LoraShareError("call the model inside `with cache.attached():`")
        held, start, tokens = self.held, self.get_seq_length(), key_states.shape[-2]
        end, z = start + tokens, self.pending
        self.pending = None
        there = min(tokens, held.length - start)  # another agent has written these
        if there < tokens:
            held.write("k", start + there, key_states[..., there:, :])
            held.write("v", start + there, value_states[..., there:, :])
            held.length = end
        held.write("z:" + self.owner, start, z)
        held.seen[self.owner] = end
        return held.read("k", end), held.read("v", end)

    def low(self) -> torch.Tensor:
        """Z ``[n, tokens, rank]`` of all that this agent may read."""
        return self.held.read("z:" + self.owner, self.get_seq_length())

    def get_seq_length(self) -> int:
        return self.held.seen[self.owner]

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.get_seq_length() + query_length, 0

    def get_max_length(self) -> int:
        return -1

    def reorder_cache(self, beam_idx: torch.LongTensor) -> None:
        """Refused: beams would change what the other agents read."""
        raise LoraShareError("beam search would reorder what other agents share: use one beam")


class SharedLoraCache(Cache):
    """``past_key_values`` of one agent over what all ``agents`` (name to adapter of a peft ``model``) share;
    :meth:`fork` gives another agent's view of the same memory.

    Per layer and token: keys after RoPE, base values, and Z without the scale, one for all ("base_lr") or one
    an agent ("base"). Inside :meth:`attached` the model is the agent's: its adapter is active, v_proj gives
    base values and Z, and attention adds B. Raises LoraShareError."""

    def __init__(
        self,
        model: Any,
        agents: Mapping[str, str],
        config: LoraShareConfig | None = None,
        *,
        agent: str | None = None,
        _of: SharedLoraCache | None = None,
    ) -> None:
        self.config = config or LoraShareConfig()
        if self.config.mode not in ("base", "base_lr"):
            raise LoraShareError(f"a shared cache has mode base or base_lr, got {self.config.mode!r}")
        self.model, self.agents = model, dict(agents)
        self.agent = next(iter(agents), "") if agent is None else agent
        if _of is None:
            self._attentions = shareable_layers(model, agents, self.config.mode)
            self._held = [_Held() for _ in self._attentions]
            self._views: dict[str, SharedLoraCache] = {}
        else:
            self._attentions, self._held, self._views = _of._attentions, _of._held, _of._views
        if self.agent not in self.agents:
            raise LoraShareError(f"agent must be one of {', '.join(self.agents)}, got {self.agent!r}")
        owner = "*" if self.config.mode == "base_lr" else self.agent
        self._mine = [_AgentLayer(held, owner) for held in self._held]
        super().__init__(layers=list(self._mine))
        self._views.setdefault(self.agent, self)

    def fork(self, agent: str) -> SharedLoraCache:
        """``agent``'s view, one for each; nothing is copied."""
        if agent not in self._views:
            SharedLoraCache(self.model, self.agents, self.config, agent=agent, _of=self)
        return self._views[agent]

    def covered(self, agent: str | None = None) -> int:
        """Tokens that ``agent`` (default: this one) need not run any more."""
        owner = "*" if self.config.mode == "base_lr" else (self.agent if agent is None else agent)
        return self._held[-1].seen.get(owner, 0)

    @property
    def stored(self) -> int:
        """Tokens whose keys and base values some agent has written."""
        return self._held[-1].length

    def truncate(self, length: int) -> None:
        """Forget this agent's tokens from ``length`` on; keys and base values end where the longest agent
        does."""
        for held, layer in zip(self._held, self._mine, strict=True):
            held.seen[layer.owner] = min(held.seen[layer.owner], length)
            held.length = max(held.seen.values())

    def nbytes(self) -> dict[str, int]:
        """Bytes held: of keys ("k"), base values ("v") and low-rank parts ("z"), room ahead not counted."""
        parts = [held.nbytes() for held in self._held]
        return {name: sum(part[name] for part in parts) for name in ("k", "v", "z")}

    def key(self) -> str:
        """A hash of what this agent's entries depend on besides the text, for whoever keeps them: the
        backbone, the mode, and A of v_proj ("base_lr") or the whole adapter ("base")."""
        adapter, shared = self.agents[self.agent], self.config.mode == "base_lr"
        digest = hashlib.blake2b(repr((self.config.mode, str(self.model.dtype))).encode(), digest_size=16)
        digest.update(self.model.get_base_model().config.to_json_string().encode())
        for name, weight in sorted(self.model.get_base_model().named_parameters()):
            flat = weight.detach().flatten()
            if "lora_" not in name:
                flat = flat[:: max(1, len(flat) // 64)][:64]
            elif f".{adapter}." not in name or (shared and "v_proj.lora_A" not in name):
                continue
            digest.update(name.replace(f".{adapter}.", ".*.").encode())
            digest.update(flat.float().cpu().numpy().tobytes())
        return digest.hexdigest()

    @property
    def projections_skipped(self) -> int:
        """Key and value projections that were not computed, because another agent had: two a token and
        layer."""
        return 2 * sum(held.skipped for held in self._held)

    @contextmanager
    def attached(self, *, skip: bool = False) -> Iterator[SharedLoraCache]:
        """The model is this agent's until the block ends. ``skip``: the tokens that it will be called with
        are all stored, so keys and base values are not computed."""
        model, adapter = self.model, self.agents[self.agent]
        if model.training:
            raise LoraShareError("the model is in training mode, where dropout is on: call model.eval()")
        if any(hasattr(attention, "sharewell_lora") for attention in self._attentions):
            raise LoraShareError("another cache is attached to this model")
        base = model.get_base_model()
        before, active = base.config._attn_implementation, model.active_adapter
        patched: list[nn.Module] = []
        try:
            for attention, layer in zip(self._attentions, self._mine, strict=True):
                attention.sharewell_lora = _Reader(layer, attention.v_proj, adapter)  # pyright: ignore
                values = attention.v_proj
                values.forward = partial(_base_and_low, layer, values, adapter, skip)
                patched.append(values)
                if skip:
                    keys = attention.k_proj
                    keys.forward = partial(_nothing, getattr(keys, "out_features", 0) or keys.weight.shape[0])
                    patched.append(keys)
            model.set_adapter(adapter)
            base.set_attn_implementation(_ATTENTION)
            yield self
        finally:
            for module in patched:
                module.__dict__.pop("forward", None)
            for attention in self._attentions:
                attention.__dict__.pop("sharewell_lora", None)
            base.set_attn_implementation(before)
            model.set_adapter(active)


class _Reader:
    """What attention needs beside keys and base values."""

    def __init__(self, layer: _AgentLayer, values: Any, adapter: str) -> None:
        self.layer, self.scale = layer, float(values.scaling[adapter])
        self.b = values.lora_B[adapter].weight.detach().T  # [rank, kv heads * d]


def _base_and_low(layer: _AgentLayer, values: Any, adapter: str, skip: bool, x: torch.Tensor) -> torch.Tensor:
    down = values.lora_A[adapter]
    layer.pending = down(x.to(down.weight.dtype)).to(x.dtype)
    if skip:
        layer.held.skipped += x.shape[0] * x.shape[1]
        return _nothing(values.out_features, x)
    return values.base_layer(x)


def _nothing(width: int, x: torch.Tensor) -> torch.Tensor:
    """Zeros without memory, for what nobody reads."""
    return x.new_zeros(()).expand(*x.shape[:-1], width)


def _attention(
    module: Any,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    reader = getattr(module, "sharewell_lora", None)
    if reader is None:
        raise LoraShareError("call the model inside `with cache.attached():`")
    mask = attention_mask
    if mask is None and query.shape[2] > 1:
        mask = "causal"
    out = flash_lora_attention(
        query, key, value, reader.layer.low(), reader.b, reader.scale, mask, attention_scale=scaling
    )
    return out.transpose(1, 2).contiguous(), None


AttentionInterface.register(_ATTENTION, _attention)
AttentionMaskInterface.register(_ATTENTION, sdpa_mask)
