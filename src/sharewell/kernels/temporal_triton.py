"""The temporal GEMM on CUDA: a persistent kernel of exactly ``programs`` programs, each walking its list of
tiles.

Source: Tempus, arXiv 2605.00536, turned to GPUs: the number of programs is the budget, the multiprocessors
that they do not occupy stay free for other work. Every tile is summed over the same K segments in the same
order as on the CPU (:mod:`sharewell.kernels.temporal_gemm`), so the result does not depend on ``programs``.
Needs Triton, which comes with the CUDA builds of PyTorch.
"""

# Triton's jit rewrites the kernel's body, which no type checker follows.
# pyright: reportInvalidTypeForm=false
from __future__ import annotations

from importlib import import_module
from typing import Any

from .temporal_plan import segments

triton: Any = None
tl: Any = None
try:
    triton, tl = import_module("triton"), import_module("triton.language")
except ModuleNotFoundError:  # CPU builds of PyTorch have none
    pass


def available() -> bool:
    """True where Triton and a CUDA device are there."""
    if triton is None:
        return False
    import torch

    return torch.cuda.is_available()


if triton is not None:

    @triton.jit
    def _persistent_gemm(
        a_ptr, b_ptr, bias_ptr, c_ptr, m, n, k, segment,
        a_m, a_k, b_k, b_n, c_m, c_n,
        HAS_BIAS: tl.constexpr, FULL: tl.constexpr, ACC: tl.constexpr,
        M_T: tl.constexpr, N_T: tl.constexpr, K_T: tl.constexpr,
    ):  # fmt: skip
        start = tl.program_id(0)
        programs = tl.num_programs(0)
        columns = tl.cdiv(n, N_T)
        tiles = tl.cdiv(m, M_T) * columns
        for tile in range(start, tiles, programs):
            rows = (tile // columns) * M_T + tl.arange(0, M_T)
            cols = (tile % columns) * N_T + tl.arange(0, N_T)
            total = tl.zeros((M_T, N_T), dtype=ACC)
            for first in range(0, k, segment):
                last = tl.minimum(k, first + segment)
                partial = tl.zeros((M_T, N_T), dtype=ACC)
                for depth in range(first, last, K_T):
                    ks = depth + tl.arange(0, K_T)
                    a = tl.load(
                        a_ptr + rows[:, None].to(tl.int64) * a_m + ks[None, :].to(tl.int64) * a_k,
                        mask=(rows[:, None] < m) & (ks[None, :] < last),
                        other=0,
                    )
                    b = tl.load(
                        b_ptr + ks[:, None].to(tl.int64) * b_k + cols[None, :].to(tl.int64) * b_n,
                        mask=(ks[:, None] < last) & (cols[None, :] < n),
                        other=0,
                    )
                    if FULL:  # float32 without the ten-bit mantissas of TF32
                        partial = tl.dot(a, b, partial, input_precision="ieee", out_dtype=ACC)
                    else:
                        partial = tl.dot(a, b, partial, out_dtype=ACC)
                total += partial
            if HAS_BIAS:
                total += tl.load(bias_ptr + cols, mask=cols < n, other=0).to(ACC)[None, :]
            tl.store(
                c_ptr + rows[:, None].to(tl.int64) * c_m + cols[None, :].to(tl.int64) * c_n,
                total.to(c_ptr.dtype.element_ty),
                mask=(rows[:, None] < m) & (cols[None, :] < n),
            )


def triton_gemm(
    a: Any,
    b: Any,
    *,
    bias: Any = None,
    out: Any = None,
    programs: int = 16,
    cascade: int = 8,
    tile: tuple[int, int, int] = (128, 128, 64),
) -> Any:
    """``a [M, K] @ b [K, N] + bias [N]`` of torch tensors of one dtype on one device, by ``programs``
    programs.

    float16, bfloat16 and float32 (not TF32) accumulate in float32 and give their own dtype, int8 gives int32.
    ``tile`` (m, n, k): powers of two of at least 16. Launches one kernel on the current stream and allocates
    nothing when ``out`` is given, so a CUDA graph can capture it. Raises ModuleNotFoundError without Triton,
    TypeError or ValueError naming dtypes and shapes.
    """
    if triton is None:
        raise ModuleNotFoundError(
            "triton is not installed: it comes with the CUDA builds of PyTorch", name="triton"
        )
    import torch

    results = {
        torch.float16: torch.float16, torch.bfloat16: torch.bfloat16, torch.float32: torch.float32,
        torch.int8: torch.int32,
    }  # fmt: skip
    if a.dtype != b.dtype or a.dtype not in results:
        raise TypeError(
            f"A and B must both be float16, bfloat16, float32 or int8, got {a.dtype} and {b.dtype}"
        )
    if a.ndim != 2 or b.ndim != 2 or a.shape[1] != b.shape[0]:
        raise ValueError(f"A must be [M, K] and B [K, N], got shapes {tuple(a.shape)} and {tuple(b.shape)}")
    if a.device != b.device:
        raise ValueError(f"A and B must be on one device, got {a.device} and {b.device}")
    if programs < 1:
        raise ValueError(f"programs must be at least 1, got {programs}")
    if len(tile) != 3 or any(t < 16 or t & (t - 1) for t in tile):
        raise ValueError(f"tile must be three powers of two of at least 16, got {tile}")
    (m, k), n = a.shape, b.shape[1]
    if bias is not None:
        bias = torch.as_tensor(bias, device=a.device)
        if tuple(bias.shape) != (n,):
            raise ValueError(f"bias must have shape ({n},), got {tuple(bias.shape)}")
    if out is None:
        out = torch.empty((m, n), dtype=results[a.dtype], device=a.device)
    elif tuple(out.shape) != (m, n) or out.dtype != results[a.dtype] or out.device != a.device:
        raise ValueError(f"out must be {results[a.dtype]} of shape {(m, n)} on {a.device}")
    if m == 0 or n == 0:
        return out
    cut = segments(k, cascade)
    _persistent_gemm[(programs,)](
        a, b, a if bias is None else bias, out, m, n, k, cut[0][1] if cut else 1,
        a.stride(0), a.stride(1), b.stride(0), b.stride(1), out.stride(0), out.stride(1),
        HAS_BIAS=bias is not None, FULL=a.dtype == torch.float32,
        ACC=tl.int32 if a.dtype == torch.int8 else tl.float32, M_T=tile[0], N_T=tile[1], K_T=tile[2],
    )  # fmt: skip
    return out
