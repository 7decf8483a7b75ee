"""Completions: prompts of all forms, echo, and scores that equal those of transformers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import httpx
import pytest
from running_server import RunningServer
from test_chat import events


def complete(api: httpx.Client, **fields: Any) -> dict[str, Any]:
    body = {
        "model": "smollm2",
        "prompt": "The capital of France is",
        "temperature": 0,
        "max_tokens": 8,
        **fields,
    }
    answer = api.post("/v1/completions", json=body)
    assert answer.status_code == 200, answer.text
    return answer.json()


def tokens_of(api: httpx.Client, text: str) -> list[int]:
    return api.post("/tokenize", json={"prompt": text}).json()["tokens"]


def test_text_and_token_ids_are_one_prompt(api: httpx.Client) -> None:
    texts = ["The capital of France is", "One, two, three,"]
    by_text = complete(api, prompt=texts)
    by_ids = complete(api, prompt=[tokens_of(api, t) for t in texts])
    one = complete(api, prompt=tokens_of(api, texts[1]))
    assert [c["text"] for c in by_text["choices"]] == [c["text"] for c in by_ids["choices"]]
    assert one["choices"][0]["text"] == by_text["choices"][1]["text"]
    assert [c["index"] for c in by_text["choices"]] == [0, 1]
    assert by_text["usage"]["prompt_tokens"] == sum(len(tokens_of(api, t)) for t in texts)
    assert by_text["usage"]["completion_tokens"] == 16


def test_choices_run_over_prompts_then_n(api: httpx.Client) -> None:
    fields: dict[str, Any] = {"prompt": ["One, two,", "Red, green,"], "n": 2, "temperature": 1.2, "seed": 3}
    whole = complete(api, **fields)["choices"]
    assert [c["index"] for c in whole] == [0, 1, 2, 3]
    chunks = events(api, "/v1/completions", **fields, max_tokens=8)
    for choice in whole:
        parts = [c for chunk in chunks for c in chunk["choices"] if c["index"] == choice["index"]]
        assert "".join(c["text"] for c in parts) == choice["text"]
        assert [c["finish_reason"] for c in parts if c["finish_reason"]] == [choice["finish_reason"]]


def test_sixteen_tokens_are_the_default(api: httpx.Client) -> None:
    assert complete(api, max_tokens=None, ignore_eos=True)["usage"]["completion_tokens"] == 16


def test_echo_gives_the_prompt_back(api: httpx.Client) -> None:
    plain, echoed = complete(api)["choices"][0], complete(api, echo=True)["choices"][0]
    assert echoed["text"] == "The capital of France is" + plain["text"]
    assert echoed["logprobs"] is None
    assert complete(api, echo=True, max_tokens=0)["choices"][0]["text"] == "The capital of France is"
    assert (
        complete(api, prompt="", echo=True)["choices"][0]["text"]
        == complete(api, prompt="")["choices"][0]["text"]
    )


def test_lists_of_scores_are_parallel_and_offsets_point_into_the_text(api: httpx.Client) -> None:
    choice = complete(api, echo=True, logprobs=3)["choices"][0]
    scores = choice["logprobs"]
    lengths = {len(scores[name]) for name in ("tokens", "token_logprobs", "top_logprobs", "text_offset")}
    assert lengths == {len(tokens_of(api, "The capital of France is")) + 8}
    for token, offset in zip(scores["tokens"], scores["text_offset"], strict=True):
        assert choice["text"].startswith(token, offset)
    assert scores["token_logprobs"][0] is scores["top_logprobs"][0] is None
    assert all(3 <= len(top) <= 4 for top in scores["top_logprobs"][1:])
    chunks = events(
        api, "/v1/completions", prompt="The capital of France is", echo=True, logprobs=3, max_tokens=8
    )
    parts = [c["choices"][0]["logprobs"] for c in chunks]
    for name in lengths and ("tokens", "token_logprobs", "text_offset"):
        assert [v for part in parts for v in part[name]] == scores[name]


@pytest.fixture(scope="module")
def oracle(smollm2: Path) -> Any:
    from sharewell.models import load_transformers

    return load_transformers(smollm2)


def test_lm_eval_request_gets_the_log_probabilities_of_transformers(
    keyed: RunningServer, oracle: Any
) -> None:
    """The request that lm-eval-harness' local-completions sends, and how it reads the answer."""
    import torch

    pairs = [
        ("The capital of France is", " Paris."),
        ("Water boils at", " one hundred degrees"),
        ("A very short story. " * 15, "The end.<|im_end|>"),
    ]
    with keyed.client("alice") as api:
        ids = [(tokens_of(api, a), tokens_of(api, b)) for a, b in pairs]
        asked: dict[str, Any] = {"logprobs": 1, "seed": 1234, "echo": True}
        answers = {n: complete(api, prompt=[a + b for a, b in ids], max_tokens=n, **asked) for n in (1, 0)}
    for max_tokens, answer in answers.items():
        choices = sorted(answer["choices"], key=lambda c: c["index"])
        for choice, (context, continuation) in zip(choices, ids, strict=True):
            scores = choice["logprobs"]
            end = len(context) + len(continuation)
            assert len(scores["tokens"]) == end + max_tokens
            with torch.inference_mode():
                logits = oracle(torch.tensor([context + continuation])).logits[0].double()
            expected = logits.log_softmax(-1)[:-1].gather(1, torch.tensor([(context + continuation)[1:]]).T)[
                :, 0
            ]
            assert scores["token_logprobs"][1:end] == pytest.approx(expected.tolist(), abs=1e-3)
            assert sum(scores["token_logprobs"][len(context) : end]) == pytest.approx(
                float(expected[len(context) - 1 :].sum()), abs=1e-3
            )
            best = [max(top.values()) for top in scores["top_logprobs"][1:end]]
            assert best == pytest.approx(logits.log_softmax(-1)[:-1].max(-1).values.tolist(), abs=1e-3)
            greedy = logits[len(context) - 1 : end - 1].argmax(-1).tolist() == continuation
            assert greedy == all(
                score == max(top.values())
                for score, top in zip(
                    scores["token_logprobs"][len(context) : end],
                    scores["top_logprobs"][len(context) : end],
                    strict=True,
                )
            )
