"""HNSW beside hnswlib, faiss and usearch: queries a second at equal recall, build, single queries, churn and
filters.

Vectors: clusters of unequal weight, and MiniLM embeddings of sentences from the documentation inside Python's
own library, numpy and torch. One thread each, in turns, CPU seconds; the build with two threads by the clock.
"""

from __future__ import annotations

import ast
import sysconfig
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from importlib.util import find_spec
from pathlib import Path

import numpy as np

from sharewell.ann import HNSWConfig, HNSWIndex
from sharewell.ann.base import Metric
from sharewell.ann.curves import CONTENDERS, Contender, curves, query_seconds_at, recall_of, truth
from sharewell.bench import PEER_NOT_INSTALLED, Progress, Report, Row, cpu_seconds, environment, median

BARS = {"hnswlib": 1.5, "faiss": 1.3, "usearch": 2.0}
BARS_LARGE = {"hnswlib": 1.3}  # from 100,000 vectors on
K = 10


def clustered(n: int, dim: int, rng: np.random.Generator) -> np.ndarray:
    """Vectors around 300 centres whose weights fall as 1 / rank."""
    centres = rng.standard_normal((300, dim))
    weight = 1 / np.arange(1, 301)
    which = rng.choice(300, n, p=weight / weight.sum())
    return (centres[which] + 0.9 * rng.standard_normal((n, dim))).astype(np.float32)


def sentences(most: int) -> list[str]:
    """Different sentences of docstrings in Python's standard library, then numpy and torch, in the order of
    their files.
    """
    found: dict[str, None] = {}
    packages = [Path(find_spec(name).origin or "").parent for name in ("numpy", "torch")]  # pyright: ignore[reportOptionalMemberAccess]
    for root in (Path(sysconfig.get_paths()["stdlib"]), *packages):
        for path in sorted(root.rglob("*.py")):
            if {"site-packages", "test", "tests"} & set(path.relative_to(root).parts):
                continue
            try:
                tree = ast.parse(path.read_text("utf-8"))
            except (SyntaxError, UnicodeDecodeError):
                continue
            for node in ast.walk(tree):
                if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef):
                    for part in (ast.get_docstring(node) or "").replace("\n", " ").split(". "):
                        text = " ".join(part.split())
                        if 20 <= len(text) <= 300:
                            found[text] = None
            if len(found) >= most:
                return list(found)[:most]
    return list(found)


def embedded(most: int, progress: Progress) -> np.ndarray:
    """MiniLM embeddings float32 ``[n, 384]`` of those sentences."""
    from sharewell.models import load_embedder

    texts, embedder, parts = sentences(most), load_embedder("minilm", 1), []
    for first in range(0, len(texts), 256):
        parts.append(embedder.embed(texts[first : first + 256]))
        progress("embedding sentences", min(first + 256, len(texts)), len(texts))
    return np.concatenate(parts)


def spent(work: Callable[[], object]) -> float:
    start = cpu_seconds()
    work()
    return cpu_seconds() - start


def compare(
    name: str, vectors: np.ndarray, queries: np.ndarray, metric: Metric, repeats: int, progress: Progress
) -> tuple[list[Row], dict[str, Contender]]:
    """Rows of one data set, and the built contenders."""
    built: dict[str, Contender] = {}
    seconds: dict[str, float] = {}
    missing = [p for p, kind in CONTENDERS.items() if not kind.installed()]
    for done, (peer, kind) in enumerate(CONTENDERS.items()):
        progress(f"{name}: building", done, len(CONTENDERS))
        if peer not in missing:
            built[peer] = kind(vectors.shape[1], metric, 16, 200)
            seconds[peer] = spent(lambda peer=peer: built[peer].build(vectors))
    measured = curves(
        list(built.values()), queries, truth(vectors, queries, K, metric), cpu_seconds, repeats=repeats
    )
    rows = []
    bars = BARS_LARGE if len(vectors) >= 100_000 else BARS
    for recall in (0.9, 0.95, 0.99):
        ours = query_seconds_at(measured["sharewell"], recall)
        for peer in BARS:
            if peer in missing:
                rows.append(
                    Row(
                        f"{name}: queries at recall {recall}",
                        1 / (ours or np.inf),
                        None,
                        "1/s",
                        "higher",
                        peer,
                        note=PEER_NOT_INSTALLED,
                    )
                )
                continue
            theirs = query_seconds_at(measured[peer], recall)
            if ours is None or theirs is None:
                continue
            bar = bars.get(peer)
            claim = {"claim": f"at least {bar} times {peer} at equal recall", "target": bar} if bar else {}
            rows.append(
                Row(
                    f"{name}: queries at recall {recall}",
                    1 / ours,
                    1 / theirs,
                    "1/s",
                    "higher",
                    peer,
                    **claim,
                )
            )
    for peer in ("hnswlib", "faiss", "usearch"):
        if peer in missing:
            continue
        claim = (
            {"claim": "at most 0.6 of hnswlib's CPU seconds", "target": 1 / 0.6} if peer == "hnswlib" else {}
        )
        rows.append(
            Row(f"{name}: build", seconds["sharewell"], seconds[peer], "CPU s", "lower", peer, **claim)
        )
        rows.append(
            Row(
                f"{name}: memory",
                built["sharewell"].nbytes() / 1e6,
                built[peer].nbytes() / 1e6,
                "MB",
                "lower",
                peer,
            )
        )
    if "hnswlib" in built:
        single: dict[str, list[float]] = {"sharewell": [], "hnswlib": []}
        for _ in range(repeats):
            for peer, times in single.items():
                times.append(
                    spent(lambda peer=peer: [built[peer].query(q[None], K, 64) for q in queries])
                    / len(queries)
                )
        rows.append(
            Row(
                f"{name}: one query at a time, ef 64",
                median(single["sharewell"]) * 1e6,
                median(single["hnswlib"]) * 1e6,
                "us",
                "lower",
                "hnswlib",
                claim="at most 0.8 of hnswlib's time",
                target=1 / 0.8,
            )
        )
    return rows, built


def threads(vectors: np.ndarray, queries: np.ndarray) -> list[Row]:
    """Recall at ef 100, and a build with two threads beside one with one."""
    true, seconds, recalls = truth(vectors, queries, K, "l2"), {}, {}
    for count in (1, 2):
        index = HNSWIndex(HNSWConfig(vectors.shape[1], "l2", capacity=len(vectors)))
        start = time.perf_counter()
        index.add(vectors, threads=count)
        seconds[count] = time.perf_counter() - start
        recalls[count] = recall_of(index.search(queries, K, ef=100, strategy="graph").labels, true)
    size = f"{len(vectors) // 1000}k x {vectors.shape[1]}"
    return [
        Row(
            f"{size}: recall at ef 100",
            recalls[1],
            None,
            "",
            "higher",
            "brute force",
            note="claim: at least 0.95",
        ),
        Row(
            f"{size}: build with two threads",
            seconds[2],
            seconds[1],
            "s",
            "lower",
            "one thread",
            claim="at least 1.6 times faster on two idle cores",
            target=1.6,
        ),
        Row(
            f"{size}: recall after a build with two threads",
            recalls[2],
            recalls[1],
            "",
            "higher",
            "one thread",
            claim="within 0.005",
            target=(recalls[1] - 0.005) / recalls[1],
        ),
    ]


def together(vectors: np.ndarray, queries: np.ndarray, seconds: float) -> list[Row]:
    """Two threads that insert beside two that search, for ``seconds`` (then what is left is inserted).

    A reader takes the labels whose ``add`` had returned before its search, and asks for some of these vectors
    themselves: each must be found, and nothing that nobody added may be.
    """
    n = len(vectors)
    index, serial = (HNSWIndex(HNSWConfig(vectors.shape[1], "l2", capacity=n, threads=1)) for _ in range(2))
    serial.add(vectors)
    index.add(vectors[: n // 10], np.arange(n // 10))
    halves = [np.arange(n // 10 + w, n, 2) for w in (0, 1)]
    done = [0, 0]  # how many rows of its half a writer has put in
    asked, missed, foreign = [0, 0], [0, 0], [0, 0]
    pause = seconds / max(1, n * 9 // 10 // 2 // 50)
    over = threading.Event()

    def write(me: int) -> None:
        start = time.perf_counter()
        for number, first in enumerate(range(0, len(halves[me]), 50)):
            rows = halves[me][first : first + 50]
            index.add(vectors[rows], rows)
            done[me] = first + len(rows)
            time.sleep(max(0.0, start + number * pause - time.perf_counter()))

    def read(me: int) -> None:
        rng = np.random.default_rng(me)
        while not over.is_set():
            sure = [halves[w][: done[w]] for w in (0, 1)]
            known = np.concatenate([np.arange(n // 10), *sure])
            picked = rng.choice(known, 20)
            labels = index.search(vectors[picked], 1, ef=64, threads=1).labels[:, 0]
            asked[me] += len(picked)
            missed[me] += int((labels != picked).sum())
            foreign[me] += int(((labels < 0) | (labels >= n)).sum())

    with ThreadPoolExecutor(4) as pool:
        readers = [pool.submit(read, me) for me in (0, 1)]
        writers = [pool.submit(write, me) for me in (0, 1)]
        try:
            for writer in writers:
                writer.result()
        finally:
            over.set()
        for reader in readers:
            reader.result()
    true = truth(vectors, queries, K, "l2")
    after, alone = (
        recall_of(i.search(queries, K, ef=64, strategy="graph").labels, true) for i in (index, serial)
    )
    what = f"2 writers and 2 readers, {seconds:.0f} s"
    return [
        Row(
            f"{what}: vectors found that were in before the search",
            1 - sum(missed) / sum(asked),
            1.0,
            "",
            "higher",
            f"all of {sum(asked)} asked for",
            claim="at most 0.01 below",
            target=0.99,
        ),
        Row(f"{what}: labels that nobody added", float(sum(foreign)), None, "", "lower", "none"),
        Row(
            f"{what}: recall afterwards",
            after,
            alone,
            "",
            "higher",
            "a serial build",
            claim="within 0.01",
            target=(alone - 0.01) / alone,
        ),
    ]


def churn(vectors: np.ndarray, queries: np.ndarray, rng: np.random.Generator) -> list[Row]:
    """Recall after five rounds of removing 30 % and adding as many, beside a fresh build and beside
    hnswlib.
    """
    n, dim = vectors.shape
    index = HNSWIndex(HNSWConfig(dim, "l2", capacity=n, threads=1))
    live = dict(zip(index.add(vectors).tolist(), vectors, strict=True))
    peer = None
    if CONTENDERS["hnswlib"].installed():
        import hnswlib  # pyright: ignore[reportMissingImports]

        peer = hnswlib.Index(space="l2", dim=dim)
        peer.init_index(n, ef_construction=200, M=16, allow_replace_deleted=True)  # pyright: ignore[reportCallIssue]
        peer.set_num_threads(1)
        peer.add_items(vectors, np.arange(n))
    for _ in range(5):
        gone = rng.choice(list(live), int(0.3 * n), replace=False)
        index.remove(gone)
        fresh = clustered(len(gone), dim, rng)
        labels = index.add(fresh)
        if peer is not None:
            for label in gone.tolist():
                peer.mark_deleted(label)
            peer.add_items(fresh, labels, replace_deleted=True)
        for label in gone.tolist():
            del live[label]
        live |= dict(zip(labels.tolist(), fresh, strict=True))
    index.compact()
    names, rows = np.array(list(live)), np.array(list(live.values()))
    true = names[truth(rows, queries, K, "l2")]
    anew = HNSWIndex(HNSWConfig(dim, "l2", capacity=n, threads=1))
    anew.add(rows, names)
    ours = recall_of(index.search(queries, K, ef=64, strategy="graph").labels, true)
    fresh_recall = recall_of(anew.search(queries, K, ef=64, strategy="graph").labels, true)
    found = [
        Row(
            "churn: recall after five rounds",
            ours,
            fresh_recall,
            "",
            "higher",
            "a fresh build",
            claim="within 0.01 of a fresh build",
            target=(fresh_recall - 0.01) / fresh_recall,
        ),
        Row(
            "churn: unreachable after compact()", float(index.stats().unreachable), None, "", "lower", "none"
        ),
    ]
    if peer is not None:
        peer.set_ef(64)
        theirs = recall_of(peer.knn_query(queries, K)[0].astype(np.int64), true)
        found.append(
            Row("churn: recall after five rounds", ours, theirs, "", "higher", "hnswlib, replace_deleted")
        )
    return found


def filters(vectors: np.ndarray, queries: np.ndarray, ours: HNSWIndex, rng: np.random.Generator) -> list[Row]:
    """Recall and time with a filter, beside hnswlib's callback and faiss's selector."""
    rows = []
    peers = {
        p: CONTENDERS[p](vectors.shape[1], "l2", 16, 200)
        for p in ("hnswlib", "faiss")
        if CONTENDERS[p].installed()
    }
    for peer in peers.values():
        peer.build(vectors)
    for share in (0.5, 0.1, 0.01, 0.001):
        allowed = np.sort(rng.choice(len(vectors), max(K, int(share * len(vectors))), replace=False))
        true = allowed[truth(vectors[allowed], queries, K, "l2")]
        found = ours.search(queries, K, ef=100, filter=allowed, threads=1)
        seconds = spent(
            lambda allowed=allowed: ours.search(queries, K, ef=100, filter=allowed, threads=1)
        ) / len(queries)
        rows.append(
            Row(
                f"filter {share:.1%}: recall ({found.strategy})",
                recall_of(found.labels, true),
                None,
                "",
                "higher",
                "brute force",
            )
        )
        if "hnswlib" in peers:
            index, allowed_set = peers["hnswlib"].index, set(allowed.tolist())  # pyright: ignore[reportAttributeAccessIssue]
            index.set_ef(100)

            def callback() -> None:
                try:
                    index.knn_query(queries, K, filter=allowed_set.__contains__)  # noqa: B023
                except RuntimeError:
                    pass  # it found fewer than k

            theirs = spent(callback) / len(queries)
            claim = {"claim": "at least 5 times hnswlib's callback", "target": 5.0} if share == 0.1 else {}
            rows.append(
                Row(
                    f"filter {share:.1%}: one query",
                    seconds * 1e6,
                    theirs * 1e6,
                    "us",
                    "lower",
                    "hnswlib, callback",
                    **claim,
                )
            )
        if "faiss" in peers:
            import faiss  # pyright: ignore[reportMissingImports]

            settings = faiss.SearchParametersHNSW(sel=faiss.IDSelectorBatch(allowed), efSearch=100)  # pyright: ignore[reportAttributeAccessIssue]
            index = peers["faiss"].index  # pyright: ignore[reportAttributeAccessIssue]
            theirs = spent(
                lambda index=index, settings=settings: index.search(queries, K, params=settings)
            ) / len(queries)
            rows.append(
                Row(
                    f"filter {share:.1%}: one query",
                    seconds * 1e6,
                    theirs * 1e6,
                    "us",
                    "lower",
                    "faiss, IDSelector",
                )
            )
    return rows


def run(scale: str, *, seed: int, progress: Progress) -> Report:
    full, rng = scale == "full", np.random.default_rng(seed)
    HNSWIndex(16, metric="l2").warmup()
    HNSWIndex(16, metric="cosine").warmup()
    rows: list[Row] = []
    sizes = [(20_000, 128), (20_000, 384), (100_000, 128), (100_000, 384)] if full else [(2_500, 32)]
    repeats = 3 if full else 2
    for n, dim in sizes:
        data = clustered(n + 500, dim, rng)
        vectors, queries = data[500:], data[: 500 if full else 60]
        if (n, dim) == sizes[0]:  # first of all: what needs two idle cores
            rows += threads(vectors, queries)
        found, _ = compare(f"{n // 1000}k x {dim}", vectors, queries, "l2", repeats, progress)
        rows += found
        if (n, dim) == sizes[0]:
            index = HNSWIndex(HNSWConfig(dim, "l2", capacity=n, threads=1))
            index.add(vectors)
            rows += filters(vectors, queries[:100], index, rng)
            rows += together(vectors, queries, 20.0 if full else 1.0)
            progress("churn", 0, 1)
            rows += churn(vectors, queries, rng)
    if full:
        data = embedded(21_000, progress)
        order = rng.permutation(len(data))
        found, _ = compare(
            f"{(len(data) - 500) // 1000}k MiniLM sentences",
            data[order[500:]],
            data[order[:500]],
            "cosine",
            repeats,
            progress,
        )
        rows += found
    return Report("hnsw", scale, tuple(rows), environment(), seed)  # pyright: ignore[reportArgumentType]
