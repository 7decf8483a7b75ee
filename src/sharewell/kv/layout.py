"""What a page holds: layers, planes and their bytes. No tensors here, so planners and simulators can count
with it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

DTYPE_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2, "int8": 1, "uint8": 1}
_ALIGNMENT = 64  # planes start on cache lines


@dataclass(frozen=True)
class PageLayout:
    """What a page holds for each of its ``block_size`` tokens: per kept layer, each plane's ``(width,
    dtype)``.

    ``kept_layers`` names the model layers that have pages of their own (default: all ``n_layers``); a
    low-rank or quantised plane is one more entry of ``planes``. Raises ValueError naming what is not allowed.
    """

    n_layers: int
    block_size: int
    planes: Mapping[str, tuple[int, str]]
    kept_layers: tuple[int, ...] | None = None
    _offsets: dict[str, int] = field(init=False, repr=False, compare=False, default_factory=dict)
    _layer_bytes: int = field(init=False, repr=False, compare=False, default=0)

    def __post_init__(self) -> None:
        if self.n_layers < 1 or self.block_size < 1:
            raise ValueError(
                f"n_layers and block_size must be at least 1, got {self.n_layers} and {self.block_size}"
            )
        if not self.planes:
            raise ValueError("planes must name at least one plane")
        if self.kept_layers is not None:
            kept = self.kept_layers
            if not kept or sorted(set(kept)) != list(kept) or kept[0] < 0 or kept[-1] >= self.n_layers:
                raise ValueError(f"kept_layers must be ascending layers in [0, {self.n_layers}), got {kept}")
        at = 0
        for name, (width, dtype) in self.planes.items():
            if dtype not in DTYPE_BYTES or width < 1:
                raise ValueError(
                    f"plane {name!r} must have a positive width and a dtype of {sorted(DTYPE_BYTES)}, "
                    f"got {width}, {dtype!r}"
                )
            self._offsets[name] = at
            at += self.block_size * width * DTYPE_BYTES[dtype]
            at = -(-at // _ALIGNMENT) * _ALIGNMENT
        object.__setattr__(self, "_layer_bytes", at)

    @property
    def layers(self) -> tuple[int, ...]:
        """Model layers with pages of their own, ascending."""
        return self.kept_layers if self.kept_layers is not None else tuple(range(self.n_layers))

    @property
    def layer_bytes(self) -> int:
        """Bytes of one layer's part of a block, padding included."""
        return self._layer_bytes

    @property
    def block_bytes(self) -> int:
        """Bytes of a block: all kept layers, all planes."""
        return self._layer_bytes * len(self.layers)

    def offset(self, plane: str) -> int:
        """Bytes from the start of a layer's part of a block to ``plane``."""
        return self._offsets[plane]
