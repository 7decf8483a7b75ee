"""``sharewell serve`` and ``sharewell keys``."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from .api.keys import StateStore

keys_app = typer.Typer(help="API keys of the server: add, list, revoke.", no_args_is_help=True)
StateOption = Annotated[
    Path | None, typer.Option("--state", help="SQLite file of keys, usage and stored responses.")
]

JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON.")]


def state_path(given: Path | None) -> Path:
    """The state file: as given, or ``$SHAREWELL_STATE``, or in the user's data folder."""
    from platformdirs import user_data_path

    return given or Path(os.environ.get("SHAREWELL_STATE") or user_data_path("sharewell") / "server.sqlite3")


def _bytes(text: str, option: str) -> int:
    units = {"k": 1 << 10, "m": 1 << 20, "g": 1 << 30}
    lowered = text.lower().removesuffix("ib").removesuffix("b")
    try:
        scale = units.get(lowered[-1:], 1)
        return int(float(lowered[:-1] if lowered[-1:] in units else lowered) * scale)
    except ValueError:
        raise typer.BadParameter(
            f"must be a size such as 512M or 2G, got {text!r}", param_hint=option
        ) from None


def serve(
    model: Annotated[
        str, typer.Argument(help="Model: a name (smollm2) or the path of a Hugging Face folder.")
    ] = "smollm2",
    host: Annotated[
        str, typer.Option(help="Address to listen on. Beyond loopback an API key must exist.")
    ] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="Port; 0 picks a free one.")] = 8000,
    dtype: Annotated[
        str, typer.Option(help="auto, float32, bfloat16, int8 or int4. auto: the fastest that keeps quality.")
    ] = "auto",
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
    runner: Annotated[str, typer.Option(help="auto, fused or stock (the transformers modules).")] = "auto",
    threads: Annotated[
        int | None, typer.Option(min=1, help="Cores for the engine; default: all that this process may use.")
    ] = None,
    kv_cache: Annotated[str | None, typer.Option(help="Memory for keys and values, such as 2G.")] = None,
    max_model_len: Annotated[
        int | None, typer.Option(min=2, help="Shorten the model's context, in tokens.")
    ] = None,
    max_seqs: Annotated[int, typer.Option(min=1, help="Most sequences that run at once.")] = 64,
    max_batch_tokens: Annotated[
        int, typer.Option(min=1, help="Most tokens of one step; long prompts come in chunks.")
    ] = 256,
    max_waiting: Annotated[
        int, typer.Option(min=0, help="Most requests that wait; further ones get 429.")
    ] = 1024,
    prefix_sharing: Annotated[
        bool, typer.Option(help="Share computed prompt beginnings between requests.")
    ] = True,
    share_scope: Annotated[
        str, typer.Option(help="Who shares them: key (requests of one API key) or all.")
    ] = "key",
    relay: Annotated[
        str, typer.Option(help="auto: prompts reuse earlier answers that they quote, approximately; off.")
    ] = "off",
    relay_sample: Annotated[
        float,
        typer.Option(
            min=0, max=1, help="Share of relayed requests that are computed in full too, when idle."
        ),
    ] = 0.05,
    relay_fallback_kl: Annotated[
        float | None,
        typer.Option(help="Measured divergence in nats above which nothing is relayed any more."),
    ] = None,
    cache: Annotated[
        str, typer.Option(help="Answer cache: exact (equal requests), semantic (other words too) or off.")
    ] = "exact",
    cache_file: Annotated[
        Path | None, typer.Option(help="SQLite file of cached answers; servers may share it.")
    ] = None,
    cache_sampled: Annotated[
        bool, typer.Option(help="Also answer requests that ask for a fresh sample from the cache.")
    ] = False,
    cache_entries: Annotated[int, typer.Option(min=1, help="Most answers in the cache.")] = 100_000,
    cache_recheck: Annotated[
        float,
        typer.Option(min=0, max=1, help="Share of answers to other words that are computed too, to compare."),
    ] = 0.01,
    cache_queue: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="Requests in the engine above which the cache accepts less alike; default: --max-seqs.",
        ),
    ] = None,
    lora: Annotated[
        list[str] | None, typer.Option(help="NAME=FOLDER of a peft LoRA adapter; repeat for several.")
    ] = None,
    max_adapters: Annotated[int, typer.Option(min=0, help="Most adapters in the engine at once.")] = 8,
    served_model_name: Annotated[
        list[str] | None, typer.Option(help="Name under which the model answers; repeat for aliases.")
    ] = None,
    embedding_model: Annotated[
        str, typer.Option(help="minilm, or a sentence-transformers folder.")
    ] = "minilm",
    cors_origin: Annotated[
        list[str] | None, typer.Option(help="Origin that browsers may call from; repeat; * for all.")
    ] = None,
    deterministic: Annotated[
        bool, typer.Option(help="One kernel whatever the batch (the fused runner always is).")
    ] = False,
    max_body: Annotated[str, typer.Option(help="Largest request body, such as 16M.")] = "16M",
    max_connections: Annotated[
        int, typer.Option(min=1, help="Most connections; further ones get 503.")
    ] = 1000,
    body_timeout: Annotated[
        float, typer.Option(help="Seconds that a request's head, and its body, may take to arrive.")
    ] = 30.0,
    drain_timeout: Annotated[
        float, typer.Option(help="Seconds that a stop waits for what is under way.")
    ] = 30.0,
    recover_timeout: Annotated[
        float, typer.Option(help="Seconds that requests wait for an engine that died to be back.")
    ] = 60.0,
    state: StateOption = None,
) -> None:
    """Serve a model to OpenAI clients, with a page at /.

    The first start downloads the default model (95 MB) and compiles the kernels; later starts take seconds.

    Examples:

      sharewell serve

      sharewell serve ./my-qwen-folder --dtype bfloat16 --port 9000

      sharewell serve --lora legal=./adapters/legal   (model name: smollm2:legal)

    Then, with any OpenAI client: base_url="http://127.0.0.1:8000/v1", model="smollm2".
    """
    from ..models import resolve_model
    from .api import ServerConfig, bind, create_app, run
    from .core import EngineConfig, EngineFailed

    level = os.environ.get("SHAREWELL_LOG", "WARNING").upper()
    logging.basicConfig(level=level, format="%(levelname)s %(name)s: %(message)s")
    adapters = {}
    for entry in lora or []:
        name, equals, path = entry.partition("=")
        if not name or not equals or not Path(path).is_dir():
            raise typer.BadParameter(
                f"must be NAME=FOLDER with a folder that exists, got {entry!r}", param_hint="--lora"
            )
        adapters[name] = path
    engine = EngineConfig(
        model=model,
        dtype=dtype,  # pyright: ignore[reportArgumentType]
        device=device,  # pyright: ignore[reportArgumentType]
        runner=runner,  # pyright: ignore[reportArgumentType]
        threads=threads,
        max_model_len=max_model_len,
        kv_cache_bytes=_bytes(kv_cache, "--kv-cache") if kv_cache else None,
        max_seqs=max_seqs,
        max_waiting=max_waiting,
        max_batch_tokens=max(max_batch_tokens, max_seqs),
        prefix_sharing=prefix_sharing,
        adapters=adapters,
        max_adapters=max_adapters,
        deterministic=deterministic,
        relay_sample=relay_sample,
        relay_fallback_kl=relay_fallback_kl,
    )
    config = ServerConfig(
        engine=engine,
        host=host,
        port=port,
        served_names=tuple(served_model_name or ()),
        share_scope=share_scope,
        relay=relay,
        embedding_model=embedding_model,
        cors_origins=tuple(cors_origin or ()),
        state_path=state_path(state),
        cache=cache,
        cache_path=None if cache == "off" else cache_file or state_path(state).with_name("answers.sqlite3"),
        cache_sampled=cache_sampled,
        cache_entries=cache_entries,
        cache_recheck=cache_recheck,
        cache_queue=cache_queue,
        audit_token=os.environ.get("SHAREWELL_AUDIT_TOKEN") or None,
        max_body_bytes=_bytes(max_body, "--max-body"),
        max_connections=max_connections,
        body_timeout_s=body_timeout,
        drain_timeout_s=drain_timeout,
        recover_timeout_s=recover_timeout,
    )
    listener = bind(config)  # before anything heavy: a port that is taken is told at once
    with listener:
        resolve_model(model)
        resolve_model(embedding_model)
        app = create_app(config)
        try:
            run(config, app, listener, typer.echo)
        except EngineFailed as error:
            typer.echo(f"error: {error}", err=True)
            raise typer.Exit(1) from None


@contextmanager
def _store(state: Path | None) -> Iterator[StateStore]:
    from ..simulation import WallClock
    from .api.keys import StateStore

    store = StateStore(state_path(state), WallClock())
    try:
        yield store
    finally:
        store.close()


@keys_app.command("add")
def add_key(
    name: Annotated[str, typer.Argument(help="Name of the key, for the list and the ledger.")],
    requests_per_min: Annotated[int | None, typer.Option(help="Most requests a minute.")] = None,
    tokens_per_min: Annotated[int | None, typer.Option(help="Most tokens a minute.")] = None,
    total_tokens: Annotated[int | None, typer.Option(help="Most tokens in all.")] = None,
    as_json: JsonOption = False,
    state: StateOption = None,
) -> None:
    """Create a key and print its secret, this once. From the first key on every request must carry one.

    Example: sharewell keys add alice --tokens-per-min 20000
    """
    with _store(state) as store:
        secret = store.add_key(name, requests_per_min, tokens_per_min, total_tokens)
    typer.echo(json.dumps({"name": name, "key": secret}) if as_json else secret)


@keys_app.command("list")
def list_keys(as_json: JsonOption = False, state: StateOption = None) -> None:
    """Show keys with their budgets and usage.

    Example: sharewell keys list --json
    """
    with _store(state) as store:
        rows = store.list_keys()
    if as_json:
        typer.echo(json.dumps(rows, indent=2))
        return
    from rich.console import Console
    from rich.table import Table

    table = Table("name", "begins with", "requests/min", "tokens/min", "total", "requests", "tokens", "state")
    for row in rows:
        budgets = [str(row[f] or "-") for f in ("requests_per_min", "tokens_per_min", "total_tokens")]
        used = [str(row["requests"]), str(row["tokens"])]
        status = "revoked" if row["revoked"] else "active"
        table.add_row(str(row["name"]), str(row["prefix"]), *budgets, *used, status)
    Console().print(table)


@keys_app.command("revoke")
def revoke_key(
    name: Annotated[str, typer.Argument(help="Name of the key.")], state: StateOption = None
) -> None:
    """End a key; requests that carry it get 401 from then on.

    Example: sharewell keys revoke alice
    """
    with _store(state) as store:
        store.revoke_key(name)
    typer.echo(f"revoked {name}")
