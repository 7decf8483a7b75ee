"""Content hashes of prompt blocks and the index from hash to block: what prefix sharing looks things up
in."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence

import numpy as np


def block_hashes(
    tokens: Sequence[int] | np.ndarray, block_size: int, *, salt: bytes, parent: bytes | None = None
) -> list[bytes]:
    """Chained 128-bit hashes of the full blocks of ``tokens``: h_i = blake2b(h_{i-1} || tokens_i), h_{-1} =
    salt's hash.

    The salt scopes sharing (model revision, adapter, key); ``parent`` continues a chain instead of starting
    one. Raises ValueError for a block_size below 1, OverflowError for a token beyond int32."""
    if block_size < 1:
        raise ValueError(f"block_size must be at least 1, got {block_size}")
    data = np.ascontiguousarray(tokens, np.int32).tobytes()
    size = 4 * block_size
    previous = parent if parent is not None else hashlib.blake2b(salt, digest_size=16).digest()
    hashes = []
    for start in range(0, len(data) - size + 1, size):
        previous = hashlib.blake2b(previous + data[start : start + size], digest_size=16).digest()
        hashes.append(previous)
    return hashes


class PrefixIndex:
    """Hash to block number, one block a hash. Tensor-free: block managers, routers and the simulator share
    it."""

    def __init__(self) -> None:
        self._blocks: dict[bytes, int] = {}

    def __len__(self) -> int:
        return len(self._blocks)

    def __contains__(self, block_hash: bytes) -> bool:
        return block_hash in self._blocks

    def __iter__(self) -> Iterator[tuple[bytes, int]]:
        return iter(self._blocks.items())

    def get(self, block_hash: bytes) -> int | None:
        """The block that holds this content, or None."""
        return self._blocks.get(block_hash)

    def add(self, block_hash: bytes, block: int) -> bool:
        """Publish; False when another block already holds this content (the first stays)."""
        return self._blocks.setdefault(block_hash, block) == block

    def remove(self, block_hash: bytes) -> None:
        """Forget a hash. Raises KeyError for an unknown one."""
        del self._blocks[block_hash]

    def match(self, hashes: Sequence[bytes]) -> int:
        """How many leading blocks are present: O(matched)."""
        n = 0
        for block_hash in hashes:
            if block_hash not in self._blocks:
                break
            n += 1
        return n
