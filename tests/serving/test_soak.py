"""The server under random load for a while: exact answers throughout, and nothing left over.

CI runs it for a minute; ``make nightly`` for half an hour, or for as long as ``SHAREWELL_SOAK_S`` says."""

from __future__ import annotations

import asyncio
import json
import os
import random
import sqlite3
import time
from collections import Counter
from pathlib import Path

import httpx
import numpy as np
import psutil
import pytest
from server_process import ServerProcess

MIB = 1 << 20
LONGEST = 24  # tokens of an answer
SYSTEM = "You are the keeper of a lighthouse and answer in one short sentence. " * 4
QUESTIONS = [
    "How high are the waves today?",
    "Who built the tower?",
    "What do you eat in winter?",
    "Is the lamp lit?",
    "When did the last ship pass?",
    "Why is the sea salt?",
    "Where does the path lead?",
    "Do the gulls sleep?",
]
PROMPTS = [SYSTEM + q for q in QUESTIONS[:4]] + [
    *QUESTIONS[4:],
    "def fibonacci(n):",
    "The capital of France is",
    "To bake bread you need flour, water, salt and",
    "The quick brown fox jumps over the lazy dog. " * 9,
]


class Soak:
    """Clients that come at random and do all that clients do; every greedy answer is compared at once."""

    def __init__(self, server: ServerProcess, seed: int) -> None:
        self.server, self._rng = server, random.Random(seed)
        self.alone = [server.answer(p, LONGEST, ignore_eos=True)["choices"][0]["text"] for p in PROMPTS]
        self.counts: Counter[str] = Counter()
        self.reported = 0  # tokens
        self.wrong: list[str] = []
        self.samples: list[tuple[float, int, int, int, int]] = []  # time, memory and files of both processes
        self._processes = [psutil.Process(server.pid), psutil.Process(server.engine_pid())]

    async def run(self, seconds: float, arrivals_per_s: float, most_at_once: int = 24) -> None:
        """Poisson arrivals for ``seconds``, then wait until all have got their answer."""
        loop = asyncio.get_running_loop()
        started = loop.time()
        under_way: set[asyncio.Task[None]] = set()
        limits = httpx.Limits(max_connections=None, max_keepalive_connections=4)
        async with httpx.AsyncClient(base_url=self.server.url, timeout=300, limits=limits) as client:
            watch = asyncio.create_task(self._watch(started, seconds / 100))
            while (now := loop.time()) - started < seconds:
                if len(under_way) < most_at_once:
                    task = asyncio.create_task(self._visit(client))
                    under_way.add(task)
                    task.add_done_callback(under_way.discard)
                await asyncio.sleep(min(self._rng.expovariate(arrivals_per_s), started + seconds - now))
            await asyncio.gather(*under_way)
            watch.cancel()

    async def _watch(self, started: float, every_s: float) -> None:
        loop = asyncio.get_running_loop()
        while True:
            figures = [
                f(p) for p in self._processes for f in (lambda p: p.memory_info().rss, lambda p: p.num_fds())
            ]
            self.samples.append((loop.time() - started, *figures))  # pyright: ignore[reportArgumentType]
            await asyncio.sleep(every_s)

    async def _visit(self, client: httpx.AsyncClient) -> None:
        rng = self._rng
        kind = rng.choices(("stream", "leave", "whole", "sampled", "refused"), (45, 20, 20, 10, 5))[0]
        case = rng.randrange(len(PROMPTS))
        body = {
            "model": "smollm2",
            "prompt": PROMPTS[case],
            "max_tokens": rng.randint(1, LONGEST),
            "temperature": 0,
            "ignore_eos": True,
            "priority": rng.randint(0, 2),
        }
        if kind in ("stream", "leave"):
            await self._stream(client, kind, case, body, rng.randint(1, LONGEST))
        elif kind == "sampled":
            await self._post(client, body | {"temperature": 1.0, "n": 2, "seed": rng.randrange(100)})
        elif kind == "whole":
            answer = await self._post(client, body)
            self._compare(case, answer["choices"][0]["text"])
            if answer["usage"]["completion_tokens"] != body["max_tokens"]:
                self.wrong.append(f"{answer['usage']} for max_tokens {body['max_tokens']}")
        else:
            refused = await client.post("/v1/completions", json=body | {"prompt": "far too long " * 9000})
            assert refused.status_code == 400, refused.text
        self.counts[kind] += 1

    async def _post(self, client: httpx.AsyncClient, body: dict) -> dict:
        answer = (await client.post("/v1/completions", json=body)).raise_for_status().json()
        self.reported += answer["usage"]["total_tokens"]
        return answer

    async def _stream(self, client: httpx.AsyncClient, kind: str, case: int, body: dict, events: int) -> None:
        text = ""
        body = body | {"stream": True, "stream_options": {"include_usage": True}}
        async with client.stream("POST", "/v1/completions", json=body) as answer:
            answer.raise_for_status()
            async for line in answer.aiter_lines():
                if not line.startswith("data: {"):
                    continue
                event = json.loads(line[6:])
                assert "error" not in event, event
                text += "".join(c["text"] for c in event["choices"])
                if event.get("usage"):
                    self.reported += event["usage"]["total_tokens"]
                    if event["usage"]["completion_tokens"] != body["max_tokens"]:
                        self.wrong.append(f"{event['usage']} for max_tokens {body['max_tokens']}")
                events -= 1
                if kind == "leave" and not events:
                    break
        self._compare(case, text)

    def _compare(self, case: int, text: str) -> None:
        self.counts["compared"] += 1
        if not self.alone[case].startswith(text.rstrip("\ufffd")):
            self.wrong.append(f"{text!r} instead of {self.alone[case]!r}")

    def growth_bytes(self, process: int) -> float:
        """What the memory of the API process (0) or the engine (1) grew in the last two thirds of the time,
        on the least-squares line."""
        samples = np.array(self.samples)
        late = samples[samples[:, 0] >= samples[-1, 0] / 3]
        slope = np.polyfit(late[:, 0], late[:, 1 + 2 * process], 1)[0]
        return float(slope * (late[-1, 0] - late[0, 0]))


def soak(folder: Path, seconds: float, arrivals_per_s: float, most_growth_bytes: int) -> None:
    engine = {"dtype": "float32", "num_blocks": 72, "max_seqs": 8, "forced_preemption_every": 41}
    with ServerProcess(folder, engine=engine) as server:
        load = Soak(server, seed=11)
        asyncio.run(
            load.run(min(10, seconds / 6), 2 * arrivals_per_s)
        )  # every page touched, every path taken
        load.samples.clear()
        files = [p.num_fds() for p in load._processes]
        begun = server.engine()
        asyncio.run(load.run(seconds, arrivals_per_s))
        deadline = time.monotonic() + 60
        while (idle := server.engine())["running"] + idle["waiting"] and time.monotonic() < deadline:
            time.sleep(0.1)

        growth = [load.growth_bytes(0), load.growth_bytes(1)]
        more_files = [p.num_fds() - f for p, f in zip(load._processes, files, strict=True)]
        figures = {
            "seconds": round(seconds),
            **load.counts,
            "generated_tokens": idle["generated_tokens"] - begun["generated_tokens"],
            "shared_prompt_tokens": idle["cached_prompt_tokens"] - begun["cached_prompt_tokens"],
            "preemptions": idle["preemptions"] - begun["preemptions"],
            "growth_mib": {"api": round(growth[0] / MIB, 2), "engine": round(growth[1] / MIB, 2)},
            "memory_mib": {n: load.samples[-1][i] // MIB for n, i in (("api", 1), ("engine", 3))},
            "more_files": more_files,
        }
        print(json.dumps(figures))
        assert load.wrong == []
        assert load.counts["compared"] > seconds * arrivals_per_s / 3, "too little was asked to mean anything"
        assert load.counts["leave"] and figures["preemptions"] and figures["shared_prompt_tokens"]
        assert (idle["running"], idle["waiting"], idle["blocks_used"], idle["blocks_shared"]) == (0, 0, 0, 0)
        assert idle["blocks_free"] == idle["blocks_total"] == 72 and idle["restarts"] == 0
        assert max(more_files) <= 4, "file handles are left"
        assert max(growth) <= most_growth_bytes, "memory grows"
        with sqlite3.connect(f"file:{server.state_path}?mode=ro", uri=True) as db:
            (written,) = db.execute("SELECT SUM(prompt_tokens + completion_tokens) FROM usage").fetchone()
        assert written >= load.reported
        assert server.stop() == 0


@pytest.mark.timeout(400)
def test_a_minute_under_random_load_leaks_nothing_and_every_answer_is_exact(
    tmp_path: Path, smollm2: Path
) -> None:
    soak(tmp_path, 60, arrivals_per_s=1.0, most_growth_bytes=16 * MIB)


@pytest.mark.nightly
@pytest.mark.timeout(7200)
def test_half_an_hour_under_random_load_leaks_nothing_and_every_answer_is_exact(
    tmp_path: Path, smollm2: Path
) -> None:
    seconds = float(os.environ.get("SHAREWELL_SOAK_S", "1800"))
    soak(tmp_path, seconds, arrivals_per_s=2.0, most_growth_bytes=16 * MIB)
