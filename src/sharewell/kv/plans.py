"""A plan says, layer by layer, which tokens of a pass are computed and where other keys and values come from.

The engine (:mod:`sharewell.kv.engine`) owns the loop, the memory and the masks, and calls a plan at the
moments of :class:`KVPlan`. A sharing policy is a subclass that overrides the two or three moments it cares
about."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal, Protocol

if TYPE_CHECKING:
    import torch

    from .spaces import KVSpace


class PlanError(ValueError):
    """A plan that cannot be carried out; the message names the layer and the slot."""


class UnsupportedModel(ValueError):
    """A model whose layers the engine cannot run; the message names the class and what is missing."""


@dataclass(frozen=True)
class Call:
    """The tokens of one pass, packed along one axis without padding; a *slot* is an index into them.

    Sorted by (sequence, position), each pair once. ``token_ids``, ``positions`` and ``sequences`` are int64
    ``[T]`` on the decoder's device. A sequence may have earlier tokens in ``space`` already: those are no
    slots, and every query sees them by the mask.
    """

    token_ids: torch.Tensor
    positions: torch.Tensor
    sequences: torch.Tensor
    n_layers: int
    space: KVSpace = field(repr=False)

    def __len__(self) -> int:
        return len(self.token_ids)


class SegmentSource(Protocol):
    """Keys and values of some tokens, whoever keeps them: a stored segment, pages of another sequence."""

    @property
    def positions(self) -> torch.Tensor:
        """Where the keys are rotated to: int64 ``[n]``."""
        ...

    def read(self, layer: int, tokens: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys (after RoPE) and values ``[len(tokens), kv_heads, head_dim]``; never written to."""
        ...


@dataclass(frozen=True)
class Read:
    """Where the keys and values of some slots come from.

    ``segment`` with ``tokens`` (int64 ``[n]``, which of its tokens, one per slot), or without a segment the
    same slots of an earlier ``layer`` of this pass. ``layer`` None means the layer being computed. Keys are
    moved from the segment's positions to the slots' by RoPE unless ``move`` is False. ``transform(k, v)`` is
    applied last. Other dtypes and devices are converted and counted.
    """

    segment: SegmentSource | None = None
    tokens: torch.Tensor | None = None
    layer: int | None = None
    move: bool = True
    transform: Callable[[torch.Tensor, torch.Tensor], tuple[torch.Tensor, torch.Tensor]] | None = None


@dataclass(frozen=True)
class LowRank:
    """Values with a low-rank part, V + scale (x A^T) B, whose second term is added after attention and never
    materialised: O = P V + scale (P Z) B (LRAgent, arXiv 2602.01053).

    ``a`` ``[rank, hidden]`` acts on the layer's normed input; ``b`` ``[rank, kv_heads * head_dim]``. The
    engine keeps Z = x A^T, without the scale, beside keys and values.
    """

    a: torch.Tensor
    b: torch.Tensor
    scale: float


class KVPlan:
    """The moments at which a sharing policy is asked. This base class computes everything: it is the plain
    cache.

    Per pass: ``begin`` once, then for each layer in order ``active``, ``source``, ``read``, ``hidden`` (only
    for slots that need one) and ``observe``. Slots are int64 tensors, ascending.
    """

    mask: Literal["causal", "full"] = "causal"
    # False: attention mass leaves out what each token gives itself.
    mass_of_self: bool = True
    # True: the pass's tokens are in the space already; slots that are not active stay as they are.
    present: bool = False
    # Positions below this hold what computing would give, for everybody.
    exact_tokens: int = 0

    def begin(self, call: Call) -> None:
        """A pass over ``call`` begins."""

    def active(self, layer: int) -> torch.Tensor | None:
        """Slots whose queries, keys and values are computed at ``layer``; None: the same as at the layer
        before (at layer 0: all)."""
        return None

    def source(self, layer: int) -> int:
        """The layer (at most ``layer``) whose keys and values the queries of ``layer`` attend to. Another
        layer than its own: keys and values of ``layer`` are neither computed nor kept."""
        return layer

    def read(self, layer: int) -> Iterable[tuple[torch.Tensor, Read]]:
        """(slots, where from): keys and values put in place before ``layer`` attends. Active slots must not
        be among them. An inactive slot that is not read must be there from an earlier pass."""
        return ()

    def hidden(self, layer: int, slots: torch.Tensor) -> torch.Tensor | None:
        """Hidden states ``[len(slots), hidden]`` before ``layer`` of slots that become active there."""
        return None

    def states(self, layer: int, slots: torch.Tensor, h: torch.Tensor) -> None:
        """Hidden states ``h [len(slots), hidden]`` before ``layer`` (1 or above) of its active slots, to
        copy: the engine goes on in that memory."""

    def low_rank(self, layer: int) -> LowRank | None:
        """The low-rank part of this layer's values; None for none."""
        return None

    def wants_attention(self, layer: int) -> bool:
        """True: :meth:`observe` gets this layer's attention mass (costs an explicit softmax)."""
        return False

    def observe(
        self,
        layer: int,
        slots: torch.Tensor,
        k: torch.Tensor | None,
        v: torch.Tensor | None,
        mass: list[torch.Tensor] | None = None,
    ) -> None:
        """What ``layer`` computed: selection of the layers above happens here, and copies are taken here. Not
        called at a layer where no slot is active.

        ``k`` (after RoPE) and ``v`` ``[len(slots), kv_heads, head_dim]``, None where the layer has a source
        of its own below. ``mass``: for each sequence of the call in order, float32 ``[context]``: attention
        that each of its tokens received, summed over queries and heads.
        """

    def finish(self, call: Call) -> None:
        """The pass is over; everything that it wrote is in the space."""


class OwnPlan(KVPlan):
    """Every token computes its own keys and values in every layer: an ordinary cache, and the oracle."""


class SourcePlan(KVPlan):
    """Layers read the keys and values of layer ``sources[l]``; nothing else changes.

    Raises ValueError unless layer 0 reads itself and each source is a layer at or below that reads itself.
    """

    def __init__(self, sources: Iterable[int]) -> None:
        self.sources = tuple(sources)
        for layer, source in enumerate(self.sources):
            if not 0 <= source <= layer or self.sources[source] != source:
                raise ValueError(
                    f"sources[{layer}] must be a layer in [0, {layer}] that reads itself, got {source}"
                )
        if not self.sources:
            raise ValueError("sources must name a layer for each layer, got none")

    def begin(self, call: Call) -> None:
        if len(self.sources) != call.n_layers:
            raise PlanError(f"sources name {len(self.sources)} layers, the model has {call.n_layers}")

    def source(self, layer: int) -> int:
        return self.sources[layer]


class ReusePlan(KVPlan):
    """Slots that segments hold are read (moved to their place), all others computed: direct reuse.

    ``matches``: (slots, segment, tokens of the segment) of this pass.
    """

    def __init__(
        self, matches: Iterable[tuple[torch.Tensor, SegmentSource, torch.Tensor]], move: bool = True
    ) -> None:
        self.matches, self.move = list(matches), move
        self._computed: torch.Tensor | None = None

    def begin(self, call: Call) -> None:
        import torch

        keep = torch.ones(len(call), dtype=torch.bool)
        for slots, _, _ in self.matches:
            keep[slots] = False
        self._computed = keep.nonzero().flatten()

    def active(self, layer: int) -> torch.Tensor | None:
        return self._computed if layer == 0 else None

    def read(self, layer: int) -> Iterable[tuple[torch.Tensor, Read]]:
        return [(slots, Read(segment, tokens, move=self.move)) for slots, segment, tokens in self.matches]


@dataclass
class PlanStats:
    """What a pass did, per layer: always counted.

    ``computed``: tokens whose queries were computed; ``projections_skipped``: key and value projections not
    called for them (2 a token); ``tokens_read`` and ``bytes_read`` from other sources; ``converted``: tokens
    whose source had another dtype or device. ``bytes_held`` by the space after the pass.
    """

    computed: list[int]
    projections_skipped: list[int]
    tokens_read: list[int]
    bytes_read: list[int]
    converted: int = 0
    bytes_held: int = 0

    @classmethod
    def of(cls, n_layers: int) -> PlanStats:
        """Zeros for ``n_layers``."""
        return cls([0] * n_layers, [0] * n_layers, [0] * n_layers, [0] * n_layers)

    @property
    def token_layers(self) -> int:
        """(token, layer) pairs that were computed."""
        return sum(self.computed)
