"""What the tasks of this benchmark share: the contenders, their turns, and rows out of these."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from sharewell.bench import Progress, Row, Sample, interleave
from sharewell.bench.report import PEER_NOT_INSTALLED, Better

from .load import send
from .processes import Launch, Server
from .transformers_peer import Transformers, Way
from .workload import Prompt, Prompts

Quantity = Literal[
    "tokens_per_s", "decode_tokens_per_s", "prefill_tokens_per_s", "ttft_s", "itl_p95_s", "cpu_s", "peak_gib"
]


@dataclass(frozen=True)
class Turn:
    """One contender's turn at one task. CPU seconds and peak memory are its own, without the client's."""

    tokens_per_s: float
    cpu_s: float
    peak_gib: float
    ttft_s: float = 0.0
    decode_tokens_per_s: float = 0.0
    prefill_tokens_per_s: float = 0.0
    itl_p95_s: float = 0.0
    texts: tuple[str, ...] = ()


def server_turn(server: Server, prompts: list[Prompt], new_tokens: int, clients: int | None = None) -> Turn:
    """``clients`` at once (one for each prompt by default) send ``prompts``."""
    with server.turn():
        before = server.group.usage().cpu_s
        load = send(server.url, server.launch.model, prompts, new_tokens, clients)
        usage = server.group.usage()
    alone = clients == 1 or len(prompts) == 1
    decode = [a.decode_tokens_per_s for a in load.answers]
    prefill = (
        sum(a.prompt_tokens for a in load.answers) / sum(a.ttft_s for a in load.answers) if alone else 0.0
    )
    return Turn(
        load.tokens_per_s, usage.cpu_s - before, usage.peak_bytes / 2**30, load.ttft_s,
        sum(decode) / len(decode), prefill, load.itl_p95_s, tuple(a.text for a in load.answers),
    )  # fmt: skip


def transformers_turn(peer: Transformers, way: Way, prompts: list[Prompt], new_tokens: int) -> Turn:
    """The same prompts through transformers, without HTTP."""
    before = peer.usage().cpu_s
    wall_s = peer.run(way, prompts, new_tokens)
    usage = peer.usage()
    return Turn(len(prompts) * new_tokens / wall_s, usage.cpu_s - before, usage.peak_bytes / 2**30)


@dataclass
class Stage:
    """The machine, the model, and the contenders that run for the whole benchmark.

    ``servers`` holds ours and the peers' by name; a peer that is not installed is not in it.
    """

    threads: int
    seed: int
    progress: Progress
    logs: Path
    prompts: Prompts
    exit_stack: contextlib.ExitStack
    servers: dict[str, Server]
    transformers: Transformers

    def start(self, launch: Launch) -> Server:
        """Start a server, warm it up, and let it stand still until its turn."""
        self.progress(f"starting {launch.name}", 0, 1)
        server = self.exit_stack.enter_context(Server(launch, self.logs))
        server_turn(server, [self.prompts.take(64), self.prompts.take(64)], 4)
        self.servers[launch.name] = server
        self.progress(f"starting {launch.name}", 1, 1)
        return server

    def compare(
        self,
        contenders: Mapping[str, Callable[[list[Prompt]], Turn]],
        rounds: Callable[[], list[Prompt]],
        repeats: int,
        warmup: int = 1,
    ) -> dict[str, list[Turn]]:
        """Interleaved turns of each; in one round all get the same prompts, which no round had before."""
        drawn: list[list[Prompt]] = []

        def nth(i: int) -> list[Prompt]:
            while len(drawn) <= i:
                drawn.append(rounds())
            return drawn[i]

        def in_turn(contender: Callable[[list[Prompt]], Turn]) -> Callable[[], Turn]:
            count = itertools.count()
            return lambda: contender(nth(next(count)))

        runs = {name: in_turn(contender) for name, contender in contenders.items()}
        samples = interleave(runs, repeats, warmup, self.progress)
        return {name: _turns(taken) for name, taken in samples.items()}


def _turns(samples: Sequence[Sample]) -> list[Turn]:
    return [sample.value for sample in samples]


def row(
    metric: str,
    ours: list[Turn],
    theirs: list[Turn] | None,
    quantity: Quantity,
    unit: str,
    better: Better,
    against: str,
    *,
    claim: str = "",
    target: float | None = None,
    scale: float = 1.0,
    note: str = "",
) -> Row:
    """One quantity of both's turns, each figure times ``scale``; ``theirs=None``: peer not installed."""
    figures = [[getattr(turn, quantity) * scale for turn in turns] for turns in (ours, theirs or [])]
    return Row.from_samples(
        metric, figures[0], figures[1] or None, unit, better, against,
        claim=claim, target=target, note=note if theirs else PEER_NOT_INSTALLED,
    )  # fmt: skip
