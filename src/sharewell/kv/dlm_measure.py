"""What each way of keeping keys and values costs a masked diffusion language model, and what it changes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from .dkv import VARIANTS, DKVConfig, Variant

if TYPE_CHECKING:
    import torch

    from ..simulation import Clock
    from .diffusion_models import MaskedDiffusionLM

Judge = Callable[["torch.Tensor"], float]


@dataclass(frozen=True)
class CacheTrial:
    """What is compared: every variant with every number of steps, on the same prompts.

    ``block_length`` tokens are decided block by block; None: all at once, and a quarter for "block".
    ``refresh`` and ``window`` as in :class:`~sharewell.kv.DKVConfig`. Raises ValueError naming the field."""

    gen_length: int = 128
    steps: tuple[int, ...] = (128,)
    variants: tuple[Variant, ...] = ("none", "decode", "pd")
    block_length: int | None = None
    refresh: int | None = None
    window: int = 4
    remasking: str = "low_confidence"
    seed: int = 0

    def __post_init__(self) -> None:
        if not self.steps or any(steps < 1 for steps in self.steps):
            raise ValueError(f"steps must be numbers of at least 1, got {self.steps}")
        for variant in self.variants:
            if variant not in VARIANTS:
                raise ValueError(f"variant must be one of {', '.join(VARIANTS)}, got {variant!r}")
        if not self.variants:
            raise ValueError(f"variants must name at least one of {', '.join(VARIANTS)}, got none")

    def block(self, variant: Variant) -> int:
        """Tokens of a block of ``variant``."""
        if self.block_length is not None:
            return self.block_length
        return max(1, self.gen_length // 4) if variant == "block" else self.gen_length


@dataclass(frozen=True)
class CacheRow:
    """One variant with one number of steps, over all prompts at once.

    ``computed``: positions computed as a part of those without a cache. ``times_faster``: than "none" with as
    many steps. ``same_tokens``: share of the answers' tokens that equal those of "none". ``solved``: what the
    judge says, where there is one."""

    variant: str
    steps: int
    seconds: float
    tokens_per_s: float
    times_faster: float
    computed: float
    kv_bytes: int
    same_tokens: float
    solved: float | None = None


def compare_caches(
    lm: MaskedDiffusionLM,
    prompts: Sequence[Sequence[int]],
    trial: CacheTrial,
    clock: Clock,
    judge: Judge | None = None,
) -> list[CacheRow]:
    """A row for every number of steps and variant; "none" always runs, since the others are set beside it.

    ``judge`` gets the answers, int64 ``[B, gen_length]``, and gives the share that is right. Raises
    ValueError naming what :func:`~sharewell.kv.denoise` cannot do."""
    from .diffusion_lm import generate_masked_diffusion
    from .engine import PlannedForward

    engine = PlannedForward(lm.model)
    variants: list[Variant] = ["none", *(v for v in trial.variants if v != "none")]
    rows = []
    for steps in trial.steps:
        plain: tuple[torch.Tensor, float] | None = None
        for variant in variants:
            cache = DKVConfig(variant, trial.refresh, trial.window, lm.shift)
            options: dict[str, Any] = {"remasking": trial.remasking, "eos_id": lm.eos_id, "seed": trial.seed}
            begun = clock.monotonic()
            out = generate_masked_diffusion(
                engine, prompts, trial.gen_length, steps, mask_id=lm.mask_id, cache=cache,
                block_length=trial.block(variant), **options,
            )  # fmt: skip
            seconds = clock.monotonic() - begun
            if plain is None:
                plain = out.answers, seconds
            rows.append(
                CacheRow(
                    variant, steps, seconds, out.answers.numel() / seconds, plain[1] / seconds,
                    out.stats.share, out.stats.bytes_held,
                    float((out.answers == plain[0]).double().mean()),
                    None if judge is None else judge(out.answers),
                )
            )  # fmt: skip
    return rows
