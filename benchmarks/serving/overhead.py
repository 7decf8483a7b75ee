"""What a step costs besides its forward pass: scheduler, sampling, messages between processes, detokenising.

The engine runs in its own process as in the server, with a runner that notes when it computes. Everything
else that the engine's thread does (reading requests, planning, packing the batch, choosing tokens, publishing
pages, writing the frame) is CPU time between two forward passes. This side of the socket reads the frames,
hands tokens to each stream and detokenises them, as the API process does; its CPU time counts too. HTTP does
not.
"""

from __future__ import annotations

import asyncio
import os
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from sharewell.bench import usable_cores
from sharewell.models import IncrementalDetokenizer, LoraAdapter, Tokenizer, resolve_model
from sharewell.serving.core import AsyncEngine, Built, EngineConfig, EngineRequest, SamplingParams, build
from sharewell.serving.core.runner import Runner, StepBatch

from .workload import Prompt

_NOTES = "SHAREWELL_BENCH_NOTES"
_ROWS = 20_000
_ROOT = str(Path(__file__).resolve().parents[2])  # of the checkout


class _NotingRunner:
    """Writes tokens, wall at start and end, and thread CPU at start and end, of every pass to a file."""

    def __init__(self, runner: Runner, notes: Path) -> None:
        self._runner = runner
        self._notes = np.lib.format.open_memmap(notes, "w+", np.float64, (_ROWS, 5))
        self._row = 0

    def run(self, batch: StepBatch) -> Any:
        row = self._notes[self._row % _ROWS]
        row[0] = len(batch.token_ids)
        row[1], row[3] = time.perf_counter(), time.thread_time()
        logits = self._runner.run(batch)
        row[2], row[4] = time.perf_counter(), time.thread_time()
        self._row += 1
        return logits

    def load_adapter(self, slot: int, adapter: LoraAdapter) -> None:
        self._runner.load_adapter(slot, adapter)


def build_noting(config: EngineConfig) -> Built:
    """The engine's ordinary builder with the runner above; runs in the engine's process."""
    built = build(config)
    core = built.core
    core._runner = _NotingRunner(core._runner, Path(os.environ[_NOTES]))  # pyright: ignore[reportAttributeAccessIssue]
    return built


@dataclass(frozen=True)
class Overhead:
    """Medians over the decode steps in which all streams ran. CPU and wall seconds a step."""

    steps: int
    step_s: float  # wall from one forward pass's start to the next
    engine_s: float  # CPU of the engine's thread between forward passes
    front_s: float  # CPU of this side a step (mean)

    @property
    def total_s(self) -> float:
        """CPU seconds a step besides the forward pass, both processes."""
        return self.engine_s + self.front_s

    @property
    def share(self) -> float:
        """Of the step's time."""
        return self.total_s / self.step_s


async def _stream(
    engine: AsyncEngine, tokenizer: Tokenizer, name: str, prompt: Prompt, new_tokens: int
) -> int:
    request = EngineRequest(
        name, tuple(prompt), SamplingParams(temperature=0, max_tokens=new_tokens, ignore_eos=True)
    )
    text = IncrementalDetokenizer(tokenizer)
    pieces = 0
    async for output in engine.submit(request):
        pieces += len(text.push(output.token_ids))
    return pieces


async def _measure(dtype: str, prompts: list[list[Prompt]], new_tokens: int, threads: int) -> list[Overhead]:
    with tempfile.TemporaryDirectory() as folder:
        notes = Path(folder) / "notes.npy"
        # The engine's process must find this file, and know where to write.
        os.environ[_NOTES] = str(notes)
        before = os.environ.get("PYTHONPATH")
        os.environ["PYTHONPATH"] = _ROOT if before is None else f"{_ROOT}{os.pathsep}{before}"
        tokenizer = Tokenizer(resolve_model("smollm2", progress=False))
        config = EngineConfig(dtype=dtype, threads=threads)  # pyright: ignore[reportArgumentType]
        engine = await AsyncEngine.start(config, builder=f"{__name__}:build_noting")
        try:
            table = np.load(notes, mmap_mode="r")
            results, seen = [], int(np.count_nonzero(table[:, 0]))
            for round, batch in enumerate(prompts):
                cpu = time.process_time()
                streams = [
                    _stream(engine, tokenizer, f"{round}-{i}", p, new_tokens) for i, p in enumerate(batch)
                ]
                await asyncio.gather(*streams)
                front = time.process_time() - cpu
                rows = np.array(table[seen : int(np.count_nonzero(table[:, 0]))])
                seen += len(rows)
                results.append(_overhead(rows, len(batch), front))
            return results
        finally:
            await engine.close()
            os.environ.pop(_NOTES)
            os.environ.pop("PYTHONPATH") if before is None else os.environ.update(PYTHONPATH=before)


def _overhead(rows: np.ndarray, streams: int, front_s: float) -> Overhead:
    """``rows`` as the runner writes them, one for each pass of a round."""
    full = np.flatnonzero((rows[:-1, 0] == streams) & (rows[1:, 0] == streams))  # decode steps of all streams
    if len(full) < 3:
        raise RuntimeError(f"only {len(full)} of {len(rows)} steps decoded all {streams} streams")
    between = rows[full + 1, 3] - rows[full, 4]
    step = rows[full + 1, 1] - rows[full, 1]
    return Overhead(len(full), float(np.median(step)), float(np.median(between)), front_s / len(rows))


def measure_overhead(
    dtype: str, prompts: list[list[Prompt]], new_tokens: int, threads: int | None = None
) -> list[Overhead]:
    """One result for each round of ``prompts``; all prompts of a round are streams at the same time."""
    return asyncio.run(_measure(dtype, prompts, new_tokens, threads or usable_cores()))
