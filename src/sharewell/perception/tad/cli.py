"""``sharewell tad``: train a temporal action detector on feature files, evaluate, export and measure it."""

from __future__ import annotations

import json
from contextlib import nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from .evaluate import MapResult
    from .recipes import Recipe

app = typer.Typer(help="Find actions in long videos: train, evaluate, export.", no_args_is_help=True)
RUN_FILE = "run.json"

AsJson = Annotated[bool, typer.Option("--json", help="Print JSON.")]
RunFolder = Annotated[Path, typer.Argument(help="Folder that `sharewell tad train` wrote.")]
Tiou = Annotated[str | None, typer.Option(help="Thresholds: 0.3:0.7:0.1 or 0.5,0.75. Default: the recipe's.")]
Threads = Annotated[
    int | None, typer.Option(min=1, help="CPU threads. Default: the cores this process may use.")
]


def _use_threads(threads: int | None) -> None:
    import torch

    from ...bench import usable_cores

    # More threads than cores make every step many times slower.
    torch.set_num_threads(threads or max(1, int(usable_cores())))


def _bars(quiet: bool) -> Any:
    from ...bench import no_progress, progress_bars

    return nullcontext(no_progress) if quiet else progress_bars()


@app.command()
def train(
    annotations: Annotated[
        Path, typer.Argument(help="ActivityNet JSON, or CSV with video, start, end, label.")
    ],
    features: Annotated[Path, typer.Argument(help="Folder with one <video>.npy each, [rows, width].")],
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder of the run.")],
    recipe: Annotated[str, typer.Option(help="tiny, thumos14, activitynet13 or a TOML file.")] = "tiny",
    backbone: Annotated[str, typer.Option(help="liquid, actionformer or maxpool.")] = "liquid",
    epochs: Annotated[int | None, typer.Option(min=1, help="After the warm-up.")] = None,
    warmup_epochs: Annotated[int | None, typer.Option(min=0, help="Of the learning rate.")] = None,
    batch_size: Annotated[int | None, typer.Option(min=1, help="Over all processes.")] = None,
    lr: Annotated[float | None, typer.Option(help="Peak learning rate.")] = None,
    seed: Annotated[int | None, typer.Option(min=0, help="Of weights, order and crops.")] = None,
    precision: Annotated[str | None, typer.Option(help="float32, bfloat16 or float16 (CUDA).")] = None,
    stride: Annotated[float | None, typer.Option(help="Frames between two rows.")] = None,
    num_frames: Annotated[float | None, typer.Option(help="Frames that a row covers.")] = None,
    fps: Annotated[float | None, typer.Option(help="Frames a second, for all videos.")] = None,
    missing: Annotated[str | None, typer.Option(help="error or skip videos without features.")] = None,
    device: Annotated[str, typer.Option(help="cpu, cuda or cuda:0.")] = "cpu",
    threads: Threads = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with the run in OUT.")] = False,
    as_json: AsJson = False,
) -> None:
    """Train a detector. Several processes or GPUs: start it with torchrun.

    Example: sharewell tad train labels.csv feats/ -o run/
    """
    import torch

    from . import distributed
    from .model import TADModel
    from .recipes import Recipe
    from .trainer import STATE_FILE, TrainingAborted, fit

    _use_threads(threads)
    chosen = Recipe.load(recipe).changed(
        epochs=epochs, warmup_epochs=warmup_epochs, batch_size=batch_size, lr=lr, seed=seed,
        precision=precision, stride=stride, num_frames=num_frames, fps=fps, missing=missing,
    )  # fmt: skip
    training, held_out = chosen.open(annotations, features)
    if held_out is not None and held_out.labels != training.labels:
        raise ValueError("training and evaluation videos must have the same labels")
    joined = distributed.join_from_environment()
    try:
        where = torch.device(device)
    except RuntimeError as error:
        raise ValueError(f"--device: {str(error).splitlines()[0]}") from None
    if where.type == "cuda":
        if not torch.cuda.is_available():
            raise ValueError("--device cuda: torch sees no CUDA device here")
        if joined:
            where = torch.device("cuda", distributed.rank() % torch.cuda.device_count())
    config = chosen.model_config(training.width, training.labels)
    model = TADModel(config, backbone, seed=chosen.train.seed).to(where)  # pyright: ignore[reportArgumentType]
    first = distributed.rank() == 0
    if not resume and (out / STATE_FILE).exists():
        raise ValueError(f"{out} holds a run already: go on with --resume or choose another folder")
    if first:
        _write_run(out, annotations, features, chosen)
        if not as_json:
            _tell_data(training.report, held_out)
    from .evaluate import parse_tious

    settings = chosen.changed(tious=parse_tious(chosen.data.tiou)).train
    try:
        with _bars(as_json or not first) as progress:
            result = fit(model, training, held_out, settings, out=out, resume=resume, progress=progress)
    except TrainingAborted as error:
        raise ValueError(str(error)) from None
    finally:
        distributed.leave()
    if not first:
        return
    last = result.history[-1]
    if as_json:
        summary = {
            "out": str(out),
            "epochs": [asdict(log) for log in result.history],
            "skipped": result.skipped,
            "data": asdict(training.report),
        }
        typer.echo(json.dumps(summary))
        return
    skipped = f", {len(result.skipped)} steps skipped" if result.skipped else ""
    typer.echo(
        f"{out}: {last.epoch} epochs, losses {last.classification:.4f} and {last.regression:.4f}{skipped}"
    )
    if result.evaluation is not None:
        _print_map(result.evaluation)


def _write_run(out: Path, annotations: Path, features: Path, recipe: Recipe) -> None:
    from .annotations import write_json

    about = {
        "annotations": str(annotations.resolve()),
        "features": str(features.resolve()),
        "recipe": {"model": dict(recipe.model), "train": asdict(recipe.train), "data": asdict(recipe.data)},
    }
    write_json(out / RUN_FILE, about)


def _tell_data(report: Any, held_out: Any) -> None:
    typer.echo(
        f"{report.videos} videos with {report.annotations} annotations train; "
        f"{0 if held_out is None else len(held_out)} evaluate"
    )
    for count, what in (
        (len(report.missing_features), "videos have no feature file and are left out"),
        (report.outside, "annotations begin after the last feature row and are left out"),
        (len(report.without_actions), "videos have no actions and train as background"),
    ):
        if count:
            typer.echo(f"  {count} {what}")


def _print_map(result: MapResult) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table("label", *(f"AP@{t:g}" for t in result.tious), "mean")
    for label, ap in result.ap.items():
        table.add_row(label, *(f"{100 * v:.1f}" for v in ap), f"{100 * ap.mean():.1f}")
    table.add_section()
    table.add_row("mAP", *(f"{100 * v:.1f}" for v in result.map), f"{100 * result.average:.2f}")
    Console().print(table)
    if result.unknown:
        typer.echo(f"{result.unknown} predictions have labels that do not occur in the ground truth")


def _map_json(result: MapResult) -> dict[str, Any]:
    return {
        "average_map": result.average,
        "tiou": list(result.tious),
        "map": result.map.tolist(),
        "ap": {label: ap.tolist() for label, ap in result.ap.items()},
        "unknown": result.unknown,
    }


def _read_run(run: Path) -> dict[str, Any]:
    path = run / RUN_FILE
    if not path.is_file():
        raise ValueError(f"{run} is no folder of a run: it has no {RUN_FILE}")
    return json.loads(path.read_text(encoding="utf-8"))


@app.command("eval")
def evaluate(
    run: RunFolder,
    annotations: Annotated[Path | None, typer.Option(help="Others than those of the run.")] = None,
    features: Annotated[Path | None, typer.Option(help="Another folder than that of the run.")] = None,
    tiou: Tiou = None,
    onnx: Annotated[Path | None, typer.Option(help="Evaluate this exported model instead.")] = None,
    predictions: Annotated[Path | None, typer.Option(help="Write the detections to this JSON file.")] = None,
    threads: Threads = None,
    as_json: AsJson = False,
) -> None:
    """mAP of a trained detector on the videos that were held out, by the ActivityNet toolkit's rules.

    Example: sharewell tad eval run/ --tiou 0.3:0.7:0.1
    """
    from .annotations import predictions_document, write_json
    from .checkpoint import load_checkpoint
    from .evaluate import mean_average_precision, parse_tious
    from .export import OnnxDetector
    from .recipes import Recipe
    from .trainer import predict_dataset

    _use_threads(threads)
    about = _read_run(run)
    recipe = Recipe.from_dict(about["recipe"])
    model = load_checkpoint(run) if onnx is None else OnnxDetector(onnx, threads=threads)
    labels = None if recipe.data.class_agnostic else model.config.names
    parts = recipe.open(annotations or about["annotations"], features or about["features"], labels)
    held_out = parts[1]
    if held_out is None:
        raise ValueError("the annotations have no videos for evaluation: give others with --annotations")
    with _bars(as_json) as progress:
        found = predict_dataset(model, held_out, progress)
    if predictions is not None:
        write_json(predictions, predictions_document(found))
    truth = {record.video_id: held_out.annotations(record) for record in held_out.records}
    result = mean_average_precision(truth, found, parse_tious(tiou or recipe.data.tiou))
    if as_json:
        typer.echo(json.dumps(_map_json(result)))
    else:
        _print_map(result)


@app.command()
def score(
    truth: Annotated[Path, typer.Argument(help="Annotations, ActivityNet JSON.")],
    predictions: Annotated[Path, typer.Argument(help='Predictions, {"results": {video: [...]}}.')],
    tiou: Annotated[str, typer.Option(help="Thresholds.")] = "0.3:0.7:0.1",
    subset: Annotated[str | None, typer.Option(help="Of the annotations. Default: all.")] = None,
    as_json: AsJson = False,
) -> None:
    """mAP of a prediction file, whoever wrote it.

    Example: sharewell tad score activity_net.v1-3.json results.json --subset validation --tiou 0.5:0.95:0.05
    """
    from .evaluate import evaluate_map, parse_tious

    result = evaluate_map(truth, predictions, parse_tious(tiou), subset=subset)
    if as_json:
        typer.echo(json.dumps(_map_json(result)))
    else:
        _print_map(result)


@app.command()
def export(
    run: RunFolder,
    path: Annotated[Path, typer.Argument(help="ONNX file to write.")],
    int8: Annotated[Path | None, typer.Option(help="Also write an int8 variant to this file.")] = None,
    as_json: AsJson = False,
) -> None:
    """Write a detector as one ONNX file of standard operators for videos of any length, checked with
    onnxruntime.

    The int8 variant is calibrated on training videos of the run.

    Example: sharewell tad export run/ model.onnx --int8 model-int8.onnx
    """
    from .checkpoint import load_checkpoint
    from .export import export_onnx, operators, quantize_onnx
    from .recipes import Recipe

    model = load_checkpoint(run)
    export_onnx(model, path)
    written = [path]
    if int8 is not None:
        about = _read_run(run)
        recipe = Recipe.from_dict(about["recipe"])
        training, _ = recipe.open(about["annotations"], about["features"])
        calibration = (training[index].features.numpy() for index in range(min(16, len(training))))
        quantize_onnx(path, int8, calibration)
        written.append(int8)
    sizes = {str(file): file.stat().st_size for file in written}
    if as_json:
        typer.echo(json.dumps({"bytes": sizes, "operators": operators(path)}))
        return
    for file, size in sizes.items():
        typer.echo(f"{file}: {size:,} bytes")
    typer.echo("operators: " + ", ".join(operators(path)))


@app.command()
def timescales(
    run: RunFolder,
    plot: Annotated[Path | None, typer.Option(help="Draw them to this image.")] = None,
    fps: Annotated[float | None, typer.Option(help="Frames a second, where the run does not say.")] = None,
    as_json: AsJson = False,
) -> None:
    """How long each level of a trained detector remembers, in seconds.

    Example: sharewell tad timescales run/ --plot timescales.png
    """
    import numpy as np

    from .checkpoint import checkpoint_extra, load_checkpoint
    from .timescales import plot_time_constants, time_constants

    facts = checkpoint_extra(run).get("features", {})
    rate = fps or facts.get("fps")
    if rate is None or not facts.get("stride"):
        raise ValueError("--fps must be given: the run does not say how many frames a second have")
    constants = time_constants(load_checkpoint(run), facts["stride"] / rate)
    rows = [
        {"block": c.block, "stride": c.stride, "seconds": np.percentile(c.seconds, [5, 50, 95]).tolist()}
        for c in constants
    ]
    if plot is not None:
        plot_time_constants(constants, plot)
    if as_json:
        typer.echo(json.dumps(rows))
        return
    for row in rows:
        low, middle, high = row["seconds"]
        typer.echo(
            f"block {row['block']} at stride {row['stride']:2}: {middle:.3g} s (5-95 %: {low:.3g}-{high:.3g})"
        )


@app.command()
def bench(
    preset: Annotated[str, typer.Option(help="tiny, thumos14 or activitynet13.")] = "tiny",
    width: Annotated[int, typer.Option(min=1, help="Feature width of tiny.")] = 96,
    rows: Annotated[int, typer.Option(min=1, help="Feature rows of one video.")] = 2304,
    repeats: Annotated[int, typer.Option(min=1, help="Runs of each.")] = 5,
    threads: Threads = None,
    as_json: AsJson = False,
) -> None:
    """Parameters, multiply-adds and CPU time of the three backbones here, in turns.

    Example: sharewell tad bench --preset thumos14 --rows 2304
    """
    import torch

    from ...bench import interleave, median, values
    from .config import BACKBONES, LiquidTADConfig
    from .cost import count_cost
    from .model import TADModel

    _use_threads(threads)
    presets = {
        "tiny": lambda: LiquidTADConfig.tiny(width, 3),
        "thumos14": LiquidTADConfig.thumos14,
        "activitynet13": LiquidTADConfig.activitynet13,
    }
    if preset not in presets:
        raise ValueError(f"--preset must be {', '.join(presets)}, got {preset!r}")
    config = presets[preset]()
    padded = config.padded(rows)
    models = {name: TADModel(config, name) for name in BACKBONES}  # pyright: ignore[reportArgumentType]
    features = torch.randn(1, config.c_in, padded, generator=torch.Generator().manual_seed(0))
    mask = torch.ones(1, 1, padded)

    def runner(model: TADModel) -> Any:
        return lambda: model.infer(features, mask) and None

    samples = interleave({name: runner(model) for name, model in models.items()}, repeats=repeats)
    table = []
    for name, model in models.items():
        cost = count_cost(model, padded)
        seconds = median(values(samples[name], "cpu_s"))
        table.append(
            {"backbone": name, "parameters": cost.parameters, "gmacs": cost.total / 1e9, "cpu_s": seconds}
        )
    if as_json:
        typer.echo(json.dumps({"rows": padded, "backbones": table}))
        return
    typer.echo(f"{padded} rows, {config.c_in} wide")
    for row in table:
        typer.echo(
            f"{row['backbone']:12} {row['parameters']:>12,} parameters {row['gmacs']:8.2f} GMAC "
            f"{row['cpu_s']:8.3f} CPU s"
        )
