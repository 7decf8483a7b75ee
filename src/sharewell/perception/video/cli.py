"""The commands around video: ``sharewell detect``, and ``extract``, ``labels`` and ``demo`` of ``sharewell
tad``."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Annotated, Any

import typer


def extract(
    sources: Annotated[
        list[Path], typer.Argument(metavar="VIDEOS...", help="Files, or folders with all below.")
    ],
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder of the features.")],
    extractor: Annotated[
        str,
        typer.Option(
            "--extractor", "-e", help="small, efficientnet-lite0, signal, or python:MODULE:FACTORY."
        ),
    ] = "small",
    fps: Annotated[
        float | None, typer.Option(help="Frames a second to look at; of a signal its rate.")
    ] = None,
    stride: Annotated[int | None, typer.Option(help="Frames from one feature to the next.")] = None,
    num_frames: Annotated[int | None, typer.Option(help="Frames of one feature.")] = None,
    channels: Annotated[int | None, typer.Option(help="Columns of a signal, without its time.")] = None,
    skip_damaged: Annotated[
        bool, typer.Option("--skip-damaged", help="Go on behind damage in a video.")
    ] = False,
    force: Annotated[bool, typer.Option("--force", help="Do again what is done.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the report as JSON.")] = False,
) -> None:
    """Turn videos into features, once. Run it again and it goes on where it was.

    Example: sharewell tad extract videos/ -e efficientnet-lite0 -o feats/
    """
    from ...bench import progress_bars
    from .decode import VIDEO_SUFFIXES
    from .extraction import extract_folder, find_sources
    from .extractors import load_extractor
    from .local import SIGNAL_SUFFIXES

    if extractor.startswith("dir:"):
        raise typer.BadParameter("the features of dir: are there already", param_hint="--extractor")
    made = load_extractor(
        extractor, fps=fps, stride=stride, num_frames=num_frames, channels=channels, skip_damaged=skip_damaged
    )
    found = find_sources(sources, SIGNAL_SUFFIXES if extractor == "signal" else VIDEO_SUFFIXES)
    with progress_bars() as bars:
        report = extract_folder(found, made, out, force=force, progress=bars)
    if as_json:
        typer.echo(json.dumps(dataclasses.asdict(report), indent=2))
    else:
        typer.echo(
            f"{len(report.done)} extracted, {len(report.skipped)} done before, {len(report.failed)} failed"
        )
        for name, why in report.partial:
            typer.echo(f"damaged, kept what could be read: {name}: {why}", err=True)
        for name, why in report.failed:
            typer.echo(f"failed: {name}: {why}", err=True)
    if report.failed:
        raise typer.Exit(1)


def labels(
    table: Annotated[
        Path, typer.Argument(metavar="LABELS.csv", help="Columns video, start, end, label[, subset].")
    ],
    features: Annotated[
        Path, typer.Option("--features", "-f", help="Folder of tad extract: knows the durations.")
    ],
    out: Annotated[Path, typer.Option("--out", "-o", help="ActivityNet JSON to write.")] = Path(
        "annotations.json"
    ),
    test_share: Annotated[float, typer.Option(help="Share of the videos kept for testing.")] = 0.25,
    seed: Annotated[int, typer.Option(min=0, help="Seed of that choice.")] = 0,
    as_json: Annotated[bool, typer.Option("--json", help="Print what was read as JSON.")] = False,
) -> None:
    """Turn a table of labels into the annotations that training reads, and say what is in it.

    Example: sharewell tad labels labels.csv -f feats/ -o annotations.json
    """
    from .features import write_atomically
    from .labels import convert_labels

    if not table.is_file():
        raise FileNotFoundError(f"no table {table}")
    report = convert_labels(table, features, test_share=test_share, seed=seed)
    write_atomically(out, (json.dumps(report.document, indent=1) + "\n").encode())
    if as_json:
        fields = dataclasses.asdict(report)
        del fields["document"]
        typer.echo(json.dumps(fields, indent=2))
        return
    typer.echo(f"{out}: " + ", ".join(f"{n} videos to {name}" for name, n in sorted(report.videos.items())))
    typer.echo(
        "actions: " + (", ".join(f"{n} {name}" for name, n in sorted(report.actions.items())) or "none")
    )
    for what, names in (
        ("cut off at the end of the video", report.clipped),
        ("videos without an action", report.negatives),
        ("left out, not in the table", report.unlabelled),
    ):
        if names:
            typer.echo(
                f"{what}: {', '.join(names[:8])}{' ...' if len(names) > 8 else ''} ({len(names)})", err=True
            )


def demo(
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder of the videos and labels.csv.")],
    train: Annotated[int, typer.Option(min=1, max=1000, help="Videos for training.")] = 24,
    test: Annotated[int, typer.Option(min=1, max=1000, help="Videos for testing, of other digits.")] = 8,
    seconds: Annotated[float, typer.Option(help="Length of each.")] = 60.0,
    seed: Annotated[int, typer.Option(min=0, help="Other seeds give other videos.")] = 0,
) -> None:
    """Render videos of handwritten digits that move in five ways, with their labels, to try everything out.

    Example: sharewell tad demo -o videos/ --train 24 --test 8
    """
    from ...bench import progress_bars
    from .digits import DigitClip, render_folder

    with progress_bars() as bars:
        table = render_folder(out, train, test, seed=seed, clip=DigitClip(0, seconds=seconds), progress=bars)
    typer.echo(f"{train + test} videos; labels in {table}")


def detect(
    source: Annotated[
        str, typer.Argument(metavar="VIDEO", help="A file, a URL that FFmpeg knows, or - for a pipe.")
    ],
    model: Annotated[
        Path | None,
        typer.Option(help="Folder of tad train, a checkpoint or .onnx; without: the demonstration."),
    ] = None,
    extractor: Annotated[
        str | None, typer.Option("--extractor", "-e", help="Instead of the one that the model names.")
    ] = None,
    out: Annotated[
        Path | None, typer.Option("--out", "-o", help="Folder for NAME.json, NAME.csv and NAME.png.")
    ] = None,
    json_path: Annotated[
        str | None, typer.Option("--json", metavar="FILE", help="JSON; - prints it.")
    ] = None,
    csv_path: Annotated[Path | None, typer.Option("--csv", help="Table: start, end, label, score.")] = None,
    timeline: Annotated[
        Path | None, typer.Option(help="Picture of the timeline: .png, .svg or .pdf.")
    ] = None,
    overlay: Annotated[Path | None, typer.Option(help="Copy of the video with captions (.mp4).")] = None,
    clips: Annotated[Path | None, typer.Option(help="Folder for one clip a detection.")] = None,
    min_score: Annotated[float, typer.Option(help="Lowest score that is reported.")] = 0.2,
    stream: Annotated[
        bool, typer.Option("--stream", help="Follow a live source: one JSON line a detection, as it settles.")
    ] = False,
    lookahead_s: Annotated[
        float | None,
        typer.Option(help="With --stream: wait less for what follows; scores are then approximate."),
    ] = None,
    skip_damaged: Annotated[
        bool, typer.Option("--skip-damaged", help="Go on behind damage in the video.")
    ] = False,
    threads: Annotated[int, typer.Option(min=0, help="Of the decoder; 0: the usable cores.")] = 0,
) -> None:
    """Find what happens when in a video: start, end, label and score, in bounded memory however long it is.

    Exit code 1 when the video is damaged: what was found before the damage is written all the same.

    Example: sharewell detect clip.mp4 --model run/ --out found/
    """
    from ...bench import no_progress, progress_bars
    from . import report
    from .decode import PIPE
    from .detect import VideoDetector, live
    from .detect import detect as run
    from .extractors import load_extractor
    from .stream import StreamConfig

    if source == PIPE and (overlay or clips):
        raise typer.BadParameter("a pipe can be read only once: no --overlay, no --clips", param_hint="VIDEO")
    if timeline is not None and timeline.suffix.lower() not in report.PICTURE_SUFFIXES:
        raise typer.BadParameter(
            f"must end in {', '.join(report.PICTURE_SUFFIXES)}, got {timeline.name}", param_hint="--timeline"
        )
    if lookahead_s is not None and not stream:
        raise typer.BadParameter("goes with --stream", param_hint="--lookahead-s")
    options: dict[str, Any] = {"skip_damaged": skip_damaged, "threads": threads}
    chosen = None if extractor is None else load_extractor(extractor, **options)
    detector = VideoDetector.load(model, chosen, **options)
    config = StreamConfig(min_score=min_score)
    if detector.demonstration:
        typer.echo(f"demonstration: {detector.about} Train your own: sharewell tad train --help", err=True)
    if stream:
        if lookahead_s is not None:
            rows = max(0, round(lookahead_s / detector.extractor.settings.grid.step_s))
            config = dataclasses.replace(config, lookahead=rows)
        detector, config = live(detector, config)
        _announce(detector, config)
        result = run(source, detector, config, on_detection=lambda d: typer.echo(_line(d)))
    elif json_path == "-":
        result = run(source, detector, config, progress=no_progress)
    else:
        with progress_bars() as bars:
            result = run(source, detector, config, progress=bars)

    name = Path(source).stem if source != PIPE else "stream"
    if out is not None:
        json_path = json_path or str(out / f"{name}.json")
        csv_path, timeline = csv_path or out / f"{name}.csv", timeline or out / f"{name}.png"
    if json_path == "-":
        typer.echo(json.dumps(report.to_document(result, detector), indent=2))
    elif json_path is not None:
        report.write_json(result, detector, Path(json_path))
    if csv_path is not None:
        report.write_csv(result, csv_path)
    if timeline is not None:
        report.write_timeline(result, detector, timeline)
    if overlay is not None or clips is not None:
        from . import render

        if overlay is not None:
            with progress_bars() as bars:
                render.write_overlay(source, result.detections, overlay, progress=bars)
        if clips is not None:
            render.write_clips(source, result.detections, clips)
    if not stream and json_path != "-":
        _table(result)
    if not result.complete:
        typer.echo(f"damaged: {result.error}", err=True)
        raise typer.Exit(1)


def _announce(detector: Any, config: Any) -> None:
    from .stream import StreamDetector

    shape = StreamDetector(detector.model, detector.extractor.settings.grid, config)
    exact = "scores as of the whole recording" if shape.ahead == shape.edge else "scores are approximate"
    typer.echo(
        f"window {shape.window_s:.0f} s, overlap {shape.overlap_s:.0f} s, an action is reported at most "
        f"{shape.latency_s:.0f} s after its end; {exact}",
        err=True,
    )


def _line(detection: Any) -> str:
    return json.dumps({k: round(v, 4) if isinstance(v, float) else v for k, v in vars(detection).items()})


def _table(result: Any) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table("start", "end", "label", "score")
    for d in result.detections:
        table.add_row(f"{d.start:.2f}", f"{d.end:.2f}", d.label, f"{d.score:.2f}")
    Console().print(table)
