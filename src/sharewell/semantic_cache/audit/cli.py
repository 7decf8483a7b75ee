"""``sharewell cache audit``."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from .outcome import AuditReport

TOKEN_VARIABLE = "SHAREWELL_AUDIT_TOKEN"
VOCABULARY = 30_000  # token ids that the black box draws words from


def audit(
    cache: Annotated[
        str | None,
        typer.Option(help="Your cache file, or http://localhost:PORT of your own server (with the token)."),
    ] = None,
    pairs: Annotated[int, typer.Option(help="Canary and victim pairs to try.")] = 20,
    threshold: Annotated[
        float | None, typer.Option(help="Audit at this similarity instead of the cache's own.")
    ] = None,
    defences: Annotated[
        str,
        typer.Option(help="Sets to compare, by commas; + joins: none,default,scope,crop,second,crop+second."),
    ] = "none,default,crop+second",
    victims: Annotated[
        Path | None,
        typer.Option(help='JSON lines: "a question" or {"question": ..., "paraphrases": [...]}.'),
    ] = None,
    twin: Annotated[
        str, typer.Option(help="Model with gradients: minilm-torch, a folder, or none (black box).")
    ] = "minilm-torch",
    embedder: Annotated[str, typer.Option(help="The embedder that the cache uses.")] = "minilm",
    time_budget_s: Annotated[float, typer.Option(help="After that many seconds report what there is.")] = 600,
    resume: Annotated[
        Path | None, typer.Option(help="Keep found texts in this file and go on from it.")
    ] = None,
    report: Annotated[Path | None, typer.Option(help="Write the report there: .html or .json.")] = None,
    reveal: Annotated[
        bool, typer.Option("--reveal", help="Show the crafted texts instead of their hashes.")
    ] = False,
    fail_above: Annotated[
        float, typer.Option(help="Exit code 2 when more than this share is hijacked, in [0, 1].")
    ] = 1.0,
    timing_probes: Annotated[int, typer.Option(help="Timed questions; 0: no timing.")] = 100,
    seed: Annotated[int, typer.Option(min=0, help="Seed of pairs and search.")] = 0,
    as_json: Annotated[bool, typer.Option("--json", help="Print the report as JSON.")] = False,
) -> None:
    """Attack a copy of your own semantic cache with harmless canaries, and say how often it serves them.

    Nothing is written to the cache. A server on this machine is audited only when it was started with the
    same SHAREWELL_AUDIT_TOKEN. Without --cache a new empty cache with the default rules is audited.

    Example: sharewell cache audit --cache answers.sqlite --pairs 20 --report audit.html --fail-above 0.15
    """
    import numpy as np

    from ...models import load_embedder, resolve_model
    from ..cache import SemanticCache
    from .config import AuditConfig
    from .gradients import GradientProposer, RandomProposer, printable_words
    from .log import AttackLog
    from .refusal import AuditRefused, check_own, loopback_cache_file
    from .runner import CollisionAudit
    from .sources import load_questions, shipped_questions
    from .verdict import advice, verdict

    if not 0 <= fail_above <= 1:
        raise typer.BadParameter(f"must be in [0, 1], got {fail_above}", param_hint="--fail-above")
    if report is not None and report.suffix not in (".html", ".json"):
        raise typer.BadParameter(f"must end in .html or .json, got {report.name!r}", param_hint="--report")
    config = AuditConfig(
        pairs=pairs, threshold=threshold, timing_probes=timing_probes, seed=seed, time_budget_s=time_budget_s
    )
    questions = shipped_questions() if victims is None else load_questions(victims)
    try:
        if cache is None:
            target: Path | None = None
        elif "://" in cache:
            target = loopback_cache_file(cache, os.environ.get(TOKEN_VARIABLE, ""))
        else:
            target = Path(cache)
            check_own(target)
        deployed = load_embedder(embedder)
        if twin == "none":
            words = printable_words(deployed, VOCABULARY)
            proposer, mode = RandomProposer(words, np.random.default_rng(seed)), "black box"
        else:
            proposer = GradientProposer.from_folder(resolve_model(twin))
            mode = "white box" if twin == "minilm-torch" and embedder == "minilm" else "transfer"
        audited = SemanticCache(None, deployed) if target is None else target
        found = CollisionAudit(
            audited, deployed, proposer, config, mode=mode, log=AttackLog(resume), progress=_progress
        ).run(victims=questions, defences=[name.strip() for name in defences.split(",")])
    except AuditRefused as error:
        typer.echo(f"error: refused: {error}", err=True)
        raise typer.Exit(2) from None
    if report is not None:
        text = found.to_html(reveal=reveal) if report.suffix == ".html" else found.to_json(reveal=reveal)
        report.write_text(text, encoding="utf-8")
    if as_json:
        typer.echo(found.to_json(reveal=reveal))
    else:
        typer.echo(verdict(found))
        _table(found)
        for line in advice(found):
            typer.echo(f"- {line}")
    if found.risk > fail_above:
        typer.echo(f"error: the risk {found.risk:.3f} is above --fail-above {fail_above}", err=True)
        raise typer.Exit(2)


def _progress(what: str, done: int, total: int) -> None:
    typer.echo(f"{what}: {done} of {total}", err=True)


def _table(found: AuditReport) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table("defences", "hijacked", "adaptive attacker", "benign hits", "lost", "wrong hits")
    for row in found.results:
        lost = f"{100 * row.lost(found.results[0]):.1f} %"
        wrong = f"{row.wrong_hits.count} of {row.wrong_hits.n}"
        hits = f"{row.benign_hits.count} of {row.benign_hits.n}"
        table.add_row(row.name, str(row.hijacked), str(row.hijacked_adaptive), hits, lost, wrong)
    console = Console()
    console.print(table)
    typer.echo(f"random suffixes: {found.control}; exact matching alone: {found.exact_tier}")
    if found.timing is not None:
        typer.echo(f"timing: hit told from miss with AUC {found.timing.auc:.3f}")
    for note in found.notes:
        typer.echo(note)
