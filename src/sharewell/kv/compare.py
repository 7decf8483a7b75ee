"""All plans on one text, side by side: work, bytes, time to the first token, distance from full attention."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import torch

from .engine import PlannedForward
from .plans import KVPlan, OwnPlan, ReusePlan, SourcePlan
from .segments import Segment, TensorKV

if TYPE_CHECKING:
    from ..simulation import Clock


@dataclass(frozen=True)
class Handover:
    """A text in three pieces: a prefix, tokens that somebody else has computed behind another prefix, and
    what follows. ``segment`` holds the middle ones as they were computed there, at other positions."""

    prefix: list[int]
    shared: list[int]
    suffix: list[int]
    segment: Segment

    @property
    def ids(self) -> list[int]:
        """The whole text."""
        return [*self.prefix, *self.shared, *self.suffix]

    @property
    def slots(self) -> torch.Tensor:
        """Where the shared tokens are in the text."""
        return torch.arange(len(self.prefix), len(self.prefix) + len(self.shared))


@dataclass(frozen=True)
class Compared:
    """One plan's figures. ``kl``: mean KL(full || plan) of the next-token distributions behind the suffix's
    tokens, in nats; ``ttft_s``: the pass over the text; bytes per pass."""

    plan: str
    token_layers: int
    share_computed: float
    projections_skipped: int
    bytes_read: int
    bytes_held: int
    ttft_s: float
    kl: float

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)


# Name -> the plan for a hand-over on a model of so many layers. Systems add theirs.
PLANS: dict[str, Callable[[Handover, int], KVPlan]] = {
    "own": lambda h, layers: OwnPlan(),
    "reuse": lambda h, layers: ReusePlan([(h.slots, h.segment, torch.arange(len(h.shared)))]),
    "reuse-unmoved": lambda h, layers: ReusePlan(
        [(h.slots, h.segment, torch.arange(len(h.shared)))], move=False
    ),
    "layers-of-2": lambda h, layers: SourcePlan(layer - layer % 2 for layer in range(layers)),
    "layers-of-4": lambda h, layers: SourcePlan(layer - layer % 4 for layer in range(layers)),
}


def handover(engine: PlannedForward, ids: list[int], *, other_prefix: list[int]) -> Handover:
    """Split ``ids`` 2 : 5 : 1, and compute the middle behind ``other_prefix``. Raises ValueError for fewer
    than 16 ids or an empty prefix."""
    if len(ids) < 16 or not other_prefix:
        raise ValueError(
            f"ids must be at least 16 tokens and other_prefix 1, got {len(ids)} and {len(other_prefix)}"
        )
    a, b = len(ids) // 4, len(ids) - len(ids) // 8
    prefix, shared, suffix = ids[:a], ids[a:b], ids[b:]
    out = engine([*other_prefix, *shared])
    places = torch.arange(len(other_prefix), len(other_prefix) + len(shared))
    kv = TensorKV.copied(out.space, 0, places)  # pyright: ignore[reportArgumentType]
    return Handover(prefix, shared, suffix, Segment(0, "compare", torch.tensor(shared), places, kv))


def compare(
    engine: PlannedForward, text: Handover, clock: Clock, names: list[str] | None = None
) -> list[Compared]:
    """Run each of ``names`` (default: all of :data:`PLANS`) over ``text``. Raises ValueError for an unknown
    name."""
    unknown = next((n for n in names or () if n not in PLANS), None)
    if unknown is not None:
        raise ValueError(f"plans must be of {', '.join(PLANS)}, got {unknown!r}")
    ids, layers = text.ids, engine.decoder.config.n_layers
    wanted = torch.arange(len(ids) - len(text.suffix), len(ids))
    full = engine(ids, OwnPlan(), want=wanted).logits.float().log_softmax(-1)
    rows = []
    for name in names or list(PLANS):
        plan = PLANS[name](text, layers)
        started = clock.monotonic()
        engine(ids, plan)
        seconds = clock.monotonic() - started
        out = engine(ids, PLANS[name](text, layers), want=wanted)
        log_p = out.logits.float().log_softmax(-1)
        kl = float((full.exp() * (full - log_p)).sum(-1).mean())
        stats = out.stats
        rows.append(
            Compared(
                name,
                stats.token_layers,
                stats.token_layers / (len(ids) * layers),
                sum(stats.projections_skipped),
                sum(stats.bytes_read),
                stats.bytes_held,
                seconds,
                max(0.0, kl),
            )
        )
    return rows
