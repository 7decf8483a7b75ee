"""Reading and writing tokens of tiled pages from torch, whole blocks at a time.

The tiling is :func:`sharewell.kernels.attention.tile_offset`'s: for each head and each 16 tokens, keys
``[head_dim, 16]`` and values ``[head_dim / 16, 16, 16]``, in bfloat16 with pairs along the summed axis."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from .pool import PagePool

_LANES = 16


class TiledPlanes:
    """Planes "k" and "v" of ``pool``, whose blocks hold ``kv_heads`` heads of ``head_dim`` in tiles."""

    def __init__(self, pool: PagePool, kv_heads: int, head_dim: int) -> None:
        self._pool = pool
        self._size, self._layers = pool.layout.block_size, pool.layout.layers
        tiles, pairs = self._size // _LANES, pool.layout.planes["k"][1] != "float32"
        self._token = self._size, kv_heads, head_dim
        # (shape in memory, axes that bring it to [block, tile, token of tile, head, dim])
        if pairs:
            self._k = (kv_heads, tiles, head_dim // 2, 16, 2), (0, 2, 4, 1, 3, 5)
            self._v = (kv_heads, tiles, head_dim // 16, 8, 16, 2), (0, 2, 4, 6, 1, 3, 5)
        else:
            self._k = (kv_heads, tiles, head_dim, 16), (0, 2, 4, 1, 3)
            self._v = (kv_heads, tiles, head_dim // 16, 16, 16), (0, 2, 4, 1, 3, 5)

    def _blocks(self, name: str, layer: int) -> torch.Tensor:
        shape = (self._k if name == "k" else self._v)[0]
        plane = self._pool.plane(name, layer)
        return plane.view(len(plane), *shape)

    def _load(self, name: str, layer: int, blocks: torch.Tensor) -> torch.Tensor:
        """Copy ``[len(blocks) * block_size, kv_heads, head_dim]``."""
        axes = (self._k if name == "k" else self._v)[1]
        return self._blocks(name, layer)[blocks].permute(axes).reshape(-1, *self._token[1:])

    def _store(self, name: str, layer: int, blocks: torch.Tensor, x: torch.Tensor) -> None:
        shape, axes = self._k if name == "k" else self._v
        memory = len(blocks), *shape
        order = [axes.index(i) for i in range(len(axes))]
        permuted = x.view([memory[i] for i in axes]).permute(order)
        self._blocks(name, layer)[blocks] = permuted

    def read(
        self, layer: int, table: torch.Tensor, places: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values ``[n, kv_heads, head_dim]`` of ``places`` (ascending) of the sequence of
        ``table``."""
        first, blocks = self._span(table, places)
        at = places - first
        return self._load("k", layer, blocks)[at], self._load("v", layer, blocks)[at]

    def write(
        self, layer: int, table: torch.Tensor, places: torch.Tensor, k: torch.Tensor, v: torch.Tensor
    ) -> None:
        """Put ``k, v`` in place; the other tokens of those blocks stay."""
        first, blocks = self._span(table, places)
        at = places - first
        for name, new in (("k", k), ("v", v)):
            tokens = self._load(name, layer, blocks)
            tokens[at] = new.to(tokens.dtype)
            self._store(name, layer, blocks, tokens)

    def silence(self, table: torch.Tensor, context: int) -> None:
        """Zero the values behind place ``context - 1`` in its block, in every layer."""
        behind = context % self._size
        if behind:
            block = table[context // self._size : context // self._size + 1]
            for layer in self._layers:
                values = self._load("v", layer, block)
                values[behind:] = 0
                self._store("v", layer, block, values)

    def _span(self, table: torch.Tensor, places: torch.Tensor) -> tuple[int, torch.Tensor]:
        low, high = int(places[0]) // self._size, int(places[-1]) // self._size
        return low * self._size, table[low : high + 1]
