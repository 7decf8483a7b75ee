"""Page layouts and the pool: every plane of every kept layer has bytes of its own, and a block is one
region."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sharewell.kv import PageLayout, PagePool

BYTES = {"float32": 4, "bfloat16": 2, "float16": 2, "int8": 1, "uint8": 1}
planes = st.dictionaries(
    st.sampled_from(["k", "v", "k_scale", "v_scale", "low_rank"]),
    st.tuples(st.integers(1, 40), st.sampled_from(sorted(BYTES))),
    min_size=1,
)
# LRAgent's low-rank plane, int8 keys and values with their scales, pages for three of twelve layers
RICH = PageLayout(
    12,
    16,
    {
        "k": (64, "int8"),
        "v": (64, "int8"),
        "k_scale": (2, "float32"),
        "v_scale": (2, "float32"),
        "z": (8, "bfloat16"),
    },
    kept_layers=(0, 5, 11),
)


def filled(pool: PagePool, seed: int) -> dict[tuple[str, int], torch.Tensor]:
    """Random bytes in every plane; what was written."""
    generator = torch.Generator().manual_seed(seed)
    written = {}
    for name, layer in itertools.product(pool.layout.planes, pool.layout.layers):
        view = pool.plane(name, layer)
        values = torch.randint(-100, 100, view.shape, generator=generator).to(view.dtype)
        view.copy_(values.abs() if view.dtype == torch.uint8 else values)
        written[name, layer] = view.clone()
    return written


@settings(max_examples=50, deadline=None)
@given(planes, st.integers(1, 9), st.sets(st.integers(0, 5), min_size=1), st.integers(1, 4))
def test_no_plane_overlaps_another(
    planes: dict[str, tuple[int, str]], size: int, kept: set[int], num_blocks: int
) -> None:
    layout = PageLayout(6, size, planes, tuple(sorted(kept)))
    pool = PagePool(layout, num_blocks)
    for (name, layer), values in filled(pool, 1).items():
        width, dtype = planes[name]
        assert values.shape == (num_blocks, size, width) and values.dtype == getattr(torch, dtype)
        assert torch.equal(pool.plane(name, layer), values)
    wanted = sum(size * width * BYTES[dtype] for width, dtype in planes.values())
    assert wanted <= layout.layer_bytes < wanted + 64 * len(planes)
    assert layout.block_bytes == layout.layer_bytes * len(kept)
    assert all(layout.offset(name) % 64 == 0 for name in planes)


def test_a_page_holds_low_rank_and_int8_planes_of_the_kept_layers() -> None:
    assert RICH.layers == (0, 5, 11)
    assert RICH.layer_bytes == 2 * 16 * 64 + 2 * 16 * 2 * 4 + 16 * 8 * 2
    assert RICH.block_bytes == 3 * RICH.layer_bytes
    full = PageLayout(12, 16, {"k": (64, "float32"), "v": (64, "float32")})
    assert full.block_bytes / RICH.block_bytes == pytest.approx(12 * 8192 / (3 * 2560))
    pool = PagePool(RICH, 4)
    with pytest.raises(KeyError):
        pool.plane("k", 1)
    with pytest.raises(KeyError):
        pool.plane("w", 0)


def test_int8_keys_with_their_scales_come_back_within_half_a_step() -> None:
    pool = PagePool(RICH, 2)
    keys = torch.randn(16, 2, 32, generator=torch.Generator().manual_seed(3))
    scale = keys.abs().amax(-1) / 127
    pool.plane("k", 5)[1] = (keys / scale[..., None]).round().to(torch.int8).view(16, 64)
    pool.plane("k_scale", 5)[1] = scale
    read = pool.plane("k", 5)[1].view(16, 2, 32).float() * pool.plane("k_scale", 5)[1][..., None]
    assert ((read - keys).abs() <= scale[..., None] / 2 + 1e-6).all()


def test_copying_and_moving_a_block_takes_everything_and_nothing_else() -> None:
    pool = PagePool(RICH, 4)
    before = filled(pool, 2)
    pool.copy_block(1, 3)
    data = pool.read_block(0)
    assert len(data) == RICH.block_bytes
    pool.write_block(2, data)
    for key, values in before.items():
        assert torch.equal(pool.plane(*key), values[[0, 1, 0, 1]])


def test_bad_blocks_and_layouts_are_refused() -> None:
    pool = PagePool(RICH, 4)
    for call in (lambda: pool.copy_block(0, 4), lambda: pool.copy_block(-1, 0), lambda: pool.read_block(4)):
        with pytest.raises(IndexError, match=r"block must be in \[0, 4\)"):
            call()
    with pytest.raises(ValueError, match=f"data must be {RICH.block_bytes} bytes, got 3"):
        pool.write_block(0, b"abc")
    with pytest.raises(ValueError, match="num_blocks must be at least 1, got 0"):
        PagePool(RICH, 0)
    ok = {"k": (4, "int8")}
    bad: tuple[tuple[Any, str], ...] = (
        ((0, 16, ok), "n_layers and block_size must be at least 1, got 0 and 16"),
        ((1, 16, {}), "planes must name at least one plane"),
        ((1, 16, {"k": (4, "int4")}), "plane 'k' must have a positive width and a dtype of"),
        ((1, 16, {"k": (0, "int8")}), "plane 'k' must have a positive width"),
        ((4, 16, ok, (2, 1)), r"kept_layers must be ascending layers in \[0, 4\), got \(2, 1\)"),
        ((4, 16, ok, (4,)), "kept_layers must be ascending"),
        ((4, 16, ok, ()), "kept_layers must be ascending"),
    )
    for arguments, message in bad:
        with pytest.raises(ValueError, match=message):
            PageLayout(*arguments)
