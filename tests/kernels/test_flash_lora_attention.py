"""Attention over values with a low-rank part: every back end against float64, and bad calls."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sharewell.kernels import flash_lora_attention

CPU = ["auto", "reference", "matmul", "sdpa", "expand"]
# Beside the rounding of the result. The fused kernels and the plain products round scores or weights to
# bfloat16 on the way; only the reference, which works in float32, is as good as its result can be.
BFLOAT16 = {"reference": 1e-5, "sdpa": 3e-3, "expand": 6e-3, "matmul": 6e-3, "auto": 6e-3, "triton": 3e-3}


def tolerance_of(backend: str, dtype: torch.dtype) -> float:
    return 1e-5 if dtype == torch.float32 else BFLOAT16[backend]


Operands = tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]


def operands(
    *, batch: int = 1, kv_heads: int = 2, group: int = 3, queries: int = 5, tokens: int = 40, d: int = 64,
    rank: int = 8, dtype: torch.dtype = torch.float32, seed: int = 0,
) -> Operands:  # fmt: skip
    g = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=g).to(dtype)

    size = 0.25 if dtype == torch.bfloat16 else 1.0  # values of a model, whose bfloat16 steps are 2e-3
    return (
        draw(batch, kv_heads * group, queries, d),
        draw(batch, kv_heads, tokens, d),
        size * draw(batch, kv_heads, tokens, d),
        size * draw(batch, tokens, rank),
        draw(rank, kv_heads * d) / math.sqrt(rank),
    )


def truth(q: Any, k: Any, v: Any, z: Any, b: Any, scale: float, seen: torch.Tensor | None = None) -> Any:
    """Written out in float64, head by head."""
    q, k, v, z, b = (x.double() for x in (q, k, v, z, b))
    batch, heads, queries, d = q.shape
    group = heads // k.shape[1]
    out = torch.zeros(batch, heads, queries, v.shape[3], dtype=torch.float64)
    for n in range(batch):
        for h in range(heads):
            kv = h // group
            scores = q[n, h] @ k[n, kv].T / math.sqrt(d)
            if seen is not None:
                scores = scores.masked_fill(~seen[n], -math.inf)
            p = scores.softmax(-1).nan_to_num(0.0)
            out[n, h] = p @ (v[n, kv] + scale * z[n] @ b[:, kv * d : (kv + 1) * d])
    return out


def lower(batch: int, queries: int, tokens: int) -> torch.Tensor:
    return torch.ones(batch, queries, tokens, dtype=torch.bool).tril(tokens - queries)


def assert_close(ours: torch.Tensor, expected: torch.Tensor, tolerance: float) -> None:
    """Within ``tolerance`` of the largest entry, beside the rounding of a bfloat16 result itself."""
    assert torch.isfinite(ours).all()
    allowed = tolerance * expected.abs().max().clamp_min(1.0)
    rounding = 2.0**-8 * expected.abs() if ours.dtype == torch.bfloat16 else 0.0
    assert ((ours.double() - expected).abs() <= allowed + rounding).all()


@pytest.mark.parametrize("backend", CPU)
@pytest.mark.parametrize("rank", [4, 8, 16, 64])
@pytest.mark.parametrize("d", [64, 128])
@pytest.mark.parametrize("group", [1, 3, 8])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_every_back_end_gives_what_float64_gives(
    backend: Any, rank: int, d: int, group: int, dtype: torch.dtype
):
    args = operands(group=group, d=d, rank=rank, dtype=dtype)
    ours = flash_lora_attention(*args, 2.0, mask="causal", backend=backend)
    assert ours.dtype == dtype
    assert_close(ours, truth(*args, 2.0, lower(1, 5, 40)), tolerance_of(backend, dtype))


@pytest.mark.parametrize("backend", CPU)
@pytest.mark.parametrize("tokens", [1, 2, 3, 31, 64, 65, 513, 4097])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_any_length_decodes_and_prefills(backend: Any, tokens: int, dtype: torch.dtype):
    for queries in {1, min(tokens, 7)}:
        args = operands(queries=queries, tokens=tokens, dtype=dtype)
        ours = flash_lora_attention(*args, 0.5, mask="causal", backend=backend)
        assert_close(ours, truth(*args, 0.5, lower(1, queries, tokens)), tolerance_of(backend, dtype))


@pytest.mark.parametrize("backend", CPU)
@pytest.mark.parametrize("queries", [1, 12])
def test_padding_is_not_seen_and_queries_that_see_nothing_get_zeros(backend: Any, queries: int):
    args = operands(batch=2, queries=queries, tokens=12)
    seen = lower(2, queries, 12)
    seen[1, :, :4] = False  # row 1 is padded on the left
    seen[0, 0, :] = False
    mask = seen[:, None]
    ours = flash_lora_attention(*args, 2.0, mask=mask, backend=backend)
    assert_close(ours, truth(*args, 2.0, seen), 1e-5)
    assert not ours[0, :, 0].any()
    # what is not seen has no influence, whatever is in it
    for x in args[1:4]:
        x.select(0, 1)[..., :4, :] = 1e3
    assert torch.equal(flash_lora_attention(*args, 2.0, mask=mask, backend=backend)[1], ours[1])


@given(
    st.sampled_from(CPU), st.integers(1, 3), st.integers(1, 4), st.integers(1, 4), st.integers(1, 9),
    st.integers(0, 40), st.sampled_from([1, 3, 5, 8]), st.sampled_from([8, 24, 64]),
    st.floats(-3, 3), st.integers(0, 99),
)  # fmt: skip
@settings(max_examples=60, deadline=None)
def test_odd_shapes_ranks_and_scales_agree(
    backend: Any, batch: int, kv: int, group: int, queries: int, more: int, rank: int, d: int, scale: float,
    seed: int,
):  # fmt: skip
    args = operands(
        batch=batch,
        kv_heads=kv,
        group=group,
        queries=queries,
        tokens=queries + more,
        rank=rank,
        d=d,
        seed=seed,
    )
    ours = flash_lora_attention(*args, scale, mask="causal", backend=backend)
    assert_close(ours, truth(*args, scale, lower(batch, queries, queries + more)), 1e-5)


def test_the_softmax_scale_and_views_of_larger_buffers_are_respected():
    q, k, v, z, b = operands(queries=1, tokens=33)
    room = [torch.full((*x.shape[:-2], 64, x.shape[-1]), math.nan) for x in (k, v, z)]
    for buffer, x in zip(room, (k, v, z), strict=True):
        buffer[..., :33, :] = x
    vk, vv, vz = (buffer[..., :33, :] for buffer in room)
    for backend in CPU:
        ours = flash_lora_attention(q, vk, vv, vz, b, 2.0, attention_scale=0.3, backend=backend)  # pyright: ignore[reportArgumentType]
        assert_close(ours, truth(q * 0.3 * 8, k, v, z, b, 2.0), 1e-5)


def test_every_row_of_a_batch_may_have_its_own_adapter():
    q, k, v, z, b = operands(batch=2)
    both = torch.stack([b, -2 * b])
    for backend in CPU:
        ours = flash_lora_attention(q, k, v, z, both, 2.0, "causal", backend=backend)  # pyright: ignore[reportArgumentType]
        for row in (0, 1):
            one = slice(row, row + 1)
            expected = truth(q[one], k[one], v[one], z[one], both[row], 2.0, lower(1, 5, 40))
            assert_close(ours[one], expected, 1e-5)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"backend": "fast"}, "backend must be auto, reference, matmul, sdpa, expand or triton, got 'fast'"),
        ({"q": (1, 6, 5)}, r"q must be \[n, heads, t, d\], got \(1, 6, 5\)"),
        ({"q": (1, 6, 5, 32)}, r"k must be \[n, kv_heads, context, d\]"),
        ({"v_base": (1, 2, 40, 32)}, r"v_base must be of k's shape"),
        ({"q": (1, 5, 5, 64)}, "heads of q must be a multiple of 2, got 5"),
        ({"z": (1, 39, 8)}, r"z must be \[1, 40, rank\], got \(1, 39, 8\)"),
        ({"b": (8, 64)}, r"b must be \[8, 128\] .* got \(8, 64\)"),
        ({"q": (1, 6, 41, 64), "mask": "causal"}, "queries must be at most the context of 40, got 41"),
        ({"mask": "diagonal"}, "mask must be None, 'causal' or a bool tensor, got 'diagonal'"),
        ({"mask": torch.zeros(5, 40)}, "mask must be bool, got torch.float32"),
        ({"mask": torch.ones(1, 6, 5, 40, dtype=torch.bool)}, "mask must be the same for all heads"),
    ],
)
def test_a_bad_call_names_what_is_wrong(change: dict[str, Any], message: str):
    call: dict[str, Any] = dict(zip(("q", "k", "v_base", "z", "b"), operands(), strict=True))
    call |= {name: torch.zeros(x) if isinstance(x, tuple) else x for name, x in change.items()}
    with pytest.raises(ValueError, match=message):
        flash_lora_attention(scale=1.0, **call)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("rank", [4, 8, 16, 64])
@pytest.mark.parametrize("group", [1, 3, 8])
def test_the_kernel_on_cuda_gives_what_float64_gives(dtype: torch.dtype, rank: int, group: int):
    for queries, tokens, d in ((1, 1, 64), (1, 4097, 64), (70, 300, 128), (65, 65, 64)):
        args = operands(queries=queries, tokens=tokens, d=d, rank=rank, group=group, dtype=dtype)
        q, k, v, z, b = (x.cuda() for x in args)
        ours = flash_lora_attention(q, k, v, z, b, 2.0, "causal", backend="triton")
        expected = truth(*args, 2.0, lower(1, queries, tokens))
        assert_close(ours.cpu(), expected, tolerance_of("triton", dtype))
