"""``sharewell qtc`` (text compression) and ``sharewell mec`` (couplings and hidden messages)."""

from __future__ import annotations

import dataclasses
import json
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    import numpy as np

SUFFIX = ".qtc"
_CHUNK = 1 << 20
_TILINGS = "auto, fibonacci, multi, period5, none or all"

qtc_app = typer.Typer(help="Compress text without loss, and see what the tiling buys.", no_args_is_help=True)
mec_app = typer.Typer(help="Couple distributions; hide a message in what a model says.", no_args_is_help=True)
stego_app = typer.Typer(
    help="Hide a message in the text of a language model.\n\n"
    "Example: sharewell mec stego encode --model my-model --message c0ffee --rate 0.5 --out text.json",
    no_args_is_help=True,
)
mec_app.add_typer(stego_app, name="stego")

Files = Annotated[list[Path], typer.Argument(help="Files; - is standard input.")]
Tiling = Annotated[str, typer.Option("-T", "--tiling", help=f"Where phrases may be: {_TILINGS}.")]
Level = Annotated[int, typer.Option("-l", "--level", help="1 (fast) to 9 (small).")]
BlockSize = Annotated[int, typer.Option("--block-size", help="Bytes in a block; blocks decode on their own.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON.")]
MaxOutput = Annotated[int | None, typer.Option("--max-output", help="Refuse to make more bytes than this.")]
Force = Annotated[bool, typer.Option("-f", "--force", help="Overwrite files that exist.")]


def _read(path: Path) -> bytes:
    return sys.stdin.buffer.read() if str(path) == "-" else path.read_bytes()


def _fail(error: Exception | str) -> typer.Exit:
    typer.echo(f"error: {error}", err=True)
    return typer.Exit(1)


def _check_target(target: Path, force: bool) -> None:
    if target.exists() and not force:
        raise typer.BadParameter(f"{target} exists; use --force to overwrite it", param_hint="FILE")


@qtc_app.command("c")
def compress_files(
    files: Files,
    tiling: Tiling = "auto",
    level: Level = 6,
    block_size: BlockSize = 1 << 25,
    force: Force = False,
    as_json: AsJson = False,
) -> None:
    """Compress each FILE to FILE.qtc, or standard input to standard output.

    Example: sharewell qtc c notes.txt
    """
    from .quasicryth import QuasicrythCompressor

    rows = []
    for path in files:
        compressor = QuasicrythCompressor(tiling=tiling, level=level, block_size=block_size)
        if str(path) == "-":
            while chunk := sys.stdin.buffer.read(_CHUNK):
                sys.stdout.buffer.write(compressor.compress(chunk))
            sys.stdout.buffer.write(compressor.flush())
            sys.stdout.buffer.flush()
            continue
        target = path.with_name(path.name + SUFFIX)
        _check_target(target, force)
        beside = target.with_name(f".{target.name}.{os.getpid()}")
        size = 0
        try:
            with path.open("rb") as source, beside.open("wb") as out:
                while chunk := source.read(_CHUNK):
                    size += out.write(compressor.compress(chunk))
                size += out.write(compressor.flush())
                out.flush()
                os.fsync(out.fileno())
            beside.replace(target)
        finally:
            beside.unlink(missing_ok=True)
        before = sum(s.data_bytes for s in compressor.stats)
        blocks = [dataclasses.asdict(s) for s in compressor.stats]
        rows.append({"file": str(target), "bytes": before, "compressed_bytes": size, "blocks": blocks})
        if not as_json:
            modes = ", ".join(sorted({s.mode for s in compressor.stats})) or "empty"
            share = f"{100 * size / before:.1f} %" if before else "-"
            typer.echo(f"{target}: {before:,} -> {size:,} bytes ({share}; {modes})")
    if as_json and rows:
        typer.echo(json.dumps(rows, indent=2))


@qtc_app.command("d")
def decompress_files(files: Files, max_output: MaxOutput = None, force: Force = False) -> None:
    """Decompress each FILE.qtc to FILE, or standard input to standard output.

    Example: sharewell qtc d notes.txt.qtc --max-output 100000000
    """
    from .files import QuasicrythFile
    from .quasicryth import QuasicrythError

    for path in files:
        try:
            if str(path) == "-":
                source = QuasicrythFile(sys.stdin.buffer, "rb", max_output=max_output)
                while chunk := source.read1():
                    sys.stdout.buffer.write(chunk)
                sys.stdout.buffer.flush()
                continue
            if path.suffix != SUFFIX:
                raise typer.BadParameter(f"must end in {SUFFIX}, got {path.name!r}", param_hint="FILE")
            target = path.with_suffix("")
            _check_target(target, force)
            beside = target.with_name(f".{target.name}.{os.getpid()}")
            try:
                with QuasicrythFile(path, "rb", max_output=max_output) as source, beside.open("wb") as out:
                    while chunk := source.read1():
                        out.write(chunk)
                    out.flush()
                    os.fsync(out.fileno())
                beside.replace(target)
            finally:
                beside.unlink(missing_ok=True)
            typer.echo(str(target))
        except QuasicrythError as error:
            raise _fail(f"{path}: {error}") from None


@qtc_app.command("t")
def test_files(files: Files, max_output: MaxOutput = None) -> None:
    """Check that each FILE is whole; exit code 1 if one is not.

    Example: sharewell qtc t notes.txt.qtc
    """
    from .files import QuasicrythFile
    from .quasicryth import QuasicrythError

    for path in files:
        try:
            given = sys.stdin.buffer if str(path) == "-" else path
            with QuasicrythFile(given, "rb", max_output=max_output) as source:
                size = 0
                while chunk := source.read1():
                    size += len(chunk)
        except QuasicrythError as error:
            raise _fail(f"{path}: {error}") from None
        typer.echo(f"{path}: whole, {size:,} bytes")


def _peers() -> dict[str, Any]:
    import bz2
    import lzma

    peers: dict[str, Any] = {
        "xz -9e": lambda d: lzma.compress(d, preset=9 | lzma.PRESET_EXTREME),
        "bzip2 -9": lambda d: bz2.compress(d, 9),
    }
    try:
        import zstandard

        peers["zstd -19"] = zstandard.ZstdCompressor(level=19).compress
    except ImportError:
        pass
    return peers


@qtc_app.command("bench")
def bench_files(files: Files, tiling: Tiling = "auto", level: Level = 6, as_json: AsJson = False) -> None:
    """Sizes beside xz, bzip2 and, where installed, zstd, on your own files; each is decompressed and
    compared.

    Example: sharewell qtc bench notes.txt --json
    """
    from .quasicryth import compress, decompress

    rows = []
    for path in files:
        data = _read(path)
        packed = compress(data, tiling=tiling, level=level)
        if decompress(packed) != data:
            raise _fail(f"{path}: did not come back as it was")
        sizes = {"quasicryth": len(packed), **{name: len(peer(data)) for name, peer in _peers().items()}}
        rows.append({"file": str(path), "bytes": len(data), "compressed_bytes": sizes})
    if as_json:
        typer.echo(json.dumps(rows, indent=2))
        return
    from rich.console import Console
    from rich.table import Table

    table = Table("file", "bytes", *rows[0]["compressed_bytes"])
    for row in rows:
        table.add_row(row["file"], f"{row['bytes']:,}", *(f"{n:,}" for n in row["compressed_bytes"].values()))
    Console().print(table)


@qtc_app.command("ab")
def compare_tilings(
    files: Files,
    arms: Annotated[
        str, typer.Option(help="Layouts to compare: name[:number of tilings], comma-separated.")
    ] = "fib:12,p5:1,fib:8,p5:8,all,none",
    own_book: Annotated[
        bool, typer.Option("--own-book", help="Let each arm keep the dictionary that suits it.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """What the tiling buys: the same text and coder under several tilings.

    fib:12 against p5:1 is the paper's comparison, fib:8 against p5:8 the one at equal budget, all the
    control that looks everywhere, none the one without phrases.

    Example: sharewell qtc ab notes.txt --arms fib:8,p5:8,all
    """
    from .comparison import ab_test
    from .tiling import Arm

    wanted = [Arm.parse(name) for name in arms.split(",")]
    rows = []
    for path in files:
        for row in ab_test(_read(path), wanted, same_book=not own_book):
            rows.append({"file": str(path), **dataclasses.asdict(row)})
    if as_json:
        typer.echo(json.dumps(rows, indent=2))
        return
    from rich.console import Console
    from rich.table import Table

    table = Table(
        "file", "arm", "bytes", "text", "phrases", "words", "events", "phrases of 13 words and more"
    )
    for row in rows:
        table.add_row(*(f"{v:,}" if isinstance(v, int) else str(v) for v in row.values()))
    Console().print(table)


def _distribution_file(path: Path) -> np.ndarray:
    from .info import distribution

    try:
        return distribution(json.loads(path.read_text(encoding="utf-8")), str(path))
    except (TypeError, json.JSONDecodeError, UnicodeDecodeError):
        raise typer.BadParameter(f"{path} must hold a JSON list of numbers", param_hint="FILE") from None


@mec_app.command("couple")
def couple(
    p: Annotated[Path, typer.Argument(help="JSON list: the distribution of X.")],
    q: Annotated[Path, typer.Argument(help="JSON list: the distribution of Y.")],
    rate: Annotated[
        float | None, typer.Option(help="Bits that may pass between them; none: no limit.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """The joint distribution that carries most about X into Y, both marginals kept exactly.

    Example: sharewell mec couple p.json q.json --rate 2.0
    """
    from .info import entropy
    from .mecb import MECB

    p_x, p_y = _distribution_file(p), _distribution_file(q)
    fitted = MECB(entropy(p_x) if rate is None else rate).fit(p_x, p_y)
    found = {
        "rate_bits": fitted.encoder_.rate,
        "mutual_information_bits": fitted.mutual_information_,
        "joint": fitted.joint_.tolist(),
    }
    if as_json:
        typer.echo(json.dumps(found))
        return
    typer.echo(
        f"H(X) {entropy(p_x):.4f} bits, H(T) {found['rate_bits']:.4f}, "
        f"I(X;Y) {found['mutual_information_bits']:.4f}"
    )
    for row in fitted.joint_:
        typer.echo("  ".join(f"{x:.6f}" for x in row))


def _carrier(model: Path, rate: float) -> Any:
    """A carrier over a model folder of transformers."""
    if not (model / "config.json").is_file():
        raise typer.BadParameter(f"{model} is no model folder: it has no config.json", param_hint="--model")
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from .carrier import LMCarrier, TransformersCarrier

    loaded = AutoModelForCausalLM.from_pretrained(model, local_files_only=True, dtype="float32")
    return LMCarrier(
        TransformersCarrier(loaded), AutoTokenizer.from_pretrained(model, local_files_only=True), rate=rate
    )


@stego_app.command("encode")
def stego_encode(
    model: Annotated[Path, typer.Option(help="Folder of a causal language model of transformers.")],
    message: Annotated[str, typer.Option(help="The message, in hexadecimal digits.")],
    prompt: Annotated[
        str, typer.Option(help="What the text goes on from; the receiver needs it too.")
    ] = "Today",
    rate: Annotated[
        float, typer.Option(help="Bits of a token's code, as a share of a block of 8 bits.")
    ] = 1.0,
    seed: Annotated[int, typer.Option(help="Seed of the draws; not needed to decode.")] = 0,
    out: Annotated[Path | None, typer.Option(help="Write the document there; without it, print it.")] = None,
) -> None:
    """Hide MESSAGE in text that the model says with exactly its own probabilities.

    Example: sharewell mec stego encode --model my-model --message c0ffee --rate 0.5 --out text.json
    """
    try:
        payload = bytes.fromhex(message)
    except ValueError:
        raise typer.BadParameter(
            f"must be hexadecimal digits, got {message!r}", param_hint="--message"
        ) from None
    sent = _carrier(model, rate).encode(payload, prompt, seed)
    if out is None:
        typer.echo(sent.to_json())
    else:
        out.write_text(sent.to_json() + "\n", encoding="utf-8")
        typer.echo(f"{out}: {len(sent.tokens)} tokens, {sent.bits_per_token:.2f} bits a token")


@stego_app.command("decode")
def stego_decode(
    model: Annotated[Path, typer.Option(help="Folder of the same model.")],
    file: Annotated[Path, typer.Argument(help="What encode wrote.")],
    prompt: Annotated[str, typer.Option(help="The prompt of the sender.")] = "Today",
    rate: Annotated[float, typer.Option(help="The rate of the sender.")] = 1.0,
) -> None:
    """Print the hidden message in hexadecimal digits.

    Example: sharewell mec stego decode --model my-model text.json --rate 0.5
    """
    from .carrier import StegoText

    sent = StegoText.from_json(file.read_text(encoding="utf-8"))
    typer.echo(_carrier(model, rate).decode(sent, prompt).hex())
