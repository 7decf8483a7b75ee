"""How alike the keys and values of LoRA roles are, and what sharing them does to the next token.

Source: the measurements that motivate LRAgent, arXiv 2602.01053."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F

from .lora_sharing import LoraShareConfig, LoraShareError, Mode, shareable_layers

if TYPE_CHECKING:
    from collections.abc import Iterator


@dataclass(frozen=True)
class Similarity:
    """Cosines between roles, the mean over pairs, layers and tokens. ``low_rank`` is of x A, None where
    ranks differ."""

    keys: float
    base_values: float
    values: float
    adapter_outputs: float
    low_rank: float | None


@dataclass(frozen=True)
class ModeReport:
    """One mode on one transcript: bytes beside separate caches (``memory_ratio``), tokens computed, and
    ``kl``, the mean divergence (nats) of the next token from the role's own cache; None with ``reason``
    where the adapters cannot share so."""

    mode: str
    memory_ratio: float | None
    computed: int | None
    kl: float | None
    reason: str = ""


def similarity(model: Any, adapters: Mapping[str, str], ids: Sequence[int]) -> Similarity:
    """Cosines between what the roles (name to adapter of a peft ``model``) compute for the text ``ids``.
    Raises LoraShareError for adapters without a low-rank part of values."""
    layers = shareable_layers(model, adapters, "base")
    text = torch.tensor([list(ids)], device=model.device)
    seen: dict[str, dict[str, list[torch.Tensor]]] = {}
    before = model.active_adapter
    for role, adapter in adapters.items():
        model.set_adapter(adapter)
        parts = seen[role] = {"k": [], "base": [], "value": [], "delta": [], "z": []}
        hooks = [hook for layer in layers for hook in _watch(layer, adapter, parts)]
        try:
            with torch.no_grad():
                model(input_ids=text, use_cache=False, logits_to_keep=1)
        finally:
            for hook in hooks:
                hook.remove()
    model.set_adapter(before)

    def alike(part: str) -> float:
        found = [
            float(F.cosine_similarity(x.float(), y.float(), dim=-1).mean())
            for a, b in combinations(seen, 2)
            for x, y in zip(seen[a][part], seen[b][part], strict=True)
        ]
        return sum(found) / len(found) if found else 1.0

    ranks = {part.shape[-1] for parts in seen.values() for part in parts["z"]}
    return Similarity(
        alike("k"), alike("base"), alike("value"), alike("delta"), alike("z") if len(ranks) == 1 else None
    )


def _watch(layer: Any, adapter: str, parts: dict[str, list[torch.Tensor]]) -> Iterator[Any]:
    values = layer.v_proj

    def keep_values(module: Any, args: Any, out: torch.Tensor) -> None:
        x = args[0]
        z = module.lora_A[adapter](x.to(module.lora_A[adapter].weight.dtype))
        delta = module.lora_B[adapter](z) * module.scaling[adapter]
        parts["z"].append(z[0])
        parts["delta"].append(delta[0])
        parts["value"].append(out[0])
        parts["base"].append(out[0] - delta[0].to(out.dtype))

    yield values.register_forward_hook(keep_values)
    yield layer.k_proj.register_forward_hook(lambda module, args, out: parts["k"].append(out[0]))


def lora_report(
    model: Any,
    adapters: Mapping[str, str],
    ids: Sequence[int],
    modes: Sequence[Mode] = ("none", "base", "base_lr", "full"),
) -> tuple[Similarity, list[ModeReport]]:
    """The first half of ``ids`` is written by the first role, the second half is then read by each other one:
    in every mode, beside the role's own cache. Raises LoraShareError, ValueError for a text that is too
    short."""
    from .lora_session import MultiLoraSession

    if len(ids) < 4 or len(adapters) < 2:
        raise ValueError(f"a report needs two roles and four tokens, got {len(adapters)} and {len(ids)}")
    half = len(ids) // 2
    first, *others = adapters

    def halves(mode: Mode) -> tuple[dict[str, torch.Tensor], float, int]:
        logits, ratio, computed = {}, 0.0, 0
        for role in others:
            session = MultiLoraSession(
                model, {first: adapters[first], role: adapters[role]}, LoraShareConfig(mode)
            )
            session.logits(first, ids[:half])
            logits[role] = session.logits(role, ids[half:])[-(len(ids) - half) :].float().log_softmax(-1)
            computed += sum(session.computed.values())
            ratio += session.memory().ratio / len(others)
        return logits, ratio, computed

    rows, own = [], halves("none")[0]
    for mode in modes:
        try:
            logits, ratio, computed = halves(mode)
        except LoraShareError as error:
            rows.append(ModeReport(mode, None, None, None, str(error)))
            continue
        divergences = [
            float(F.kl_div(logits[role], own[role], reduction="batchmean", log_target=True))
            for role in others
        ]
        kl = max(0.0, math.fsum(divergences) / len(divergences))
        rows.append(ModeReport(mode, ratio, computed, kl))
    return similarity(model, adapters, ids), rows
