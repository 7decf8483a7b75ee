"""The attention of the compiled step against a plain float64 softmax over the same keys and values."""

from __future__ import annotations

import numpy as np
import pytest

from sharewell.kernels import shape as layout
from sharewell.kernels.attention import (
    MAX_ITEM_ROWS,
    attend,
    attention_entries,
    scratch_floats,
    silence_tail,
    write_tiled,
)


class _Pages:
    """One layer's keys and values of one sequence in scattered pages, and the same numbers plainly."""

    def __init__(
        self, length: int, *, dim: int, heads: int, kv_heads: int, block: int, bf16: bool, window: int = 0
    ) -> None:
        rng = np.random.default_rng(length)
        size = 2 if bf16 else 4
        plane = block * kv_heads * dim * size
        blocks = -(-length // block)
        size = 2 * (blocks + 2) * plane
        self.memory = np.full(size + 64, 255, np.uint8)  # every number that is not written is NaN
        aligned = -self.memory.ctypes.data % 64
        self.pool = self.memory[aligned : aligned + size]
        self.table = rng.permutation(blocks + 2)[:blocks].astype(np.int32)
        self.shape = np.zeros(layout.LENGTH, np.int64)
        for name, value in {
            layout.N_HEADS: heads,
            layout.N_KV: kv_heads,
            layout.HEAD_DIM: dim,
            layout.BLOCK_SIZE: block,
            layout.BLOCK_BYTES: 2 * plane,
            layout.LAYER_BYTES: 2 * plane,
            layout.VALUES_AT: plane,
            layout.POOL: self.pool.ctypes.data,
            layout.WINDOW: window,
            layout.PAGES_BF16: int(bf16),
            layout.SCORES: attention_entries(bf16)[0],
            layout.MIX: attention_entries(bf16)[1],
        }.items():
            self.shape[name] = value
        self.k, self.v = (rng.normal(size=(length, kv_heads, dim)).astype(np.float32) for _ in range(2))
        if bf16:
            for x in (self.k, self.v):
                x.view(np.uint32)[:] &= 0xFFFF0000
        self.length, self.window, self.block = length, window, block

    def write(self, first: int, end: int) -> None:
        for t in range(first, end):
            slot = int(self.table[t // self.block]) * self.block + t % self.block
            for head in range(self.k.shape[1]):
                write_tiled(self.shape, self.pool, 0, slot, head, self.k[t, head], False)
                write_tiled(self.shape, self.pool, 0, slot, head, self.v[t, head], True)
        silence_tail(self.shape, self.pool, 0, slot)

    def attend(self, q: np.ndarray, first: int, count: int) -> np.ndarray:
        """``q``: float32 ``[count, heads, dim]`` of positions ``first ..``, in one item a key head."""
        heads, dim = q.shape[1:]
        kv_heads = self.k.shape[1]
        group = heads // kv_heads
        ordered = q.reshape(count, kv_heads, group, dim).transpose(1, 0, 2, 3).reshape(-1).copy()
        out = np.zeros((count, heads * dim), np.float32)
        scratch = np.zeros(scratch_floats(dim), np.float32)
        positions = np.arange(first, first + count)
        for head in range(kv_heads):
            at = head * count * group * dim
            attend(self.shape, 0, head, 0, count, self.table, positions, ordered, at, scratch, out)
        return out.reshape(count, heads, dim)

    def expected(self, q: np.ndarray, first: int) -> np.ndarray:
        group = q.shape[1] // self.k.shape[1]
        keys, values = (np.repeat(x.astype(np.float64), group, 1) for x in (self.k, self.v))
        scores = np.einsum("qhd,khd->hqk", q.astype(np.float64), keys)
        where = np.arange(first, first + len(q))[:, None]
        seen = np.arange(self.length)[None] <= where
        if self.window:
            seen &= np.arange(self.length)[None] > where - self.window
        scores = np.where(seen[None], scores, -np.inf)
        weights = np.exp(scores - scores.max(-1, keepdims=True))
        weights /= weights.sum(-1, keepdims=True)
        return np.einsum("hqk,khd->qhd", weights, values)


@pytest.mark.parametrize("bf16", [False, True])
@pytest.mark.parametrize(
    ("dim", "heads", "kv_heads", "block"), [(64, 9, 3, 16), (32, 4, 4, 32), (80, 4, 2, 64), (16, 2, 1, 16)]
)
def test_attention_equals_a_plain_softmax(
    bf16: bool, dim: int, heads: int, kv_heads: int, block: int
) -> None:
    pages = _Pages(301, dim=dim, heads=heads, kv_heads=kv_heads, block=block, bf16=bf16)
    pages.write(0, 301)
    rng = np.random.default_rng(1)
    for first, count in [(0, 1), (300, 1), (17, 3), (290, 5), (120, MAX_ITEM_ROWS // (heads // kv_heads))]:
        q = rng.normal(0, dim**-0.25, (count, heads, dim)).astype(np.float32)
        out = pages.attend(q, first, count)
        assert np.abs(out - pages.expected(q, first)).max() < 5e-6


@pytest.mark.parametrize("window", [1, 7, 16, 100, 200])
def test_a_window_hides_older_keys(window: int) -> None:
    pages = _Pages(400, dim=32, heads=4, kv_heads=2, block=16, bf16=False, window=window)
    pages.write(0, 400)
    rng = np.random.default_rng(2)
    for first, count in [(0, 4), (127, 6), (388, 12), (256, 1)]:
        q = rng.normal(size=(count, 4, 32)).astype(np.float32)
        assert np.abs(pages.attend(q, first, count) - pages.expected(q, first)).max() < 5e-6


@pytest.mark.parametrize("window", [0, 50])
@pytest.mark.parametrize("bf16", [False, True])
def test_a_query_is_bit_equal_whatever_shares_its_item(bf16: bool, window: int) -> None:
    pages = _Pages(350, dim=64, heads=6, kv_heads=2, block=16, bf16=bf16, window=window)
    pages.write(0, 350)
    q = np.random.default_rng(3).normal(0, 0.3, (8, 6, 64)).astype(np.float32)
    together = pages.attend(q, 340, 8)
    for first, count in [(0, 1), (2, 1), (3, 4), (1, 7)]:
        apart = pages.attend(q[first : first + count], 340 + first, count)
        assert np.array_equal(apart, together[first : first + count])


def test_nan_left_in_a_reused_page_is_not_seen() -> None:
    pages = _Pages(40, dim=32, heads=2, kv_heads=1, block=16, bf16=True)
    q = np.random.default_rng(4).normal(size=(1, 2, 32)).astype(np.float32)
    written = 0
    for end in (1, 9, 16, 17, 33, 40):  # the tail of the last tile is silenced before it is read
        pages.write(written, end)
        written = end
        assert np.isfinite(pages.attend(q, end - 1, 1)).all()
    assert np.abs(pages.attend(q, 39, 1) - pages.expected(q, 39)).max() < 5e-6


def test_bfloat16_pages_round_to_nearest_even_and_keep_nan() -> None:
    pages = _Pages(16, dim=16, heads=1, kv_heads=1, block=16, bf16=True)
    values = np.array([1.00390625, 1.01171875, -1.00390625, np.nan, np.inf] + [0.0] * 11, np.float32)
    write_tiled(pages.shape, pages.pool, 0, 0, 0, values, False)
    at = 0
    plain = pages.pool.view(np.uint16)
    got = np.array([plain[at + i // 2 * 32 + i % 2] for i in range(16)], np.uint16)
    got = (got.astype(np.uint32) << 16).view(np.float32)
    assert got[:3].tolist() == [1.0, 1.015625, -1.0]
    assert np.isnan(got[3])
    assert np.isinf(got[4])
