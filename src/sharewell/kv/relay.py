"""RelayCaching: text that one agent has just decoded is not prefilled again by the next one.

Its keys and values are moved to their new place; the tokens that the other prefix changes most, and those
that later tokens look at most, are computed anew in the layers where it matters (arXiv 2603.13289)."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import torch

from .plans import Call, KVPlan
from .relay_pieces import Piece, PiecePlan, RelayDeclined

if TYPE_CHECKING:
    from .relay_profile import LayerProfile

PREFIX, OWN, RELAYED, DEVIATION, INFLUENCE, EDGE = range(6)
ORIGINS = ("prefix", "computed", "relayed", "deviation", "influence", "edge")


@dataclass(frozen=True)
class RelayConfig:
    """Which tokens are computed anew.

    ``tau_dev``, ``tau_inf``: tokens whose deviation, or influence, is at least so many times the mean;
    infinity switches a set off. ``suffix``: last tokens of a segment, and ``seam``: first tokens of a piece,
    that always are. ``layers``: from the model's profile, or (start, detection, end). ``store_hidden``:
    layers below start are not computed for reused tokens. ``max_recompute``: above that share of tokens the
    prompt is computed in full; ``fallback_kl``: likewise above that predicted divergence (nats). Raises
    ValueError naming the field."""

    tau_dev: float = 1.5
    tau_inf: float = 1.45
    suffix: int = 10
    seam: int = 1
    layers: Literal["profile"] | tuple[int, int, int] = "profile"
    store_hidden: bool = True
    max_recompute: float = 0.5
    fallback_kl: float | None = None

    def __post_init__(self) -> None:
        for name in ("tau_dev", "tau_inf", "suffix", "seam"):
            if not getattr(self, name) >= 0:
                raise ValueError(f"{name} must be at least 0, got {getattr(self, name)!r}")
        if not 0 <= self.max_recompute <= 1:
            raise ValueError(f"max_recompute must be in [0, 1], got {self.max_recompute!r}")
        if self.fallback_kl is not None and not self.fallback_kl > 0:
            raise ValueError(f"fallback_kl must be None or positive, got {self.fallback_kl!r}")
        if self.layers != "profile":
            start, det, end = self.layers
            if not 0 <= start <= det <= end:
                raise ValueError(
                    f"layers must be 'profile' or 0 <= start <= detection <= end, got {self.layers!r}"
                )

    def range(self, profile: LayerProfile | None, n_layers: int) -> tuple[int, int, int]:
        """(start, detection, end) for a model. Raises ValueError when they are not its layers."""
        layers = self.layers
        if layers == "profile":
            if profile is None:
                raise ValueError("layers is 'profile', but no profile was given")
            layers = profile.start, profile.detection, profile.end
        if layers[2] >= n_layers:
            raise ValueError(f"layers must end below {n_layers}, got {layers!r}")
        return layers


class RelayPlan(PiecePlan):
    """Stages for reused tokens: below start skipped, up to detection all computed, up to end the selected
    ones, above reused. Raises RelayDeclined in the middle of a pass that is better computed in full."""

    def __init__(
        self,
        pieces: Iterable[Piece] | Callable[[], Iterable[Piece]],
        config: RelayConfig,
        profile: LayerProfile | None = None,
    ) -> None:
        super().__init__(pieces)
        self.config, self.profile = config, profile
        self.predicted_kl: float | None = None
        self.declined = ""

    def begin(self, call: Call) -> None:
        super().begin(call)
        self.start, self.detection, self.end = self.config.range(self.profile, call.n_layers)
        # where no hidden states are stored, a piece begins at layer 0
        kept = [self.config.store_hidden and self.start in p.segment.hidden for p in self.pieces]
        self._late = self.shared & torch.tensor([*kept, False])[self.owner]
        self.selected = torch.zeros_like(self.shared)
        self.origin = torch.where(self.shared, RELAYED, OWN)
        self.predicted_kl, self.declined = None, ""

    def chosen(self, layer: int) -> torch.Tensor:
        if layer < self.start:
            return ~self._late
        if layer <= self.detection:
            return torch.ones_like(self.shared)
        return ~self.shared | self.selected if layer <= self.end else ~self.shared

    def hidden(self, layer: int, slots: torch.Tensor) -> torch.Tensor:
        at = slots.cpu()
        width = self.pieces[int(self.owner[at[0]])].segment.hidden[self.start].shape[1]
        rows = torch.empty(len(at), width)
        for i in self.owner[at].unique().tolist():
            mine = (self.owner[at] == i).nonzero().flatten()
            stored = self.pieces[i].segment.hidden[self.start]
            rows[mine] = stored[self.token[at[mine]].to(stored.device)].float().cpu()
        return rows.to(slots.device)

    def observe(self, layer: int, slots: Any, k: Any, v: Any, mass: Any = None) -> None:
        if layer != self.detection or not bool(self.shared.any()):
            return
        config, fresh = self.config, v.flatten(1).float().cpu()
        deviation = torch.zeros(len(self.shared))
        for i, piece in enumerate(self.pieces):
            mine = (self.owner == i).nonzero().flatten()
            if not len(mine):
                continue
            old = self.read_values(layer, i, mine).cpu()
            d = 1 - torch.cosine_similarity(old, fresh[mine], dim=-1)
            if not bool(torch.isfinite(d).all()):
                self._decline(f"segment {piece.segment.id} holds NaN or infinite values", piece.segment.id)
            d = d.clamp(min=0)
            deviation[mine] = d
            tokens, influence = self.token[mine], piece.segment.influence
            if influence is not None and config.tau_inf != float("inf"):
                s = influence.cpu().float()
                self.origin[mine[s[tokens] >= config.tau_inf * s.mean()]] = INFLUENCE
            self.origin[mine[(d >= config.tau_dev * d.mean()) & (d > 0)]] = DEVIATION
            edge = (tokens >= len(piece.segment) - config.suffix) | (tokens < piece.offset + config.seam)
            self.origin[mine[edge]] = EDGE
        if config.tau_dev == 0:
            self.origin[self.shared & (self.origin == RELAYED)] = DEVIATION
        self.selected = self.shared & (self.origin != RELAYED)
        share = float(self.selected.sum() / self.shared.sum())
        if share > config.max_recompute:
            self._decline(f"{share:.0%} of the reused tokens would be computed anew, at most "
                          f"{config.max_recompute:.0%} may be (max_recompute)")  # fmt: skip
        left = float(deviation[self.shared & ~self.selected].sum() / self.shared.sum())
        if self.profile is not None and self.profile.kl_per_deviation:
            self.predicted_kl = left * self.profile.kl_per_deviation
            if config.fallback_kl is not None and self.predicted_kl > config.fallback_kl:
                self._decline(f"a divergence of {self.predicted_kl:.3g} nats is predicted, above fallback_kl "
                              f"{config.fallback_kl:.3g}")  # fmt: skip

    def _decline(self, why: str, damaged: int | None = None) -> None:
        if damaged is not None:
            self.damaged.append(damaged)
        self.declined = why
        raise RelayDeclined(why)

    @property
    def reuse_rate(self) -> float:
        """Share of the pieces' (token, layer) pairs that the last pass did not compute."""
        n = int(self.shared.sum())
        if not n or self.declined:
            return 0.0
        late, chosen = int(self._late.sum()), int(self.selected.sum())
        computed = (n - late) * self.start + n * (self.detection - self.start + 1)
        computed += chosen * (self.end - self.detection)
        return 1 - computed / (n * self.n_layers)


class StudyPlan(KVPlan):
    """Looks at a finished answer once: hidden states before layer ``start`` of all its tokens, and how much
    attention each got from later ones, of which every ``stride``-th asks. The answer's keys and values are in
    the space; what is computed here equals them.

    The call's tokens are the answer's. Afterwards :attr:`kept` (layer -> ``[n, hidden]``) and
    :attr:`influence` (float32 ``[n]``: mean over layers, heads and the later queries)."""

    mass_of_self, present = False, True

    def __init__(self, layers: tuple[int, int, int], n_heads: int, *, stride: int = 1) -> None:
        if stride < 1:
            raise ValueError(f"stride must be at least 1, got {stride}")
        self.layers, self._heads, self._stride = layers, n_heads, stride
        self.kept: dict[int, torch.Tensor] = {}
        self.influence = torch.zeros(0)

    def begin(self, call: Call) -> None:
        n = len(call)
        self._first = int(call.positions[0])
        ask = torch.arange(n)
        self._asking = ask[(n - 1 - ask) % self._stride == 0]
        self._mass = torch.zeros(n)
        self._n = n

    @property
    def _asked(self) -> range:
        """Layers whose attention counts: from start on, behind the one whose input is kept."""
        start, _, end = self.layers
        return range(start + 1 if start else 0, max(start, end) + 1)

    def active(self, layer: int) -> torch.Tensor | None:
        if layer == self._asked.start:
            return self._asking
        return self._asking[:0] if layer == self._asked.stop else None

    def states(self, layer: int, slots: torch.Tensor, h: torch.Tensor) -> None:
        if layer == self.layers[0]:
            self.kept[layer] = h.clone()

    def wants_attention(self, layer: int) -> bool:
        return layer in self._asked

    def observe(self, layer: int, slots: Any, k: Any, v: Any, mass: Any = None) -> None:
        if mass is not None:
            self._mass += mass[0][self._first : self._first + self._n].cpu().float()

    def finish(self, call: Call) -> None:
        later = len(self._asking) - torch.searchsorted(self._asking, torch.arange(self._n), right=True)
        self.influence = self._mass / (later.clamp(min=1) * max(1, len(self._asked)) * self._heads)
        self.influence[later == 0] = 0


def origin_spans(
    origin: torch.Tensor, owner: torch.Tensor, names: Mapping[int, str], first: int = 0
) -> list[list]:
    """Runs of equal origin as [first position, end, origin, whose segment]."""
    out: list[list] = []
    for at, (kind, who) in enumerate(zip(origin.tolist(), owner.tolist(), strict=True), first):
        source = names.get(who, "") if kind >= RELAYED else ""
        if out and out[-1][2:] == [ORIGINS[kind], source] and out[-1][1] == at:
            out[-1][1] = at + 1
        else:
            out.append([at, at + 1, ORIGINS[kind], source])
    return out
