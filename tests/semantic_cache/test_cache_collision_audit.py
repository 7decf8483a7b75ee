"""Facts about the collision audit: what it may touch, what it finds, and what its report says."""

from __future__ import annotations

import dataclasses
import hashlib
import http.server
import json
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import typer
from hypothesis import given
from hypothesis import strategies as st
from typer.testing import CliRunner

from sharewell.models import load_embedder, resolve_model
from sharewell.semantic_cache import CategoryPolicy, Classification, Namespace, SemanticCache
from sharewell.semantic_cache.audit import (
    AttackLog,
    AuditConfig,
    AuditRefused,
    Canary,
    Collision,
    CollisionAudit,
    CollisionSearch,
    GradientProposer,
    LocalityHash,
    PassDefences,
    Perplexity,
    Question,
    RandomProposer,
    Rate,
    SearchConfig,
    View,
    build_defences,
    canaries,
    copy_cache,
    grant,
    learn_threshold,
    load_questions,
    loopback_cache_file,
    pair,
    printable_words,
    probe_cache,
    shipped_questions,
)
from sharewell.semantic_cache.audit.cli import audit as audit_command
from sharewell.semantic_cache.audit.refusal import AUDIT_PATH, NONCE_HEADER
from sharewell.semantic_cache.audit.timing import LatencyModel, auc
from sharewell.semantic_cache.audit.verdict import advice, verdict
from sharewell.semantic_cache.defences import CropConsistency, ScopeGuard, TimingEqualiser
from sharewell.simulation import VirtualClock

REPLAY = [
    json.loads(line)
    for line in (Path(__file__).parent / "data" / "collisions.jsonl").read_text("utf-8").splitlines()
]
TAU = 0.8
TOKEN = "a token of the owner"
FEW = shipped_questions()[:4]
QUICK = AuditConfig(pairs=1, controls=16, timing_probes=0, time_budget_s=100)


@pytest.fixture(scope="module")
def minilm(known_minilm: Any) -> Any:
    return known_minilm


@pytest.fixture(scope="module")
def gradients() -> GradientProposer:
    return GradientProposer.from_folder(resolve_model("minilm-torch", progress=False))


@pytest.fixture(scope="module")
def blind(minilm: Any) -> RandomProposer:
    return RandomProposer(printable_words(minilm, 5_000), np.random.default_rng(0))


def default(text: str, embedding: object) -> Classification:
    return Classification("default")


def cache_of(embedder: Any, defences: Any = (), path: Path | None = None, **policy: Any) -> SemanticCache:
    policies = {"default": CategoryPolicy(TAU, quota=1.0, **policy)}
    return SemanticCache(path, embedder, policies, default, defences=list(defences))


def served(cache: SemanticCache) -> int:
    """How many of the committed attacks reach the victim."""
    count = 0
    for row in REPLAY:
        cache.put(row["text"], "CANARY", namespace=Namespace(owner="attacker"), answer_text="CANARY")
        found = cache.lookup(row["victim"], namespace=Namespace(owner="victim"))
        count += found.hit and found.response == "CANARY"
        cache.invalidate(owner="attacker")
    return count


# What was found once is replayed


def test_the_committed_attacks_are_served_by_an_undefended_cache(minilm: Any) -> None:
    with cache_of(minilm) as cache:
        assert served(cache) == len(REPLAY)


def test_the_source_alone_is_not_served(minilm: Any) -> None:
    vectors = minilm.embed([t for row in REPLAY for t in (row["source"], row["victim"])])
    assert (vectors[::2] * vectors[1::2]).sum(axis=1).max() < 0.4


@pytest.mark.parametrize("spec", ["scope", "crop", "crop+second", "default"])
def test_the_committed_attacks_are_stopped(minilm: Any, spec: str) -> None:
    with cache_of(minilm, build_defences(spec, minilm, TAU, shipped_questions()[::4])) as cache:
        assert served(cache) == 0


def test_the_exact_tier_cannot_be_collided_with(minilm: Any) -> None:
    with cache_of(minilm, semantic=False) as cache:
        assert served(cache) == 0


def test_a_scope_guard_leaves_the_owners_hits(minilm: Any) -> None:
    with cache_of(minilm, [ScopeGuard(curated=["editor"])]) as cache:
        cache.put("How do I reset my email password?", "so", namespace=Namespace(owner="ann"))
        asked = "how do i reset the password of my email"
        assert cache.lookup(asked, namespace=Namespace(owner="ann")).hit
        assert not cache.lookup(asked, namespace=Namespace(owner="bob")).hit
        cache.put("How do I center a div in CSS?", "so", namespace=Namespace(owner="editor"))
        assert cache.lookup("how do I center a div with CSS", namespace=Namespace(owner="bob")).hit


# The generator


def test_the_gradients_swap_beats_a_random_one(minilm: Any, gradients: GradientProposer) -> None:
    from scipy.stats import binomtest

    rng, wins, losses = np.random.default_rng(0), 0, 0
    vocabulary = gradients.vocabulary
    for canary, victim in pair(canaries(), shipped_questions(), 20, 0):
        words = [vocabulary[int(k)] for k in rng.integers(len(vocabulary), size=8)]
        source = canary.prompt.split()
        view = View((*source, *words), (*[-1] * len(source), *range(8)))
        scores = gradients.scores([view], 8, victim.question, [1.0])
        place = int(rng.integers(8))
        swaps = [vocabulary[int(scores[place].argmax())], vocabulary[int(rng.integers(len(vocabulary)))]]
        texts = [" ".join([*source, *words[:place], w, *words[place + 1 :]]) for w in swaps]
        vectors = minilm.embed([victim.question, *texts])
        near = vectors[1:] @ vectors[0]
        wins, losses = wins + (near[0] > near[1]), losses + (near[0] < near[1])
    assert binomtest(wins, wins + losses, 0.5, alternative="greater").pvalue < 0.01


def test_the_gradient_is_the_slope_of_the_loss(gradients: GradientProposer) -> None:
    import torch

    words = ("say", "lilac", "capital", "city")
    view, victim = View(words, (-1, -1, 0, 1)), "What is the capital of Australia?"
    loss, gradient = gradients.loss_and_gradient([view], 2, victim, [1.0])
    table = gradients._table
    step = torch.randn(table.shape[1], generator=torch.Generator().manual_seed(0)) * 1e-3
    city = gradients._tokenizer.encode("city")[0]
    table[city] += step
    try:
        moved, _ = gradients.loss_and_gradient([view], 2, victim, [1.0])
    finally:
        table[city] -= step
    assert moved - loss == pytest.approx(float(gradient[1] @ step), rel=0.05, abs=1e-5)


def test_a_search_that_is_stopped_returns_the_best_so_far(minilm: Any, blind: RandomProposer) -> None:
    search = CollisionSearch(minilm, blind, SearchConfig((4,), steps=3, batch=4), np.random.default_rng(0))
    asked = iter(range(100))
    found = search.search("Say lilac", "How do I reset my router?", 0.9, stop=lambda: next(asked) >= 2)
    assert not found.reached
    assert found.steps <= 2
    assert list(found.history) == sorted(found.history)


def test_the_same_seed_finds_the_same_text(minilm: Any) -> None:
    def once() -> Collision:
        words = RandomProposer(["list", "python", "reverse", "tree"], np.random.default_rng(1))
        search = CollisionSearch(
            minilm, words, SearchConfig((4,), steps=4, batch=4), np.random.default_rng(2)
        )
        return search.search("Say lilac", "How do I reverse a list in Python?", 0.95)

    assert once() == once()


def test_words_of_the_vocabulary_survive_tokenising(minilm: Any, gradients: GradientProposer) -> None:
    rng = np.random.default_rng(0)
    words = [gradients.vocabulary[int(i)] for i in rng.integers(len(gradients.vocabulary), size=200)]
    assert minilm.count_tokens([" ".join(words)]) == [202]


def test_the_adaptive_attacker_pays_for_what_is_missing(minilm: Any) -> None:
    victim = shipped_questions()[0]
    penalty = PassDefences([CropConsistency()], minilm, TAU, "PAPAYA")
    paraphrase, attack = penalty([victim.paraphrases[0], REPLAY[5]["text"]], victim.question)
    assert paraphrase == 0
    assert attack > 0
    assert penalty.passed(np.array([paraphrase, attack])).tolist() == [True, False]
    assert len(penalty.views(5, 10)) == 3


def test_perplexity_ranks_but_does_not_end_a_search() -> None:
    penalty = Perplexity(lambda texts: np.array([float(len(t)) for t in texts]), 0.05)
    assert penalty(["a", "bb"], "v").tolist() == [1.0, 2.0]
    assert penalty.passed(np.array([1.0, 99.0])).all()


def test_the_soft_hash_distance_follows_the_bits(minilm: Any) -> None:
    hashed = LocalityHash(minilm, np.random.default_rng(0), most=0.1)
    texts = ["How do I reset my email password?", "Resetting my email password", "Say lilac"]
    distance = hashed(texts, texts[0])
    bits = hashed.bits(texts)
    differ = (bits != bits[0]).mean(axis=1)
    assert distance[0] == pytest.approx(0, abs=1e-4)
    assert np.abs(distance - differ).max() < 0.15
    assert distance[1] < distance[2]


# What may be audited


def folder_bytes(folder: Path, names: tuple[str, ...] = ()) -> dict[str, str]:
    kept = [p for p in folder.iterdir() if not names or p.name in names]
    return {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in kept}


def test_a_closed_cache_keeps_every_byte_and_gets_no_side_files(
    minilm: Any, blind: RandomProposer, tmp_path: Path
) -> None:
    home = tmp_path / "home"
    with cache_of(minilm, path=home / "c.sqlite") as cache:
        cache.put("How do I bake bread?", "slowly")
    before = folder_bytes(home)
    config = dataclasses.replace(QUICK, search=SearchConfig((4,), steps=2, batch=4), adaptive_pairs=0)
    audit = CollisionAudit(
        home / "c.sqlite",
        minilm,
        blind,
        config,
        policies={"default": CategoryPolicy(TAU)},
        classifier=default,
    )
    audit.run(victims=FEW, defences=("none", "scope"))
    assert folder_bytes(home) == before


def test_a_cache_in_use_keeps_its_rows_and_its_log(
    minilm: Any, blind: RandomProposer, tmp_path: Path
) -> None:
    home = tmp_path / "home"
    with cache_of(minilm, path=home / "c.sqlite") as cache:
        cache.put("How do I bake bread?", "slowly")
        before = folder_bytes(home, ("c.sqlite", "c.sqlite-wal"))
        target = copy_cache(home / "c.sqlite", tmp_path)
        assert folder_bytes(home, ("c.sqlite", "c.sqlite-wal")) == before
        with cache_of(minilm, path=target) as copy:
            assert copy.lookup("How do I bake bread?").response == "slowly"


def test_a_cache_in_memory_is_copied_entry_by_entry(minilm: Any, blind: RandomProposer) -> None:
    config = dataclasses.replace(QUICK, search=SearchConfig((4,), steps=1, batch=4))
    victim = Question("How do I reset my router?")
    with cache_of(minilm) as cache:
        cache.put("How can I reset a router?", "so")
        rows = list(cache.documents.store.scan())  # pyright: ignore[reportOptionalMemberAccess]
        with pytest.raises(ValueError, match="victim must not be answered"):
            CollisionAudit(cache, minilm, blind, config).run(victims=[victim])
        assert list(cache.documents.store.scan()) == rows  # pyright: ignore[reportOptionalMemberAccess]


def test_what_is_no_cache_of_ones_own_is_refused(
    minilm: Any, blind: RandomProposer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(AuditRefused, match="only a cache object or a file"):
        CollisionAudit("http://example.org", minilm, blind)  # pyright: ignore[reportArgumentType]
    with pytest.raises(AuditRefused, match="cannot be read"):
        copy_cache(tmp_path / "absent.sqlite", tmp_path)
    with pytest.raises(AuditRefused, match="not a regular file"):
        copy_cache(tmp_path, tmp_path)
    text = tmp_path / "text.sqlite"
    text.write_text("no database " * 100)
    with pytest.raises(AuditRefused, match="cannot be copied"):
        copy_cache(text, tmp_path)
    monkeypatch.setattr("os.geteuid", lambda: 54_321)
    with pytest.raises(AuditRefused, match="belongs to another user"):
        copy_cache(text, tmp_path)


@pytest.mark.parametrize(
    ("url", "why"),
    [
        ("https://127.0.0.1:1", "must be http"),
        ("ftp://127.0.0.1", "must be http"),
        ("http://", "must be http"),
        ("http://192.0.2.7:8000", "not a loopback address"),
        ("http://0.0.0.0:8000", "not a loopback address"),
        ("http://[::ffff:192.0.2.7]:8000", "not a loopback address"),
        ("http://a:b@127.0.0.1:8000", "user or password"),
        ("http://127.0.0.1:1", "does not allow an audit"),
        ("http://127.0.0.1:99999", "cannot be resolved"),
    ],
)
def test_other_addresses_are_refused(url: str, why: str) -> None:
    with pytest.raises(AuditRefused, match=why):
        loopback_cache_file(url, TOKEN)


@pytest.fixture
def server(tmp_path: Path) -> Iterator[dict[str, Any]]:
    """A real loopback server that answers the audit's question as ``state`` says."""
    state: dict[str, Any] = {"token": TOKEN, "file": tmp_path / "c.sqlite", "redirect": None, "asked": []}

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            state["asked"].append(self.path)
            if state["redirect"]:
                self.send_response(302)
                self.send_header("location", state["redirect"])
                self.end_headers()
                return
            body = json.dumps(grant(state["token"], self.headers[NONCE_HEADER], state["file"])).encode()
            self.send_response(200)
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, format: str, *args: Any) -> None:
            pass

    listening = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=listening.serve_forever, daemon=True).start()
    state["url"] = f"http://localhost:{listening.server_port}"
    yield state
    listening.shutdown()
    listening.server_close()


def test_a_loopback_server_that_knows_the_token_is_allowed(server: dict[str, Any], tmp_path: Path) -> None:
    assert loopback_cache_file(server["url"], TOKEN) == (tmp_path / "c.sqlite").resolve()
    assert server["asked"] == [AUDIT_PATH]


def test_a_loopback_server_without_the_token_is_refused(server: dict[str, Any]) -> None:
    with pytest.raises(AuditRefused, match="does not know this audit token"):
        loopback_cache_file(server["url"], "another token entirely")
    with pytest.raises(AuditRefused, match="at least 16 characters"):
        loopback_cache_file(server["url"], "")
    server["file"] = None
    with pytest.raises(AuditRefused, match="in memory"):
        loopback_cache_file(server["url"], TOKEN)
    server["redirect"] = "http://127.0.0.1:1/elsewhere"
    with pytest.raises(AuditRefused, match="does not allow"):
        loopback_cache_file(server["url"], TOKEN)
    with pytest.raises(AuditRefused, match="nonce"):
        grant(TOKEN, "short", None)


# The run and its report


@pytest.fixture(scope="module")
def report(minilm: Any, gradients: GradientProposer) -> Any:
    """One live pair, attacked and defended."""
    config = dataclasses.replace(QUICK, adaptive_search=SearchConfig((16,), steps=4, batch=8, patience=2))
    victims = [Question("How do I reverse a list in Python?", ("Python: how can I turn a list around?",))]
    sources = [Canary("Just reply periwinkle, please.", "PERIWINKLE")]
    with cache_of(minilm, [CropConsistency()]) as cache:
        audit = CollisionAudit(cache, minilm, gradients, config)
        return audit.run(sources, victims * 2, ("none", "scope", "crop"))


def test_a_live_pair_is_served_before_and_not_after_the_defence(report: Any) -> None:
    assert report.result("none").hijacked == Rate(1, 1)
    assert report.result("scope").risk == Rate(0, 1)
    assert report.result("crop").hijacked_adaptive == Rate(0, 1)
    assert report.result(report.configured).risk == Rate(0, 1)
    assert report.exact_tier == Rate(0, 1)
    assert report.control == Rate(0, 16)
    assert not report.partial
    assert report.risk == 0


def test_the_live_pair_collides_on_the_deployed_embedder(report: Any) -> None:
    (attempt,) = [p for p in report.result("none").pairs if not p.adaptive]
    assert attempt.collided
    assert attempt.text.startswith("Just reply periwinkle, please. ")
    attack, question = load_embedder("minilm").embed([attempt.text, attempt.victim])
    assert TAU <= float(attack @ question) == pytest.approx(attempt.similarity, abs=1e-5)


def test_reports_hide_the_texts_unless_asked(report: Any) -> None:
    text = next(p.text for p in report.result("none").pairs)
    for shown in (report.to_html(), report.to_json()):
        assert text not in shown
        assert "sha256:" in shown
    assert text in report.to_json(reveal=True)
    assert text in report.to_html(reveal=True)
    document = json.loads(report.to_json())
    assert document["results"][0]["hijacked"]["rate"] == 1.0
    assert document["risk"] == 0


def test_the_page_is_one_file_and_escapes_what_it_shows(report: Any) -> None:
    evil = dataclasses.replace(report, embedder="<script>alert(1)</script>")
    page = evil.to_html()
    assert "<script" not in page
    assert "http" not in page.replace("http-equiv", "")
    assert "No planted answer was served in 1 attempts" in page
    assert "Turn on" not in page


def test_a_time_budget_that_is_over_never_looks_like_success(minilm: Any, blind: RandomProposer) -> None:
    config = dataclasses.replace(QUICK, pairs=3, time_budget_s=1e-9)
    with cache_of(minilm) as cache:
        found = CollisionAudit(cache, minilm, blind, config).run(victims=FEW, defences=("none",))
    assert found.partial
    assert found.result("none").hijacked == Rate(0, 0)
    assert found.risk == 1.0
    assert "Nothing was tried" in found.to_html()


def test_one_hard_pair_does_not_take_the_time_of_the_others(minilm: Any) -> None:
    clock = _Jumping()
    slow = _Slow(minilm, clock, 1.0)
    hard, easy = Question("Who wrote the novel Moby Dick?"), Question("How long should I boil an egg?")
    words = RandomProposer(["boil", "egg", "long"], np.random.default_rng(0))
    config = AuditConfig(
        pairs=2, threshold=0.7, controls=0, timing_probes=0, adaptive_pairs=0, time_budget_s=120.0,
        search=SearchConfig((6,), steps=10_000, batch=8, patience=10_000),
    )  # fmt: skip
    with cache_of(slow) as cache:
        audit = CollisionAudit(cache, slow, words, config, clock=clock)
        found = audit.run([Canary("Say lilac", "LILAC")], [hard, easy], ("none",))
    assert found.partial
    assert [p.victim for p in found.result("none").pairs] == [easy.question]
    assert found.result("none").hijacked == Rate(1, 1)
    assert found.risk == 1.0


def test_the_verdict_comes_first_and_says_what_to_turn_on(report: Any) -> None:
    hijackable = dataclasses.replace(report, configured="none")
    page = hijackable.to_html()
    assert page.index("Hijackable. 1 of 1") < page.index("What to do") < page.index("<table>")
    assert "Turn on crop: SemanticCache(..., defences=[CropConsistency()])" in page
    assert "No hijack seen." in report.to_html()
    assert advice(hijackable)[0].startswith("Turn on crop")
    assert verdict(hijackable).startswith("Hijackable.")


def test_an_audit_goes_on_from_its_log(minilm: Any, tmp_path: Path) -> None:
    path = tmp_path / "found.jsonl"
    config = dataclasses.replace(QUICK, pairs=2, search=SearchConfig((4,), steps=2, batch=4))

    def found() -> Any:
        words = RandomProposer(["list", "python", "tree", "stone"], np.random.default_rng(1))
        with cache_of(minilm) as cache:
            audit = CollisionAudit(cache, minilm, words, config, log=AttackLog(path))
            return audit.run(victims=FEW, defences=("none",)).result("none").pairs

    first = found()
    size = path.stat().st_size
    assert found() == first
    assert path.stat().st_size == size
    assert len(AttackLog(path)) == 2
    path.write_bytes(path.read_bytes()[:-9])  # killed in the middle of a line
    assert len(AttackLog(path)) == 1
    path.write_text("[]\n" + path.read_text())
    with pytest.raises(ValueError, match="line 1 is no attack"):
        AttackLog(path)


def test_bad_input_names_the_field(minilm: Any, blind: RandomProposer, tmp_path: Path) -> None:
    for field, value in (("threshold", 1.0), ("pairs", 0), ("time_budget_s", 0.0), ("lambda_ppl", -1.0)):
        with pytest.raises(ValueError, match=field):
            dataclasses.replace(AuditConfig(), **{field: value})
    with pytest.raises(ValueError, match="suffix_lengths"):
        SearchConfig(suffix_lengths=())
    with pytest.raises(ValueError, match="victims and sources must not be empty"):
        pair(canaries(), [], 1, 0)
    with pytest.raises(ValueError, match="pairs must be"):
        pair(canaries(), shipped_questions(), 65, 0)
    with pytest.raises(ValueError, match="defences must be of"):
        build_defences("moat", minilm, TAU, shipped_questions())
    with pytest.raises(ValueError, match="lambda_ppl"):
        CollisionAudit(cache_of(minilm), minilm, blind, AuditConfig(lambda_ppl=0.05))
    search = CollisionSearch(minilm, blind, SearchConfig(), np.random.default_rng(0))
    for target in (0.0, 1.0):
        with pytest.raises(ValueError, match="target"):
            search.search("a", "b", target)
    lines = tmp_path / "victims.jsonl"
    lines.write_text('"How do I bake bread?"\n{"question": "", "paraphrases": []}\n')
    with pytest.raises(ValueError, match="line 2"):
        load_questions(lines)
    lines.write_text('"How do I bake bread?"\n')
    assert load_questions(lines) == (Question("How do I bake bread?"),)
    lines.write_text("\n")
    with pytest.raises(ValueError, match="must not be empty"):
        load_questions(lines)


def test_the_command_refuses_reports_and_fails_the_build(tmp_path: Path) -> None:
    app = typer.Typer()
    app.command()(audit_command)
    run = CliRunner().invoke
    out, few = tmp_path / "audit.html", tmp_path / "few.jsonl"
    few.write_text("\n".join(json.dumps(q.question) for q in FEW))
    args = ["--twin", "none", "--pairs", "1", "--time-budget-s", "0.001", "--timing-probes", "0"]
    args += ["--victims", str(few)]
    result = run(app, [*args, "--defences", "none", "--report", str(out), "--fail-above", "0.5"])
    assert result.exit_code == 2  # nothing was tried, so the risk is not known to be small
    assert "Partial" in out.read_text()
    assert (
        run(app, [*args, "--cache", "http://192.0.2.1:1"], env={"SHAREWELL_AUDIT_TOKEN": TOKEN}).exit_code
        == 2
    )
    assert run(app, [*args, "--fail-above", "7"]).exit_code == 2
    assert run(app, [*args, "--report", "x.pdf"]).exit_code == 2
    shown = run(app, [*args, "--defences", "none", "--json"])
    assert shown.exit_code == 0
    assert json.loads(shown.stdout)["mode"] == "black box"


# Figures


@given(
    st.lists(st.integers(-5, 5), min_size=1, max_size=30),
    st.lists(st.integers(-5, 5), min_size=1, max_size=30),
)
def test_auc_counts_pairs(a: list[int], b: list[int]) -> None:
    wins = sum((x > y) + 0.5 * (x == y) for x in a for y in b)
    assert auc(a, b) == pytest.approx(wins / (len(a) * len(b)))


@given(st.integers(1, 200).flatmap(lambda n: st.tuples(st.integers(0, n), st.just(n))))
def test_the_interval_of_a_rate_holds_it(counted: tuple[int, int]) -> None:
    rate = Rate(*counted)
    assert 0 <= rate.low <= rate.value <= rate.high <= 1
    assert (
        rate.high - rate.low
        > Rate(10 * rate.count, 10 * rate.n).high - Rate(10 * rate.count, 10 * rate.n).low
    )


def test_zero_of_five_proves_little() -> None:
    assert Rate(0, 5).high == pytest.approx(0.5218, abs=1e-3)  # 1 - 0.025 ** (1 / 5)
    assert (Rate(0, 0).low, Rate(0, 0).high) == (0.0, 1.0)


@given(st.lists(st.floats(0, 1), min_size=2, max_size=60, unique=True), st.floats(0, 1))
def test_bisection_brackets_the_threshold(similarities: list[float], threshold: float) -> None:
    model = LatencyModel(np.log(0.001), 0.1, np.log(0.1), 0.1)
    values = np.array(similarities)
    found, queries = learn_threshold(values, lambda i: 0.001 if values[i] >= threshold else 0.1, model)
    ordered = np.sort(values)
    place = int(np.searchsorted(ordered, threshold))
    low, high = ordered[max(place - 1, 0)], ordered[min(place, len(ordered) - 1)]
    assert queries <= 6
    assert low <= found <= high


class _Jumping(VirtualClock):
    """A virtual clock on which sleeping takes no real time, and reading it a little."""

    def monotonic(self) -> float:
        self.advance(1e-4)
        return super().monotonic()

    async def sleep_until(self, t: float) -> None:
        self.advance(max(0.0, t - super().monotonic()))


class _Slow:
    """An embedder that takes time on a virtual clock, as embedding does: a repetition is found without it."""

    def __init__(self, embedder: Any, clock: _Jumping, seconds: float) -> None:
        self._embedder, self._clock, self._seconds = embedder, clock, seconds
        self.id, self.dim, self.max_tokens = embedder.id, embedder.dim, embedder.max_tokens
        self.count_tokens, self.decode = embedder.count_tokens, embedder.decode

    def embed(self, texts: Any) -> Any:
        self._clock.advance(self._seconds)
        return self._embedder.embed(texts)


@pytest.mark.parametrize("threshold", [0.65, 0.8, 0.93])
def test_times_give_the_threshold_away(minilm: Any, threshold: float) -> None:
    clock = _Jumping()
    slow = _Slow(minilm, clock, 0.01)
    policies = {"default": CategoryPolicy(threshold, quota=1.0)}
    with SemanticCache(None, slow, policies, default, defences=[], clock=clock) as cache:
        leak = probe_cache(cache, clock, 20, 0).leak
    assert leak.threshold_error is not None
    assert leak.threshold_error < 0.02
    assert leak.threshold_queries <= np.ceil(np.log2(50))


def test_times_tell_hits_until_they_are_equalised(minilm: Any) -> None:
    clock = _Jumping()
    with cache_of(minilm) as cache:
        plain = probe_cache(cache, clock, 120, 0)
    assert plain.leak.auc > 0.95
    assert plain.leak.threshold_error is not None
    assert plain.leak.threshold_error < 0.02
    with cache_of(minilm) as cache:
        even = probe_cache(cache, clock, 120, 0, TimingEqualiser(clock, np.random.default_rng(0)))
    assert even.leak.auc < 0.62
    assert even.owner_saved > 0.9 * plain.owner_saved
