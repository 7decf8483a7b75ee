"""The gossip log: laws of a grow-only set, two histories found out, damage noticed, a kill survived."""

from __future__ import annotations

import asyncio
import sqlite3
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sharewell.allocation import (
    ClickLog,
    DamagedFile,
    DamagedLog,
    FixedPoint,
    GossipFormatError,
    GossipLog,
    GRank,
    Identity,
    InterferenceGame,
    LogLimits,
    Peer,
)
from sharewell.allocation.wire import Run, decode, decode_heads, encode, encode_heads, pack_row, unpack_row


def identity(n: int) -> Identity:
    return Identity(bytes([n]) * 32)


def authored(n: int, rows: int, text: str = "row") -> GossipLog:
    log = GossipLog(identity=identity(n))
    for k in range(rows):
        log.append((f"{text} {n}".encode(), str(k).encode()))
    return log


CLICKS = [
    (a, f"term{(a + k) % 4}", f"item{(a * k) % 7}") for a in range(1, 5) for k in range(6)
]  # four authors of six clicks each


def click_deltas() -> tuple[list[bytes], bytes]:
    """Every run of rows first..last of every author as a message of its own, and the hash of all rows."""
    logs = {a: ClickLog(identity=identity(a)) for a in range(1, 5)}
    for a, query, item in CLICKS:
        logs[a].append(query, (item,), item, (query,))
    pieces = []
    for log in logs.values():
        for first in range(6):
            for last in range(first + 1, 7):
                message = log.delta({log.node_id: first}, last - first)
                assert [(r.first, r.last) for r in decode(message)] == [(first + 1, last)]
                pieces.append(message)
    whole = ClickLog(identity=identity(9))
    for log in logs.values():
        whole.merge(log.delta({}))
    return pieces, whole.gossip.hash()


PIECES, WHOLE = click_deltas()


@given(st.data())
@settings(max_examples=500)
def test_any_order_duplication_and_splitting_gives_one_log_and_one_ranking(data: st.DataObject):
    log = ClickLog(identity=identity(9))
    rank = GRank(log)
    chosen = data.draw(st.lists(st.sampled_from(range(len(PIECES))), max_size=12))
    # Whatever came before, the whole histories come in between, in some order.
    wholes = [5, 26, 47, 68]  # rows 1 to 6 of each author
    for at in data.draw(st.permutations(chosen + wholes)):
        log.merge(PIECES[at])
    assert log.gossip.hash() == WHOLE and len(log.gossip) == 24
    again = GRank(log)  # indexed from the first row
    for term in ("term0", "term1", "term2", "term3", "unknown"):
        assert rank.rank(term) == again.rank(term)
    assert [(r.author, r.seq) for r in log.rows()] == sorted(
        (identity(a).author, s) for a in range(1, 5) for s in range(1, 7)
    )


@given(st.permutations(range(6)))
@settings(max_examples=40)
def test_rows_that_come_early_wait_for_those_before_them(order: list[int]):
    source = authored(1, 6)
    log, head = GossipLog(identity=identity(2)), 0
    seen: set[int] = set()
    for k in order:
        report = log.merge(source.delta({source.author: k}, 1))
        seen.add(k + 1)
        while head + 1 in seen:
            head += 1
        assert log.heads().get(source.author, 0) == head
        assert [seq for _, seq, _ in report.added] == list(range(head - len(report.added) + 1, head + 1))
    assert log.hash() == authored(1, 6).hash()


def test_a_delta_is_what_the_peer_lacks_and_resumes_from_heads():
    source, log = authored(1, 30), GossipLog(identity=identity(2))
    sizes = []
    while log.heads() != source.heads():
        sizes.append(len(log.merge(source.delta(log.heads(), 12)).added))
    assert sizes == [12, 12, 6]
    assert decode(source.delta(log.heads())) == []
    assert log.merge(source.delta({})).duplicates == 30


def test_a_relay_passes_on_what_it_can_vouch_for():
    source, relay, log = authored(1, 10), GossipLog(identity=identity(2)), GossipLog(identity=identity(3))
    relay.merge(source.delta({}))
    log.merge(relay.delta(log.heads(), 4))  # only the last row's signature is there: all ten come
    assert log.heads()[source.author] == 10 and log.hash() == relay.hash()


def forked() -> tuple[GossipLog, GossipLog]:
    """Two logs of one author that agree on three rows and then differ."""
    a, b = authored(1, 3), authored(1, 3)
    for log, word in ((a, b"left"), (b, b"right")):
        for k in range(3):
            log.append((word, str(k).encode()))
    return a, b


@given(st.sampled_from([0, 2, 3]), st.booleans(), st.booleans())
@settings(max_examples=12)
def test_two_histories_are_found_out_in_any_order_and_by_hearsay(first: int, swap: bool, early: bool):
    a, b = reversed(forked()) if swap else forked()
    log = GossipLog(identity=identity(2))
    if not early:
        log.merge(a.delta({}))
        report = log.merge(b.delta({b.author: first}))
    else:  # both wait for earlier rows
        log.merge(a.delta({a.author: 3}))
        report = log.merge(b.delta({b.author: 3}))
    (conflict,) = report.conflicts
    assert (conflict.author, conflict.seq) == (a.author, 4) and a.author.hex()[:16] in str(conflict)
    assert {conflict.ours[0], conflict.theirs[0]} == {b"left", b"right"}
    assert list(log.rows()) == [] and log.excluded() == {a.author} and log.heads()[a.author] == -1
    assert log.merge(a.delta({})).refused == {a.author: "forked"}
    # The proof travels, and convinces one who has either history, or none.
    for start in (None, a, b):
        other = GossipLog(identity=identity(3))
        if start is not None:
            other.merge(start.delta({}))
        other.merge(log.delta(other.heads()))
        assert other.excluded() == {a.author} and other.hash() == log.hash()


def test_a_forged_signature_merges_nothing_of_the_whole_message():
    good, bad = authored(1, 2), authored(2, 2)
    run = decode(bad.delta({}))[0]
    forged = Run(run.author, 1, run.link, ((b"other",), run.rows[1]), run.signature)
    log = GossipLog(identity=identity(3))
    before = log.hash()
    with pytest.raises(GossipFormatError, match="signature"):
        log.merge(encode([decode(good.delta({}))[0], forged]))
    assert log.hash() == before and len(log) == 0 and not log.heads()


def test_a_flood_is_cut_at_the_limit_whatever_the_order():
    source = authored(1, 30)
    limits = LogLimits(max_rows_per_author=10)
    hashes = set()
    for steps in ([30], [7, 30], [10, 12, 30]):
        log, have = GossipLog(identity=identity(2), limits=limits), 0
        for end in steps:
            report = log.merge(source.delta({source.author: have}, end - have))
            have = end
        assert "limit of 10" in report.refused[source.author] or steps != [30]
        assert log.heads()[source.author] == 10
        hashes.add(log.hash())
    assert len(hashes) == 1
    tight = GossipLog(identity=identity(2), limits=LogLimits(max_row_bytes=8))
    with pytest.raises(GossipFormatError, match="over 8 bytes"):
        tight.merge(source.delta({}))
    with pytest.raises(ValueError, match="at most 8 bytes"):
        tight.append((b"far too long",))


def test_a_log_is_the_same_when_it_is_opened_again(tmp_path: Path):
    path = tmp_path / "log.db"
    log = GossipLog(path)
    log.append((b"mine", b"1"))
    log.merge(authored(1, 5).delta({}))
    log.merge(authored(2, 5).delta({identity(2).author: 2}))  # waits
    who, digest, heads = log.author, log.hash(), log.heads()
    log.close()
    log = GossipLog(path)
    assert (log.author, log.hash(), log.heads()) == (who, digest, heads)
    log.merge(authored(2, 2).delta({}))
    assert log.heads()[identity(2).author] == 5


def test_forgetting_deletes_and_oneself_gets_a_new_name(tmp_path: Path):
    path = tmp_path / "log.db"
    log = GossipLog(path)
    log.append((b"secret words",))
    log.merge(authored(1, 3).delta({}))
    assert log.forget(identity(1).author) == 3
    assert log.merge(authored(1, 3).delta({})).refused == {identity(1).author: "forgotten"}
    old = log.author
    assert log.forget(old) == 1 and log.author != old and len(log) == 0
    assert log.append((b"new",)) == 1
    log.close()
    assert GossipLog(path).heads()[old] == -1
    private = GossipLog(share=False)
    private.append((b"mine alone",))
    assert decode(private.delta({})) == []


def test_a_kill_in_the_middle_of_a_merge_leaves_the_log_before_or_after(tmp_path: Path):
    path = tmp_path / "log.db"
    log = GossipLog(path, identity(2))
    log.merge(authored(1, 3).delta({}))
    before = log.hash()
    log.close()
    code = (
        "import os, sys; sys.path.insert(0, sys.argv[2])\n"
        "from test_gossip import *\n"
        "log = GossipLog(sys.argv[1])\n"
        "take, calls = log._take, [0]\n"
        "def dying(run, report):\n"
        "    take(run, report)\n"
        "    calls[0] += 1\n"
        "    if calls[0] == 2: os.kill(os.getpid(), 9)\n"
        "log._take = dying\n"
        "log.merge(encode([decode(authored(n, 4).delta({}))[0] for n in (3, 4, 5)]))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(path), str(Path(__file__).parent)],
        capture_output=True,
        check=False,
        timeout=60,
    )
    assert done.returncode == -9, done.stderr
    log = GossipLog(path)
    assert log.hash() == before and len(log) == 3
    assert len(log.merge(encode([decode(authored(n, 4).delta({}))[0] for n in (3, 4, 5)])).added) == 12


# --- damage: a flipped or cut byte is an error or changes nothing ---

MESSAGES = [authored(1, 5).delta({}), authored(1, 5).delta({}, compress=False), encode_heads({bytes(32): 7})]


def damaged(raw: bytes, data: st.DataObject) -> bytes:
    kind = data.draw(st.sampled_from(["flip", "cut", "cut front", "insert", "swap"]))
    at = data.draw(st.integers(0, len(raw) - 1))
    if kind == "flip":
        return raw[:at] + bytes([raw[at] ^ data.draw(st.integers(1, 255))]) + raw[at + 1 :]
    if kind == "cut":
        return raw[:at]
    if kind == "cut front":
        return raw[at + 1 :]
    if kind == "insert":
        return raw[:at] + data.draw(st.binary(min_size=1, max_size=9)) + raw[at:]
    other = data.draw(st.integers(0, len(raw) - 1))
    swapped = bytearray(raw)
    swapped[at], swapped[other] = swapped[other], swapped[at]
    return bytes(swapped)


@given(st.data())
@settings(max_examples=400)
def test_a_damaged_message_is_refused(data: st.DataObject):
    at = data.draw(st.integers(0, 2))
    raw = damaged(MESSAGES[at], data)
    if raw == MESSAGES[at]:
        return
    with pytest.raises(GossipFormatError):
        decode_heads(raw) if at == 2 else decode(raw)


@given(st.binary(max_size=300))
@settings(max_examples=300)
def test_hostile_bytes_under_a_right_checksum_raise_only_format_errors(body: bytes):
    from sharewell.allocation.wire import frame

    for flags in (0, 1):
        try:
            decode(frame(body, flags))
        except GossipFormatError:
            pass
    for read in (decode_heads, unpack_row):
        try:
            read(frame(body) if read is decode_heads else body)
        except GossipFormatError:
            pass


@given(st.lists(st.binary(max_size=40), max_size=20))
def test_rows_and_messages_survive_the_round_trip(tokens: list[bytes]):
    row = tuple(tokens)
    assert unpack_row(pack_row(row)) == row
    run = Run(bytes(32), 3, bytes(32), (row, row), bytes(64))
    for compress in (True, False):
        assert decode(encode([run], compress)) == [run]
    heads = {bytes([k]) * 32: k - 1 for k in range(len(tokens))}
    assert decode_heads(encode_heads(heads)) == heads


def test_a_bomb_does_not_inflate():
    import zlib

    from sharewell.allocation.wire import frame

    with pytest.raises(GossipFormatError, match="inflates past"):
        decode(frame(zlib.compress(bytes(40 << 20)), 1))


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[bytes, object]]:
    """Each file format with its bytes, and a reader of what is in it."""
    import numpy as np

    folder = tmp_path_factory.mktemp("files")
    log = GossipLog(folder / "log.db", identity(2))
    log.append((b"mine", b"1"))
    log.merge(authored(1, 5).delta({}))
    log._db.execute("PRAGMA journal_mode=DELETE")
    log.close()
    H = np.random.default_rng(0).exponential(1, (2, 2, 3))
    game = InterferenceGame(H, np.ones((2, 3)), np.ones(2))
    FixedPoint(game).save(folder / "run.npz")
    np.savez(folder / "channel.npz", H=H, noise=np.ones((2, 3)), power=np.ones(2))
    import gzip

    tasks = "".join(f"{k},,7,{k},,0,user,2,{k % 12},0.{k + 1}25,0.0{k + 1},0.0004,0\n" for k in range(9))
    (folder / "tasks.csv.gz").write_bytes(gzip.compress(tasks.encode()))

    def read_log(path: Path):
        log = GossipLog(path)
        try:
            return sorted(log.rows()), log.author
        finally:
            log.close()

    def read_run(path: Path):
        return FixedPoint.load(path, game).p.tobytes()

    def read_channel(path: Path):
        loaded = InterferenceGame.load(path)
        return loaded.H.tobytes(), loaded.noise.tobytes(), loaded.power.tobytes()

    def read_trace(path: Path):
        from sharewell.allocation import Problem

        problem = Problem.from_google_trace(path)
        return problem.demand.tobytes(), problem.capacity.tobytes(), problem.budget.tobytes()

    readers = {
        "log.db": read_log,
        "run.npz": read_run,
        "channel.npz": read_channel,
        "tasks.csv.gz": read_trace,
    }
    return {name: ((folder / name).read_bytes(), read) for name, read in readers.items()}


@pytest.mark.parametrize("name", ["log.db", "run.npz", "channel.npz", "tasks.csv.gz"])
@given(data=st.data())
@settings(max_examples=120)
def test_a_damaged_file_is_an_error_or_reads_as_it_was(
    name: str, files, tmp_path_factory, data: st.DataObject
):
    raw, read = files[name]
    path = tmp_path_factory.getbasetemp() / name
    path.write_bytes(raw)
    whole = read(path)
    changed = damaged(raw, data)
    for leftover in path.parent.glob(f"{name}-*"):
        leftover.unlink()
    path.write_bytes(changed)
    try:
        found = read(path)
    except (DamagedFile, DamagedLog, ValueError):
        return
    if name == "log.db" and not found[0] and len(changed) == 0:
        return  # an empty file is a new log
    assert found == whole


def test_a_lost_row_is_noticed(tmp_path: Path):
    for statement in (
        "DELETE FROM rows WHERE seq = 5",
        "DELETE FROM rows WHERE seq = 2",
        "UPDATE rows SET packed = X'00' WHERE seq = 3",
        "UPDATE meta SET value = X'00' WHERE key = 'hash'",
        "UPDATE meta SET value = zeroblob(32) WHERE key = 'secret'",
        "DELETE FROM rows",
        "INSERT INTO authors VALUES (zeroblob(32), 1)",
    ):
        path = tmp_path / "log.db"
        path.unlink(missing_ok=True)
        log = GossipLog(path)
        log.merge(authored(1, 5).delta({}))
        log.close()
        raw = sqlite3.connect(path)
        raw.execute(statement)
        raw.commit()
        raw.close()
        with pytest.raises(DamagedLog):
            GossipLog(path)


# --- over real sockets ---


async def test_a_peer_that_breaks_off_loses_nothing_and_nonsense_is_refused():
    source = authored(1, 20)
    message = source.delta({})

    async def liar(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.read(100)
        answers = {0: message[: len(message) // 2], 1: b"nonsense" * 10}
        body = answers[min(calls[0], 1)]
        size = len(message) if calls[0] == 0 else len(body)
        calls[0] += 1
        writer.write(size.to_bytes(4, "big") + body)
        await writer.drain()
        writer.close()

    calls = [0]
    server = await asyncio.start_server(liar, "127.0.0.1", 0)
    host, port = server.sockets[0].getsockname()[:2]
    log = GossipLog(identity=identity(2))
    peer = Peer(log, timeout_s=5)
    with pytest.raises(ConnectionError):
        await peer.pull(host, port)
    with pytest.raises(GossipFormatError):
        await peer.pull(host, port)
    server.close()
    assert len(log) == 0
    honest = Peer(source, max_rows=7)
    host, port = await honest.serve()
    added = [len((await peer.pull(host, port)).added) for _ in range(4)]
    assert added == [7, 7, 6, 0] and log.hash() == source.hash()
    # A server that is sent nonsense drops the caller and goes on.
    _, writer = await asyncio.open_connection(host, port)
    writer.write(b"\xff" * 50)
    await writer.drain()
    writer.close()
    assert (await peer.pull(host, port)).duplicates == 0
    await honest.close()
