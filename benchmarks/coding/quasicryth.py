"""Quasicryth beside xz, bzip2, zstd, brotli and PPMd on the same bytes, and what its tilings buy.

Sizes are exact and need no repeats; speeds are CPU seconds, with everything compiled beforehand.
"""

from __future__ import annotations

import bz2
import lzma
import os
import time
from collections.abc import Callable
from importlib.util import find_spec
from typing import Any

from benchmarks.coding.corpora import corpora
from sharewell.bench import Progress, Report, Row, environment
from sharewell.bench.report import PEER_NOT_INSTALLED
from sharewell.coding import ab_test, compress, decompress

CARD = {"linux-doc-6.1": 818_135, "dict-gcide": 861_089}  # acceptance at 3 MB, bytes
OFFICIAL_GAIN = {
    "linux-doc-6.1": 24_961,
    "dict-gcide": 42_195,
}  # bytes, fib:12 over p5:1 by the official tool
THREE = 3_000_000
Codec = tuple[Callable[[bytes], bytes], Callable[[bytes], bytes]]


def peers(large: bool) -> dict[str, Codec | None]:
    """Every peer at its best for text; None where it is not installed."""
    found: dict[str, Codec | None] = {
        "xz -9e": (lambda d: lzma.compress(d, preset=9 | lzma.PRESET_EXTREME), lzma.decompress),
        "bzip2 -9": (lambda d: bz2.compress(d, 9), bz2.decompress),
        "zstd -19": None,
        "zstd -3": None,
        "brotli -q 11": None,
        "PPMd7 o16": None,
    }
    if find_spec("zstandard"):
        import zstandard

        def zstd(level: int) -> Codec:
            return (
                zstandard.ZstdCompressor(level=level).compress,
                lambda d: zstandard.ZstdDecompressor().decompress(d),
            )

        found["zstd -19"], found["zstd -3"] = zstd(19), zstd(3)
    if find_spec("brotli"):
        import brotli

        found["brotli -q 11"] = (lambda d: brotli.compress(d, quality=11, lgwin=24), brotli.decompress)
    if find_spec("pyppmd"):
        import pyppmd

        order, memory = 16, (1 << 30) if large else (1 << 28)

        def unpack(d: bytes) -> bytes:
            size = int.from_bytes(d[:8], "little")
            decoder = pyppmd.Ppmd7Decoder(order, memory)
            out = bytearray(decoder.decode(d[8:], size))
            while len(out) < size:
                out += decoder.decode(b"\0", size - len(out))
            return bytes(out)

        def pack(d: bytes) -> bytes:
            encoder = pyppmd.Ppmd7Encoder(order, memory)
            return len(d).to_bytes(8, "little") + encoder.encode(d) + encoder.flush()

        found["PPMd7 o16"] = (pack, unpack)
    return found


def cpu_time(work: Callable[[], Any]) -> tuple[Any, float]:
    start = time.process_time()
    out = work()
    return out, time.process_time() - start


def measure(data: bytes, codec: Codec) -> dict[str, float]:
    """Bytes and MB/s of CPU time of one codec; the round trip is checked."""
    packed, packing = cpu_time(lambda: codec[0](data))
    out, unpacking = cpu_time(lambda: codec[1](packed))
    if out != data:
        raise AssertionError("a codec did not give back what it was given")
    return {
        "bytes": len(packed),
        "compress_MB_per_s": len(data) / packing / 1e6,
        "decompress_MB_per_s": len(data) / unpacking / 1e6,
    }


def run(scale: str, *, seed: int, progress: Progress) -> Report:
    full = scale == "full"
    texts = corpora()
    if not full:
        texts = {"python-stdlib": texts["python-stdlib"][:400_000]}
    warm = texts["python-stdlib"][:60_000]
    first, compiling = cpu_time(lambda: decompress(compress(warm, tiling="all", level=9)))
    if first != warm:
        raise AssertionError("round trip failed")
    rows: list[Row] = []
    table: dict[str, dict[str, dict[str, float]]] = {}
    ours: dict[str, Codec] = {
        "quasicryth": (lambda d: compress(d, level=6), decompress),
        "quasicryth, phrases everywhere": (lambda d: compress(d, tiling="all"), decompress),
        "quasicryth, 12 Fibonacci tilings": (lambda d: compress(d, tiling="fibonacci"), decompress),
    }
    for k, (name, whole) in enumerate(texts.items()):
        data = whole[:THREE]
        label = f"{name}, {len(data) / 1e6:.1f} MB"
        table[label] = {method: measure(data, codec) for method, codec in ours.items()}
        for peer, codec in peers(False).items():
            mine = table[label]["quasicryth"]
            if codec is None:
                rows.append(
                    Row(f"size, {label}", mine["bytes"], None, "B", "lower", peer, note=PEER_NOT_INSTALLED)
                )
                continue
            table[label][peer] = measure(data, codec)
            goal = full and peer == "xz -9e" and name in CARD
            rows.append(
                Row(
                    f"size, {label}",
                    mine["bytes"],
                    table[label][peer]["bytes"],
                    "B",
                    "lower",
                    peer,
                    claim=f"at most {CARD[name]:,} B (3 % under the official tool)" if goal else "",
                    target=table[label][peer]["bytes"] / CARD[name] if goal else None,
                )
            )
        progress("corpora", k + 1, len(texts))
    comparisons: dict[str, list[dict[str, Any]]] = {}
    arms = ["fib:12", "p5:1", "fib:1", "fib:8", "p5:8", "multi", "all", "none"]
    for name, whole in texts.items():
        data = whole[:THREE]
        label = f"{name}, {len(data) / 1e6:.1f} MB"
        found = {row.arm: row for row in ab_test(data, arms)}
        shallow = ab_test(data, ["all"], longest=8)[0]
        comparisons[label] = [vars(row) for row in found.values()] + [
            {**vars(shallow), "arm": "all, to 8 words"}
        ]
        gain = found["period5:1"].total_bytes - found["fibonacci:12"].total_bytes
        official = OFFICIAL_GAIN.get(name) if full else None
        rows += [
            Row(
                f"12 Fibonacci against 1 Period-5 tiling, {label}",
                found["fibonacci:12"].total_bytes,
                found["period5:1"].total_bytes,
                "B",
                "lower",
                "p5:1",
                target=1.0,
                claim="the paper's comparison: Fibonacci smaller",
                note=f"{gain:,} B; official tool {official:,} B" if official else f"{gain:,} B",
            ),
            Row(
                f"8 Fibonacci against 8 Period-5 tilings, {label}",
                found["fibonacci:8"].total_bytes,
                found["period5:8"].total_bytes,
                "B",
                "lower",
                "p5:8",
                claim="equal budget; above 1 Fibonacci wins",
            ),
            Row(
                f"1 Fibonacci against 1 Period-5 tiling, {label}",
                found["fibonacci:1"].total_bytes,
                found["period5:1"].total_bytes,
                "B",
                "lower",
                "p5:1 (equal budget)",
                claim="equal budget; above 1 Fibonacci wins",
            ),
            Row(
                f"36 tilings against looking everywhere, {label}",
                found["multi:36"].total_bytes,
                found["all"].total_bytes,
                "B",
                "lower",
                "all",
                claim="control; above 1 the tilings win",
            ),
            Row(
                f"phrases everywhere against no phrases, {label}",
                found["all"].total_bytes,
                found["none"].total_bytes,
                "B",
                "lower",
                "none",
                claim="control; above 1 phrases win",
            ),
            Row(
                f"phrases of 13 words and more, {label}",
                found["all"].total_bytes,
                shallow.total_bytes,
                "B",
                "lower",
                "phrases to 8 words",
                claim="what the deep levels are worth",
            ),
        ]
        if official:
            rows.append(
                Row(
                    f"gain of 12 Fibonacci over 1 Period-5, {label}",
                    gain,
                    official,
                    "B",
                    "higher",
                    "official tool",
                    claim="same sign, within a factor of 2",
                    target=0.5,
                )
            )
        progress("tilings", len(comparisons), len(texts))
    if full and "linux-doc-6.1" in texts:
        whole = texts["linux-doc-6.1"]
        label = f"linux-doc-6.1, {len(whole) / 1e6:.1f} MB"
        table[label] = {"quasicryth": measure(whole, ours["quasicryth"])}
        mine = table[label]["quasicryth"]["bytes"]
        for peer, codec in peers(True).items():
            if codec is None:
                rows.append(Row(f"size, {label}", mine, None, "B", "lower", peer, note=PEER_NOT_INSTALLED))
                continue
            table[label][peer] = measure(whole, codec)
            needed = 1.0 if peer in ("bzip2 -9", "zstd -19") else None
            rows.append(
                Row(
                    f"size, {label}",
                    mine,
                    table[label][peer]["bytes"],
                    "B",
                    "lower",
                    peer,
                    target=needed,
                    claim="smaller" if needed else "",
                )
            )
            progress("24 MB", len(table[label]), 7)
        if os.environ.get("SHAREWELL_AB_LARGE", "1") != "0":
            large = ab_test(whole, ["fib:12", "p5:1", "fib:8", "p5:8", "all", "none"])
            comparisons[label] = [vars(row) for row in large]
    speeds = next(iter(table.values()))
    for method, direction, goal in (
        ("quasicryth, 12 Fibonacci tilings", "compress_MB_per_s", 0.8),
        ("quasicryth, phrases everywhere", "compress_MB_per_s", 2.0),
        ("quasicryth", "decompress_MB_per_s", 10.0),
    ):
        rows.append(
            Row(
                f"{direction.split('_')[0]}, {method}",
                speeds[method][direction],
                goal,
                "MB/s of CPU",
                "higher",
                "goal",
                claim=f"at least {goal} MB/s",
                target=1.0 if full else None,
            )
        )
    rows.append(
        Row(
            "first call",
            compiling,
            20.0,
            "s of CPU",
            "lower",
            "goal",
            claim="compiling takes at most 20 s",
            note="0 when the compiled code was cached",
        )
    )
    extra = {"table": table, "tilings": comparisons}
    return Report("quasicryth", "full" if full else "smoke", tuple(rows), environment(), seed, extra)
