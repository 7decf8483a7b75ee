"""Quasicryth: exact on any bytes, streaming equal to one shot, and the theorems about its tilings."""

from __future__ import annotations

import bz2
import io
import lzma
import random
import struct
import subprocess
import sys
import sysconfig
import tracemalloc
import zlib
from functools import cache
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sharewell.cli import main
from sharewell.coding import Arm, ab_test, coverage, positions, quasicryth, text_block
from sharewell.coding.frame import BLOCK_HEADER, CodecError
from sharewell.coding.phrases import book_sizes, choose_phrases, lay_phrases
from sharewell.coding.quasicryth import (
    BadMagic,
    ChecksumMismatch,
    OutputLimit,
    QuasicrythCompressor,
    QuasicrythDecompressor,
    QuasicrythError,
    Settings,
    Truncated,
    UnsupportedVersion,
    analyze,
    compress,
    decode_block,
    decompress,
)
from sharewell.coding.tiling import (
    GOLDEN,
    PHRASE_LENGTHS,
    TILINGS,
    arm_positions,
    cut_and_project,
    period5_positions,
)
from sharewell.coding.tokens import tokenize


@cache
def python_sources(size: int) -> bytes:
    """The first ``size`` bytes of the standard library's modules in order of their names."""
    folder = Path(sysconfig.get_paths()["stdlib"])
    out = bytearray()
    for path in sorted(folder.glob("*.py")):
        out += path.read_bytes()
        if len(out) >= size:
            return bytes(out[:size])
    raise AssertionError(f"the standard library holds fewer than {size} bytes")


HARD = {
    "empty": b"",
    "one byte": b"x",
    "every byte": bytes(range(256)),
    "every byte, often": bytes(range(256)) * 40,
    "invalid UTF-8": b"caf\xe9 \xff\xfe\x80 word " * 60,
    "words of 300 bytes": (b"x" * 300 + b" " + b"Y" * 300 + b"\n") * 3,
    "70,000 spaces": b" " * 70_000,
    "one word of 300 kB": b"abcdefghij" * 30_000,
    "NULs late in the file": b"plain words come first, many of them. " * 500 + b"\0" * 20 + b" and on " * 40,
    "words cut at 255 bytes": b"z" * 255 + b"y" * 255 + b" q" * 100 + b"e" * 510 + b"\n" * 600 + b"end",
    "cases": b"A a AB aB Ab ABc abC A1 \xc3\x84B \xc3\xa4b I i McDonald McDONALD. The THE the\n" * 30,
    "white space": b"a\tb \t c\r\nd\n\n\n e \x0b f \x0c\n" * 60,
    "no end of line": b"word " * 400 + b"wor",
}

WORDS = st.sampled_from(
    ["the", "The", "THE", "of", "cat", "caf\u00e9", "x", "1", "0", ".", ",", "McX", "aQuiteLongWordHere"]
)
GAPS = st.sampled_from(["", " ", " ", " ", "\n", "\n    ", "\t", "\r\n"])
TEXTS = st.lists(st.tuples(WORDS, GAPS), max_size=400).map(lambda p: "".join(a + b for a, b in p).encode())


@pytest.mark.parametrize("name", HARD)
@pytest.mark.parametrize("level", [1, 6, 9])
def test_hard_inputs_come_back(name: str, level: int):
    data = HARD[name]
    assert decompress(compress(data, level=level)) == data


@given(st.binary(max_size=600))
@settings(max_examples=400)
def test_any_bytes_come_back(data: bytes):
    assert decompress(compress(data)) == data


@given(TEXTS, st.sampled_from(TILINGS))
@settings(max_examples=200)
def test_any_text_comes_back_through_words_and_phrases(data: bytes, tiling: str):
    raw = np.frombuffer(bytearray(data), np.uint8)
    tokens = tokenize(raw)
    assert tokens is not None
    coded = text_block.encode(text_block.lay_out(tokens, Arm.parse(tiling)), 4 * len(data) + 4096)
    assert coded is not None
    assert text_block.decode(coded[0], len(data)) == data


@given(
    st.lists(st.binary(min_size=1, max_size=300), max_size=12), st.sampled_from([b" ", b"", b"\n", b"  \t"])
)
@settings(max_examples=200)
def test_bytes_that_are_no_text_come_back_through_words_too(parts: list[bytes], gap: bytes):
    data = gap.join(parts)
    raw = np.frombuffer(bytearray(data), np.uint8)
    tokens = tokenize(raw)
    assert tokens is not None
    coded = text_block.encode(text_block.lay_out(tokens, Arm("all")), 4 * len(data) + 4096)
    assert coded is not None
    assert text_block.decode(coded[0], len(data)) == data


@pytest.mark.nightly
def test_ten_thousand_random_inputs_come_back():
    rng = random.Random(5)
    source = python_sources(400_000)
    for _ in range(10_000):
        kind = rng.randrange(4)
        n = int(10 ** (rng.random() * 4))
        at = rng.randrange(len(source) - n)
        data = bytearray(source[at : at + n])
        if kind == 1:
            data = bytearray(rng.randbytes(n))
        elif kind == 2:
            for _ in range(1 + n // 50):
                data[rng.randrange(n)] = rng.randrange(256)
        elif kind == 3:
            data = bytearray(rng.choice(list(HARD.values()))[:n]) + data
        level = rng.randrange(1, 10)
        assert decompress(compress(data, level=level, tiling=rng.choice(["auto", *TILINGS]))) == data


@pytest.mark.parametrize("chunk", [1, 7, 1 << 16])
def test_pieces_give_the_same_stream_as_one_shot(chunk: int):
    data = python_sources(150_000)
    whole = compress(data, block_size=40_000)
    compressor = QuasicrythCompressor(block_size=40_000)
    parts = [compressor.compress(data[i : i + chunk]) for i in range(0, len(data), chunk)]
    assert b"".join([*parts, compressor.flush()]) == whole
    decompressor = QuasicrythDecompressor()
    out = b"".join(decompressor.decompress(whole[i : i + chunk]) for i in range(0, len(whole), chunk))
    assert out == data and decompressor.eof and decompressor.unused_data == b""


def test_output_is_handed_out_in_pieces_of_the_length_asked_for():
    data = python_sources(50_000)
    decompressor = QuasicrythDecompressor()
    out = [decompressor.decompress(compress(data, block_size=20_000) + b"tail", 1000)]
    while not decompressor.eof:
        assert not decompressor.needs_input
        out.append(decompressor.decompress(b"", 1000))
    assert max(map(len, out)) == 1000 and b"".join(out) == data
    assert decompressor.unused_data == b"tail"
    with pytest.raises(EOFError):
        decompressor.decompress(b"")


def blocks_of(stream: bytes) -> list[tuple[int, int]]:
    """(start, end) of each block in a stream."""
    at, found = 5, []
    while stream[at : at + 1] == b"B":
        payload = struct.unpack_from("<cBII", stream, at)[3]
        found.append((at, at + BLOCK_HEADER + payload))
        at = found[-1][1]
    return found


def test_blocks_decode_on_their_own():
    data = python_sources(90_000)
    stream = compress(data, block_size=30_000)
    for k, (start, end) in enumerate(blocks_of(stream)):
        _, mode, size, _, _, _ = struct.unpack_from("<cBIII8s", stream, start)
        assert (
            decode_block(mode, stream[start + BLOCK_HEADER : end], size)
            == data[30_000 * k : 30_000 * (k + 1)]
        )


def test_memory_stays_within_twelve_blocks_and_sixteen_with_phrases():
    size = 1 << 20
    data = python_sources(2 * size)
    compress(data[:50_000])  # the compiler's own memory is not the codec's
    for level, tiling, blocks in ((6, "auto", 12), (6, "fibonacci", 16)):
        tracemalloc.start()
        stream = compress(data, block_size=size, level=level, tiling=tiling)
        peak = tracemalloc.get_traced_memory()[1] - len(stream)
        tracemalloc.reset_peak()
        decompress(stream)
        unpacking = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert peak <= blocks * size, (tiling, peak / size)
        assert unpacking <= blocks * size + len(data), (tiling, unpacking / size)


# ---- theory


def test_fibonacci_coverage_is_the_same_at_every_level():
    covered = coverage(positions(GOLDEN, 0.0, 200_000))
    assert covered[3] == pytest.approx(0.7082, abs=5e-5) and covered[5] == pytest.approx(0.7295, abs=5e-5)
    limit = (1 + 5**0.5) / 2 / 5**0.5
    for length in PHRASE_LENGTHS[3:]:
        assert covered[length] == pytest.approx(limit, abs=0.003)


@pytest.mark.parametrize("phase", [0.0, 0.1, 0.618, 0.99])
def test_long_tiles_number_words_over_golden_powers(phase: float):
    phi, n = (1 + 5**0.5) / 2, 200_000
    marks = positions(GOLDEN, phase, n)
    for level in range(len(PHRASE_LENGTHS)):
        assert np.count_nonzero(marks & (1 << level)) == pytest.approx(n * phi ** -(level + 2), abs=4)


def test_period_five_has_no_place_for_phrases_from_thirteen_words_on():
    covered = coverage(period5_positions(0, 200_000))
    assert [round(covered[n], 3) for n in PHRASE_LENGTHS] == [0.75, 0.75, 0.625, 1.0, 0, 0, 0, 0, 0, 0]


def test_a_sturmian_word_has_n_plus_one_factors_of_length_n():
    word = bytes(cut_and_project(GOLDEN, 0.3, 40_000)[1].tolist())
    for n in range(1, 51):
        assert len({word[i : i + n] for i in range(len(word) - n)}) == n + 1


def test_eight_shifts_of_period_five_look_everywhere_up_to_eight_words():
    marks = arm_positions(Arm("period5", 8), 5_000)[16:-32]
    assert np.all(marks & 0b1111 == 0b1111)
    assert np.all(arm_positions(Arm("all"), 100) == (1 << 10) - 1)
    assert not arm_positions(Arm("none"), 100).any()
    assert len(arm_positions(Arm.parse("multi"), 1000)) == 1000


@given(st.lists(st.integers(0, 3), min_size=1, max_size=300), st.integers(0, 2**10 - 1))
@settings(max_examples=60)
def test_phrases_cover_the_words_without_overlap_and_only_where_allowed(words: list[int], allowed: int):
    text = np.array(words, np.int32)
    book = choose_phrases(text, np.ones(4, bool), book_sizes(len(text)))
    marks = np.where(np.arange(len(text)) % 3 == 0, allowed, 0).astype(np.uint16)
    events = lay_phrases(text, marks, book)
    at, out = 0, []
    while at < len(text):
        if events[at] == -2:
            out.append(text[at : at + 1])
            at += 1
            continue
        k = events[at]
        level = book.levels[k]
        assert level == 0 or marks[at] >> level & 1
        phrase = book.words[book.starts[k] : book.starts[k + 1]]
        assert np.all(events[at + 1 : at + len(phrase)] == -1)
        out.append(phrase)
        at += len(phrase)
    assert np.concatenate(out).tolist() == words


def test_counts_of_phrases_are_exact():
    text = np.array([1, 2, 3, 1, 2, 3, 1, 2, 9, 1, 2, 3], np.int32)
    book = choose_phrases(text, np.ones(10, bool), (5, 5, 0, 0, 0, 0, 0, 0, 0, 0), least=3)
    phrases = {tuple(book.words[book.starts[k] : book.starts[k + 1]].tolist()) for k in range(book.n)}
    assert phrases == {(1, 2), (2, 3), (1, 2, 3)}


# ---- what it is worth


def test_python_sources_get_smaller_than_with_xz_and_bzip2():
    data = python_sources(500_000)
    ours = len(compress(data))
    assert ours < 0.92 * len(lzma.compress(data, preset=9 | lzma.PRESET_EXTREME))
    assert ours < len(bz2.compress(data, 9))
    assert analyze(data)[0].mode == "phrases"


def test_the_papers_comparison_and_the_one_at_equal_budget_have_opposite_signs():
    rows = {
        r.arm: r for r in ab_test(python_sources(500_000), ["fib:12", "p5:1", "fib:8", "p5:8", "all", "none"])
    }
    assert rows["fibonacci:12"].total_bytes < rows["period5:1"].total_bytes
    assert rows["period5:8"].total_bytes < rows["fibonacci:8"].total_bytes
    assert rows["all"].total_bytes < rows["fibonacci:12"].total_bytes
    assert rows["period5:1"].deep_phrases == 0 < rows["fibonacci:12"].deep_phrases
    assert rows["none"].phrase_bytes == 0


def test_every_part_of_a_block_is_accounted_for():
    (stats,) = analyze(python_sources(60_000), tiling="all")
    assert stats.bytes_of is not None and stats.phrases_used is not None
    assert sum(stats.bytes_of.values()) == stats.payload_bytes and stats.phrases_used[2] > 0


def test_level_nine_is_never_larger_than_level_six_or_plain_lzma():
    for data in (python_sources(60_000), bytes(range(256)) * 200, HARD["70,000 spaces"]):
        nine = len(compress(data, level=9))
        assert nine <= len(compress(data, level=6)) and nine <= len(lzma.compress(data, preset=9)) + 64


# ---- faults

SAMPLE = python_sources(6_000)
STREAM = compress(SAMPLE[:900], block_size=400)


def test_every_flipped_bit_is_detected():
    for at in range(len(STREAM)):
        damaged = bytearray(STREAM)
        damaged[at] ^= 1 << (at % 8)
        with pytest.raises(QuasicrythError):
            decompress(damaged)


def test_every_cut_is_detected():
    for at in range(len(STREAM)):
        with pytest.raises(QuasicrythError):
            decompress(STREAM[:at])
    with pytest.raises(Truncated):
        decompress(STREAM[:-1])


def reseal(stream: bytes, at: int, change: int) -> bytes:
    """The stream with a byte of its first payload changed and both checksums made right again."""
    start, end = blocks_of(stream)[0]
    payload = bytearray(stream[start + BLOCK_HEADER : end])
    payload[at % len(payload)] ^= change
    head = bytearray(stream[start : start + BLOCK_HEADER - 4])
    struct.pack_into("<I", head, 10, zlib.crc32(payload))
    return stream[:start] + head + struct.pack("<I", zlib.crc32(head)) + payload + stream[end:]


@given(st.integers(0, 10**6), st.integers(1, 255), st.sampled_from(["phrases", "none", "lzma"]))
@settings(max_examples=300)
def test_a_forged_payload_with_right_checksums_is_never_returned_as_data(at: int, change: int, kind: str):
    stream, data = FORGEABLE[kind]
    try:
        out = decompress(reseal(stream, at, change))
    except ChecksumMismatch:
        return
    assert out == data  # the last byte of a range coder leaves some freedom


_BINARY = b"\x01\x02\x03\x04" * 300 + random.Random(3).randbytes(40)
FORGEABLE = {
    "phrases": (compress(SAMPLE, tiling="all"), SAMPLE),
    "none": (compress(SAMPLE, tiling="none"), SAMPLE),
    "lzma": (compress(_BINARY), _BINARY),
}


@given(st.binary(max_size=400), st.integers(0, 5000), st.integers(0, 3))
@settings(max_examples=800)
def test_no_payload_crashes_a_decoder_or_outgrows_its_size(payload: bytes, size: int, mode: int):
    try:
        out = decode_block(mode, payload, size)
    except ValueError:
        return
    assert len(out) <= size


@given(st.binary(max_size=200), st.booleans())
@settings(max_examples=200)
def test_no_bytes_crash_the_container(tail: bytes, start: bool):
    data = (STREAM[:5] if start else b"") + tail
    try:
        decompress(data, max_output=1 << 20)
    except CodecError:
        pass


@pytest.mark.nightly
def test_a_hundred_thousand_mutated_streams_crash_nothing_and_return_nothing():
    rng = random.Random(11)
    for _ in range(100_000):
        stream, data = rng.choice(list(FORGEABLE.values()))
        damaged = bytearray(stream)
        if rng.random() < 0.5:
            damaged = reseal(stream, rng.randrange(1 << 20), rng.randrange(1, 256))
        else:
            for _ in range(rng.randrange(1, 4)):
                damaged[rng.randrange(len(damaged))] ^= rng.randrange(1, 256)
        try:
            assert decompress(damaged, max_output=1 << 20) == data
        except QuasicrythError:
            pass


def test_output_is_refused_before_it_is_made():
    bomb = compress(b"a bomb " * 100_000)
    assert len(bomb) < 5_000
    for limit in (0, 1, 699_999):
        with pytest.raises(OutputLimit, match=f"max_output={limit}"):
            decompress(bomb, max_output=limit)
    assert len(decompress(bomb, max_output=700_000)) == 700_000
    two = compress(b"abc") + compress(b"def")
    assert decompress(two) == b"abcdef"
    with pytest.raises(OutputLimit):
        decompress(two, max_output=5)


def test_a_header_that_lies_about_its_size_costs_no_memory():
    start, _ = blocks_of(STREAM)[0]
    head = bytearray(STREAM[start : start + BLOCK_HEADER - 4])
    struct.pack_into("<I", head, 2, (1 << 32) - 1)
    forged = STREAM[:start] + head + struct.pack("<I", zlib.crc32(head)) + STREAM[start + BLOCK_HEADER :]
    with pytest.raises(ChecksumMismatch, match="out of range"):
        decompress(forged)


def test_other_formats_and_versions_are_named():
    with pytest.raises(BadMagic):
        decompress(lzma.compress(b"x"))
    with pytest.raises(UnsupportedVersion, match="got 9"):
        decompress(STREAM[:4] + b"\x09" + STREAM[5:])
    with pytest.raises(Truncated):
        decompress(b"")


def test_blocks_cannot_be_left_out_or_doubled():
    (a, b), (c, d), *_ = blocks_of(STREAM)
    for forged in (STREAM[:a] + STREAM[b:], STREAM[:d] + STREAM[c:]):
        with pytest.raises(ChecksumMismatch, match="blocks"):
            decompress(forged)


@pytest.mark.parametrize(
    ("given", "told"),
    [
        ({"level": 0}, r"level must be in \[1, 9\], got 0"),
        ({"block_size": 0}, r"block_size must be in \[1, 268435456\], got 0"),
        ({"tiling": "penrose"}, "tiling must be one of fibonacci, multi, period5, none, all, got 'penrose'"),
        ({"tiling": "period5", "n_tilings": 9}, r"number of period5 tilings must be in \[1, 8\], got 9"),
        ({"n_tilings": 3}, "n_tilings needs a tiling other than auto, got 3"),
    ],
)
def test_wrong_settings_are_refused_by_name(given: dict, told: str):
    with pytest.raises(ValueError, match=told):
        Settings(**given)


# ---- files and the command line


def test_files_are_read_written_and_appended_to(tmp_path: Path):
    path = tmp_path / "a.qtc"
    text = python_sources(30_000).decode()
    with quasicryth.open(path, "wt", encoding="utf-8", newline="") as file:
        file.write(text)
    with quasicryth.open(path, "ab") as file:
        file.write(b"# more\n")
    with quasicryth.open(path, "rt", encoding="utf-8", newline="") as file:
        assert file.read() == text + "# more\n"
    with quasicryth.open(path) as file:
        assert file.read(10) == text[:10].encode() and file.tell() == 10
        assert io.BufferedReader(file).readline() == text[10:].splitlines(keepends=True)[0].encode()  # type: ignore
    with pytest.raises(ValueError, match="mode must be"):
        quasicryth.open(path, "rw")


def test_complete_blocks_of_a_torn_file_are_read(tmp_path: Path):
    data = python_sources(30_000)
    path = tmp_path / "torn.qtc"
    file = quasicryth.open(path, "wb", block_size=8_000)
    file.write(data)  # type: ignore[arg-type]
    file._file.flush()  # the process dies here: no flush of the codec, no end mark
    torn = tmp_path / "copy.qtc"
    torn.write_bytes(path.read_bytes())
    file.close()
    with quasicryth.open(torn) as reader:
        assert reader.read(24_000) == data[:24_000]
        with pytest.raises(Truncated):
            reader.read(1)
    with quasicryth.open(torn) as reader, pytest.raises(Truncated):
        reader.read()


def test_command_line_there_and_back(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    path = tmp_path / "text"
    path.write_bytes(python_sources(40_000))
    assert main(["qtc", "c", str(path)]) == 0
    packed = tmp_path / "text.qtc"
    assert main(["qtc", "t", str(packed)]) == 0
    assert main(["qtc", "d", str(packed)]) == 2 and "--force" in capsys.readouterr().err
    path.unlink()
    assert main(["qtc", "d", str(packed), "--max-output", "100"]) == 1
    assert "max_output" in capsys.readouterr().err and not path.exists()
    assert main(["qtc", "d", str(packed)]) == 0 and path.read_bytes() == python_sources(40_000)
    damaged = bytearray(packed.read_bytes())
    damaged[99] ^= 1
    packed.write_bytes(damaged)
    assert main(["qtc", "t", str(packed)]) == 1
    assert main(["qtc", "c", str(tmp_path / "missing")]) == 2
    assert main(["qtc", "ab", str(path), "--arms", "fob:1"]) == 2
    assert "tiling must be one of" in capsys.readouterr().err
    assert main(["qtc", "ab", str(path), "--arms", "p5:1,all", "--json"]) == 0
    assert '"arm": "period5:1"' in capsys.readouterr().out
    assert main(["qtc", "bench", str(path), "--json"]) == 0
    assert '"xz -9e"' in capsys.readouterr().out


def test_pipes_carry_bytes():
    data = python_sources(20_000)
    run = [sys.executable, "-m", "sharewell", "qtc"]
    packed = subprocess.run([*run, "c", "-"], input=data, capture_output=True, check=True).stdout
    assert decompress(packed) == data
    assert subprocess.run([*run, "d", "-"], input=packed, capture_output=True, check=True).stdout == data
