"""LiquidTAD beside ActionFormer's backbone and plain max-pooling, on the same heads, losses and evaluator.

Costs, CPU time, growth with the length of a video, ONNX and int8, and what each learns on streams of wrist
movements (see ``basic_motions.py``). Training is slow (half an hour on one core), so every run is kept in the
user's cache, epoch by epoch, and a benchmark that was cut goes on. To train for about 500 seconds and stop:
``python -m benchmarks.perception.liquidtad 500``. ``SHAREWELL_BENCH_TRAINING_S`` ends training within the
benchmark after so many seconds; the report then lists what is missing. Change ``RECIPE`` when anything
changes what a run gives.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
import time
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from platformdirs import user_cache_path
from scipy import stats

from benchmarks.perception.basic_motions import STRIDE, WINDOW, write_streams
from sharewell.bench import (
    Progress,
    Report,
    Row,
    environment,
    interleave,
    measure,
    median,
    no_progress,
    values,
)
from sharewell.perception import (
    FeatureDataset,
    FeatureMeta,
    LiquidTADConfig,
    OnnxDetector,
    TADModel,
    TrainConfig,
    count_cost,
    evaluate_dataset,
    export_onnx,
    fit,
    load_checkpoint,
    predict,
    quantize_onnx,
    time_constants,
)

SLUG = "liquidtad"
RECIPE = 1
TRAINING_LIMIT = "SHAREWELL_BENCH_TRAINING_S"
SEEDS = (0, 1, 2)
ABLATION_SEEDS = (0, 1, 2)
NOT_INSTALLED = "aeon's wheel is not installed"
FULL = TrainConfig(lr=2e-3, epochs=25, warmup_epochs=5, batch_size=8, ema_decay=0.99)
SHORT = replace(FULL, lr=1e-3, epochs=16, warmup_epochs=4)
HOURS = (1 / 60, 0.1, 1.0, 10.0)
ROWS_A_SECOND = 7.5  # THUMOS-14: one row every 4 frames at 30 frames a second


@dataclass(frozen=True)
class Variant:
    """One thing that is trained, and what differs from the recipe."""

    name: str
    backbone: Any = "liquid"
    train: TrainConfig = FULL
    streams: int = 96
    changes: dict[str, Any] = field(default_factory=dict)


MAIN = (Variant("liquid"), Variant("maxpool", "maxpool"), Variant("actionformer", "actionformer"))
ABLATIONS = (
    Variant("no relaxation", changes={"relaxation": False}),
    Variant("unshared decay", changes={"decay_sharing": "none"}),
    Variant("shared without level scale", changes={"decay_sharing": "shared"}),
    Variant("fixed decay", changes={"decay_learned": False}),
)
LESS = (
    Variant("liquid, less training", train=SHORT, streams=64),
    Variant("actionformer, less training", "actionformer", SHORT, 64),
)


class CpuClock:
    """CPU seconds of this process in place of time, so that neighbours do not count."""

    def monotonic(self) -> float:
        return time.process_time()

    def unix(self) -> float:
        return time.time()

    async def sleep_until(self, t: float) -> None:
        raise NotImplementedError


def cache() -> Path:
    return user_cache_path("sharewell") / "bench" / f"{SLUG}-{RECIPE}"


def data(streams: int) -> tuple[FeatureDataset, FeatureDataset] | None:
    """Training and test streams; None without the recordings."""
    folder = cache() / "streams"
    path = write_streams(folder)
    if path is None:
        return None
    names = [f"training_{n:03}" for n in range(streams)]
    train = FeatureDataset(path, folder, STRIDE, WINDOW, videos=names)
    return train, FeatureDataset(path, folder, STRIDE, WINDOW, subsets=["test"], labels=train.labels)


def run_one(variant: Variant, seed: int, deadline: float = float("inf")) -> dict[str, Any] | None:
    """What a training run gave, from the cache or trained now; None when the time ended first."""
    folder = cache() / f"{variant.name.replace(' ', '-').replace(',', '')}-{seed}"
    done = folder / "result.json"
    if done.is_file():
        return json.loads(done.read_text())
    sets = data(variant.streams)
    assert sets is not None
    train, test = sets
    config = LiquidTADConfig.tiny(train.width, train.n_cls, **variant.changes)
    schedule = replace(variant.train, seed=seed)
    resume = (folder / "state.safetensors").is_file()
    epoch = len((folder / "log.jsonl").read_text().splitlines()) if resume else 0
    while epoch < schedule.total_epochs:
        if time.monotonic() > deadline:
            return None
        epoch += 1
        model = TADModel(config, variant.backbone, seed=seed)
        fit(model, train, None, schedule, out=folder, resume=resume, clock=CpuClock(), stop_after=epoch)
        resume = True
    model = load_checkpoint(folder)
    found = evaluate_dataset(model, test)
    logs = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    summary = {
        "average_map": 100 * found.average,
        "map": (100 * found.map).tolist(),
        "cpu_s": sum(log["seconds"] for log in logs),
        "skipped": sum(log["skipped"] for log in logs),
        "parameters": sum(p.numel() for p in model.parameters()),
    }
    done.write_text(json.dumps(summary))
    return summary


def plan() -> list[tuple[Variant, int]]:
    """Every training run, the most important first."""
    return [
        *((variant, seed) for seed in SEEDS for variant in MAIN),
        *((variant, seed) for seed in ABLATION_SEEDS for variant in ABLATIONS),
        *((variant, seed) for seed in ABLATION_SEEDS for variant in LESS),
    ]


def train_for(seconds: float, first: int = 0, last: int | None = None) -> None:
    """Train what is missing of ``plan()[first:last]`` until the time is over."""
    deadline = time.monotonic() + seconds
    for variant, seed in plan()[first:last]:
        result = run_one(variant, seed, deadline)
        if result is None:
            print("time is over in", variant.name, seed, flush=True)
            return
        print(variant.name, seed, f"{result['average_map']:.2f} mAP, {result['cpu_s']:.0f} CPU s", flush=True)


# -- costs and speed


def cost_rows() -> list[Row]:
    config = LiquidTADConfig.thumos14()
    costs = {name: count_cost(TADModel(config, name), 2304) for name in ("liquid", "actionformer", "maxpool")}
    ours, theirs = costs["liquid"], costs["actionformer"]
    rows = [
        Row(
            "parameters, THUMOS-14", ours.parameters, theirs.parameters, "", "lower", "actionformer",
            "a third of ActionFormer's parameters", target=2.7,
        ),
        Row(
            "multiply-adds, THUMOS-14, 2,304 rows", ours.macs / 1e9, theirs.macs / 1e9, "GMAC", "lower",
            "actionformer", "27.17 G against 45.2 G, attention's own products not counted", target=1.66,
        ),
        Row(
            "with the products of attention", ours.total / 1e9, theirs.total / 1e9, "GMAC", "lower",
            "actionformer",
        ),
        Row(
            "multiply-adds, THUMOS-14, 2,304 rows", ours.macs / 1e9, costs["maxpool"].macs / 1e9, "GMAC",
            "lower", "maxpool",
        ),
    ]  # fmt: skip
    return rows


def inputs(config: LiquidTADConfig, rows: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(1, config.c_in, rows, generator=generator), torch.ones(1, 1, rows)


def runner(model: Any, x: torch.Tensor, mask: torch.Tensor) -> Any:
    return lambda: model.infer(x, mask) and None


def speed_rows(config: LiquidTADConfig, rows: int, repeats: int, progress: Progress, name: str) -> list[Row]:
    x, mask = inputs(config, rows)
    models = {b: TADModel(config, b).frozen() for b in ("liquid", "actionformer", "maxpool")}
    taken = interleave({b: runner(m, x, mask) for b, m in models.items()}, repeats=repeats, progress=progress)
    cpu = {b: values(samples, "cpu_s") for b, samples in taken.items()}
    return [
        Row.from_samples(
            f"CPU time, {name}, {rows:,} rows", cpu["liquid"], cpu["actionformer"], "s", "lower",
            "actionformer", claim="at most 0.65 of ActionFormer's time", target=1 / 0.65,
        ),
        Row.from_samples(
            f"CPU time, {name}, {rows:,} rows", cpu["liquid"], cpu["maxpool"], "s", "lower", "maxpool"
        ),
    ]  # fmt: skip


def slope_rows(
    repeats: int, lengths: tuple[int, ...], progress: Progress
) -> tuple[list[Row], dict[str, Any]]:
    config = LiquidTADConfig.tiny(96, 3)
    model = TADModel(config).frozen()
    taken = interleave(
        {str(n): runner(model, *inputs(config, n)) for n in lengths}, repeats=repeats, progress=progress
    )
    seconds = [median(values(taken[str(n)], "cpu_s")) for n in lengths]
    slope = float(np.polyfit(np.log(lengths), np.log(seconds), 1)[0])
    row = Row(
        f"growth of CPU time with rows, {lengths[0]} to {lengths[-1]:,} (log-log slope)",
        slope,
        1.15,
        "",
        "lower",
        "bound",
        "linear in time",
        target=1.0,
        samples=repeats,
    )
    return [row], {"rows": list(lengths), "cpu_s": seconds}


def _count_detections(network: TADModel, feats: np.ndarray, meta: FeatureMeta, window: int | None) -> int:
    return len(predict(network, feats, meta, window=window))


def long_rows(
    model: TADModel, other: TADModel, features: np.ndarray, hours: tuple[float, ...], progress: Progress
) -> tuple[list[Row], list[dict[str, Any]]]:
    """Whole detections (network, decoding, suppression) of recordings of growing length, mapped from disk."""
    rows, table = [], []
    meta = FeatureMeta(ROWS_A_SECOND * STRIDE, STRIDE, WINDOW)
    with tempfile.TemporaryDirectory() as folder:
        for place, length in enumerate(hours):
            count = round(length * 3600 * ROWS_A_SECOND)
            path = Path(folder) / "features.npy"
            out = np.lib.format.open_memmap(path, "w+", np.float32, (count, features.shape[1]))
            for first in range(0, count, len(features)):
                out[first : first + len(features)] = features[: count - first]
            out.flush()
            del out
            mapped = np.load(path, mmap_mode="r")
            entry: dict[str, Any] = {"hours": length, "rows": count}
            for name, network, window in (
                ("liquid", model, 8192),
                ("actionformer", other, 8192),
                ("liquid at once", model, None),
            ):
                sample = measure(partial(_count_detections, network, mapped, meta, window))
                entry[name] = {
                    "cpu_s": sample.cpu_s,
                    "growth_mib": sample.growth_bytes / 2**20,
                    "detections": sample.value,
                }
            table.append(entry)
            progress("long recordings", place + 1, len(hours))
    for entry in table[-1:]:
        label = f"{entry['hours']:g} hours of video"
        rows.append(
            Row(
                f"CPU time to detect in {label}", entry["liquid"]["cpu_s"], entry["actionformer"]["cpu_s"],
                "s", "lower", "actionformer",
            )
        )  # fmt: skip
        rows.append(
            Row(
                f"memory to detect in {label}", entry["liquid"]["growth_mib"],
                entry["liquid at once"]["growth_mib"], "MiB", "lower", "without windows",
            )
        )  # fmt: skip
    if len(table) > 2:
        short, last = table[-2], table[-1]
        rows.append(
            Row(
                f"CPU time of {last['hours']:g} hours over that of {short['hours']:g}, per hour",
                last["liquid"]["cpu_s"] / short["liquid"]["cpu_s"] / (last["hours"] / short["hours"]),
                1.15, "", "lower", "bound", "hours cost in proportion", target=1.0,
            )
        )  # fmt: skip
    return rows, table


def onnx_rows(
    model: TADModel,
    test: FeatureDataset | None,
    calibration: list[np.ndarray],
    repeats: int,
    progress: Progress,
) -> list[Row]:
    with tempfile.TemporaryDirectory() as folder:
        path = export_onnx(model, Path(folder) / "model.onnx")
        small = quantize_onnx(path, Path(folder) / "int8.onnx", calibration)
        float32, int8 = OnnxDetector(path, threads=1), OnnxDetector(small, threads=1)
        x, mask = inputs(model.config, 2304)
        taken = interleave(
            {
                "torch": runner(model.frozen(), x, mask),
                "onnx": runner(float32, x, mask),
                "int8": runner(int8, x, mask),
            },
            repeats=repeats,
            progress=progress,
        )
        cpu = {name: values(samples, "cpu_s") for name, samples in taken.items()}
        worst = 0.0
        for rows in (256, 1024):
            x, mask = inputs(model.config, rows)
            for a, b in zip(model.infer(x, mask), float32.infer(x, mask), strict=True):
                worst = max(worst, float((a.logits - b.logits).abs().max()))
                worst = max(worst, float((a.offsets - b.offsets).abs().max()))
        out = [
            Row(
                "largest difference of ONNX from PyTorch, 256 and 1,024 rows", worst, 1e-4, "", "lower",
                "bound", "one file for every length, equal to PyTorch", target=1.0,
            ),
            Row.from_samples(
                "CPU time of ONNX, 2,304 rows", cpu["onnx"], cpu["torch"], "s", "lower", "PyTorch"
            ),
            Row.from_samples(
                "CPU time of int8 ONNX, 2,304 rows", cpu["int8"], cpu["torch"], "s", "lower", "PyTorch"
            ),
            Row("size of int8 ONNX", small.stat().st_size, path.stat().st_size, "bytes", "lower", "ONNX"),
        ]  # fmt: skip
        if test is not None:
            reference = 100 * evaluate_dataset(float32, test).average
            out.append(
                Row(
                    "average mAP of int8 ONNX, wrist movements", 100 * evaluate_dataset(int8, test).average,
                    reference, "", "higher", "ONNX",
                )
            )  # fmt: skip
    return out


# -- learning


def interval(numbers: list[float]) -> tuple[float, float]:
    """Mean, and half the width of its 95 % interval (Student's t)."""
    mean = float(np.mean(numbers))
    if len(numbers) < 2:
        return mean, float("nan")
    half = float(stats.t.ppf(0.975, len(numbers) - 1) * np.std(numbers, ddof=1) / len(numbers) ** 0.5)
    return mean, half


Runs = dict[str, dict[int, dict[str, Any]]]  # variant -> seed -> what the run gave


def paired(results: Runs, ours: str, theirs: str, what: str) -> tuple[list[float], list[float]]:
    """One figure of both, for the seeds that both have."""
    a, b = results.get(ours, {}), results.get(theirs, {})
    seeds = sorted(set(a) & set(b))
    return [a[seed][what] for seed in seeds], [b[seed][what] for seed in seeds]


def compared(
    results: Runs, ours: str, theirs: str, metric: str, claim: str = "", points: float = 0.0
) -> list[Row]:
    """Average mAP of two variants, and the difference with its interval; ``claim`` needs ours to be
    ``points`` above theirs."""
    a, b = paired(results, ours, theirs, "average_map")
    if not a:
        return []
    mean, half = interval([x - y for x, y in zip(a, b, strict=True)])
    base = float(np.mean(b))
    # The claim is in points; of the ratio of both this much is needed.
    target = (base + points) / base if claim and len(a) >= len(SEEDS) else None  # fewer decide nothing
    note = f"95 % interval {mean - half:+.2f} to {mean + half:+.2f}" if len(a) > 1 else "one seed"
    return [
        Row.from_samples(metric, a, b, "", "higher", theirs, claim=claim, target=target),
        Row(f"{metric}: points above {theirs}, {len(a)} seeds", mean, None, "", "higher", note=note),
    ]


def learning_rows(results: Runs) -> list[Row]:
    """Average mAP (0.3:0.7) by variant. Differences are of runs with the same seed."""
    name = "average mAP, wrist movements"
    liquid = [run["average_map"] for run in results["liquid"].values()]
    bar = Row.from_samples(
        name,
        liquid,
        [92.0] * len(liquid),
        "",
        "higher",
        "pilot",
        claim="the bar set from a pilot on other streams",
        target=1.0,
    )
    rows = [
        bar,
        *compared(results, "liquid", "actionformer", name, "at most 1.5 points below ActionFormer", -1.5),
        *compared(results, "liquid", "maxpool", name, "at least 1.5 points above max-pooling", 1.5),
    ]
    for variant in ABLATIONS:
        rows += compared(results, "liquid", variant.name, name)
    ours, theirs = (variant.name for variant in LESS)
    rows += compared(results, ours, theirs, "average mAP, 64 streams, 20 epochs")
    for other in ("actionformer", "maxpool"):
        cpu = paired(results, "liquid", other, "cpu_s")
        rows.append(Row.from_samples("CPU time of training, shared core", *cpu, "s", "lower", other))
    return rows


def smoke_learning(progress: Progress) -> Row:
    """Two epochs on few streams: shows that it runs, claims nothing."""
    with tempfile.TemporaryDirectory() as folder:
        path = write_streams(Path(folder), train=8, test=4)
        if path is None:
            return Row("average mAP after 2 epochs", 0.0, None, "", "higher", note=NOT_INSTALLED)
        train = FeatureDataset(path, folder, STRIDE, WINDOW, subsets=["training"])
        test = FeatureDataset(path, folder, STRIDE, WINDOW, subsets=["test"])
        model = TADModel(LiquidTADConfig.tiny(train.width, train.n_cls))
        schedule = replace(FULL, epochs=1, warmup_epochs=1, ema_decay=0.5)
        result = fit(model, train, test, schedule, progress=progress)
        assert result.evaluation is not None
        return Row("average mAP after 2 epochs", 100 * result.evaluation.average, None, "", "higher")


def run(scale: str, *, seed: int, progress: Progress = no_progress) -> Report:
    """Costs, speed, length, ONNX and learning (see the module)."""
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    rows = cost_rows()
    extra: dict[str, Any] = {"threads": torch.get_num_threads()}
    if scale == "smoke":
        tiny = LiquidTADConfig.tiny(96, 3)
        rows += speed_rows(tiny, 512, 3, progress, "128 wide")
        rows.append(smoke_learning(progress))
        calibration = [np.random.default_rng(seed).standard_normal((256, 96)).astype(np.float32)]
        rows += onnx_rows(TADModel(tiny), None, calibration, 2, progress)
        return Report(SLUG, "smoke", tuple(rows), environment(), seed, extra)

    rows += speed_rows(LiquidTADConfig.thumos14(), 2304, 7, progress, "512 wide")
    grown, extra["length"] = slope_rows(7, (512, 1024, 2048, 4096), progress)
    rows += grown
    results: Runs = {}
    sets = data(96)
    if sets is None:
        rows.append(Row("average mAP, wrist movements", 0.0, None, "", "higher", note=NOT_INSTALLED))
        return Report(SLUG, "full", tuple(rows), environment(), seed, extra)
    train, test = sets
    todo = plan()
    deadline = time.monotonic() + float(os.environ.get(TRAINING_LIMIT, "inf"))
    extra["not_run"] = []
    for place, (variant, number) in enumerate(todo):
        result = run_one(variant, number, deadline)
        if result is None:
            extra["not_run"].append(f"{variant.name}, seed {number}")
        else:
            results.setdefault(variant.name, {})[number] = result
        progress("training", place + 1, len(todo))
    rows += learning_rows(results)
    extra["learning"] = {
        name: {
            "average_map": float(np.mean([run["average_map"] for run in runs.values()])),
            "runs": {str(number): run for number, run in runs.items()},
        }
        for name, runs in results.items()
    }
    liquid, other = (load_checkpoint(cache() / f"{name}-0") for name in ("liquid", "actionformer"))
    calibration = [train[n].features.numpy() for n in range(16)]
    rows += onnx_rows(liquid, test, calibration, 7, progress)
    everything = np.concatenate([test[n].features.numpy() for n in range(len(test))])
    long, extra["recordings"] = long_rows(liquid, other, everything, HOURS, progress)
    rows += long
    extra["time_constants_s"] = [
        {"block": c.block, "stride": c.stride, "quantiles": np.percentile(c.seconds, [5, 50, 95]).tolist()}
        for c in time_constants(liquid, STRIDE / 10)
    ]
    extra["recipe"] = asdict(FULL)
    return Report(SLUG, "full", tuple(rows), environment(), seed, extra)


if __name__ == "__main__":
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    train_for(float(sys.argv[1]), *map(int, sys.argv[2:4]))
