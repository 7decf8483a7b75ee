"""One checkpoint with a cache in all, half or a quarter of its layers, beside the same model trained plainly,
a shallower one and one with fixed sharing.

Models are those of ``tools/train/byte_lm.py``; the full scale trains what its runs folder lacks (about four
minutes of CPU a run) and goes on where an earlier run stopped."""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import torch

from sharewell.bench import Progress, Report, Row, environment, interleave, values
from sharewell.kv import (
    DepthSharedCache,
    NotTrainedForSharing,
    cache_argument,
    choose_layers,
    depth_loss,
    groups,
    skip_follower_projections,
)
from sharewell.models import load_transformers, python_text, shipped_models
from tools.train import byte_lm

LAYERS = byte_lm.LAYERS
SEEDS = 3
SHARES = {"all": 1, "half": 2, "a quarter": 4}


def shipped_losses(windows: torch.Tensor) -> dict[str, dict[str, list[float]]]:
    """Held-out losses of the shipped weights: kind -> share of layers -> one seed."""
    models = shipped_models()
    return {
        kind: {
            share: [depth_loss(load_transformers(models[slug]), windows, groups(LAYERS, g))]
            for share, g in SHARES.items()
        }
        for kind, slug in byte_lm.SLUGS.items()
    }


def trained_losses(
    windows: torch.Tensor, seeds: int, runs: Path, progress: Progress
) -> tuple[dict[str, dict[str, list[float]]], list[dict[str, Any]], Any]:
    """The same over several seeds, with the shallow and the fixed-sharing model of seed 0; the records of
    training; the routed model of seed 0."""
    wanted = [(kind, seed) for seed in range(seeds) for kind in ("base", "routed")]
    wanted += [("shallow", 0), ("cla2", 0)]
    losses: dict[str, dict[str, list[float]]] = {}
    records, routed = [], None
    for done, (kind, seed) in enumerate(wanted):
        progress("training what is missing", done, len(wanted))
        finished = byte_lm.train(kind, seed, runs=runs, show=False)
        assert finished is not None
        model, record = finished
        records.append(record)
        routed = model if (kind, seed) == ("routed", 0) else routed
        n = model.config.num_hidden_layers
        for share, g in SHARES.items():
            if kind != "shallow" or share == "all":
                mine = losses.setdefault(kind, {}).setdefault(share, [])
                mine.append(depth_loss(model, windows, groups(n, g)))
    progress("training what is missing", len(wanted), len(wanted))
    return losses, records, routed


def loss_rows(losses: dict[str, dict[str, list[float]]], windows: torch.Tensor) -> list[Row]:
    """The published claims, and the alternatives at equal bytes."""
    base, routed = losses["base"], losses["routed"]
    n = len(base["all"])
    note = f"{windows.numel() - len(windows):,} held-out bytes, {n} seed{'s' if n > 1 else ''}"

    def row(
        metric: str, ours: list[float], theirs: list[float], name: str, claim: str, target: float | None
    ) -> Row:
        return Row.from_samples(
            metric, ours, theirs, "nats/byte", "lower", name, claim=claim, target=target, note=note
        )

    rows = [
        row("loss, cache in all layers", routed["all"], base["all"], "the same model trained plainly",
            "routing in training costs at most 3 % at full cache (paper: 1.5 %)", 1 / 1.03),
        row("loss, cache in half of the layers", routed["half"], routed["all"], "itself with all layers",
            "at most 4 % worse", 1 / 1.04),
        row("loss, cache in a quarter of the layers", routed["a quarter"], routed["all"],
            "itself with all layers", "at most 10 % worse", 1 / 1.10),
        row("loss of the plain model, all layers", base["all"], base["a quarter"],
            "the plain model with a quarter", "without routing a quarter is at least 50 % worse", 1.5),
        row("loss, half of the layers", routed["half"], base["half"], "the plain model with half", "", None),
        row("loss, a quarter of the layers", routed["a quarter"], base["a quarter"],
            "the plain model with a quarter", "better than the plain model from half on", 1.0),
    ]  # fmt: skip
    if "shallow" in losses:
        shallow, cla2 = losses["shallow"]["all"], losses["cla2"]
        one = {share: [found[0]] for share, found in routed.items()}
        note = note.replace(f"{n} seeds", "seed 0")
        rows += [
            row("loss at a quarter of the bytes", one["a quarter"], shallow,
                "a model of a quarter of the layers",
                "better than a shallower model with as large a cache", 1.0),
            row("loss, half, against fixed sharing", one["half"], cla2["half"], "CLA trained for half",
                "fixed sharing may win where it was trained for", None),
            row("loss, a quarter, against fixed sharing", one["a quarter"], cla2["a quarter"],
                "CLA trained for half, run with a quarter", "fixed sharing loses elsewhere", 1.0),
            row("loss, all layers, against fixed sharing", one["all"], cla2["all"],
                "CLA trained for half, run with all", "fixed sharing loses elsewhere", 1.0),
        ]  # fmt: skip
    return rows


def choice_rows(model: Any, windows: torch.Tensor) -> tuple[list[Row], dict[str, list[int]]]:
    """Greedy removal on 64 windows of the training text beside uniform groups, measured on held-out text."""
    text = torch.frombuffer(bytearray(python_text("train", 64 * byte_lm.CONTEXT)), dtype=torch.uint8)
    calibration = text.long().view(64, byte_lm.CONTEXT)
    rows, chosen = [], {}
    for share, g in SHARES.items():
        if g == 1:
            continue
        layers = choose_layers(model, retention=1 / g, calibration=calibration)
        chosen[share] = list(layers)
        rows.append(
            Row(
                f"loss, {share} of the layers, chosen by calibration",
                depth_loss(model, windows, layers),
                depth_loss(model, windows, groups(LAYERS, g)),
                "nats/byte",
                "lower",
                "uniform groups",
                "greedy removal is ours, not the paper's",
                note=f"layers {', '.join(map(str, layers))}",
            )
        )
    return rows, chosen


def speed_rows(context: int, batch: int, new_tokens: int, repeats: int, progress: Progress) -> list[Row]:
    """Time to first token, decoding and bytes of the shipped routed model with a quarter of the layers."""
    model = load_transformers(shipped_models()["byte-lm-routed"])
    argument = cache_argument(model.forward) or "past_key_values"
    data = torch.frombuffer(bytearray(python_text("held-out", context * batch)), dtype=torch.uint8)
    prompt = data.long().view(batch, context)
    held: dict[str, int] = {}
    first: dict[str, list[float]] = {"all": [], "a quarter": []}

    def contender(share: str) -> Callable[[], None]:
        layers = groups(LAYERS, SHARES[share])

        def generate() -> None:
            handle = skip_follower_projections(model, layers)
            with warnings.catch_warnings(), torch.no_grad():
                warnings.simplefilter("ignore", NotTrainedForSharing)
                cache = DepthSharedCache(model, layers)
                begun = time.process_time()
                token = prompt
                for step in range(new_tokens + 1):
                    logits = model(
                        input_ids=token, use_cache=True, logits_to_keep=1, **{argument: cache}
                    ).logits
                    token = logits[:, -1:].argmax(-1)
                    if step == 0:
                        first[share].append(time.process_time() - begun)
            handle.remove()
            held[share] = cache.nbytes

        return generate

    samples = interleave({s: contender(s) for s in first}, repeats, progress=progress)
    decode = {
        share: [
            batch * new_tokens / (t - f)
            for t, f in zip(values(samples[share], "cpu_s"), first[share][1:], strict=True)
        ]
        for share in first
    }
    size = f"batch {batch}, context {context}"
    return [
        Row("KV bytes, a quarter of the layers", held["a quarter"], held["all"], "B", "lower", "all layers",
            "exactly a quarter", note=size, target=4.0),
        Row.from_samples("CPU time to the first token, a quarter", first["a quarter"][1:], first["all"][1:],
                         "s", "lower", "all layers", claim="projections only: little", note=size),
        Row.from_samples("decoding, a quarter", decode["a quarter"], decode["all"], "tokens/CPU s", "higher",
                         "all layers", claim="on a CPU followers still read keys and values", note=size),
    ]  # fmt: skip


def run(scale: str, *, seed: int, progress: Progress) -> Report:
    """``smoke`` measures the shipped weights; ``full`` three seeds and the alternatives. ``seed`` is only
    recorded: every training run has its own."""
    extra: dict[str, Any] = {}
    if scale == "full":
        windows = byte_lm.held_out(128)
        losses, records, routed = trained_losses(windows, SEEDS, byte_lm.runs_folder(), progress)
        rows = loss_rows(losses, windows)
        more, extra["calibrated_layers"] = choice_rows(routed, windows)
        rows += more + speed_rows(1024, 4, 32, 5, progress)
        extra["training"] = records
        extra["training_cpu_s"] = round(sum(r["cpu_s"] for r in records))
    else:
        windows = byte_lm.held_out(8)
        losses = shipped_losses(windows)
        rows = loss_rows(losses, windows) + speed_rows(128, 2, 4, 2, progress)
    extra["losses"] = losses
    extra["median_losses"] = {k: {s: median(v) for s, v in shares.items()} for k, shares in losses.items()}
    return Report("stochastic-kv-routing", scale, tuple(rows), environment(), seed, extra)  # pyright: ignore[reportArgumentType]
