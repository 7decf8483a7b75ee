"""The room's commands: ``sharewell waterfill``, ``sharewell auction``, ``sharewell grank``."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer


def waterfill(
    channel: Annotated[
        Path,
        typer.Argument(
            metavar="CHANNEL.npz",
            help="Arrays H [users, users, carriers], noise and mask [users, carriers], power [users].",
        ),
    ],
    schedule: Annotated[str, typer.Option(help="sequential, simultaneous or async.")] = "sequential",
    max_delay: Annotated[int, typer.Option(help="Oldest news that an async update sees, in ticks.")] = 5,
    p_update: Annotated[float, typer.Option(help="Chance of an async update in a tick.")] = 0.5,
    step: Annotated[float, typer.Option(help="Part of the way to the best response, in (0, 1].")] = 1.0,
    tol: Annotated[float, typer.Option(help="Greatest move that is left, in units of power.")] = 1e-9,
    max_iter: Annotated[int, typer.Option(help="Sweeps, rounds or ticks at most.")] = 10_000,
    seed: Annotated[int, typer.Option(min=0, help="Seed of an async schedule.")] = 0,
    allow_silent: Annotated[
        bool, typer.Option("--allow-silent", help="Users without a gain send nothing.")
    ] = False,
    report: Annotated[
        Path | None, typer.Option(help="Write the allocation and its rates there, as JSON.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Share power (or any divisible budget) over interfering channels until nobody wants to move.

    Says beforehand which schedules are certain to converge, and afterwards how far off the answer can be.

    Example: sharewell waterfill channel.npz --schedule async --max-delay 5 --report out.json
    """
    from .interference import InterferenceGame
    from .schedules import schedule_of

    game = InterferenceGame.load(channel, allow_silent=allow_silent)
    chosen = schedule_of(schedule, max_delay=max_delay, p_update=p_update, seed=seed)
    certificate = game.certificate()
    result = game.solve(chosen, tol, max_iter, step)
    rates = game.rates(result.p)
    summary: dict[str, Any] = {
        "schedule": schedule,
        "converged": result.converged,
        "cause": result.cause,
        "iterations": result.iterations,
        "residual": result.residual,
        "error_bound": result.error_bound,
        "rho": certificate.rho,
        "unique": certificate.unique,
        "guaranteed": list(certificate.guaranteed),
        "sum_rate": float(rates.sum()),
    }
    whole = {**summary, "rates": rates.tolist(), "p": result.p.tolist()}
    if report is not None:
        report.write_text(json.dumps(whole, indent=2) + "\n", encoding="utf-8")
    if as_json:
        typer.echo(json.dumps(whole))
    else:
        promise = ", ".join(certificate.guaranteed) or "no schedule"
        typer.echo(f"certificate: rho {certificate.rho:.4g}, certain to converge: {promise}")
        ending = "converged" if result.converged else f"did not converge ({result.cause})"
        typer.echo(
            f"{schedule}: {ending} after {result.iterations} iterations, residual {result.residual:.3g}"
        )
        if result.error_bound is not None:
            typer.echo(f"distance to the equilibrium: at most {result.error_bound:.3g}")
        typer.echo(f"sum rate: {rates.sum():.4f} bit a channel use over {game.users} users")
    if not result.converged:
        raise typer.Exit(1)


auction_app = typer.Typer(help="Place requests on unequal resources.", no_args_is_help=True)
grank_app = typer.Typer(help="Rank by the clicks of similar peers, without a server.", no_args_is_help=True)


def _mechanisms(seed: int) -> dict[str, Any]:
    from .baselines import BestFit, FirstPriceAuction, GreedyAuction, RandomAuction
    from .mohaf import Mohaf

    return {
        "mohaf": Mohaf(),
        "greedy": GreedyAuction(),
        "first-price": FirstPriceAuction(),
        "random": RandomAuction(seed),
        "best-fit": BestFit(),
    }


def _figures_table(figures: dict[str, dict[str, float]], title: str) -> None:
    from rich.console import Console
    from rich.table import Table

    # Mechanisms side by side: a dozen figures would not fit on a line.
    table = Table("figure", *figures, title=title, title_justify="left")
    for name in next(iter(figures.values())):
        table.add_row(name.replace("_", " "), *(f"{row[name]:.3f}" for row in figures.values()))
    Console().print(table)


@auction_app.command("run")
def auction_run(
    trace: Annotated[
        Path | None, typer.Option(help="task_events of Google's 2011 cluster data (.csv or .csv.gz).")
    ] = None,
    machines: Annotated[Path | None, typer.Option(help="machine_events of the same trace.")] = None,
    requests: Annotated[Path | None, typer.Option(help="CSV of requests, with --resources.")] = None,
    resources: Annotated[Path | None, typer.Option(help="CSV of resources.")] = None,
    size: Annotated[int, typer.Option(help="Requests of a generated problem, when no file is given.")] = 3553,
    tightness: Annotated[float, typer.Option(help="Its capacity over its demand.")] = 0.28,
    payment: Annotated[str, typer.Option(help="posted, first or critical.")] = "posted",
    seed: Annotated[int, typer.Option(min=0, help="Seed of what is drawn.")] = 0,
    out: Annotated[Path | None, typer.Option(help="Write who got what, as CSV.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Run the auction once, with its distance from the optimum and the reason of each request left out.

    Example: sharewell auction run --trace task_events.csv.gz --machines machine_events.csv.gz
    """
    from .bound import LPBound
    from .core import Problem, explain, metrics
    from .mohaf import Mohaf, MohafConfig
    from .traces import read_tables, write_allocation

    if (requests is None) != (resources is None):
        raise typer.BadParameter("give both or neither", param_hint="--requests, --resources")
    if trace is not None and requests is not None:
        raise typer.BadParameter("give a trace or tables, not both", param_hint="--trace")
    if machines is not None and trace is None:
        raise typer.BadParameter("needs --trace", param_hint="--machines")
    if trace is not None:
        problem = Problem.from_google_trace(trace, machines, seed=seed)
    elif requests is not None and resources is not None:
        problem = read_tables(requests, resources)
    else:
        problem = Problem.synthetic(size, max(1, size // 4), tightness, seed)
    config = MohafConfig(payment=payment, seed=seed)  # pyright: ignore[reportArgumentType]
    allocation = Mohaf(config).solve(problem)
    figures = metrics(problem, allocation, config.objective)
    lowest = 1 - config.price_eta * config.price_target
    bound = LPBound(config.objective, price_factor=max(lowest, config.price_low)).solve(problem, allocation)
    figures["bound"] = bound.upper
    figures["of_bound"] = figures["welfare"] / bound.upper if bound.upper > 0 else 1.0
    reasons = explain(problem, allocation)
    if out is not None:
        write_allocation(out, problem, allocation, reasons)
    if as_json:
        whole = {
            "metrics": figures,
            "stats": dict(allocation.stats),
            "assign": allocation.assign.tolist(),
            "payment": allocation.payment.tolist(),
            "reasons": {str(i): why for i, why in reasons.items()},
        }
        typer.echo(json.dumps(whole))
        return
    _figures_table({"mohaf": figures}, f"{len(problem.budget)} requests, {len(problem.cost)} resources")
    counts: dict[str, int] = {}
    for why in reasons.values():
        counts[why] = counts.get(why, 0) + 1
    for why, count in sorted(counts.items(), key=lambda pair: -pair[1]):
        typer.echo(f"{count} not placed: {why}")


@auction_app.command("bench")
def auction_bench(
    seeds: Annotated[int, typer.Option(min=1, help="How many instances.")] = 5,
    size: Annotated[int, typer.Option(min=8, help="Requests of each.")] = 3553,
    tightness: Annotated[float, typer.Option(help="Capacity over demand.")] = 0.28,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Compare the auction with its baselines on generated instances (means over seeds).

    Example: sharewell auction bench --seeds 5
    """
    from .core import Objective, Problem, best_utilities, metrics

    sums: dict[str, dict[str, float]] = {}
    for seed in range(seeds):
        problem = Problem.synthetic(size, max(1, size // 4), tightness, seed)
        best = best_utilities(problem, Objective())
        for name, mechanism in _mechanisms(seed).items():
            row = metrics(problem, mechanism.solve(problem), best=best)
            into = sums.setdefault(name, dict.fromkeys(row, 0.0))
            for key, value in row.items():
                into[key] += value / seeds
    if as_json:
        typer.echo(json.dumps(sums))
        return
    _figures_table(sums, f"{size} requests, {max(1, size // 4)} resources, {seeds} seeds")


Log = Annotated[Path, typer.Option(help="The click log.")]
Library = Annotated[Path, typer.Option(help="The index of your documents.")]


def _library(path: Path) -> dict[str, Any]:
    from .ranking import Item

    if not path.is_file():
        return {}
    try:
        whole = json.loads(path.read_text(encoding="utf-8"))
        return {i: Item(item["title"], tuple(item["tags"])) for i, item in whole["items"].items()}
    except (ValueError, KeyError, TypeError):
        raise ValueError(f"{path.name} is no index; make one with: sharewell grank index FOLDER") from None


@grank_app.command("index")
def grank_index(
    folder: Annotated[Path, typer.Argument(help="Text files; their names and words become tags.")],
    library: Library = Path("library.json"),
    tags: Annotated[int, typer.Option(min=1, help="Most frequent words kept of each file.")] = 12,
) -> None:
    """Index a folder of text files, so that they can be found and clicks on them be trusted.

    Example: sharewell grank index ./docs --library library.json
    """
    import re
    from collections import Counter

    if not folder.is_dir():
        raise typer.BadParameter(f"{folder} is no folder", param_hint="FOLDER")
    items: dict[str, Any] = {}
    for path in sorted(p for p in folder.rglob("*") if p.suffix in (".md", ".txt", ".rst", ".html")):
        words = Counter(re.findall(r"[a-z]{4,}", path.read_text(encoding="utf-8", errors="replace").lower()))
        own = re.findall(r"[a-z0-9]+", path.stem.lower())
        best = [w for w, _ in sorted(words.items(), key=lambda p: (-p[1], p[0]))[:tags]]
        items[path.relative_to(folder).as_posix()] = {
            "title": path.stem.replace("-", " "),
            "tags": sorted({*own, *best}),
        }
    if not items:
        raise typer.BadParameter(f"{folder} holds no .md, .txt, .rst or .html file", param_hint="FOLDER")
    library.write_text(json.dumps({"items": items}, indent=1) + "\n", encoding="utf-8")
    typer.echo(f"{len(items)} documents in {library}")


@grank_app.command("query")
def grank_query(
    text: Annotated[str, typer.Argument(metavar="QUERY", help="One term.")],
    log: Log = Path("clicks.db"),
    library: Library = Path("library.json"),
    k: Annotated[int, typer.Option("--results", "-k", min=1, help="How many results.")] = 10,
    click: Annotated[str | None, typer.Option(help="Log that this item was taken.")] = None,
    private: Annotated[bool, typer.Option("--private", help="Never share your own clicks.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Rank what is known for a term, and say whose clicks are behind it.

    Example: sharewell grank query jazz --click blue-train.md
    """
    from .grank import ClickLog, GRank

    clicks = ClickLog(log, share=not private)
    rank = GRank(clicks, _library(library))
    results = rank.rank(text, k=k)
    if click is not None:
        rank.click(text, click)
    if as_json:
        whole = [
            {"item": r.item, "score": r.score, "why": [[a.hex()[:16], c, s] for a, c, s in r.why]}
            for r in results
        ]
        typer.echo(json.dumps(whole))
    else:
        for place, r in enumerate(results, start=1):
            behind = ", ".join(f"{a.hex()[:8]} x{c:g} ({s:.2f})" for a, c, s in r.why[:3]) or "text match"
            typer.echo(f"{place:2}. {r.item}  {r.score:.3f}  {behind}")
        if not results:
            typer.echo("nothing is known yet")
    clicks.close()


@grank_app.command("sync")
def grank_sync(
    peer: Annotated[
        list[str] | None, typer.Option(help="HOST:PORT to pull from; may be given again.")
    ] = None,
    serve: Annotated[str | None, typer.Option(help="HOST:PORT to listen on, until interrupted.")] = None,
    log: Log = Path("clicks.db"),
    private: Annotated[bool, typer.Option("--private", help="Never share your own clicks.")] = False,
) -> None:
    """Pull what peers have logged, serve what you have, or both.

    Example: sharewell grank sync --peer 127.0.0.1:7001
    """
    import asyncio

    from .grank import ClickLog
    from .peers import Peer
    from .wire import GossipFormatError

    if not peer and serve is None:
        raise typer.BadParameter("name a --peer to pull from, or an address to --serve")
    addresses = [_address(p, "--peer") for p in peer or []]
    listen = _address(serve, "--serve") if serve else None
    clicks = ClickLog(log, share=not private)

    async def work() -> int:
        own, failed = Peer(clicks.gossip), 0
        if listen is not None:
            host, port = await own.serve(*listen)
            typer.echo(f"serving {len(clicks.gossip)} rows on {host}:{port}")
        for host, port in addresses:
            try:
                total = 0
                while added := len((await own.pull(host, port)).added):
                    total += added
                typer.echo(f"{host}:{port}: {total} new rows")
            except (OSError, TimeoutError, GossipFormatError) as error:
                typer.echo(f"error: {host}:{port}: {error or 'no answer in time'}", err=True)
                failed += 1
        if listen is not None:
            await asyncio.get_running_loop().create_future()  # until interrupted
        return failed

    failed = asyncio.run(work())
    clicks.close()
    if failed:
        raise typer.Exit(1)


def _address(text: str, option: str) -> tuple[str, int]:
    host, _, port = text.rpartition(":")
    if not host or not port.isdigit() or int(port) > 65535:
        raise typer.BadParameter(f"must be HOST:PORT, got {text!r}", param_hint=option)
    return host, int(port)


@grank_app.command("simulate")
def grank_simulate(
    nodes: Annotated[int, typer.Option(min=2, help="Nodes of the network.")] = 100,
    steps: Annotated[int, typer.Option(min=1, help="Searches in all.")] = 8000,
    attack: Annotated[str | None, typer.Option(help="targeted, inflation, epic or push.")] = None,
    isolation: Annotated[float, typer.Option(min=0, help="F: what everybody counts.")] = 0.0,
    seed: Annotated[int, typer.Option(min=0, help="Seed.")] = 0,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Simulate a network of searching and gossiping nodes, with or without an attack.

    Example: sharewell grank simulate --nodes 100 --steps 8000 --attack targeted
    """
    from dataclasses import asdict

    from .rank_simulation import SimConfig, simulate

    at = tuple(sorted({max(1, steps * q // 4) for q in (1, 2, 3, 4)}))
    result = simulate(
        SimConfig(nodes=nodes, steps=steps, isolation=isolation, measure_at=at),
        attack,  # pyright: ignore[reportArgumentType]
        seed,
    )
    if as_json:
        typer.echo(json.dumps([asdict(frame) for frame in result.frames]))
        return
    for frame in result.frames:
        typer.echo(
            f"step {frame.step}: first result agrees {frame.top1:.3f}, nDCG@10 {frame.ndcg:.4f}, "
            f"distance an item {frame.distance:.3f}"
        )
