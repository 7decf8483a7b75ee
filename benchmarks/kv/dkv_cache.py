"""dKV-Cache on the small masked diffusion model that ships: work, speed and right answers beside the plain
sampler, half the steps, and the block-wise cache that others use."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

import numpy as np
import torch

from sharewell.bench import Progress, Report, Row, environment, interleave, values
from sharewell.kv import (
    DKVConfig,
    PlannedForward,
    denoise,
    generate_masked_diffusion,
    load_masked_diffusion,
)
from sharewell.kv.dkv import Bidirectional, settled
from sharewell.kv.worked_sums import BASE, WIDTH, WorkedSums, score
from sharewell.models import shipped_manifest, shipped_models

PLAIN = DKVConfig("none")


@dataclass(frozen=True)
class Sizes:
    """Of one scale. ``problems``: 8 tokens of prompt and 8 of answer each."""

    problems: int = 16
    exercises: int = 11  # of each seed: 528 problems of three
    random_exercises: int = 6  # for the random order: 96 problems
    seeds: int = 3
    repeats: int = 3
    long_prompt: int = 512
    work: int = 256


SMOKE = Sizes(2, 2, 2, 1, 1, 32, 32)


@dataclass
class Measured:
    """One sampler's answers: which problems are right, bool ``[seeds, exercises, problems]``."""

    right: np.ndarray
    positions: int

    @property
    def accuracy(self) -> float:
        return 100 * float(self.right.mean())

    def points_above(self, other: Measured) -> str:
        """The difference with its 95 % interval: exercises are drawn again, in pairs."""
        a, b = (x.right.mean(-1).ravel() for x in (self, other))
        drawn = np.random.default_rng(0).integers(0, len(a), (2000, len(a)))
        low, high = np.percentile(100 * (a - b)[drawn].mean(1), [2.5, 97.5])
        seeds = 100 * (self.right.mean((1, 2)) - other.right.mean((1, 2)))
        each = ", ".join(f"{difference:+.2f}" for difference in seeds)
        return (
            f"{100 * (a - b).mean():+.2f} points, 95 % interval {low:+.2f} to {high:+.2f}, "
            f"by seed {each}, {self.right.size} problems"
        )


def run(scale: str, *, seed: int, progress: Progress) -> Report:
    """smoke: two problems, seconds. full: 16 problems an exercise, about 12 CPU minutes."""
    sizes = Sizes() if scale == "full" else SMOKE
    manifest = shipped_manifest("masked-sums")["model"]
    shipped = load_masked_diffusion(shipped_models()["masked-sums"])
    engine, mask = PlannedForward(shipped.model), shipped.mask_id
    rows = [*_work(engine, mask, sizes), *_delay(engine, mask, sizes, seed)]
    rows += _accuracy(engine, mask, sizes, seed, progress)
    rows += _speed(engine, mask, sizes, seed, progress)
    rows += _long_prompt(engine, mask, sizes, progress)
    rows += _greedy(engine, mask, sizes, seed, progress)
    extra = {"model": {key: manifest[key] for key in ("script", "steps", "training_cpu_s", "solved")}}
    made = environment(("torch", "transformers"))
    return Report("dkv-cache", scale, tuple(rows), made, seed, extra)  # pyright: ignore[reportArgumentType]


def _work(engine: PlannedForward, mask: int, sizes: Sizes) -> list[Row]:
    """Line 3: counted positions beside the formula's."""
    n = sizes.work
    prompt = np.random.default_rng(0).integers(0, BASE, (1, n))
    stats = generate_masked_diffusion(engine, prompt, n, n, mask_id=mask, cache=DKVConfig("decode")).stats
    counted, expected = float(np.mean(stats.per_step)), 2 * n / 8 + 7 / 8 * (n / 2 + 1)
    return [
        Row(
            f"positions computed, prompt and answer of {n}", stats.positions, stats.positions_without, "",
            "lower", "no cache", claim="(3) at most 0.40 of them", target=1 / 0.4,
        ),
        Row(
            "the same, a step", counted, expected, "positions", "lower", "the formula",
            claim="(3) within 5 %", target=1 / 1.05,
        ),
    ]  # fmt: skip


def _delay(engine: PlannedForward, mask: int, sizes: Sizes, seed: int) -> list[Row]:
    """Line 2: what the next step reads beside what it would compute, with and without the delay."""
    errors = {delay: _kv_error(engine, mask, sizes, seed, delay) for delay in (1, 0)}
    return [
        Row(
            "relative error of the keys and values read, kept one step after the decision", errors[1],
            errors[0], "", "lower", "kept at the decision", claim="(2) smaller with the delay", target=1.0,
        )
    ]  # fmt: skip


def _kv_error(engine: PlannedForward, mask: int, sizes: Sizes, seed: int, delay: int) -> float:
    prompts = torch.as_tensor(WorkedSums(sizes.problems, seed).batch(1)[0])
    length = sizes.problems * WIDTH
    config = DKVConfig("decode", delay=delay)
    decided = torch.zeros(1, 2 * length, dtype=torch.bool)
    decided[:, :length] = True
    found = []
    for step in denoise(engine, prompts, length, length, mask_id=mask, cache=config):
        before, decided = decided, decided | step.decided
        if step.index % 8 == 7 or step.index == 0 or step.index + 1 == length:
            continue  # the next step computes everything
        read = settled(None, before if delay else decided)[0].nonzero().flatten()
        read = read[read >= length]
        if not len(read):
            continue
        space = engine.space(1, 2 * length)
        engine(step.ids[0], Bidirectional(), space=space)
        for layer in range(engine.decoder.config.n_layers):
            for kept, fresh in zip(
                step.space.keys_values(layer, 0, 1, 2 * length), space.keys_values(layer, 0, 1, 2 * length),
                strict=True,
            ):  # fmt: skip
                difference = (kept - fresh)[0][:, read].norm()
                found.append(float(difference / fresh[0][:, read].norm()))
    return float(np.mean(found))


def _solve(
    engine: PlannedForward,
    mask: int,
    sizes: Sizes,
    seeds: list[int],
    cache: DKVConfig,
    steps: int,
    **options: Any,
) -> Measured:
    length, right, positions = sizes.problems * WIDTH, [], 0
    for seed in seeds:
        prompts, _ = WorkedSums(sizes.problems, 1000 + seed).batch(sizes.exercises)
        out = generate_masked_diffusion(
            engine, prompts, length, steps, mask_id=mask, cache=cache, seed=seed, **options
        )
        right.append(score(prompts, out.answers.numpy()))
        positions += out.stats.positions
    return Measured(np.array(right), positions)


def _accuracy(engine: PlannedForward, mask: int, sizes: Sizes, seed: int, progress: Progress) -> list[Row]:
    """Line 4, the answers: every problem of every exercise judged exactly."""
    length = sizes.problems * WIDTH
    seeds = [seed + i for i in range(sizes.seeds)]
    samplers: dict[str, tuple[DKVConfig, int, dict[str, Any]]] = {
        "plain sampler": (PLAIN, length, {}),
        "decode, refresh 8": (DKVConfig("decode"), length, {}),
        "prefill and decode": (DKVConfig("pd"), length, {}),
        "half the steps": (PLAIN, length // 2, {}),
        "block-wise cache, blocks of a quarter": (DKVConfig("block"), length, {"block_length": length // 4}),
    }
    found = {}
    for done, (name, (cache, steps, options)) in enumerate(samplers.items()):
        progress("right answers", done, len(samplers))
        found[name] = _solve(engine, mask, sizes, seeds, cache, steps, **options)
    progress("right answers", len(samplers), len(samplers))
    plain, half = found.pop("plain sampler"), found["half the steps"]
    rows = []
    for name, measured in found.items():
        claimed = name.startswith("decode")
        rows.append(
            Row(
                f"problems solved, {name}", measured.accuracy, plain.accuracy, "%", "higher", "plain sampler",
                claim="(4) within 1 point" if claimed else "", samples=sizes.seeds,
                note=f"{measured.points_above(plain)}; positions {measured.positions / plain.positions:.2f}x",
                target=(plain.accuracy - 1) / plain.accuracy if claimed and plain.accuracy > 1 else None,
            )
        )  # fmt: skip
    decode = found["decode, refresh 8"]
    rows.append(
        Row("problems solved, decode, refresh 8", decode.accuracy, half.accuracy, "%", "higher",
            "half the steps", note=decode.points_above(half), samples=sizes.seeds)
    )  # fmt: skip
    return rows


def _timed(
    contenders: dict[str, Callable[[], Any]], repeats: int, progress: Progress
) -> dict[str, tuple[list[float], list[float]]]:
    samples = interleave(contenders, repeats=repeats, warmup=0, progress=progress)
    return {name: (values(taken), values(taken, "cpu_s")) for name, taken in samples.items()}


def _row(metric: str, ours: list[float], baseline: list[float], name: str, **claim: Any) -> Row:
    return Row.from_samples(metric, ours, baseline, "s", "lower", name, **claim)


def _speed(engine: PlannedForward, mask: int, sizes: Sizes, seed: int, progress: Progress) -> list[Row]:
    """Line 4, the time: CPU seconds of one thread, since neighbours stretch the clock."""
    length, rows = sizes.problems * WIDTH, []
    for batch in (1, 8):
        prompts, _ = WorkedSums(sizes.problems, seed).batch(batch)

        def sample(
            cache: DKVConfig, steps: int = length, prompts: np.ndarray = prompts, **options: Any
        ) -> Callable[[], Any]:
            return lambda: generate_masked_diffusion(
                engine, prompts, length, steps, mask_id=mask, cache=cache, **options
            )

        took = _timed(
            {
                "plain": sample(PLAIN), "decode": sample(DKVConfig("decode")),
                "half": sample(PLAIN, length // 2),
                "block": sample(DKVConfig("block"), block_length=length // 4),
            },
            max(1, sizes.repeats - (batch > 1)), progress,
        )  # fmt: skip
        what = f"batch {batch}, prompt and answer of {length}"
        plain = took["plain"]
        rows += [
            _row(f"{what}: decode, refresh 8", took["decode"][1], plain[1], "plain sampler",
                 claim="(4) 1.8 times", target=1.8),
            _row(f"{what}: decode, by the clock", took["decode"][0], plain[0], "plain sampler"),
            _row(f"{what}: half the steps", took["half"][1], plain[1], "plain sampler"),
            _row(f"{what}: decode, refresh 8", took["decode"][1], took["half"][1], "half the steps",
                 claim="(4) half the steps is slower (or less accurate)", target=1.0),
            _row(f"{what}: block-wise cache", took["block"][1], plain[1], "plain sampler"),
        ]  # fmt: skip
    return rows


def _long_prompt(engine: PlannedForward, mask: int, sizes: Sizes, progress: Progress) -> list[Row]:
    """Line 4, PD: the model was not trained on prompts of this length, so only the clock counts."""
    length = sizes.problems * WIDTH
    prompt = np.random.default_rng(1).integers(0, BASE, (1, sizes.long_prompt))
    took = _timed(
        {
            name: lambda cache=cache: generate_masked_diffusion(
                engine, prompt, length, length, mask_id=mask, cache=cache
            )
            for name, cache in (("plain", PLAIN), ("pd", DKVConfig("pd")), ("decode", DKVConfig("decode")))
        },
        sizes.repeats,
        progress,
    )
    what = f"prompt of {sizes.long_prompt}, answer of {length}"
    return [
        _row(f"{what}: prefill and decode", took["pd"][1], took["plain"][1], "plain sampler",
             claim="(4) 3 times", target=3.0),
        _row(f"{what}: decode, refresh 8", took["decode"][1], took["plain"][1], "plain sampler"),
    ]  # fmt: skip


def _greedy(engine: PlannedForward, mask: int, sizes: Sizes, seed: int, progress: Progress) -> list[Row]:
    """Line 5: random remasking, where the order is known."""
    length = sizes.problems * WIDTH
    prompts = torch.as_tensor(WorkedSums(sizes.problems, seed).batch(1)[0])
    caches = {"plain": PLAIN, **{f"refresh {n}": DKVConfig("greedy", refresh=n) for n in (1, 2, 4, 8)}}
    took = _timed(
        {
            name: lambda cache=cache: generate_masked_diffusion(
                engine, prompts, length, length, mask_id=mask, cache=cache, remasking="random", seed=seed
            )
            for name, cache in caches.items()
        },
        sizes.repeats,
        progress,
    )
    few = replace(sizes, exercises=sizes.random_exercises)
    solved = {n: _solve(engine, mask, few, [seed], c, length, remasking="random") for n, c in caches.items()}
    rows, plain = [], solved["plain"]
    for name in list(caches)[1:]:
        claimed = {"claim": "(5) 1.5 times", "target": 1.5} if name == "refresh 2" else {}
        rows += [
            _row(f"greedy, {name}", took[name][1], took["plain"][1], "plain sampler, random order",
                 **claimed),
            Row(f"problems solved, greedy, {name}", solved[name].accuracy, plain.accuracy, "%", "higher",
                "plain sampler, random order", note=solved[name].points_above(plain)),
        ]  # fmt: skip
    seconds = [float(np.median(took[f"refresh {n}"][1])) for n in (1, 2, 4, 8)]
    right = [solved[f"refresh {n}"].accuracy for n in (1, 2, 4, 8)]
    broken = sum(b > a for a, b in pairwise(seconds)) + sum(b > a for a, b in pairwise(right))
    rows.append(
        Row("greedy: steps of refresh 1, 2, 4, 8 that get slower or solve more", broken, 0, "", "lower",
            "a monotone trade-off", claim="(5) monotone", target=1.0,
            note=f"solved {', '.join(f'{x:.1f}' for x in right)} %")
    )  # fmt: skip
    return rows
