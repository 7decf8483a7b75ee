"""``sharewell kv``: what keys and values cost, and what sharing them costs."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

app = typer.Typer(help="Keys and values: what sharing them saves and costs.", no_args_is_help=True)


@app.callback()
def _group() -> None:
    """Keys and values: what sharing them saves and costs."""


@app.command("depth-report")
def depth_report_command(
    model: Annotated[str, typer.Argument(help="byte-lm-routed, smollm2, or the path of a model folder.")],
    retention: Annotated[str, typer.Option(help="Shares of the layers that keep a cache.")] = "1,0.5,0.25",
    text: Annotated[
        Path | None,
        typer.Option(help="UTF-8 text to measure on. Default: held-out text of Python's library."),
    ] = None,
    budget_bytes: Annotated[
        int | None, typer.Option(help="Also the most layers whose cache of --tokens fits into so many bytes.")
    ] = None,
    tokens: Annotated[int, typer.Option(min=1, help="Tokens that --budget-bytes has to hold.")] = 8192,
    greedy: Annotated[
        bool, typer.Option("--greedy", help="Choose layers by greedy removal on a part of the text.")
    ] = False,
    context: Annotated[int, typer.Option(help="Tokens of a window, and of the timed prompt.")] = 256,
    windows: Annotated[int, typer.Option(help="Windows for the perplexity.")] = 32,
    new_tokens: Annotated[int, typer.Option(help="Decoded tokens that are timed.")] = 32,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Perplexity, KV bytes, time to first token and tokens per second with a cache in fewer layers.

    Example: sharewell kv depth-report byte-lm-routed --retention 1,0.5,0.25
    """
    shares = _shares(retention)
    if text is not None and not text.is_file():
        raise ValueError(f"--text must be a file that exists, got {text}")

    from transformers.utils.logging import disable_progress_bar

    from ..models import Tokenizer, load_transformers, python_text, resolve_model
    from ..simulation import WallClock
    from .depth_measure import DepthReportConfig, depth_report
    from .depth_sharing import layer_types, retained_count

    config = DepthReportConfig(
        context=context, windows=windows, prompt=context, new_tokens=new_tokens, greedy=greedy
    )
    folder = resolve_model(model, progress=not as_json)
    data = python_text("held-out") if text is None else text.read_bytes()
    try:
        words = data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"--text must be UTF-8: {text}: {error}") from None
    disable_progress_bar()
    lm = load_transformers(folder)
    if budget_bytes is not None:
        fit = retained_count(lm, budget_bytes=budget_bytes, tokens=tokens)
        shares.append(fit / len(layer_types(lm)))
    # enough text for every window, and no more: tokenizing is not what is measured
    most = 40 * context * (windows + (3 * config.calibration if greedy else 0))
    report = depth_report(lm, Tokenizer(folder).encode(words[:most]), shares, WallClock(), config)
    if as_json:
        typer.echo(json.dumps({"model": model, **asdict(report)}, indent=2))
        return
    _print(model, report)


@app.command("compare")
def compare_command(
    model: Annotated[str, typer.Argument(help="smollm2, or the path of a model folder.")],
    text: Annotated[
        Path | None, typer.Option(help="UTF-8 text to run. Default: held-out text of Python's library.")
    ] = None,
    tokens: Annotated[int, typer.Option(min=16, help="Tokens of the text that are taken.")] = 256,
    plans: Annotated[str, typer.Option(help="Names with commas between. Default: all.")] = "",
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Every plan on one text: token-layers, bytes, time to the first token, and KL to full attention.

    The middle of the text is taken to be there already, computed behind another prefix.

    Example: sharewell kv compare smollm2 --tokens 256
    """
    if text is not None and not text.is_file():
        raise ValueError(f"--text must be a file that exists, got {text}")
    from rich.console import Console
    from rich.table import Table

    from ..models import Tokenizer, load_transformers, python_text, resolve_model
    from ..simulation import WallClock
    from .compare import PLANS, compare, handover
    from .engine import PlannedForward

    names = [name.strip() for name in plans.split(",") if name.strip()]
    unknown = next((name for name in names if name not in PLANS), None)
    if unknown is not None:
        raise ValueError(f"--plans must be of {', '.join(PLANS)}, got {unknown!r}")
    folder = resolve_model(model, progress=not as_json)
    data = python_text("held-out") if text is None else text.read_bytes()
    ids = Tokenizer(folder).encode(data.decode("utf-8", "replace")[: 40 * tokens])
    least = tokens + max(1, tokens // 5)
    if len(ids) < least:
        raise ValueError(f"--text must have at least {least} tokens for --tokens {tokens}, got {len(ids)}")
    engine = PlannedForward(load_transformers(folder))
    piece = handover(engine, ids[:tokens], other_prefix=ids[tokens:least])
    rows = compare(engine, piece, WallClock(), names or None)
    if as_json:
        typer.echo(
            json.dumps({"model": model, "tokens": tokens, "plans": [r.as_dict() for r in rows]}, indent=2)
        )
        return
    table = Table(
        "plan", "token-layers", "computed", "projections skipped", "bytes read", "bytes held", "TTFT ms", "KL"
    )
    for r in rows:
        table.add_row(
            r.plan, f"{r.token_layers:,}", f"{r.share_computed:.0%}", f"{r.projections_skipped:,}",
            f"{r.bytes_read:,}", f"{r.bytes_held:,}", f"{r.ttft_s * 1e3:.1f}", f"{r.kl:.2g}",
        )  # fmt: skip
    Console().print(table)


def _shares(text: str) -> list[float]:
    try:
        shares = [float(part) for part in text.split(",") if part.strip()]
    except ValueError:
        raise ValueError(f"--retention must be numbers in (0, 1] with commas between, got {text!r}") from None
    if not shares or not all(0 < share <= 1 for share in shares):
        raise ValueError(f"--retention must be numbers in (0, 1] with commas between, got {text!r}")
    return shares


def _print(model: str, report: object) -> None:
    from rich.console import Console
    from rich.table import Table

    from .depth_measure import DepthReport

    assert isinstance(report, DepthReport)
    table = Table("retained", "layers", "perplexity", "of all layers'", "KV bytes", "TTFT ms", "tokens/s")
    for row in report.rows:
        table.add_row(
            f"{row.retention:.0%}",
            ",".join(map(str, row.layers)) if len(row.layers) <= 10 else f"{len(row.layers)} layers",
            f"{row.perplexity:.4g}",
            f"{row.perplexity_ratio:.3g}x",
            f"{row.kv_bytes:,}",
            f"{row.ttft_s * 1e3:.1f}",
            f"{row.tokens_per_s:.1f}",
        )
    Console().print(table)
    if not report.trained:
        typer.echo(
            f"{model} was not trained for sharing between layers: see docs/kv/stochastic-kv-routing.md"
        )
    if not report.skipped:
        typer.echo("its projections could not be left out for layers without a cache; times include them")
