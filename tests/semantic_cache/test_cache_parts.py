"""Slots, categories, calibration, break-even, load and the client wrapper, each by itself."""

from __future__ import annotations

import asyncio
import json
import random
from collections.abc import Iterator
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from openai import AsyncOpenAI, OpenAI

from sharewell.cli import main
from sharewell.models import load_embedder
from sharewell.semantic_cache import (
    BreakEvenSwitch,
    CategoryPolicy,
    Context,
    Entry,
    Judged,
    LoadGauge,
    Lookup,
    Query,
    RuleClassifier,
    SemanticCache,
    SlotVerifier,
    answers_agree,
    break_even_share,
    cached,
    choose_threshold,
    load_of,
    upper_bound,
)
from sharewell.semantic_cache.calibration import calibrations, least_hits
from sharewell.semantic_cache.categories import CentroidClassifier, default_classifier, shipped_examples
from sharewell.semantic_cache.slots import disagreement
from sharewell.simulation import VirtualClock


@pytest.mark.parametrize(
    ("a", "b", "what"),
    [
        ("What is 20 C in F?", "What is 25 C in F?", "numbers"),
        ("recipe for two people", "recipe for 2 people", ""),
        ("release date of Python 3.11", "release date of Python 3.12", "numbers"),
        ("It costs 1,000 euros", "It costs 1000 euros", ""),
        ("Is it safe?", "Is it not safe?", "negation"),
        ("I can't log in", "I cannot log in", ""),
        ("cook rice without salt", "cook rice with salt", "negation"),
        ("What is the capital of France?", "What is the capital of Peru?", "names"),
        ("What is the capital of France?", "which city is the capital of france", ""),
        ("What does `os.path.getatime` do?", "What does `os.path.getmtime` do?", "identifiers"),
        ("how do I call read_csv", "how do I call read_json", "identifiers"),
        ("Explain getElementById", "Explain getElementByTag", "identifiers"),
        ("sort ascending", "sort descending", "opposites"),
        ("open a file", "open this file please", ""),
        ("What is 10 degrees Celsius in Fahrenheit?", "What is 10 degrees Fahrenheit in Celsius?", "numbers"),
        ("release date of Go 1.2 Thanks!", "When was Go 1.2 released?", ""),
        ("turn the lights on", "turn the lights off", "opposites"),
        ("list the weak references to the keys", "list the weak references to the values", "a word"),
        ("Can toddlers take this safely?", "Can children take this safely?", ""),  # how it begins
        ("Is this safe for toddlers?", "Is this safe for children?", "a word"),
        ("how can I remove a file from disk", "how can I delete a file from disk", ""),
        ("what is the adress of the office", "what is the address of the office", ""),
        ("Which city is the capital of Peru?", "Tell me the capital of Peru", ""),
        ("How do I sort a list in Python?", "How do I sort a list?", "names"),
    ],
)
def test_slots_that_fix_an_answer_must_agree(a: str, b: str, what: str):
    assert disagreement(a, b) == what


def seen(verifier: SlotVerifier, texts: list[str], category: str = "code") -> None:
    context = Context(lambda _: np.empty((0, 0), np.float32), CategoryPolicy(), 0.0)
    for text in texts:
        verifier.admit(Entry(0, "p", "", category, text, None, "", 0.0), context)


def test_a_name_that_most_questions_have_is_taken_as_read_but_no_other_in_its_place():
    verifier = SlotVerifier()

    def accepts(question: str, cached: str, category: str = "code") -> bool:
        context = Context(lambda _: np.empty((0, 0), np.float32), CategoryPolicy(), 0.0)
        entry = Entry(1, "p", "", category, cached, None, "", 0.0)
        return verifier.accept(Query(question, "p", "", category), entry, context).ok

    plain, python, rust = (f"How do I sort a list{tail}?" for tail in ("", " in Python", " in Rust"))
    assert not accepts(plain, python)
    seen(verifier, [f"How do I do thing {i} in Python?" for i in range(99)])
    assert not accepts(plain, python)  # too few to tell
    seen(verifier, ["How do I do another thing in Rust?"])
    assert accepts(plain, python) and accepts(python, plain)
    assert not accepts(plain, rust) and not accepts(rust, python)
    assert not accepts(plain, python, category="chat")
    seen(verifier, ["How do I sort a list?"] * 2000)  # the custom has gone
    assert not accepts(plain, python)
    never = SlotVerifier(customary=None)
    seen(never, ["Use Python."] * 200)
    assert never.taken_as_read("p", "code") == frozenset()
    with pytest.raises(ValueError, match="customary must be None or a share"):
        SlotVerifier(customary=0)


def test_names_are_counted_for_the_partitions_used_last(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("sharewell.semantic_cache.slots.MOST_PARTITIONS", 3)
    verifier = SlotVerifier()
    for category in ("a", "b", "c"):
        seen(verifier, [f"How do I do thing {i} in Python?" for i in range(100)], category)
    seen(verifier, ["once more"], "a")
    seen(verifier, ["a new one"], "d")  # b has to go: it was used longest ago
    kept = [c for c in "abcd" if verifier.taken_as_read("p", c)]
    assert kept == ["a", "c"]


@given(st.text(max_size=80))
def test_a_text_agrees_with_itself(text: str):
    assert disagreement(text, text) == ""


@given(st.text(max_size=40), st.text(max_size=40))
def test_disagreement_has_no_direction(a: str, b: str):
    assert disagreement(a, b) == disagreement(b, a)


def test_rules_tell_code_live_data_and_sensitive_questions():
    rules = RuleClassifier()
    for text, category in (
        ("why does `foo(x)` raise a TypeError in main.py", "code"),
        ("price of AAPL stock now", "live"),
        ("what is the weather today", "live"),
        ("what dose of this medicine", "sensitive"),
    ):
        found = rules(text, None)
        assert found is not None and found.category == category, text
    assert rules("tell me a joke", None) is None


def test_the_shipped_categories_are_told_apart_and_nonsense_is_rejected():
    embedder = load_embedder("minilm")
    classify = default_classifier(embedder)

    def category(text: str) -> str:
        found = classify(text, embedder.embed([text])[0])
        assert found is not None
        return found.category

    assert category("How can I sort an array in JavaScript?") == "code"
    assert category("What is the tallest mountain in Africa?") == "reference"
    assert category("Suggest a present for my sister's birthday") == "chat"

    strict = CentroidClassifier(embedder, shipped_examples(), reject=0.3)
    nonsense = strict("xqzv 99 ;; lorem", embedder.embed(["xqzv 99 ;; lorem"])[0])
    assert nonsense is not None and nonsense.category == "default"
    close = strict("What does my blood test mean?", embedder.embed(["What does my blood test mean?"])[0])
    assert close is not None and close.category == "sensitive"


def test_categories_are_told_apart_by_what_varies_little_within_them():
    """Two kinds along one axis, each spread widely along another: the cosine to the centre misleads."""
    rng = np.random.default_rng(0)

    class Axes:
        id, dim, max_tokens = "axes", 3, 100

        def embed(self, texts) -> np.ndarray:
            rows = []
            for text in texts:
                side = 0.3 if text.startswith("a") else -0.3
                row = np.array([side, rng.uniform(-2, 2), 1.0])
                rows.append(row / np.linalg.norm(row))
            return np.array(rows, np.float32)

        def count_tokens(self, texts) -> list[int]:
            return [1 for _ in texts]

        def decode(self, ids) -> str:
            return ""

    classify = CentroidClassifier(Axes(), {k: [f"{k} {i}" for i in range(40)] for k in "ab"}, reject=-1.0)
    found = [classify(t, Axes().embed([t])[0]) for t in ["a", "b"] * 50]
    right = sum(f is not None and f.category == t for f, t in zip(found, ["a", "b"] * 50, strict=True))
    assert right >= 98
    for fields in ({"doubt": 0.0}, {"shrink": 1.5}):
        with pytest.raises(ValueError, match=r"must be in \(0, 1\]"):
            CentroidClassifier(Axes(), {"a": ["a"], "b": ["b"]}, **fields)


def test_a_product_that_looks_like_a_file_is_no_code():
    rules = RuleClassifier()
    assert rules("When was Node.js 12 released?", None) is None
    found = rules("why does server.js print nothing", None)
    assert found is not None and found.category == "code"


def test_the_bound_is_that_of_clopper_and_pearson():
    # Wrong shares w with P(at most k of n | w) = 5 %, by bisection over the binomial sum itself.
    from math import comb

    for k, n in ((0, 149), (0, 10), (3, 100), (20, 100)):
        bound = upper_bound(k, n)
        below = sum(comb(n, i) * bound**i * (1 - bound) ** (n - i) for i in range(k + 1))
        assert below == pytest.approx(0.05, abs=1e-9)
    assert upper_bound(5, 5) == 1.0
    assert least_hits(0.02) == 149
    assert upper_bound(0, 149) <= 0.02 < upper_bound(0, 148)


def judged(n: int, wrong_below: float, rng: np.random.Generator) -> list[Judged]:
    near = rng.uniform(0.6, 1.0, n)
    return [Judged("c", float(s), bool(s >= wrong_below or rng.random() < 0.5)) for s in near]


def test_a_threshold_is_certified_where_answers_are_right_and_not_where_they_are_wrong():
    found = choose_threshold(judged(4000, 0.8, np.random.default_rng(0)), 0.02)
    assert found.threshold is not None and 0.78 <= found.threshold <= 0.83
    assert found.bound <= 0.02
    assert upper_bound(found.wrong, found.hits) == found.bound


def test_too_few_candidates_leave_a_category_exact_only():
    found = choose_threshold([Judged("c", 0.99, True)] * 200, 0.02)
    assert found.threshold is None  # 100 on each side, 149 are needed
    assert choose_threshold([Judged("c", 0.99, True)] * 400, 0.02).threshold is not None


def test_a_certificate_holds_in_19_of_20_worlds():
    broken = 0
    for seed in range(60):
        rng = np.random.default_rng(seed)
        # the wrong share rises smoothly as the similarity falls: there is no gap to find
        near = rng.uniform(0.6, 1.0, 3000)
        sample = [Judged("c", float(s), bool(rng.random() > (1 - s) * 0.25)) for s in near]
        found = choose_threshold(sample, 0.02, rng=rng)
        if found.threshold is not None:
            true = (1 - found.threshold) * 0.25 / 2  # mean over [threshold, 1]
            broken += true > 0.02
    assert broken <= 6  # 5 % of 60 are 3; 7 or more would happen once in 30


def test_good_hits_do_not_pay_for_a_stretch_of_bad_ones():
    right = [Judged("c", 0.8 + 0.2 * i / 4000, True) for i in range(4000)]
    bad = [Judged("c", 0.7 + 0.001 * i, i % 2 == 0) for i in range(100)]  # half are wrong there
    found = choose_threshold(right + bad, 0.05)
    assert found.threshold is not None and found.threshold >= 0.79
    allowed = choose_threshold(right + bad, 0.05, most_in_window=1.0)  # the average would allow them
    assert allowed.threshold is not None and allowed.threshold < 0.72
    both = calibrations(right + bad, {"c": 0.02})["c"]
    assert both.floor is not None and both.threshold is not None and both.floor <= both.threshold


def test_a_calibrated_policy_bounds_what_load_may_do():
    policy = CategoryPolicy(0.9, load_delta=0.05)
    loaded = policy.calibrated(0.85, 0.82)
    assert [round(loaded.threshold_at(x), 3) for x in (0, 0.5, 1)] == [0.85, 0.835, 0.82]
    assert policy.calibrated(None).semantic is False
    assert replace(policy, load_delta=0.0).calibrated(0.85, 0.82).threshold_at(1.0) == 0.85
    assert replace(policy, strict=True).calibrated(0.85, 0.82).threshold_at(1.0) == 0.85


def test_answers_agree_when_they_say_the_same():
    embed = load_embedder("minilm").embed
    paris = "The capital of France is Paris."
    assert answers_agree(paris, " the capital of  France is Paris. ", embed)
    assert answers_agree(paris, "Paris is the capital of France.", embed)
    assert not answers_agree(paris, "The capital of France is Lyon.", embed)
    assert not answers_agree("It takes 20 minutes.", "It takes 25 minutes.", embed)
    assert not answers_agree("Yes, it is safe.", "No, it is not safe.", embed)
    assert not answers_agree(paris, "I like bread.", embed) and not answers_agree("", paris, embed)


def looked(similarity: float) -> Lookup:
    return Lookup("hit", "semantic", "reference", CategoryPolicy(), "semantic", similarity=similarity)


def test_thresholds_follow_what_was_judged_while_serving_and_only_on_evidence():
    cache = SemanticCache(None, load_embedder("minilm"))
    assert cache.policies["reference"].threshold == 0.88
    for number in range(40):
        cache.judge(looked(0.9), number > 1)
    assert cache.follow("reference") is None  # two of forty may be chance where 2 % are allowed
    assert cache.policies["reference"].semantic
    assert cache.follow("nothing") is None


def test_a_category_whose_hits_are_wrong_falls_back_to_its_exact_tier():
    cache = SemanticCache(None, load_embedder("minilm"))
    for number in range(60):
        cache.judge(looked(0.9), number % 2 == 0)
    moved = cache.follow("reference")
    assert moved is not None and moved.threshold is None
    assert not cache.policies["reference"].semantic


def test_a_threshold_rises_above_what_was_judged_wrong():
    cache = SemanticCache(None, load_embedder("minilm"))
    for number in range(800):
        cache.judge(looked(0.95 + 0.0001 * (number % 400)), True)
    for number in range(100):
        cache.judge(looked(0.885 + 0.0001 * number), number % 3 == 0)
    moved = cache.follow("reference")
    assert moved is not None and moved.threshold is not None and 0.89 < moved.threshold < 0.96
    assert cache.policies["reference"].threshold == moved.threshold
    assert cache.follow("reference") is None


def test_the_switch_turns_a_category_off_below_break_even_and_on_again():
    switch = BreakEvenSwitch(random.Random(0))
    assert break_even_share(0.030, 0.0, 0.2) == pytest.approx(0.15)
    assert break_even_share(0.002, 0.002, 0.2) == pytest.approx(0.0101, abs=1e-4)
    switch.answered("c", 0.2)
    for _ in range(450):
        switch.looked("c", False, 0.030, 0.0)
    assert not switch.bypassed("c")  # not enough seen
    for _ in range(50):
        switch.looked("c", False, 0.030, 0.0)
    assert switch.bypassed("c")
    past = sum(switch.bypass("c") for _ in range(10_000))
    assert 9850 <= past <= 9950  # one in a hundred is tried
    for _ in range(100):
        switch.looked("c", True, 0.030, 0.0)
    assert not switch.bypassed("c")
    assert switch.state("c").needed == pytest.approx(0.15)


def test_a_category_that_pays_stays_on():
    switch = BreakEvenSwitch(random.Random(0))
    switch.answered("c", 0.2)
    for i in range(2000):
        switch.looked("c", i % 4 == 0, 0.030, 0.001)  # 25 % hits, 15 % needed
    assert not switch.bypassed("c")


def test_load_is_smoothed_over_half_a_minute():
    clock = VirtualClock()
    gauge = LoadGauge(clock)
    assert [load_of(q, 10) for q in (5, 10, 15, 20, 90)] == [0, 0, 0.5, 1, 1]
    gauge.set("m", 1.0)
    assert gauge.get("m") == 0
    clock.advance(30)
    assert gauge.get("m") == pytest.approx(1 - np.exp(-1))
    gauge.set("m", 0.0)
    clock.advance(300)
    assert gauge.get("m") < 1e-4
    with pytest.raises(ValueError, match="load in"):
        gauge.set("m", 1.5)


class Upstream(BaseHTTPRequestHandler):
    """An endpoint of OpenAI's form that counts how often it is asked."""

    asked = 0

    def do_POST(self) -> None:
        type(self).asked += 1
        body = json.loads(self.rfile.read(int(self.headers["content-length"])))
        text = f"answer {type(self).asked}"
        common = {"id": f"chatcmpl-{self.asked}", "created": 1, "model": body["model"]}
        self.send_response(200)
        if body.get("stream"):
            self.send_header("content-type", "text/event-stream")
            self.end_headers()
            parts = [
                ({"role": "assistant", "content": text[:4]}, None),
                ({"content": text[4:]}, None),
                ({}, "stop"),
            ]
            for delta, reason in parts:
                choice = {"index": 0, "delta": delta, "finish_reason": reason}
                chunk = {**common, "object": "chat.completion.chunk", "choices": [choice]}
                self.wfile.write(f"data: {json.dumps(chunk)}\n\n".encode())
            self.wfile.write(b"data: [DONE]\n\n")
            return
        message = {"role": "assistant", "content": text}
        choice = {"index": 0, "message": message, "finish_reason": "stop", "logprobs": None}
        whole = json.dumps({**common, "object": "chat.completion", "choices": [choice]}).encode()
        self.send_header("content-type", "application/json")
        self.send_header("content-length", str(len(whole)))
        self.end_headers()
        self.wfile.write(whole)

    def log_message(self, format: str, *args: object) -> None:
        pass


@pytest.fixture
def upstream() -> Iterator[str]:
    Upstream.asked = 0
    server = ThreadingHTTPServer(("127.0.0.1", 0), Upstream)
    thread = Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}/v1"
    server.shutdown()
    server.server_close()
    thread.join()


def messages(text: str) -> list:
    return [{"role": "user", "content": text}]


def test_the_openai_client_is_answered_from_the_cache(upstream: str):
    cache = SemanticCache(None, load_embedder("minilm"))
    client = cached(OpenAI(base_url=upstream, api_key="none"), cache)

    def ask(text: str, **fields) -> str:
        found = client.chat.completions.create(model="m", messages=messages(text), temperature=0, **fields)
        if fields.get("stream"):
            return "".join(chunk.choices[0].delta.content or "" for chunk in found)
        return found.choices[0].message.content

    assert ask("What is the capital of France?") == "answer 1"
    assert ask("What is the capital of France?") == "answer 1"
    assert ask("What is the capital of France?", stream=True) == "answer 1"
    assert ask("Which city is the capital of France?") == "answer 1"
    assert ask("What is the capital of Peru?", stream=True) == "answer 2"
    assert ask("What is the capital of Peru?") == "answer 2"
    assert ask("What is the capital of Peru?", max_tokens=5) == "answer 3"
    assert ask("What is the capital of Peru?", extra_body={"sharewell": {"cache": "off"}}) == "answer 4"
    fresh = [client.chat.completions.create(model="m", messages=messages("Tell a story")) for _ in range(2)]
    assert [f.choices[0].message.content for f in fresh] == ["answer 5", "answer 6"]
    hit = client.chat.completions.create(
        model="m", messages=messages("What is the capital of France?"), temperature=0
    )
    assert hit.sharewell_cache["status"] == "hit"
    assert client.base_url == client.chat._client.base_url  # the rest of the client is as it was


async def test_the_async_client_is_answered_from_the_cache(upstream: str):
    client = cached(AsyncOpenAI(base_url=upstream, api_key="none"), SemanticCache(None))

    async def ask(**fields) -> str:
        found = await client.chat.completions.create(
            model="m", messages=messages("What is it?"), temperature=0, **fields
        )
        if fields.get("stream"):
            return "".join([chunk.choices[0].delta.content or "" async for chunk in found])
        return found.choices[0].message.content

    assert [await ask(stream=True), await ask(), await ask(stream=True)] == ["answer 1"] * 3
    assert await asyncio.gather(ask(), ask()) == ["answer 1"] * 2


def run(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    code = main(["cache", *arguments])
    said = capsys.readouterr()
    return code, said.out, said.err


def test_the_command_line_reports_calibrates_and_forgets(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    path = tmp_path / "answers.sqlite3"
    with SemanticCache(path, load_embedder("minilm")) as cache:
        for text in ("What is the capital of France?", "Tell me a joke."):
            cache.put(text, "answer", looked=cache.lookup(text))
        cache.lookup("Tell me a joke.")
    code, out, _ = run(capsys, "report", "--cache", str(path), "--json")
    figures = json.loads(out)
    assert (code, figures["entries"]) == (0, 2)
    assert sum(row["exact_hits"] for row in figures["categories"].values()) == 1
    code, out, _ = run(capsys, "report", "--cache", str(path))
    assert code == 0 and "reference" in out
    pairs = tmp_path / "pairs.jsonl"
    rows = [
        {"question": f"Which is planet {i}?", "cached": f"What is planet {i}?", "same": True}
        for i in range(320)
    ]
    pairs.write_text("\n".join(map(json.dumps, rows)))
    code, out, _ = run(
        capsys, "calibrate", str(pairs), "--cache", str(path), "--category", "reference", "--json"
    )
    threshold = json.loads(out)["reference"]["threshold"]
    assert code == 0 and 0.5 < threshold < 1
    with SemanticCache(path) as cache:
        assert cache.policies["reference"].threshold == threshold
    code, out, _ = run(capsys, "invalidate", "--cache", str(path), "--text", "Tell me a joke.")
    assert (code, out) == (0, "removed 1 answers\n")
    assert run(capsys, "invalidate", "--cache", str(path), "--all", "--json")[1] == '{"removed": 1}\n'


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("report", "--cache", "nowhere"), "--cache must be a cache file that exists"),
        (("invalidate", "--cache", "{file}"), "at least one of"),
        (("invalidate", "--cache", "{file}", "--older-than", "soon"), "--older-than must be like 90s"),
        (("calibrate", "nowhere", "--cache", "{file}"), "pairs must be a file that exists"),
        (("calibrate", "{bad}", "--cache", "{file}"), "line 1 must be like"),
    ],
)
def test_mistakes_on_the_command_line_end_in_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: tuple[str, ...], message: str
):
    file, bad = tmp_path / "c", tmp_path / "bad"
    SemanticCache(file).close()
    bad.write_text('{"question": 1}')
    code, out, err = run(capsys, *(a.format(file=file, bad=bad) for a in arguments))
    assert (code, out) == (2, "")
    assert message in err and err.count("\n") == 1
