"""``sharewell kv``: what keys and values cost, and what sharing them costs."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    import torch

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


@app.command("lora-report")
def lora_report_command(
    base: Annotated[str, typer.Argument(help="byte-lm-routed, smollm2, or the path of a model folder.")],
    adapters: Annotated[str, typer.Option(help="ROLE=FOLDER of peft adapters, with commas between.")],
    transcript: Annotated[Path, typer.Option(help="UTF-8 text that the roles work on.")],
    tokens: Annotated[int, typer.Option(min=4, help="Tokens of the text that are taken.")] = 1024,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """LoRA roles on one transcript: how alike their keys and values are, and what sharing them costs.

    The first role writes the first half, every other one goes on from there: bytes beside a cache for each,
    tokens computed, and KL of the next token to the role's own cache.

    Example: sharewell kv lora-report smollm2 --adapters plan=./plan,act=./act --transcript said.txt
    """
    folders: dict[str, Path] = {}
    for part in adapters.split(","):
        role, equals, folder = part.partition("=")
        if not equals or not role.strip() or not folder.strip():
            raise ValueError(f"--adapters must be ROLE=FOLDER with commas between, got {adapters!r}")
        if role.strip() in folders:
            raise ValueError(f"--adapters names role {role.strip()!r} twice")
        folders[role.strip()] = Path(folder.strip())
    for role, path in folders.items():
        if not (path / "adapter_config.json").is_file():
            raise ValueError(f"--adapters: {path} of role {role!r} has no adapter_config.json of peft")
    if not transcript.is_file():
        raise ValueError(f"--transcript must be a file that exists, got {transcript}")
    try:
        from peft import PeftModel
    except ModuleNotFoundError:
        raise ValueError("adapters need peft: pip install 'sharewell[lora]'") from None
    from rich.console import Console
    from rich.table import Table
    from transformers.utils.logging import disable_progress_bar

    from ..models import Tokenizer, load_transformers, resolve_model
    from .lora_measure import lora_report

    folder = resolve_model(base, progress=not as_json)
    try:
        text = transcript.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"--transcript must be UTF-8: {transcript}: {error}") from None
    ids = Tokenizer(folder).encode(text[: 40 * tokens])[:tokens]
    disable_progress_bar()
    model: Any = load_transformers(folder)
    for role, path in folders.items():
        if isinstance(model, PeftModel):
            model.load_adapter(str(path), adapter_name=role)
        else:
            model = PeftModel.from_pretrained(model, str(path), adapter_name=role)
    alike, rows = lora_report(model.eval(), {role: role for role in folders}, ids)
    if as_json:
        found = {"base": base, "tokens": len(ids), "similarity": asdict(alike)}
        typer.echo(json.dumps({**found, "modes": [asdict(row) for row in rows]}, indent=2))
        return
    table = Table("mode", "KV bytes of separate", "tokens computed", "KL", "why not")
    for r in rows:
        table.add_row(
            r.mode,
            "-" if r.memory_ratio is None else f"{r.memory_ratio:.1%}",
            "-" if r.computed is None else f"{r.computed:,}",
            "-" if r.kl is None else f"{r.kl:.2g}",
            r.reason,
        )
    Console().print(table)
    parts = ", ".join(f"{k.replace('_', ' ')} {v:.3f}" for k, v in asdict(alike).items() if v is not None)
    typer.echo(f"cosine between roles: {parts}")


@app.command("dlm-bench")
def dlm_bench_command(
    model: Annotated[
        str, typer.Argument(help="masked-sums, or the path of a LLaDA, Dream or Llama-like folder.")
    ],
    variant: Annotated[
        str, typer.Option(help="none, decode, pd, prefill, greedy, block, with commas between.")
    ] = "none,decode,pd",
    steps: Annotated[str, typer.Option(help="Denoising steps, with commas between.")] = "64,128",
    gen_length: Annotated[int, typer.Option(min=1, help="Tokens of an answer.")] = 128,
    block_length: Annotated[
        int | None, typer.Option(min=1, help="Tokens that are decided before the next begin. Default: all.")
    ] = None,
    refresh: Annotated[
        int | None, typer.Option(help="Everything is computed every so many steps. Default: 8, greedy 2.")
    ] = None,
    remasking: Annotated[
        str, typer.Option(help="low_confidence, entropy or random (what greedy needs).")
    ] = "low_confidence",
    prompts: Annotated[
        Path | None, typer.Option(help="UTF-8 text, a prompt a line. masked-sums makes its own exercises.")
    ] = None,
    batch: Annotated[int, typer.Option(min=1, help="Exercises, or the first lines of --prompts.")] = 4,
    seed: Annotated[int, typer.Option(help="Of the exercises and of what is drawn.")] = 0,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """A masked diffusion model with and without keys and values kept: seconds, work, and what changes.

    Example: sharewell kv dlm-bench masked-sums --variant none,decode,pd --steps 64,128
    """
    from ..models import Tokenizer, resolve_model, shipped_models
    from ..simulation import WallClock
    from .diffusion_models import load_masked_diffusion
    from .dlm_measure import CacheTrial, compare_caches
    from .worked_sums import PROBLEMS, WIDTH, WorkedSums, score

    names = tuple(name.strip() for name in variant.split(",") if name.strip())
    trial = CacheTrial(
        gen_length, _whole_numbers(steps), names, block_length, refresh, remasking=remasking, seed=seed  # pyright: ignore[reportArgumentType]
    )  # fmt: skip
    if prompts is not None and not prompts.is_file():
        raise ValueError(f"--prompts must be a file that exists, got {prompts}")
    folder = resolve_model(model, progress=not as_json)
    exercises = folder == shipped_models().get("masked-sums")
    judge = None
    if exercises and prompts is None:
        if gen_length != PROBLEMS * WIDTH:
            raise ValueError(f"--gen-length must be {PROBLEMS * WIDTH} for masked-sums, got {gen_length}")
        asked, _ = WorkedSums(seed=seed).batch(batch)
        rows_of_ids = asked.tolist()

        def solved(answers: torch.Tensor) -> float:
            return float(score(asked, answers.numpy()).mean())

        judge = solved
    elif exercises or prompts is None:
        wanted = "left out for masked-sums" if exercises else "given for this model: it has no exercises"
        raise ValueError(f"--prompts must be {wanted}, got {prompts}")
    else:
        lines = [line for line in prompts.read_text(encoding="utf-8").splitlines() if line.strip()][:batch]
        if not lines:
            raise ValueError(f"--prompts must hold at least one line of text, got none in {prompts}")
        tokenizer = Tokenizer(folder)
        rows_of_ids = [tokenizer.encode(line) for line in lines]
    lm = load_masked_diffusion(folder)
    rows = compare_caches(lm, rows_of_ids, trial, WallClock(), judge)
    if as_json:
        typer.echo(json.dumps({"model": model, "rows": [asdict(row) for row in rows]}, indent=2))
        return
    from rich.console import Console
    from rich.table import Table

    table = Table("variant", "steps", "s", "tokens/s", "faster", "computed", "KV MB", "same tokens", "solved")
    for r in rows:
        table.add_row(
            r.variant, str(r.steps), f"{r.seconds:.2f}", f"{r.tokens_per_s:.1f}", f"{r.times_faster:.2f}x",
            f"{r.computed:.0%}", f"{r.kv_bytes / 1e6:.1f}", f"{r.same_tokens:.1%}",
            "-" if r.solved is None else f"{r.solved:.1%}",
        )  # fmt: skip
    Console().print(table)


def _whole_numbers(text: str) -> tuple[int, ...]:
    try:
        return tuple(int(part) for part in text.split(",") if part.strip())
    except ValueError:
        raise ValueError(f"--steps must be whole numbers with commas between, got {text!r}") from None


@app.command("explain")
def explain_command(
    request_id: Annotated[str, typer.Argument(help="The id of an answer, such as chatcmpl-...")],
    server: Annotated[str, typer.Option(help="Address of the running server.")] = "http://127.0.0.1:8000",
    key: Annotated[str | None, typer.Option(help="API key.", envvar="SHAREWELL_API_KEY")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Which tokens of a request's prompt came from where, and which were computed anew and why.

    Only requests that opt in to relaying are remembered. The server shows the same at /explain/REQUEST_ID.

    Example: sharewell kv explain chatcmpl-1f0c --server http://127.0.0.1:8000
    """
    from .explain import fetch, show

    found = fetch(server, request_id, key)
    if as_json:
        typer.echo(json.dumps(found, indent=2))
    else:
        show(found)


@app.command("relay-bench")
def relay_bench_command(
    scale: Annotated[str, typer.Option(help="smoke (seconds, a random model) or full (SmolLM2).")] = "smoke",
    seed: Annotated[int, typer.Option(help="Of the hand-overs.")] = 0,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Hand-overs between agents: relay beside full prefill, direct reuse, CacheBlend and EPIC.

    The same as `sharewell bench relaycaching`, from a checkout, without keeping the result.

    Example: sharewell kv relay-bench --scale smoke
    """
    if scale not in ("smoke", "full"):
        raise ValueError(f"--scale must be smoke or full, got {scale!r}")
    from ..bench import find_benchmark, progress_bars

    with progress_bars() as progress:
        report = find_benchmark("relaycaching").run(scale, seed=seed, progress=progress)  # pyright: ignore[reportArgumentType]
    if as_json:
        typer.echo(json.dumps(report.to_dict(), indent=2))
    else:
        report.print()


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
