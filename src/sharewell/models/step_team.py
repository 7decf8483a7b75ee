"""The threads that run compiled steps, the buffers of a step, and the pages as the step sees them."""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from ..kernels import X_RECORD, scratch_floats

if TYPE_CHECKING:
    from collections.abc import Callable

    from .config import ModelConfig


class TiledPool:
    """Pages in the layout that the compiled step reads, over memory that somebody else owns.

    ``data``: uint8, flat; a block is ``[layers, planes k v, kv heads, block_size / 16 tiles]``, tiles as
    :mod:`sharewell.kernels.attention` describes; ``layer_bytes`` from one layer's keys to the next's,
    ``values_at`` bytes from a layer's keys to its values. Raises ValueError for a block size that is no
    multiple of 16.
    """

    def __init__(
        self, data: np.ndarray, block_size: int, block_bytes: int, layer_bytes: int, values_at: int
    ) -> None:
        if block_size % 16:
            raise ValueError(f"block_size must be a multiple of 16 for tiled pages, got {block_size}")
        self.data = data
        self.block_size, self.block_bytes = block_size, block_bytes
        self.layer_bytes, self.values_at = layer_bytes, values_at
        self.address = data.ctypes.data


class Workspace:
    """Every buffer of a step for up to ``rows`` tokens and ``logit_rows`` rows of logits, allocated once."""

    def __init__(
        self,
        config: ModelConfig,
        rows: int,
        logit_rows: int,
        *,
        qkv_width: int,
        head_rows: int,
        lora_width: int,
        threads: int,
        quantized: bool,
    ) -> None:
        def floats(*shape: int) -> np.ndarray:
            return torch.zeros(shape).numpy()  # torch's memory is aligned to cache lines

        def records(width: int) -> np.ndarray:
            size = 2 * (width // 32) * X_RECORD if quantized else 2  # twice: what rounding left out
            return torch.zeros((rows if quantized else 1, size), dtype=torch.uint8).numpy()

        attention = config.n_heads * config.head_dim
        widest = max(config.hidden_size, attention)
        self.rows, self.logit_rows = rows, logit_rows
        self.hidden = floats(rows, config.hidden_size)
        self.qkv = floats(rows, qkv_width)
        self.x, self.xq = floats(rows, widest), records(widest)
        self.q = floats(rows * attention)
        self.act, self.actq = floats(rows, config.intermediate_size), records(config.intermediate_size)
        self.u = floats(rows, lora_width)
        self.scratch = floats(threads, widest + max(rows * 128, scratch_floats(config.head_dim)))
        self.logits_tensor = torch.zeros(logit_rows, head_rows)
        self.logits = self.logits_tensor.numpy()


class Team:
    """Threads that run one compiled step together: the caller, and ``threads - 1`` helpers asleep between.

    The caller's part ends when the whole step is done. A helper that the machine holds up may come to a step
    when it is over; it finds nothing to do and goes on with the newest one.
    """

    def __init__(self, threads: int, step: Callable[..., None]) -> None:
        self._step = step
        self._arguments: tuple[Any, ...] | None = None
        self._start = [threading.Semaphore(0) for _ in range(threads - 1)]
        for i in range(threads - 1):
            name = f"sharewell-step-{i + 1}"
            threading.Thread(target=self._help, args=(i,), name=name, daemon=True).start()

    def _help(self, i: int) -> None:
        start = self._start[i]
        while True:
            start.acquire()
            while start.acquire(blocking=False):
                pass  # steps that were missed
            arguments = self._arguments
            if arguments is None:
                return
            self._step(i + 1, *arguments)

    def run(self, arguments: tuple[Any, ...]) -> None:
        """``step(thread, *arguments)`` on every thread; returns when the step is done."""
        self._arguments = arguments
        for start in self._start:
            start.release()
        self._step(0, *arguments)

    def close(self) -> None:
        """Let the helpers end."""
        self._arguments = None
        for start in self._start:
            start.release()
