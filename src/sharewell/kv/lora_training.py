"""Adapters that can share their low-rank part: one A on v_proj for all roles, B and q_proj for each.

Source: LRAgent, arXiv 2602.01053: the first role is trained as usual, its A on v_proj is copied into the
other roles' adapters and frozen there. The defaults are the source's."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch

from .depth_training import attention_modules
from .lora_sharing import LoraShareError


def share_A(model: Any, source: str, targets: Sequence[str] = ("v_proj",)) -> list[str]:  # noqa: N802
    """Copy A of adapter ``source`` into every other adapter of a peft ``model``, for the projections
    ``targets``, and freeze it there. Returns the adapters that were changed. Raises LoraShareError for an
    unknown source, or an adapter of another rank or scale."""
    known = list(getattr(model, "peft_config", {}))
    if source not in known:
        raise LoraShareError(f"adapter {source!r} is not loaded, only {', '.join(known) or 'none'}")
    others = [name for name in known if name != source]
    pairs = []
    for attention, _ in attention_modules(model):
        for target in targets:
            projection = getattr(attention, target, None)
            for name in (source, *others):
                if name not in getattr(projection, "lora_A", {}):
                    where = f"layer {attention.layer_idx}"
                    raise LoraShareError(f"{where}: adapter {name!r} has no LoRA on {target}")
            assert projection is not None
            for name in others:
                shapes = [(projection.r[n], projection.scaling[n]) for n in (source, name)]
                if shapes[0] != shapes[1]:
                    raise LoraShareError(
                        f"adapters {source!r} and {name!r} must have one rank and scale to share A, got "
                        f"{shapes[0]} and {shapes[1]}"
                    )
                pairs.append((projection.lora_A[source].weight, projection.lora_A[name].weight))
    with torch.no_grad():
        for theirs, mine in pairs:
            mine.copy_(theirs)
            mine.requires_grad_(False)
    return others


def train_shared_A(  # noqa: N802
    model: Any,
    batches: Mapping[str, Sequence[Mapping[str, torch.Tensor]]],
    *,
    epochs: int = 10,
    lr_first: float = 5e-5,
    lr_others: float = 6e-5,
    warmup: float = 0.05,
    targets: Sequence[str] = ("v_proj",),
    progress: Callable[[str, int, float], None] | None = None,
) -> dict[str, list[float]]:
    """Train the adapters named in ``batches`` one after the other: the first as usual, then its A is shared
    and the others train around it. A batch holds what the model takes (``input_ids``, ``labels``, ...).

    AdamW with a cosine schedule. Returns each adapter's loss per step; ``progress(adapter, step, loss)``.
    Raises LoraShareError, ValueError for settings out of range."""
    if epochs < 1 or not 0 <= warmup < 1 or min(lr_first, lr_others) <= 0:
        raise ValueError(
            f"epochs must be at least 1, warmup in [0, 1) and rates positive, got {epochs}, {warmup}, "
            f"{lr_first} and {lr_others}"
        )
    from transformers import get_cosine_schedule_with_warmup

    names = list(batches)
    missing = [name for name in names if name not in getattr(model, "peft_config", {})]
    if not names or missing:
        raise LoraShareError(f"batches must name loaded adapters, got {names}")
    losses: dict[str, list[float]] = {}
    was_training = model.training
    model.train()
    for i, name in enumerate(names):
        model.set_adapter(name)
        frozen = _own_A(model, names[0], name, targets) if i else []
        for weight in frozen:
            weight.requires_grad_(False)
        weights = [p for p in model.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(weights, lr=lr_others if i else lr_first)
        steps = epochs * len(batches[name])
        schedule = get_cosine_schedule_with_warmup(optimizer, int(warmup * steps), steps)
        mine = losses[name] = []
        for batch in (batch for _ in range(epochs) for batch in batches[name]):
            loss = model(**batch).loss
            loss.backward()
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
            mine.append(float(loss.detach()))
            if progress is not None:
                progress(name, len(mine), mine[-1])
        if i == 0 and len(names) > 1:
            share_A(model, name, targets)
    model.train(was_training)
    model.set_adapter(names[0])
    return losses


def _own_A(model: Any, source: str, name: str, targets: Iterable[str]) -> list[torch.Tensor]:  # noqa: N802
    """A of adapter ``name`` on ``targets``: activating an adapter thaws all of it."""
    return [
        getattr(attention, target).lora_A[name].weight
        for attention, _ in attention_modules(model)
        for target in targets
    ]
