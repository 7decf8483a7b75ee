"""The graph index against brute force, under churn, filters, threads, crashes and bad input."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from sharewell.ann import FlatIndex, HNSWConfig, HNSWIndex, HNSWTransformer, IndexFormatError
from sharewell.ann.base import METRICS, Metric, Strategy
from sharewell.ann.repair import reachable


def clustered(n: int, dim: int, seed: int = 0, clusters: int = 300) -> np.ndarray:
    """Vectors around ``clusters`` centres of unequal weight, as embeddings of text lie."""
    rng = np.random.default_rng(seed)
    centres = np.random.default_rng(12345).standard_normal((clusters, dim))
    weight = 1 / np.arange(1, clusters + 1)
    which = rng.choice(clusters, n, p=weight / weight.sum())
    return (centres[which] + 0.7 * rng.standard_normal((n, dim))).astype(np.float32)


def brute(vectors: np.ndarray, queries: np.ndarray, k: int, metric: str) -> tuple[np.ndarray, np.ndarray]:
    """Labels (row numbers) and distances in float64."""
    x, q = vectors.astype(np.float64), queries.astype(np.float64)
    if metric == "cosine":
        x, q = (a / np.linalg.norm(a, axis=1, keepdims=True) for a in (x, q))
    if metric == "l2":
        d = ((q[:, None] - x[None]) ** 2).sum(-1)
    else:
        d = 1 - q @ x.T
    order = np.argsort(d, axis=1, kind="stable")[:, :k]
    return order, np.take_along_axis(d, order, axis=1)


def recall(found: np.ndarray, true: np.ndarray) -> float:
    return float(
        np.mean([len(set(a) & set(b)) / len(b) for a, b in zip(found.tolist(), true.tolist(), strict=True)])
    )


@pytest.fixture(scope="module")
def corpus() -> np.ndarray:
    return clustered(5000, 64)


@pytest.fixture(scope="module")
def built(corpus: np.ndarray) -> HNSWIndex:
    index = HNSWIndex(64, metric="l2")
    index.add(corpus, threads=1)
    return index


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("strategy", ["graph", "scan"])
def test_with_ef_of_all_vectors_the_answer_is_brute_force(metric: Metric, strategy: Strategy):
    rng = np.random.default_rng(1)
    vectors, queries = (rng.standard_normal((n, 24)).astype(np.float32) for n in (2000, 50))
    index = HNSWIndex(24, metric=metric)
    index.add(vectors)
    found = index.search(queries, 10, ef=2000, strategy=strategy)
    labels, distances = brute(vectors, queries, 10, metric)
    np.testing.assert_allclose(found.distances, distances, rtol=2e-4, atol=2e-5)
    differ = found.labels != labels
    assert np.abs(found.distances - distances)[differ].max(initial=0) < 2e-4  # only ties may swap
    assert differ.mean() < 0.01
    assert found.strategy == strategy


def test_recall_on_clustered_vectors(built: HNSWIndex, corpus: np.ndarray):
    queries = clustered(300, 64, seed=7)
    found = built.search(queries, 10, ef=100, strategy="graph")
    assert recall(found.labels, brute(corpus, queries, 10, "l2")[0]) >= 0.95


@pytest.mark.parametrize("share", [0.5, 0.1, 0.01, 0.001])
@pytest.mark.parametrize("strategy", ["auto", "graph"])
def test_a_filter_lets_only_its_labels_through(
    built: HNSWIndex, corpus: np.ndarray, share: float, strategy: Strategy
):
    rng = np.random.default_rng(2)
    allowed = rng.choice(len(corpus), int(share * len(corpus)), replace=False)
    queries = clustered(60, 64, seed=8)
    found = built.search(queries, 10, ef=100, filter=allowed, strategy=strategy)
    k = min(10, len(allowed))
    assert set(found.labels[:, :k].ravel()) <= set(allowed.tolist())
    assert (found.labels[:, k:] == -1).all()
    true = allowed[brute(corpus[allowed], queries, k, "l2")[0]]
    assert recall(found.labels[:, :k], true) >= 0.95


def test_the_cheaper_way_is_taken(built: HNSWIndex, corpus: np.ndarray):
    assert built.search(corpus[:1], 5).strategy == "graph"
    assert built.search(corpus[:1], 5, filter=np.arange(40)).strategy == "scan"
    assert built.search(corpus[:1], 5, ef=5000).strategy == "scan"


def test_every_vector_is_reached_in_a_walk(built: HNSWIndex):
    stats = built.stats()
    assert (stats.vectors, stats.unreachable, stats.tombstones) == (5000, 0, 0)
    assert sum(stats.degrees) == 5000 and len(stats.degrees) <= 33


def test_thousands_of_equal_vectors_stay_connected():
    index = HNSWIndex(8, metric="l2", ef_construction=40)
    index.add(np.ones((5000, 8)))
    index.add(np.full((20, 8), 2.0))
    assert index.stats().unreachable == 0
    found = index.search(np.full(8, 2.0), 20, ef=64, strategy="graph")
    assert set(found.labels[0].tolist()) == set(range(5000, 5020))


def test_churn_keeps_the_recall_of_a_fresh_build(corpus: np.ndarray):
    rng = np.random.default_rng(3)
    index = HNSWIndex(64, metric="l2")
    labels = index.add(corpus[:4000])
    vectors = dict(zip(labels.tolist(), corpus[:4000], strict=True))
    for turn in range(5):
        gone = rng.choice(list(vectors), 1200, replace=False)
        index.remove(gone)
        for label in gone.tolist():
            del vectors[label]
        fresh = clustered(1200, 64, seed=50 + turn)
        vectors |= dict(zip(index.add(fresh).tolist(), fresh, strict=True))
    index.compact()
    assert index.stats().unreachable == 0 and index.stats().tombstones == 0
    names, rows = np.array(list(vectors)), np.array(list(vectors.values()))
    queries = clustered(200, 64, seed=9)
    true = brute(rows, queries, 10, "l2")[0]
    anew = HNSWIndex(64, metric="l2")
    anew.add(rows)
    churned = index.search(queries, 10, ef=64, strategy="graph").labels
    built_anew = anew.search(queries, 10, ef=64, strategy="graph").labels
    assert recall(churned, names[true]) >= recall(built_anew, true) - 0.01


def test_removed_labels_are_never_returned_even_when_all_around_are_gone(corpus: np.ndarray):
    index = HNSWIndex(64, metric="l2")
    index.add(corpus[:3000])
    near = index.search(corpus[0], 900).labels[0]
    index.remove(near)
    for strategy in ("graph", "scan"):
        found = index.search(corpus[0], 10, strategy=strategy)
        assert not set(found.labels[0].tolist()) & set(near.tolist())
        assert (found.labels >= 0).all()


def test_k_beyond_the_live_vectors_is_padded(corpus: np.ndarray):
    index = HNSWIndex(64)
    index.add(corpus[:5])
    index.remove([1, 3])
    for strategy in ("graph", "scan"):
        found = index.search(corpus[:2], 8, strategy=strategy)
        assert (np.sort(found.labels, axis=1) == [[-1] * 5 + [0, 2, 4]] * 2).all()
        assert np.isinf(found.distances[:, 3:]).all()


def test_an_empty_index_finds_nothing():
    index = HNSWIndex(4)
    assert (index.search(np.ones(4), 3).labels == -1).all()
    assert (index.search(np.ones(4), 3, strategy="graph").labels == -1).all()
    assert index.range_search(np.ones(4), 1.0).labels.shape == (1, 0)
    assert index.stats().vectors == 0


def test_updating_moves_a_label(corpus: np.ndarray):
    index = HNSWIndex(64, metric="l2")
    index.add(corpus[:200])
    index.update([7], corpus[300:301])
    assert index.search(corpus[300], 1, strategy="graph").labels[0, 0] == 7
    np.testing.assert_array_equal(index.get([7]), corpus[300:301])
    assert len(index) == 200


@pytest.mark.parametrize("index", [HNSWIndex(16, metric="l2"), FlatIndex(16, "l2")], ids=["hnsw", "flat"])
def test_range_search_finds_everything_inside(index: HNSWIndex | FlatIndex):
    vectors = clustered(1500, 16)
    index.add(vectors)
    found = index.range_search(vectors[0], 15.0)
    inside = np.flatnonzero(((vectors - vectors[0]) ** 2).sum(1) <= 15.0)
    assert len(inside) > 5
    assert set(found.labels[0].tolist()) == set(inside.tolist())


def test_int8_storage_finds_nearly_the_same_in_a_quarter_of_the_bytes(corpus: np.ndarray, built: HNSWIndex):
    small = HNSWIndex(64, metric="l2", storage="int8")
    small.add(corpus)
    queries = clustered(200, 64, seed=11)
    true = brute(corpus, queries, 10, "l2")[0]
    assert recall(small.search(queries, 10, ef=100, strategy="graph").labels, true) >= 0.93
    assert small._rows.graph.vectors.nbytes * 4 == built._rows.graph.vectors.nbytes


def test_searches_are_right_while_others_insert_and_remove():
    rows = clustered(4000, 32)
    index = HNSWIndex(32, metric="l2")
    index.add(rows[:1000], np.arange(1000))
    stop, failures = threading.Event(), []

    def write(first: int, last: int) -> None:
        try:
            for a in range(first, last, 50):
                index.add(rows[a : a + 50], np.arange(a, a + 50))
                if a % 500 == 0:
                    index.remove(np.arange(a, a + 25))
        except Exception as error:
            failures.append(error)

    def read() -> None:
        rng = np.random.default_rng(0)
        try:
            while not stop.is_set():
                at = int(rng.integers(0, 1000))
                found = index.search(rows[at], 5, ef=80, strategy="graph")
                assert found.labels[0, 0] == at and found.distances[0, 0] == 0
                assert found.labels.max() < len(rows)
        except Exception as error:
            failures.append(error)

    writers = [threading.Thread(target=write, args=r) for r in ((1000, 2500), (2500, 4000))]
    readers = [threading.Thread(target=read) for _ in range(2)]
    for thread in (*writers, *readers):
        thread.start()
    for thread in writers:
        thread.join()
    stop.set()
    for thread in readers:
        thread.join()
    assert not failures
    kept = np.array(sorted(index._rows.slot_of))
    assert len(kept) == 4000 - 6 * 25
    alone = HNSWIndex(32, metric="l2")
    alone.add(rows[kept], kept, threads=1)
    sample = kept[::7]
    for one in (index, alone):
        hits = one.search(rows[sample], 1, ef=64, strategy="graph").labels[:, 0] == sample
        assert hits.mean() >= 0.99


def test_a_parallel_build_finds_as_much_as_a_serial_one(corpus: np.ndarray, built: HNSWIndex):
    parallel = HNSWIndex(64, metric="l2")
    parallel.add(corpus, threads=2)
    queries = clustered(300, 64, seed=13)
    true = brute(corpus, queries, 10, "l2")[0]
    both = [recall(i.search(queries, 10, ef=64, strategy="graph").labels, true) for i in (parallel, built)]
    assert both[0] >= both[1] - 0.005
    assert parallel.stats().unreachable == 0


def test_a_serial_build_is_reproducible(corpus: np.ndarray, tmp_path: Path):
    for name in ("a", "b"):
        index = HNSWIndex(64, seed=5)
        index.add(corpus[:800], threads=1)
        index.save(tmp_path / name)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


@pytest.mark.parametrize("mmap", [False, True])
@pytest.mark.parametrize("storage", ["float32", "int8"])
def test_a_loaded_index_answers_bit_for_bit_and_can_grow(
    corpus: np.ndarray, tmp_path: Path, mmap: bool, storage: str
):
    index = HNSWIndex(64, storage=storage)
    index.add(corpus[:3000])
    index.remove(np.arange(50))
    index.save(tmp_path / "index")
    before = (tmp_path / "index").read_bytes()
    again = HNSWIndex.load(tmp_path / "index", mmap=mmap)
    queries = clustered(40, 64, seed=17)
    for strategy in ("graph", "scan"):
        a, b = (i.search(queries, 10, strategy=strategy) for i in (index, again))
        np.testing.assert_array_equal(a.labels, b.labels)
        np.testing.assert_array_equal(a.distances, b.distances)
    again.add(corpus[3000:3200])
    again.remove(np.arange(100, 200))
    again.compact()
    assert len(again) == 3000 - 50 + 200 - 100 and again.stats().unreachable == 0
    assert (tmp_path / "index").read_bytes() == before


def test_a_saved_flat_index_comes_back(corpus: np.ndarray, tmp_path: Path):
    index = FlatIndex(64)
    index.add(corpus[:100], np.arange(100) * 3)
    index.save(tmp_path / "flat")
    again = FlatIndex.load(tmp_path / "flat")
    np.testing.assert_array_equal(again.search(corpus[:9], 4).labels, index.search(corpus[:9], 4).labels)
    with pytest.raises(IndexFormatError, match="holds a flat index"):
        HNSWIndex.load(tmp_path / "flat")


@settings(max_examples=60)
@given(data=st.data())
def test_a_flipped_or_cut_byte_is_always_noticed(
    data: st.DataObject, tmp_path_factory: pytest.TempPathFactory
):
    folder = tmp_path_factory.mktemp("damaged")
    index = HNSWIndex(8, M=2, ef_construction=8)
    index.add(np.random.default_rng(0).standard_normal((60, 8)))
    index.save(folder / "index")
    raw = bytearray((folder / "index").read_bytes())
    at = data.draw(st.integers(0, len(raw) - 1))
    if data.draw(st.booleans()):
        raw[at] ^= data.draw(st.integers(1, 255))
    else:
        del raw[at:]
    (folder / "index").write_bytes(raw)
    with pytest.raises(IndexFormatError, match="index"):
        HNSWIndex.load(folder / "index")


def test_a_kill_during_a_save_leaves_the_first_file(tmp_path: Path):
    script = f"""
import numpy as np
from sharewell.ann import HNSWIndex
index = HNSWIndex(32)
index.add(np.random.default_rng(0).standard_normal((500, 32)))
index.save({str(tmp_path / "index")!r})
print("saved", flush=True)
index.add(np.random.default_rng(1).standard_normal((20000, 32)), np.arange(500, 20500))
print("saving", flush=True)
while True:
    index.save({str(tmp_path / "index")!r})
"""
    for pause_s in (0.0, 0.003, 0.02):
        process = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True)
        assert process.stdout is not None
        assert process.stdout.readline().strip() == "saved"
        assert process.stdout.readline().strip() == "saving"
        time.sleep(pause_s)
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
        assert len(HNSWIndex.load(tmp_path / "index")) in (500, 20500)


@pytest.mark.parametrize(
    ("act", "told"),
    [
        (lambda i: i.add(np.ones((2, 3))), r"vectors must have shape \[n, 4\], got \(2, 3\)"),
        (lambda i: i.add([[1, 2, 3, 4], [1, np.nan, 3, 4]]), "row 1 holds NaN"),
        (lambda i: i.add([[1, 2, 3, 4], [0, 0, 0, 0]]), "row 1 is zero"),
        (lambda i: i.add(np.ones((2, 4)), [5, 5]), "row 1 repeats label 5"),
        (lambda i: i.add(np.ones((2, 4)), [9, 0]), "row 1 is label 0, which is in the index"),
        (lambda i: i.add(np.ones((1, 4)), [2**64 - 1]), "beyond int64"),
        (lambda i: i.add(np.ones((1, 4)), [-3]), "at least 0, got -3"),
        (lambda i: i.add(np.ones((2, 4)), [7]), "one entry for each of 2 vectors, got 1"),
        (lambda i: i.search(np.ones(4), 0), "k must be a whole number of at least 1, got 0"),
        (lambda i: i.search(np.ones(4), ef=0), "ef must be at least 1, got 0"),
        (lambda i: i.search(np.ones(4), strategy="fast"), "strategy must be auto, graph or scan"),
        (lambda i: i.search(np.ones(4), threads=0), "threads must be at least 1, got 0"),
        (lambda i: i.range_search(np.ones(4), np.nan), "radius must be finite"),
    ],
)
def test_wrong_input_is_refused_by_name_and_changes_nothing(act, told: str):
    index = HNSWIndex(4)
    index.add(np.eye(4))
    with pytest.raises(ValueError, match=told):
        act(index)
    assert len(index) == 4 and index.stats().vectors == 4


def test_removing_what_is_not_there_removes_nothing():
    index = HNSWIndex(4)
    index.add(np.eye(4))
    with pytest.raises(KeyError, match="label 9"):
        index.remove([0, 9])
    assert 0 in index and len(index) == 4


@pytest.mark.parametrize(
    ("field", "value", "allowed"),
    [
        ("dim", 0, r"in \[1, 65536\]"),
        ("metric", "manhattan", "cosine, l2 or ip"),
        ("M", 1, r"in \[2, 512\]"),
        ("ef", 0, r"in \[1, 1000000\]"),
        ("storage", "float16", "float32 or int8"),
        ("threads", 0, "None or at least 1"),
    ],
)
def test_a_config_names_field_and_range(field: str, value: object, allowed: str):
    with pytest.raises(ValueError, match=f"^{field} must be {allowed}, got {value!r}"):
        HNSWConfig(**({"dim": 8} | {field: value}))  # pyright: ignore[reportArgumentType]


def test_the_neighbours_class_gives_a_distance_graph():
    vectors = clustered(400, 16)
    graph = HNSWTransformer(6).fit_transform(vectors)
    assert graph.shape == (400, 400) and (np.diff(graph.indptr) == 6).all()
    distances, labels = HNSWTransformer(6).fit(vectors).kneighbors(vectors[:20])
    true, squared = brute(vectors, vectors[:20], 6, "l2")
    np.testing.assert_allclose(distances, np.sqrt(squared), atol=1e-3)
    assert recall(labels, true) > 0.99


class Churn(RuleBasedStateMachine):
    """Random adds, removals, updates and compactions against a dict."""

    @initialize(metric=st.sampled_from(METRICS))
    def start(self, metric: str) -> None:
        self.rng = np.random.default_rng(0)
        self.metric = metric
        self.index = HNSWIndex(6, metric=metric, M=3, ef_construction=16, capacity=4)
        self.model: dict[int, np.ndarray] = {}

    @rule(n=st.integers(0, 30))
    def add(self, n: int) -> None:
        rows = self.rng.standard_normal((n, 6)).astype(np.float32)
        for label, row in zip(self.index.add(rows).tolist(), rows, strict=True):
            assert label not in self.model
            self.model[label] = row

    @rule(share=st.floats(0, 1))
    def remove(self, share: float) -> None:
        gone = [label for label in self.model if self.rng.random() < share]
        if gone:
            self.index.remove(gone)
        for label in gone:
            del self.model[label]

    @rule()
    def update(self) -> None:
        if self.model:
            label = next(iter(self.model))
            row = self.rng.standard_normal(6).astype(np.float32)
            self.index.update([label], row)
            self.model[label] = row

    @rule()
    def compact(self) -> None:
        self.index.compact()
        assert self.index.stats().tombstones == 0

    @invariant()
    def answers_are_those_of_brute_force(self) -> None:
        if not hasattr(self, "index"):
            return
        assert len(self.index) == len(self.model)
        if not self.model:
            return
        names, rows = np.array(list(self.model)), np.array(list(self.model.values()))
        query = self.rng.standard_normal((1, 6)).astype(np.float32)
        k = min(3, len(names))
        ef = len(names) + self.index.stats().tombstones
        found = self.index.search(query, k, ef=ef, strategy="graph")
        _, distances = brute(rows, query, k, self.metric)
        np.testing.assert_allclose(found.distances, distances, rtol=1e-4, atol=1e-5)
        assert set(found.labels[0].tolist()) <= set(names.tolist())


Churn.TestCase.settings = settings(max_examples=15, stateful_step_count=15, deadline=None)
TestChurn = Churn.TestCase


def test_a_second_process_finds_the_compiled_kernels():
    script = (
        "import time, numpy as np\n"
        "from sharewell.ann import HNSWIndex, insertion, searching, single\n"
        "i = HNSWIndex(8); i.add(np.eye(8)); i.search(np.ones(8), 1, strategy='graph')\n"
        "i.search(np.ones(8, np.float32), 1, strategy='graph')\n"
        "print(sum(sum(f.stats.cache_misses.values()) for f in ("
        "searching.search_many, insertion.insert_many, single.look_up)))\n"
    )
    for _ in range(2):
        done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "0"


def test_reachability_counts_only_what_a_walk_reaches(built: HNSWIndex):
    g = built._rows.graph
    assert reachable(g, 5000).sum() == 5000
    lonely = g._replace(count0=np.zeros_like(g.count0))
    assert reachable(lonely, 5000).sum() == 1
