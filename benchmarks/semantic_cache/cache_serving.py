"""The same requests against the running server with the cache off, exact and semantic: tokens computed,
seconds, and wrong answers against known truth, per kind of question.

SmolLM2-135M behind `sharewell serve`, 16 clients, temperature 0, answers up to their first punctuation mark.
Rules and thresholds are those that are shipped, not calibrated. Whose answer a hit repeats is told by the
server (x-sharewell-cache-source), so a hit is wrong when that answer was computed for another intent.
"""

from __future__ import annotations

import asyncio
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import httpx

from benchmarks.semantic_cache.questions import CATEGORIES, Request, replay
from benchmarks.serving.processes import Launch, Server
from sharewell.bench import Progress, Report, Row, environment
from sharewell.semantic_cache import upper_bound

REQUESTS = {"smoke": 60, "full": 10_000}
CLIENTS = 16
MODES = ("off", "exact", "semantic")


@dataclass
class Served:
    """What one mode did: by category (asked, exact hits, semantic hits, wrong), tokens and seconds."""

    counts: dict[str, list[int]] = field(default_factory=lambda: {c: [0, 0, 0, 0] for c in CATEGORIES})
    computed: dict[str, int] = field(default_factory=lambda: dict.fromkeys(CATEGORIES, 0))
    tokens: int = 0
    seconds: float = 0.0
    latencies: list[float] = field(default_factory=list)

    def total(self, column: int) -> int:
        return sum(row[column] for row in self.counts.values())


def launch(mode: str, folder: Path) -> Launch:
    command = (
        sys.executable, "-m", "sharewell", "serve", "smollm2", "--port", "{port}", "--cache", mode,
        "--cache-file", str(folder / f"{mode}.sqlite3"),
    )  # fmt: skip
    return Launch(f"cache-{mode}", command, {"SHAREWELL_STATE": str(folder / f"{mode}-state.sqlite3")})


async def drive(
    url: str, requests: Sequence[Request], progress: Progress, mode: str, *, clients: int = CLIENTS
) -> Served:
    """All requests in order, at most ``clients`` at once."""
    served, intent_of = Served(), dict[str, str]()
    waiting = iter(enumerate(requests))
    limits = httpx.Limits(max_connections=clients)

    async with httpx.AsyncClient(base_url=url, timeout=120, limits=limits) as client:

        async def tokens() -> int:
            engine = (await client.get("/stats")).raise_for_status().json()["engine"]
            return engine["computed_prompt_tokens"] + engine["generated_tokens"]

        async def work() -> None:
            for number, request in waiting:
                body = {
                    "model": "smollm2", "messages": [{"role": "user", "content": request.text}],
                    "temperature": 0,
                    "max_tokens": 24, "stop": [".", ",", "\n", "!", "?", ":"],
                }  # fmt: skip
                start = time.perf_counter()
                reply = (await client.post("/v1/chat/completions", json=body)).raise_for_status()
                served.latencies.append(time.perf_counter() - start)
                answer, row = reply.json(), served.counts[request.category]
                row[0] += 1
                if reply.headers["x-sharewell-cache"] == "hit":
                    exact = reply.headers["x-sharewell-cache-tier"] == "exact"
                    row[1 if exact else 2] += 1
                    # whose answer it was may still be on its way to its own client
                    source = intent_of.get(reply.headers["x-sharewell-cache-source"], request.intent)
                    row[3] += source != request.intent
                else:
                    intent_of[answer["id"]] = request.intent
                    used = answer["usage"]
                    fresh = used["prompt_tokens"] - used["prompt_tokens_details"]["cached_tokens"]
                    served.computed[request.category] += fresh + used["completion_tokens"]
                if number % 50 == 0:
                    progress(f"cache {mode}", number, len(requests))

        before, start = await tokens(), time.perf_counter()
        await asyncio.gather(*(work() for _ in range(clients)))
        served.seconds = time.perf_counter() - start
        served.tokens = await tokens() - before
    return served


def run(scale: str, *, seed: int, progress: Progress) -> Report:
    """All three modes, one after the other, each on a server of its own."""
    requests = replay(REQUESTS[scale], "test", seed=seed or 1)
    results: dict[str, Served] = {}
    with tempfile.TemporaryDirectory() as folder:
        for mode in MODES:
            with Server(launch(mode, Path(folder)), Path(folder)) as server, server.turn():
                asyncio.run(drive(server.url, requests[:1], progress, mode))  # kernels and caches warm
                results[mode] = asyncio.run(drive(server.url, requests[1:], progress, mode))
    off, rows = results["off"], []
    n = off.total(0)
    for mode in ("exact", "semantic"):
        on = results[mode]
        hits, semantic, wrong = on.total(1) + on.total(2), on.total(2), on.total(3)
        rows += [
            Row(
                f"tokens computed, {mode}", on.tokens, off.tokens, "tokens", "lower", "cache off",
                claim="fewer than without the cache", target=1.0, note=f"{hits} of {n} requests were hits",
            ),
            Row(f"seconds, {mode}", on.seconds, off.seconds, "s", "lower", "cache off"),
            Row(
                f"median latency, {mode}", _median(on.latencies), _median(off.latencies), "s",
                "lower", "cache off",
            ),
        ]  # fmt: skip
        if mode == "semantic":
            bound = upper_bound(wrong, semantic) if semantic else 1.0
            rows.append(
                Row(
                    "wrong answers, semantic", wrong, None, f"of {n} requests", "lower",
                    note=f"{wrong} of {semantic} semantic hits, at most {bound:.1%} with 95 % confidence",
                )
            )  # fmt: skip
            for name in CATEGORIES:
                asked, exact, alike, bad = on.counts[name]
                rows.append(
                    Row(
                        f"tokens computed: {name}", on.computed[name], off.computed[name], "tokens", "lower",
                        "cache off",
                        note=f"{asked} asked, {exact} equal, {alike} in other words, {bad} of them wrong",
                    )
                )  # fmt: skip
    extra = {
        mode: {"counts": r.counts, "computed": r.computed, "tokens": r.tokens, "seconds": r.seconds}
        for mode, r in results.items()
    }
    return Report("cache-serving", scale, tuple(rows), environment(), seed, extra)  # pyright: ignore[reportArgumentType]


def _median(values: Sequence[float]) -> float:
    return sorted(values)[len(values) // 2]
