"""Which layers of a model RelayCaching computes anew: measured once, on texts behind two prefixes."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from .plans import KVPlan
from .segments import Segment, TensorKV

if TYPE_CHECKING:
    from ..models import ModelConfig
    from .engine import PlannedForward

SHIPPED = Path(__file__).parent / "profiles"


@dataclass(frozen=True)
class HandOver:
    """The same ``shared`` tokens behind two prefixes, and what follows behind the second: token ids."""

    first_prefix: list[int]
    shared: list[int]
    second_prefix: list[int]
    suffix: list[int]

    @property
    def prompt(self) -> list[int]:
        """The second text."""
        return [*self.second_prefix, *self.shared, *self.suffix]


@dataclass(frozen=True)
class LayerProfile:
    """``deviation[l]``: mean over tokens of 1 - cos of values behind the one and the other prefix;
    ``correlation[l]``: of a layer's deviations per token with their mean over [start, end].
    ``kl_per_deviation``: divergence in nats per mean deviation that is left, 0 when not measured.
    ``shape``: what model it belongs to (:func:`shape_of`). Raises ValueError for layers out of order."""

    shape: str
    deviation: tuple[float, ...]
    correlation: tuple[float, ...]
    start: int
    detection: int
    end: int
    pairs: int = 0
    kl_per_deviation: float = 0.0

    def __post_init__(self) -> None:
        if not 0 <= self.start <= self.detection <= self.end < len(self.deviation):
            raise ValueError(
                f"start, detection and end must ascend below {len(self.deviation)}, "
                f"got {(self.start, self.detection, self.end)}"
            )

    def save(self, path: Path | str) -> None:
        """Write JSON, whole or not at all."""
        path = Path(path)
        with tempfile.NamedTemporaryFile("w", dir=path.parent, delete=False, suffix=".tmp") as out:
            json.dump(asdict(self), out, indent=1)
            out.flush()
            os.fsync(out.fileno())
        Path(out.name).replace(path)

    @classmethod
    def load(cls, path: Path | str) -> LayerProfile:
        """Read what :meth:`save` wrote. Raises ValueError for another file."""
        try:
            raw = json.loads(Path(path).read_text("utf-8"))
            return cls(
                **{**raw, "deviation": tuple(raw["deviation"]), "correlation": tuple(raw["correlation"])}
            )
        except (KeyError, TypeError, json.JSONDecodeError) as error:
            raise ValueError(f"{path} is no layer profile: {error}") from None

    @classmethod
    def cautious(cls, config: ModelConfig) -> LayerProfile:
        """For a model that nobody measured: everything up to an eighth of the layers, then the selected
        tokens to the last."""
        n = config.n_layers
        return cls(shape_of(config), (0.0,) * n, (0.0,) * n, 0, max(0, n // 8), n - 1)


def shape_of(config: ModelConfig) -> str:
    """What profiles are looked up by: the family and its sizes."""
    sizes = config.n_layers, config.hidden_size, config.n_heads, config.n_kv_heads, config.head_dim
    return f"{config.architecture}-" + "-".join(
        map(str, (*sizes, config.intermediate_size, config.vocab_size))
    )


def profile_for(config: ModelConfig) -> LayerProfile:
    """The shipped profile of a model, or the cautious one."""
    shape = shape_of(config)
    for path in sorted(SHIPPED.glob("*.json")):
        profile = LayerProfile.load(path)
        if profile.shape == shape:
            return profile
    return LayerProfile.cautious(config)


class _Values(KVPlan):
    def __init__(self, where: slice) -> None:
        self.where, self.seen = where, []

    def observe(self, layer: int, slots: Any, k: Any, v: Any, mass: Any = None) -> None:
        self.seen.append(v[self.where].flatten(1).float().clone())


def segment_of(engine: PlannedForward, text: HandOver) -> Segment:
    """The shared tokens as computed behind the first prefix."""
    a, n = len(text.first_prefix), len(text.shared)
    out = engine([*text.first_prefix, *text.shared])
    places = torch.arange(a, a + n)
    return Segment(0, "", torch.tensor(text.shared), places, TensorKV.copied(out.space, 0, places))


def profile_layers(
    engine: PlannedForward,
    texts: Sequence[HandOver],
    *,
    changed: float = 0.01,
    alike: float = 0.7,
    told: Callable[[int], None] = lambda done: None,
) -> LayerProfile:
    """Measure ``texts`` (50 to 200; 1 at least). Start: the first layer that deviates by more than
    ``changed``; end: the last one above the mean over layers; detection: the first from start on whose
    deviations per token correlate by ``alike`` with their mean over the range, else the best one."""
    from .plans import OwnPlan
    from .relay import RelayConfig, RelayPlan
    from .relay_pieces import Piece

    if not texts:
        raise ValueError("texts must be at least one hand-over, got none")
    all_d = []
    for i, text in enumerate(texts):
        a, b, n = len(text.first_prefix), len(text.second_prefix), len(text.shared)
        first, second = _Values(slice(a, a + n)), _Values(slice(b, b + n))
        engine([*text.first_prefix, *text.shared], first)
        engine([*text.second_prefix, *text.shared], second)
        pairs = zip(first.seen, second.seen, strict=True)
        all_d.append(torch.stack([1 - torch.cosine_similarity(x, y, dim=-1) for x, y in pairs]).clamp(min=0))
        told(i + 1)
    mean = torch.stack([d.mean(1) for d in all_d]).mean(0)
    n_layers = len(mean)
    above = (mean > changed).nonzero().flatten()
    start = int(above[0]) if len(above) else 0
    end = (
        max(start, int((mean > mean.mean()).nonzero().flatten()[-1]))
        if bool((mean > mean.mean()).any())
        else 0
    )
    end = max(start, end)
    correlation = torch.zeros(n_layers)
    for d in all_d:
        whole = d[start : end + 1].mean(0)
        correlation += torch.stack([torch.corrcoef(torch.stack([x, whole]))[0, 1] for x in d]).nan_to_num()
    correlation /= len(all_d)
    near = [layer for layer in range(start, end + 1) if correlation[layer] >= alike]
    detection = near[0] if near else start + int(correlation[start : end + 1].argmax())
    profile = LayerProfile(
        shape_of(engine.decoder.config), tuple(round(x, 6) for x in mean.tolist()),
        tuple(round(x, 4) for x in correlation.tolist()), start, detection, end, len(texts), 1.0,
    )  # fmt: skip
    left = kl = 0.0
    for text in texts[: max(1, len(texts) // 3)]:
        if not text.suffix:
            continue
        b, n = len(text.second_prefix), len(text.shared)
        wanted = torch.arange(b + n, len(text.prompt))
        plan = RelayPlan([Piece(segment_of(engine, text), b, 0, n)], RelayConfig(max_recompute=1.0), profile)
        full = engine(text.prompt, OwnPlan(), want=wanted).logits.float().log_softmax(-1)
        other = engine(text.prompt, plan, want=wanted).logits.float().log_softmax(-1)
        kl += float((full.exp() * (full - other)).sum(-1).mean())
        left += plan.predicted_kl or 0.0
    return LayerProfile(**{**asdict(profile), "kl_per_deviation": round(kl / left, 4) if left else 0.0})
