"""Every decoder and file format of the exact rooms on damaged bytes: its own error, or what was written.

A second for each format here, and in `make nightly` ten minutes for each (SHAREWELL_FUZZ_S says otherwise).
What breaks is printed with the bytes that broke it.
"""

from __future__ import annotations

import gzip
import os
import random
import struct
import time
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from sharewell.allocation import (
    DamagedFile,
    DamagedLog,
    FixedPoint,
    GossipFormatError,
    GossipLog,
    Identity,
    InterferenceGame,
    Problem,
)
from sharewell.allocation.wire import decode, decode_heads, encode_heads, frame
from sharewell.coding import QuasicrythError, compress, decompress
from sharewell.coding.carrier import StegoText
from sharewell.coding.frame import BLOCK_HEADER
from sharewell.kernels.temporal_operands import open_safetensors
from sharewell.kernels.temporal_resume import ResumeError, TileBitmap

SHORT_S = 1.0
NIGHTLY_S = float(os.environ.get("SHAREWELL_FUZZ_S", "600"))


@dataclass
class Format:
    """``samples``: valid bytes. ``read``: what is in them. ``errors``: the only ones that may come of damage.
    ``sealed``: a checksum covers all, so that damage may not change what is read. ``forge``: damages too, and
    makes the checksum right again."""

    samples: list[bytes]
    read: Callable[[bytes], Any]
    errors: tuple[type[Exception], ...]
    sealed: bool = True
    forge: Callable[[bytes, random.Random], bytes] | None = None


def mutate(raw: bytes, rng: random.Random) -> bytes:
    """One to four of: bytes changed, bits flipped, cut at either end, inserted, copied elsewhere, swapped."""
    out = bytearray(raw)
    for _ in range(rng.choice((1, 1, 1, 2, 4))):
        if not out:
            break
        at, other = rng.randrange(len(out)), rng.randrange(len(out))
        kind = rng.randrange(7)
        if kind == 0:
            out[at] = rng.choice((0, 1, 127, 128, 255, rng.randrange(256)))
        elif kind == 1:
            out[at] ^= 1 << rng.randrange(8)
        elif kind == 2:
            del out[at:]
        elif kind == 3:
            del out[: rng.choice((1, at))]
        elif kind == 4:
            out[at:at] = rng.randbytes(rng.randrange(1, 10))
        elif kind == 5:
            piece = out[at : at + rng.randrange(1, 40)]
            out[other : other + len(piece)] = piece
        else:
            out[at], out[other] = out[other], out[at]
    return bytes(out)


def reseal(stream: bytes, rng: random.Random) -> bytes:
    """A stream with a byte of its first payload changed, both checksums made right again."""
    start = 5  # after magic and version
    end = start + BLOCK_HEADER + struct.unpack_from("<cBII", stream, start)[3]
    payload = bytearray(stream[start + BLOCK_HEADER : end])
    payload[rng.randrange(len(payload))] ^= rng.randrange(1, 256)
    head = bytearray(stream[start : start + BLOCK_HEADER - 4])
    struct.pack_into("<I", head, 10, zlib.crc32(payload))
    return stream[:start] + head + struct.pack("<I", zlib.crc32(head)) + payload + stream[end:]


def log_with_rows(n: int) -> GossipLog:
    log = GossipLog(identity=Identity(bytes([n]) * 32))
    for k in range(5):
        log.append((b"row", str(k).encode()))
    return log


def formats(folder: Path) -> dict[str, Format]:
    text = b"".join(
        b"The %d words that are shared are stored once, and once only.\n" % (k % 7) for k in range(40)
    )
    binary = b"\x01\x02\x03\x04" * 300 + random.Random(3).randbytes(40)
    messages = [log_with_rows(1).delta({}), log_with_rows(1).delta({}, compress=False)]

    def through(name: str, load: Callable[[Path], Any]) -> Callable[[bytes], Any]:
        path = folder / name

        def read(raw: bytes) -> Any:
            for old in folder.glob(f"{name}*"):
                old.unlink()
            path.write_bytes(raw)
            return load(path)

        return read

    def read_log(path: Path) -> Any:
        log = GossipLog(path)
        try:
            return sorted(log.rows()), log.author
        finally:
            log.close()

    def read_trace(path: Path) -> Any:
        problem = Problem.from_google_trace(path)
        return problem.demand.tobytes(), problem.capacity.tobytes(), problem.budget.tobytes()

    def read_channel(path: Path) -> Any:
        loaded = InterferenceGame.load(path)
        return loaded.H.tobytes(), loaded.noise.tobytes(), loaded.power.tobytes()

    def read_slice(path: Path) -> Any:
        operand = open_safetensors(path, "w")
        rows, columns = operand.shape
        assert operand.read(0, rows, 0, columns).shape == (rows, columns)

    log = GossipLog(folder / "made.db", Identity(bytes(31) + b"2"))
    log.append((b"mine", b"1"))
    log.merge(messages[0])
    log._db.execute("PRAGMA journal_mode=DELETE")
    log.close()
    H = np.random.default_rng(0).exponential(1, (2, 2, 3))
    game = InterferenceGame(H, np.ones((2, 3)), np.ones(2))
    FixedPoint(game).save(folder / "made.npz")
    np.savez(folder / "channel.npz", H=H, noise=np.ones((2, 3)), power=np.ones(2))
    tasks = "".join(f"{k},,7,{k},,0,user,2,{k % 12},0.{k + 1}25,0.0{k + 1},0.0004,0\n" for k in range(9))
    bitmap = TileBitmap(folder / "made.resume", bytes(range(32)), 37)
    bitmap.mark(5, 0xDEADBEEF)
    bitmap.mark(36, 1)
    note = StegoText((5, 17, 400), "a text", 3, 99, "f" * 16, 0.0, 0.0).to_json().encode()
    header = b'{"w":{"dtype":"F32","shape":[3,4],"data_offsets":[0,48]}}'
    tensors = struct.pack("<Q", len(header)) + header + bytes(48)
    files = {name: (folder / name).read_bytes() for name in ("made.db", "made.npz", "channel.npz")}
    damage = (DamagedFile, DamagedLog, ValueError)
    return {
        "compressed text": Format(
            [compress(text, tiling="all"), compress(text, tiling="none"), compress(binary)],
            lambda raw: decompress(raw, max_output=1 << 20),
            (QuasicrythError,),
            forge=reseal,
        ),
        "gossip message": Format(
            messages,
            decode,
            (GossipFormatError,),
            forge=lambda raw, rng: frame(mutate(raw, rng), rng.randrange(2)),
        ),
        "gossip heads": Format([encode_heads({bytes(32): 7})], decode_heads, (GossipFormatError,)),
        "gossip log file": Format([files["made.db"]], through("log.db", read_log), damage),
        "fixed-point run": Format(
            [files["made.npz"]],
            through("run.npz", lambda path: FixedPoint.load(path, game).p.tobytes()),
            damage,
        ),
        "channel file": Format([files["channel.npz"]], through("channel2.npz", read_channel), damage),
        "gzipped trace": Format([gzip.compress(tasks.encode())], through("tasks.csv.gz", read_trace), damage),
        "resume bitmap": Format(
            [bitmap.to_bytes()],
            through("c.resume", lambda path: TileBitmap.open(path, bytes(range(32)), 37).to_bytes()),
            (ResumeError,),
        ),
        "hidden-text document": Format(
            [note], lambda raw: StegoText.from_json(raw.decode()), (ValueError,), sealed=False
        ),
        "safetensors slice": Format(
            [tensors], through("w.safetensors", read_slice), (ValueError,), sealed=False
        ),
    }


NAMES = (
    "compressed text",
    "gossip message",
    "gossip heads",
    "gossip log file",
    "fixed-point run",
    "channel file",
    "gzipped trace",
    "resume bitmap",
    "hidden-text document",
    "safetensors slice",
)


def fuzz(name: str, folder: Path, seconds: float, seed: int) -> int:
    """Damage samples of a format for ``seconds``; returns how often."""
    kind = formats(folder)[name]
    whole = [kind.read(sample) for sample in kind.samples]
    rng, tried, end = random.Random(seed), 0, time.monotonic() + seconds
    while tried < 20 or time.monotonic() < end:
        at = rng.randrange(len(kind.samples))
        forged = kind.forge is not None and rng.random() < 0.4
        raw = kind.forge(kind.samples[at], rng) if forged and kind.forge else mutate(kind.samples[at], rng)
        tried += 1
        if not raw and name == "gossip log file":
            continue  # an empty file is a new log: a crash before the first write leaves one
        try:
            found = kind.read(raw)
        except kind.errors:
            continue
        except BaseException as error:
            raise AssertionError(f"{name}, try {tried} of seed {seed}: {error!r} for {raw.hex()}") from error
        # A message under a forged checksum is a message; a block of text under one is still checked inside.
        if kind.sealed and not (forged and name == "gossip message"):
            assert found == whole[at], f"{name}, try {tried} of seed {seed}: other data for {raw.hex()}"
    return tried


def test_every_format_is_fuzzed(tmp_path: Path):
    assert set(formats(tmp_path)) == set(NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_damaged_bytes_are_an_error_or_read_as_written(name: str, tmp_path: Path):
    assert fuzz(name, tmp_path, SHORT_S, seed=0) >= 20


@pytest.mark.nightly
@pytest.mark.parametrize("name", NAMES)
def test_damaged_bytes_are_an_error_or_read_as_written_for_ten_minutes(name: str, tmp_path: Path):
    seed = time.time_ns() % 10**9  # another one every night; a failure names it
    print(f"{name}: {fuzz(name, tmp_path, NIGHTLY_S, seed):,} damaged inputs in {NIGHTLY_S:g} s, seed {seed}")
