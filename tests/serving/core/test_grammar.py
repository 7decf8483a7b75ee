"""Constrained output on the real tokenizer, with logits that know nothing of the grammar."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hash_runner import EOS, drain, make_core, tokens_of

from sharewell.models import Tokenizer
from sharewell.serving.core.engine import EngineCore, Refused
from sharewell.serving.core.grammar import Grammars
from sharewell.serving.core.messages import EngineRequest, GrammarSpec, SamplingParams

VOCAB = 49152
PERSON = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 8},
        "age": {"type": "integer", "minimum": 0, "maximum": 150},
        "tags": {"type": "array", "items": {"enum": ["a", "b"]}, "maxItems": 2},
    },
    "required": ["name", "age", "tags"],
    "additionalProperties": False,
}


@pytest.fixture(scope="module")
def tokenizer(smollm2: Path) -> Tokenizer:
    return Tokenizer(smollm2)


@pytest.fixture(scope="module")
def grammars(smollm2: Path) -> Grammars:
    return Grammars(smollm2 / "tokenizer.json", VOCAB, (EOS,))


@pytest.fixture
def core(smollm2: Path, grammars: Grammars) -> EngineCore:
    made, _ = make_core(
        vocab=VOCAB, max_seqs=8, max_batch_tokens=64, tokenizer=smollm2 / "tokenizer.json", num_blocks=128
    )
    made._grammars = grammars  # the tokenizer takes half a second to prepare
    return made


def answer(
    core: EngineCore, kind: Any, source: str = "", seed: int = 0, max_tokens: int = 120, **params: Any
) -> tuple[list[int], str]:
    sampling = SamplingParams(seed=seed, max_tokens=max_tokens, grammar=GrammarSpec(kind, source), **params)
    core.submit(EngineRequest("r", (11, 12, 13 + seed), sampling))
    got = drain(core)["r", 0]
    return tokens_of(got), str(got[-1].finish_reason)


def test_json_schema_output_follows_the_schema(core: EngineCore, tokenizer: Tokenizer) -> None:
    ended = 0
    for seed in range(12):
        tokens, reason = answer(core, "json_schema", json.dumps(PERSON), seed, temperature=0.7)
        assert reason in ("stop", "length")
        if reason == "stop":
            ended += 1
            person = json.loads(tokenizer.decode(tokens))
            assert set(person) == {"name", "age", "tags"} and 0 <= person["age"] <= 150
            assert len(person["name"]) <= 8 and len(person["tags"]) <= 2 and set(person["tags"]) <= {"a", "b"}
    assert ended >= 6, "most answers end within their tokens"


def test_json_object_output_is_an_object_when_it_stops(core: EngineCore, tokenizer: Tokenizer) -> None:
    close = dict.fromkeys(tokenizer.encode('{}":,\n'), 20.0)  # so that random text ends at all
    ended = 0
    for seed in range(10):
        tokens, reason = answer(core, "json_object", seed=seed, logit_bias=close, temperature=1.0)
        if reason == "stop":
            ended += 1
            assert isinstance(json.loads(tokenizer.decode(tokens)), dict)
    assert ended >= 3


@pytest.mark.parametrize("pattern", [r"[a-c]{2,4}", r"\d{3}-\d{4}", r"(yes|no)!", r"grün+"])
def test_regex_output_matches(core: EngineCore, tokenizer: Tokenizer, pattern: str) -> None:
    for seed in range(3):
        tokens, reason = answer(core, "regex", pattern, seed, max_tokens=60)
        text = tokenizer.decode(tokens)
        assert reason == "length" or re.fullmatch(pattern, text), text


def test_choice_output_is_one_of_the_words(core: EngineCore, tokenizer: Tokenizer) -> None:
    words = ["left", "right", 'a "quoted" one', "zwei\nZeilen", "日本"]
    seen = set()
    for seed in range(25):
        tokens, reason = answer(core, "choice", json.dumps(words), seed, temperature=1.0)
        assert reason == "stop" and tokenizer.decode(tokens) in words
        seen.add(tokenizer.decode(tokens))
    assert len(seen) >= 3


def test_lark_output_follows_the_grammar(core: EngineCore, tokenizer: Tokenizer) -> None:
    tokens, reason = answer(core, "lark", 'start: "<" NAME ">"\nNAME: /[a-z]{1,6}/', temperature=0.0)
    assert reason == "stop" and re.fullmatch(r"<[a-z]{1,6}>", tokenizer.decode(tokens))


def test_the_end_is_allowed_only_where_the_answer_may_end(grammars: Grammars, tokenizer: Tokenizer) -> None:
    state = grammars.compile(GrammarSpec("regex", "ab+c?"))
    may_end = []
    for piece in ("", "a", "b", "b", "c"):
        assert all(state.accept(t) for t in tokenizer.encode(piece))
        logits = np.zeros(VOCAB, np.float32)
        assert state.mask(logits)
        may_end.append(bool(np.isfinite(logits[EOS])))
        assert may_end[-1] == state.accepting
    assert may_end == [False, False, True, True, True]
    assert state.complete


def test_min_tokens_gives_way_to_a_complete_answer(core: EngineCore, tokenizer: Tokenizer) -> None:
    tokens, reason = answer(core, "choice", '["a"]', max_tokens=20, min_tokens=10)
    assert (tokenizer.decode(tokens), reason) == ("a", "stop")


def test_a_constrained_answer_resumes_exactly(core: EngineCore, smollm2: Path, grammars: Grammars) -> None:
    whole, _ = answer(core, "json_schema", json.dumps(PERSON), 3, temperature=0.9)
    forced, _ = make_core(
        vocab=VOCAB, forced_preemption_every=2, max_seqs=4, tokenizer=smollm2 / "tokenizer.json"
    )
    forced._grammars = grammars
    sampling = SamplingParams(
        seed=3, max_tokens=120, temperature=0.9, grammar=GrammarSpec("json_schema", json.dumps(PERSON))
    )
    forced.submit(
        EngineRequest("other", (5, 6), SamplingParams(temperature=0, max_tokens=60, ignore_eos=True))
    )
    forced.submit(EngineRequest("r", (11, 12, 16), sampling))
    assert tokens_of(drain(forced)["r", 0]) == whole
    assert forced.stats().preemptions > 3
    half = tuple(whole[: len(whole) // 2])
    core.submit(EngineRequest("half", (11, 12, 16), sampling, emitted=(half,)))
    assert tokens_of(drain(core)["half", 0]) == whole[len(half) :]
    core.submit(EngineRequest("alien", (11, 12, 16), sampling, emitted=((99, 100),)))
    assert drain(core)["alien", 0][-1].error == "grammar_error"


@pytest.mark.parametrize(
    ("kind", "source", "message"),
    [
        ("json_schema", '{"type": "foo"}', "Invalid type: foo"),
        ("json_schema", '{"$ref": "#/definitions/x"}', "does not exist"),
        ("json_schema", "{", "not JSON"),
        ("json_schema", "[1]", "must be an object, got list"),
        ("regex", "((", "invalid regex"),
        ("lark", "start: foo", 'unknown name: "foo"'),
        ("choice", "[]", "at least one string"),
        ("choice", "[1]", "at least one string"),
        ("choice", "x", "not JSON"),
    ],
)
def test_a_grammar_that_cannot_be_compiled_is_refused_with_the_reason(
    core: EngineCore, kind: Any, source: str, message: str
) -> None:
    with pytest.raises(Refused, match=re.escape(message)) as refusal:
        answer(core, kind, source)
    assert refusal.value.code == "invalid_grammar"
    assert not core.has_work and not core._live


def test_compiled_grammars_are_kept_and_the_least_used_given_up(smollm2: Path) -> None:
    grammars = Grammars(smollm2 / "tokenizer.json", VOCAB, (EOS,), most=2)
    specs = [GrammarSpec("regex", f"a{{{i}}}") for i in range(1, 4)]
    for spec in (specs[0], specs[1], specs[0], specs[2]):
        grammars.compile(spec)
    assert [grammars.ready(s) for s in specs] == [True, False, True]


def test_an_engine_without_a_tokenizer_refuses_grammars() -> None:
    core, _ = make_core()
    with pytest.raises(Refused, match="no tokenizer"):
        answer(core, "json_object")
