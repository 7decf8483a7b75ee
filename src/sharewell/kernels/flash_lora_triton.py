"""Flash-LoRA-Attention on CUDA: one pass over the keys with a second accumulator for P Z.

Source: LRAgent, arXiv 2602.01053. The online softmax (FlashAttention, arXiv 2205.14135) rescales both sums
alike; behind the last keys B is applied to the small one. Needs Triton, which comes with the CUDA builds of
PyTorch; :func:`sharewell.kernels.flash_lora_attention` is its twin on every machine."""

# Triton's jit rewrites the kernel's body, which no type checker follows.
# pyright: reportInvalidTypeForm=false
from __future__ import annotations

from importlib import import_module
from typing import Any

import torch

triton: Any = None
tl: Any = None
try:
    triton, tl = import_module("triton"), import_module("triton.language")
except ModuleNotFoundError:  # CPU builds of PyTorch have none
    pass


def available() -> bool:
    """True where Triton and a CUDA device are there."""
    return triton is not None and torch.cuda.is_available()


if triton is not None:

    @triton.jit
    def _attend(
        q_ptr, k_ptr, v_ptr, z_ptr, b_ptr, mask_ptr, o_ptr, lora_scale, scaling,
        heads, kv_heads, t, context, d, rank,
        q_n, q_h, q_t, q_d, k_n, k_h, k_c, k_d, v_n, v_h, v_c, v_d, z_n, z_c, z_r, b_n, b_r, b_d,
        m_n, m_t, m_c, o_n, o_h, o_t, o_d,
        CAUSAL: tl.constexpr, MASKED: tl.constexpr,
        M: tl.constexpr, N: tl.constexpr, D: tl.constexpr, R: tl.constexpr,
    ):  # fmt: skip
        n = tl.program_id(1) // heads
        head = tl.program_id(1) % heads
        key_head = head // (heads // kv_heads)
        rows = tl.program_id(0) * M + tl.arange(0, M)
        dims, ranks = tl.arange(0, D), tl.arange(0, R)
        n64 = n.to(tl.int64)
        q = tl.load(
            q_ptr + n64 * q_n + head * q_h + rows[:, None] * q_t + dims[None, :] * q_d,
            mask=(rows[:, None] < t) & (dims[None, :] < d),
            other=0,
        )
        best = tl.full((M,), -1.0e30, dtype=tl.float32)
        mass = tl.zeros((M,), dtype=tl.float32)
        out = tl.zeros((M, D), dtype=tl.float32)
        low = tl.zeros((M, R), dtype=tl.float32)
        last = context
        if CAUSAL:
            last = tl.minimum(context, context - t + tl.program_id(0) * M + M)
        for first in range(0, last, N):
            keys = first + tl.arange(0, N)
            keys64 = keys.to(tl.int64)
            there = keys < context
            k = tl.load(
                k_ptr + n64 * k_n + key_head * k_h + keys64[None, :] * k_c + dims[:, None] * k_d,
                mask=there[None, :] & (dims[:, None] < d),
                other=0,
            )
            allowed = there[None, :] & (rows[:, None] < t)
            if CAUSAL:
                allowed = allowed & (keys[None, :] <= rows[:, None] + context - t)
            if MASKED:
                allowed = allowed & (
                    tl.load(
                        mask_ptr + n64 * m_n + rows[:, None] * m_t + keys64[None, :] * m_c,
                        mask=allowed,
                        other=0,
                    )
                    != 0
                )
            scores = tl.dot(q, k, input_precision="ieee") * scaling
            scores = tl.where(allowed, scores, -1.0e30)
            top = tl.maximum(best, tl.max(scores, 1))
            decay = tl.exp(best - top)
            p = tl.where(allowed, tl.exp(scores - top[:, None]), 0.0)
            mass = mass * decay + tl.sum(p, 1)
            v = tl.load(
                v_ptr + n64 * v_n + key_head * v_h + keys64[:, None] * v_c + dims[None, :] * v_d,
                mask=there[:, None] & (dims[None, :] < d),
                other=0,
            )
            z = tl.load(
                z_ptr + n64 * z_n + keys64[:, None] * z_c + ranks[None, :] * z_r,
                mask=there[:, None] & (ranks[None, :] < rank),
                other=0,
            )
            narrow = p.to(v.dtype)
            out = tl.dot(narrow, v, out * decay[:, None], input_precision="ieee")
            low = tl.dot(narrow, z, low * decay[:, None], input_precision="ieee")
            best = top
        b = tl.load(
            b_ptr + n64 * b_n + ranks[:, None] * b_r + (key_head * d + dims[None, :]) * b_d,
            mask=(ranks[:, None] < rank) & (dims[None, :] < d),
            other=0,
        ).to(tl.float32)
        out = tl.dot(low * lora_scale, b, out, input_precision="ieee")
        out = out / tl.where(mass > 0, mass, 1.0)[:, None]
        tl.store(
            o_ptr + n64 * o_n + head * o_h + rows[:, None] * o_t + dims[None, :] * o_d,
            out.to(o_ptr.dtype.element_ty),
            mask=(rows[:, None] < t) & (dims[None, :] < d),
        )


def attend(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    z: torch.Tensor,
    b: torch.Tensor,
    scale: float,
    mask: torch.Tensor | None,
    causal: bool,
    scaling: float,
) -> torch.Tensor:
    """As :func:`sharewell.kernels.flash_lora_attention`, with ``b [n, rank, kv_heads * d]`` and ``mask``
    expanded to ``[n, 1, t, context]``. Raises ModuleNotFoundError without Triton."""
    if triton is None:
        raise ModuleNotFoundError(
            "triton is not installed: it comes with the CUDA builds of PyTorch", name="triton"
        )
    n, heads, t, d = q.shape
    out = torch.empty_like(q)
    z, b = z.to(v.dtype), b.to(q.device)
    m = 16 if t <= 16 else 64
    marks = q.new_zeros(1, dtype=torch.uint8) if mask is None else mask.to(torch.uint8)
    strides = (0, 0, 0) if mask is None else (marks.stride(0), marks.stride(2), marks.stride(3))
    _attend[(-(-t // m), n * heads)](
        q, k, v, z, b, marks, out, float(scale), float(scaling),
        heads, k.shape[1], t, k.shape[2], d, z.shape[2],
        *q.stride(), *k.stride(), *v.stride(), *z.stride(), *b.stride(), *strides, *out.stride(),
        CAUSAL=causal, MASKED=mask is not None, M=m, N=64,
        D=max(16, triton.next_power_of_2(d)), R=max(16, triton.next_power_of_2(z.shape[2])),
    )  # fmt: skip
    return out
