"""The memory of the pages: one buffer, one contiguous region a block, all layers and planes inside it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch

_SIZES = {"float32": 4, "bfloat16": 2, "float16": 2, "int8": 1, "uint8": 1}


@dataclass(frozen=True)
class PageLayout:
    """What a page holds for each of its ``block_size`` tokens: per kept layer, each plane's ``(width, dtype)``.

    ``kept_layers`` names the model layers that have pages of their own (default: all ``n_layers``); a low-rank or
    quantised plane is one more entry of ``planes``. Raises ValueError naming what is not allowed.
    """

    n_layers: int
    block_size: int
    planes: Mapping[str, tuple[int, str]]
    kept_layers: tuple[int, ...] | None = None
    _offsets: dict[str, int] = field(init=False, repr=False, default_factory=dict)

    def __post_init__(self) -> None:
        if self.n_layers < 1 or self.block_size < 1:
            raise ValueError(f"n_layers and block_size must be at least 1, got {self.n_layers} and {self.block_size}")
        if not self.planes:
            raise ValueError("planes must name at least one plane")
        if self.kept_layers is not None:
            kept = self.kept_layers
            if not kept or sorted(set(kept)) != list(kept) or kept[0] < 0 or kept[-1] >= self.n_layers:
                raise ValueError(f"kept_layers must be ascending layers in [0, {self.n_layers}), got {kept}")
        at = 0
        for name, (width, dtype) in self.planes.items():
            if dtype not in _SIZES or width < 1:
                raise ValueError(f"plane {name!r} must have a positive width and a dtype of {sorted(_SIZES)}, got {width}, {dtype!r}")
            self._offsets[name] = at
            at += self.block_size * width * _SIZES[dtype]
            at = -(-at // 64) * 64  # planes start on cache lines
        self._offsets["end"] = at

    @property
    def layers(self) -> tuple[int, ...]:
        """Model layers with pages of their own, ascending."""
        return self.kept_layers if self.kept_layers is not None else tuple(range(self.n_layers))

    @property
    def layer_bytes(self) -> int:
        return self._offsets["end"]

    @property
    def block_bytes(self) -> int:
        return self.layer_bytes * len(self.layers)

    def offset(self, plane: str) -> int:
        """Bytes from the start of a layer's part of a block to ``plane``."""
        return self._offsets[plane]


class PagePool:
    """``num_blocks`` blocks of ``layout`` in one block-major buffer; pages that were never written take no memory."""

    def __init__(self, layout: PageLayout, num_blocks: int, device: str | torch.device = "cpu") -> None:
        if num_blocks < 1:
            raise ValueError(f"num_blocks must be at least 1, got {num_blocks}")
        self.layout, self.num_blocks = layout, num_blocks
        self.data = torch.empty(num_blocks * layout.block_bytes, dtype=torch.uint8, device=device)
        self._blocks = self.data.view(num_blocks, layout.block_bytes)
        self._row = {layer: i for i, layer in enumerate(layout.layers)}

    def plane(self, name: str, layer: int) -> torch.Tensor:
        """View ``[num_blocks, block_size, width]`` of one plane of one layer, strided over the blocks; no copy."""
        width, dtype = self.layout.planes[name]
        size = _SIZES[dtype]
        start = self._row[layer] * self.layout.layer_bytes + self.layout.offset(name)
        part = self._blocks[:, start : start + self.layout.block_size * width * size]
        return part.view(getattr(torch, dtype)).view(self.num_blocks, self.layout.block_size, width)

    def copy_block(self, source: int, destination: int) -> None:
        """Copy all layers and planes of a block."""
        self._blocks[destination] = self._blocks[source]

    def read_block(self, block: int) -> bytes:
        """The block's bytes, for swapping or sending."""
        return self._blocks[block].cpu().numpy().tobytes()

    def write_block(self, block: int, data: bytes) -> None:
        """Put back what :meth:`read_block` gave. Raises ValueError for a wrong size."""
        if len(data) != self.layout.block_bytes:
            raise ValueError(f"data must be {self.layout.block_bytes} bytes, got {len(data)}")
        self._blocks[block] = torch.frombuffer(bytearray(data), dtype=torch.uint8)
