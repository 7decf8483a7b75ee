"""The one HTTP client of all servers: asyncio, httpx, OpenAI's streamed completions."""

from __future__ import annotations

import asyncio
import json
import time
from dataclasses import dataclass

import httpx
import numpy as np

from .workload import Prompt


@dataclass(frozen=True)
class Answer:
    """One streamed answer. ``events_s``: seconds from the request's start to each event of a choice."""

    prompt_tokens: int
    new_tokens: int
    events_s: tuple[float, ...]
    text: str

    @property
    def ttft_s(self) -> float:
        """Time to the first event."""
        return self.events_s[0]

    @property
    def total_s(self) -> float:
        """Time to the last event."""
        return self.events_s[-1]

    @property
    def decode_tokens_per_s(self) -> float:
        """Tokens after the first over the time after the first; 0 when all came in one event."""
        seconds = self.events_s[-1] - self.events_s[0]
        return (self.new_tokens - 1) / seconds if seconds else 0.0


@dataclass(frozen=True)
class Load:
    """All answers in the order of the prompts, and the seconds from the first request to the last end."""

    answers: tuple[Answer, ...]
    wall_s: float

    @property
    def tokens_per_s(self) -> float:
        """New tokens of all requests over wall seconds."""
        return sum(a.new_tokens for a in self.answers) / self.wall_s

    @property
    def ttft_s(self) -> float:
        """Median time to first token."""
        return float(np.median([a.ttft_s for a in self.answers]))

    @property
    def itl_p95_s(self) -> float:
        """95th percentile of the times between events: its tail shows stalls that a mean hides."""
        gaps = [np.diff(a.events_s) for a in self.answers if len(a.events_s) > 1]
        return float(np.percentile(np.concatenate(gaps), 95)) if gaps else 0.0


class WrongAnswer(RuntimeError):
    """A server answered something else than was asked for."""


async def _one(client: httpx.AsyncClient, model: str, prompt: Prompt, new_tokens: int) -> Answer:
    body = {
        "model": model,
        "prompt": prompt,
        "max_tokens": new_tokens,
        "min_tokens": new_tokens,
        "ignore_eos": True,
        "temperature": 0,
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    events: list[float] = []
    texts: list[str] = []
    usage: dict[str, int] = {}
    start = time.perf_counter()
    async with client.stream("POST", "/v1/completions", json=body) as response:
        if response.status_code != 200:
            raise WrongAnswer(f"{response.status_code}: {(await response.aread()).decode()[:300]}")
        async for line in response.aiter_lines():
            if not line.startswith("data: ") or line == "data: [DONE]":
                continue
            now = time.perf_counter() - start
            event = json.loads(line[6:])
            if "error" in event:
                raise WrongAnswer(str(event["error"])[:300])
            if event.get("usage"):
                usage = event["usage"]
            if event.get("choices"):
                events.append(now)
                texts.append(event["choices"][0].get("text") or "")
    got = usage.get("completion_tokens"), usage.get("prompt_tokens")
    if got != (new_tokens, len(prompt)):
        raise WrongAnswer(f"asked for {new_tokens} tokens after {len(prompt)}, usage says {got}")
    return Answer(len(prompt), new_tokens, tuple(events), "".join(texts))


async def _load(url: str, model: str, prompts: list[Prompt], new_tokens: int, clients: int) -> Load:
    # A connection for each request: some servers close kept ones just when the next request comes.
    limits = httpx.Limits(max_connections=clients, max_keepalive_connections=0)
    async with httpx.AsyncClient(base_url=url, timeout=300, limits=limits) as client:
        turn = asyncio.Semaphore(clients)

        async def one(prompt: Prompt) -> Answer:
            async with turn:
                return await _one(client, model, prompt, new_tokens)

        start = time.perf_counter()
        answers = await asyncio.gather(*(one(p) for p in prompts))
        return Load(tuple(answers), time.perf_counter() - start)


def send(url: str, model: str, prompts: list[Prompt], new_tokens: int, clients: int | None = None) -> Load:
    """Send ``prompts`` from ``clients`` (one each by default) at once; greedy, exactly ``new_tokens`` each.

    Raises WrongAnswer when a server gives an error, or other numbers of tokens than asked for.
    """
    return asyncio.run(_load(url, model, prompts, new_tokens, clients or len(prompts)))
