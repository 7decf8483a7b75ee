"""The CUDA rows of the Tempus benchmark: what 16 programs reach, and what they leave to others.

Run by ``tempus.py`` where Triton and a CUDA device are there.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

from sharewell.bench import Row
from sharewell.kernels.temporal_triton import available, triton_gemm

PROGRAMS = 16
SIDE = 4096
DECODE_STEPS = 200


def seconds(run: Callable[[], Any], repeats: int) -> list[float]:
    """Device time of each run, by CUDA events."""
    import torch

    out = []
    run()
    for _ in range(repeats):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        run()
        end.record()
        torch.cuda.synchronize()
        out.append(start.elapsed_time(end) / 1e3)
    return out


class DecodeLoop:
    """A stand-in for a serving engine's decode: small dependent products, replayed as a CUDA graph."""

    def __init__(self) -> None:
        import torch

        self._weights = [
            torch.randn(2048, 2048, device="cuda", dtype=torch.bfloat16) / 2048**0.5 for _ in range(24)
        ]
        self._x = torch.randn(8, 2048, device="cuda", dtype=torch.bfloat16)
        self.stream = torch.cuda.Stream()
        with torch.cuda.stream(self.stream):
            self._step()
            self.stream.synchronize()
            self._graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(self._graph, stream=self.stream):
                self._step()

    def _step(self) -> None:
        y = self._x
        for weight in self._weights:
            y = y @ weight

    def run(self) -> float:
        """Seconds of all steps; what runs on other streams meanwhile slows them."""
        import torch

        self.stream.synchronize()
        start = time.perf_counter()
        with torch.cuda.stream(self.stream):
            for _ in range(DECODE_STEPS):
                self._graph.replay()
        self.stream.synchronize()
        return time.perf_counter() - start


def beside(loop: DecodeLoop, product: Callable[[], Any], one_s: float) -> float:
    """Seconds of the decode loop while enough products for its whole length are queued on another stream."""
    import torch

    other = torch.cuda.Stream()
    alone_s = loop.run()
    with torch.cuda.stream(other):
        for _ in range(1 + int(3 * alone_s / one_s)):
            product()
    taken = loop.run()
    torch.cuda.synchronize()
    return taken


def gpu_rows(repeats: int = 9) -> list[Row]:
    """Rows of this device. Raises RuntimeError without one."""
    if not available():
        raise RuntimeError("no CUDA device with Triton")
    import torch

    sms = torch.cuda.get_device_properties(0).multi_processor_count
    rows = []
    for dtype in (torch.float16, torch.bfloat16):
        a, b = (torch.randn(SIDE, SIDE, device="cuda", dtype=dtype) for _ in range(2))
        out = torch.empty(SIDE, SIDE, device="cuda", dtype=dtype)

        def ours(a: Any = a, b: Any = b, out: Any = out) -> None:
            triton_gemm(a, b, out=out, programs=PROGRAMS)

        def cublas(a: Any = a, b: Any = b, out: Any = out) -> None:
            torch.mm(a, b, out=out)

        ours()
        ours_out = out.double()
        cublas()
        torch.testing.assert_close(ours_out, out.double(), rtol=2e-2, atol=0.5)
        flops = 2 * SIDE**3 / 1e12
        ours_s, cublas_s = seconds(ours, repeats), seconds(cublas, repeats)
        rows.append(
            Row.from_samples(
                f"{SIDE}^3 {str(dtype)[6:]} per multiprocessor",
                [flops / s / min(PROGRAMS, sms) for s in ours_s],
                [flops / s / sms for s in cublas_s],
                "TFLOP/s",
                "higher",
                "cuBLAS on all",
                claim=f"{PROGRAMS} programs use theirs well",
                target=0.6,
            )
        )
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        ours()
        torch.cuda.synchronize()
        rows.append(
            Row(
                f"extra device memory, {str(dtype)[6:]}",
                (torch.cuda.max_memory_allocated() - before) / 2**20,
                1.0,
                "MiB",
                "lower",
                "bar",
                target=1.0,
            )
        )
        loop = DecodeLoop()
        alone = [loop.run() for _ in range(repeats)]
        with_ours = [beside(loop, ours, min(ours_s)) for _ in range(repeats)]
        with_cublas = [beside(loop, cublas, min(cublas_s)) for _ in range(repeats)]
        rows.append(
            Row.from_samples(
                f"decode loop beside the {str(dtype)[6:]} product",
                [1e3 * s for s in with_ours],
                [1e3 * s for s in alone],
                "ms",
                "lower",
                "alone",
                claim="a decode loop beside it is at most 10 % slower",
                target=1 / 1.1,
            )
        )
        rows.append(
            Row.from_samples(
                f"decode loop beside the {str(dtype)[6:]} product",
                [1e3 * s for s in with_ours],
                [1e3 * s for s in with_cublas],
                "ms",
                "lower",
                "beside cuBLAS",
                claim="cuBLAS on all multiprocessors slows it more",
                target=1.0,
            )
        )
    return rows
