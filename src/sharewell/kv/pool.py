"""The memory of the pages: one buffer, one contiguous region a block, all layers and planes inside it."""

from __future__ import annotations

import torch

from .layout import DTYPE_BYTES, PageLayout


class PagePool:
    """``num_blocks`` blocks of ``layout`` in one block-major buffer; pages that were never written take no
    memory.

    A block number outside ``[0, num_blocks)`` is an IndexError.
    """

    def __init__(self, layout: PageLayout, num_blocks: int, device: str | torch.device = "cpu") -> None:
        if num_blocks < 1:
            raise ValueError(f"num_blocks must be at least 1, got {num_blocks}")
        self.layout, self.num_blocks = layout, num_blocks
        self.data = torch.empty(num_blocks * layout.block_bytes, dtype=torch.uint8, device=device)
        self._blocks = self.data.view(num_blocks, layout.block_bytes)
        self._row = {layer: i for i, layer in enumerate(layout.layers)}

    def plane(self, name: str, layer: int) -> torch.Tensor:
        """View ``[num_blocks, block_size, width]`` of one plane of one layer, strided over the blocks; no
        copy.

        Raises KeyError for a layer without pages of its own or an unknown plane.
        """
        width, dtype = self.layout.planes[name]
        size = DTYPE_BYTES[dtype]
        start = self._row[layer] * self.layout.layer_bytes + self.layout.offset(name)
        part = self._blocks[:, start : start + self.layout.block_size * width * size]
        return part.view(getattr(torch, dtype)).view(self.num_blocks, self.layout.block_size, width)

    def copy_block(self, source: int, destination: int) -> None:
        """Copy all layers and planes of a block."""
        self._blocks[self._checked(destination)] = self._blocks[self._checked(source)]

    def read_block(self, block: int) -> bytes:
        """The block's bytes, for swapping or sending."""
        return self._blocks[self._checked(block)].cpu().numpy().tobytes()

    def write_block(self, block: int, data: bytes) -> None:
        """Put back what :meth:`read_block` gave. Raises ValueError for a wrong size."""
        if len(data) != self.layout.block_bytes:
            raise ValueError(f"data must be {self.layout.block_bytes} bytes, got {len(data)}")
        self._blocks[self._checked(block)] = torch.frombuffer(bytearray(data), dtype=torch.uint8)

    def _checked(self, block: int) -> int:
        if not 0 <= block < self.num_blocks:
            raise IndexError(f"block must be in [0, {self.num_blocks}), got {block}")
        return block
