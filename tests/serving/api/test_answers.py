"""Answers from the cache: what may be answered again, to whom, and what the client sees of it."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from openai import OpenAI
from running_server import RunningServer, serving

from sharewell.serving.api.keys import StateStore
from sharewell.simulation import WallClock

CHAT = "/v1/chat/completions"
MARK = "x-sharewell-cache"


@pytest.fixture(scope="module")
def cached(tmp_path_factory: pytest.TempPathFactory, smollm2: Path) -> Iterator[RunningServer]:
    """The default server, cache included, for the users alice and bob."""
    folder = tmp_path_factory.mktemp("cached")
    store = StateStore(folder / "state.sqlite3", WallClock())
    keys = {name: store.add_key(name) for name in ("alice", "bob")}
    store.close()
    with serving(folder, "--cache", "exact", keys=keys) as running:
        yield running


@pytest.fixture
def alice(cached: RunningServer) -> Iterator[httpx.Client]:
    with cached.client("alice") as client:
        yield client


def ask(
    client: httpx.Client, text: str, path: str = CHAT, headers: dict | None = None, **fields: Any
) -> httpx.Response:
    body: dict[str, Any] = {"model": "smollm2", "max_tokens": 8, "temperature": 0, **fields}
    if path == CHAT:
        body.setdefault("messages", [{"role": "user", "content": text}])
    elif path == "/v1/completions":
        body["prompt"] = text
    else:
        body["input"], body["max_output_tokens"] = text, body.pop("max_tokens") + 8
    return client.post(path, json=body, headers=headers).raise_for_status()


def content(answer: httpx.Response) -> str:
    return answer.json()["choices"][0]["message"]["content"]


@pytest.mark.parametrize("path", [CHAT, "/v1/completions", "/v1/responses"])
def test_an_equal_request_is_answered_once(alice: httpx.Client, path: str):
    first, second = ask(alice, "Name a colour.", path), ask(alice, "Name a colour.", path)
    assert (first.headers[MARK], second.headers[MARK]) == ("miss", "hit")
    assert second.headers["x-sharewell-cache-tier"] == "exact"
    assert float(second.headers["x-sharewell-cache-similarity"]) == 1.0
    a, b = first.json(), second.json()
    assert a["id"] != b["id"]
    text = {CHAT: "choices", "/v1/completions": "choices", "/v1/responses": "output"}[path]
    if path == "/v1/responses":
        assert a[text][0]["content"] == b[text][0]["content"]
        assert b["usage"]["input_tokens_details"]["cached_tokens"] == b["usage"]["input_tokens"]
    else:
        assert a[text] == b[text]
        used = b["usage"]
        assert used["prompt_tokens_details"]["cached_tokens"] == used["prompt_tokens"]
        assert used["completion_tokens"] == a["usage"]["completion_tokens"]


def test_a_stream_replays_what_was_streamed_or_answered_whole(alice: httpx.Client):
    whole = ask(alice, "Name a fruit.")
    chunks = []
    for _ in range(2):
        stream = ask(alice, "Name a fruit.", stream=True, stream_options={"include_usage": True})
        assert stream.headers[MARK] == "hit"
        lines = [line[6:] for line in stream.text.splitlines() if line.startswith("data: ")]
        assert lines[-1] == "[DONE]"
        chunks = [json.loads(line) for line in lines[:-1]]
        text = "".join(c["choices"][0]["delta"].get("content") or "" for c in chunks if c["choices"])
        assert text == content(whole)
    assert chunks[-1]["usage"]["completion_tokens"] == whole.json()["usage"]["completion_tokens"]
    streamed = ask(alice, "Name a tool.", stream=True)
    assert streamed.headers[MARK] == "miss"
    assert ask(alice, "Name a tool.").headers[MARK] == "hit"


def test_a_fresh_sample_is_never_replayed_unless_asked_for(alice: httpx.Client):
    for _ in range(2):
        assert ask(alice, "Tell a story.", temperature=1).headers[MARK] == "bypass"
        assert ask(alice, "Tell a story.", temperature=None).headers[MARK] == "bypass"
    opted = {"sharewell": {"cache": "exact"}, "temperature": 1}
    first, second = ask(alice, "Tell a story.", **opted), ask(alice, "Tell a story.", **opted)
    assert (first.headers[MARK], second.headers[MARK]) == ("miss", "hit")
    assert content(first) == content(second)


def test_a_seed_makes_a_sample_that_can_be_replayed(alice: httpx.Client):
    one = ask(alice, "Invent a name.", temperature=1, seed=7)
    assert ask(alice, "Invent a name.", temperature=1, seed=7).headers[MARK] == "hit"
    assert ask(alice, "Invent a name.", temperature=1, seed=8).headers[MARK] == "miss"
    assert one.headers[MARK] == "miss"


TOOL = {"type": "function", "function": {"name": "look", "parameters": {"type": "object", "properties": {}}}}


@pytest.mark.parametrize(
    "fields",
    [
        {"max_tokens": 9}, {"n": 2}, {"logprobs": True}, {"logprobs": True, "top_logprobs": 2}, {"stop": "e"},
        {"temperature": 0.5, "seed": 1}, {"top_p": 0.5}, {"presence_penalty": 1.0}, {"min_tokens": 4},
        {"logit_bias": {"5": -100}}, {"response_format": {"type": "json_object"}}, {"tools": [TOOL]},
        {"messages": [{"role": "system", "content": "Hi."}, {"role": "user", "content": "Name a day."}]},
        {"messages": [{"role": "user", "content": "Name a day. "}]},
    ],
)  # fmt: skip
def test_what_shapes_the_answer_is_part_of_the_key(alice: httpx.Client, fields: dict[str, Any]):
    ask(alice, "Name a day.")
    first, second = ask(alice, "Name a day.", **fields), ask(alice, "Name a day.", **fields)
    assert (first.headers[MARK], second.headers[MARK]) == ("miss", "hit")
    assert first.json()["choices"] == second.json()["choices"] or "tools" in fields


def test_what_does_not_shape_it_is_not(alice: httpx.Client):
    ask(alice, "Name a month.")
    assert ask(alice, "Name a month.", user="somebody", priority=3).headers[MARK] == "hit"
    assert ask(alice, "Name a month.", seed=5).headers[MARK] == "hit"  # without effect at temperature 0


def test_another_key_gets_its_own_answer(cached: RunningServer, alice: httpx.Client):
    ask(alice, "Name a river.")
    with cached.client("bob") as bob:
        assert ask(bob, "Name a river.").headers[MARK] == "miss"
        assert ask(bob, "Name a river.").headers[MARK] == "hit"


def test_a_question_in_other_words_is_answered_when_the_request_asks_for_that(alice: httpx.Client):
    fields: dict[str, Any] = {"sharewell": {"cache": "semantic"}, "stop": [".", "\n"], "max_tokens": 40}
    first = ask(alice, "What is the capital of France?", **fields)
    assert first.headers[MARK] == "miss"
    assert first.json()["choices"][0]["finish_reason"] == "stop"
    other = ask(alice, "Which city is the capital of France?", **fields)
    assert other.headers[MARK] == "hit"
    assert other.headers["x-sharewell-cache-tier"] == "semantic"
    assert 0.88 <= float(other.headers["x-sharewell-cache-similarity"]) < 1
    assert other.headers["x-sharewell-cache-source"] == first.json()["id"]
    assert content(other) == content(first)
    # another name, another number: another answer; and without the wish the words must be equal
    assert ask(alice, "What is the capital of Finland?", **fields).headers[MARK] == "miss"
    plain = {**fields, "sharewell": None}
    assert ask(alice, "What city is the capital of France?", **plain).headers[MARK] == "miss"
    # under another system prompt, or after other turns, nothing is alike
    talk = [
        {"role": "system", "content": "Lie."},
        {"role": "user", "content": "What is the capital of France?"},
    ]
    assert ask(alice, "", messages=talk, **fields).headers[MARK] == "miss"


def test_cache_control_is_obeyed(alice: httpx.Client):
    def mark(control: str) -> str:
        return ask(alice, "Name a bird.", headers={"cache-control": control}).headers[MARK]

    assert mark("no-store") == "bypass"
    assert mark("max-age=60") == "miss"
    assert mark("no-cache") == "miss"  # computed anew, and kept
    assert mark("max-age=60") == "hit"


def test_off_means_off(alice: httpx.Client):
    ask(alice, "Name a tree.")
    assert ask(alice, "Name a tree.", sharewell={"cache": "off"}).headers[MARK] == "bypass"


def test_equal_requests_at_once_are_computed_once(cached: RunningServer):
    def computed() -> int:
        with cached.client("alice") as client:
            return client.get("/stats").json()["engine"]["generated_tokens"]

    before, marks = computed(), []

    def one() -> None:
        with cached.client("alice") as client:
            marks.append(ask(client, "Count to one hundred.", max_tokens=48).headers[MARK])

    threads = [threading.Thread(target=one) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(marks) == ["hit"] * 5 + ["miss"]
    assert computed() - before <= 48


def test_a_client_that_leaves_leaves_nothing_half_done_in_the_cache(alice: httpx.Client):
    body = {"model": "smollm2", "temperature": 0, "max_tokens": 200, "stream": True}
    body["messages"] = [{"role": "user", "content": "Write a long letter."}]
    with alice.stream("POST", CHAT, json=body) as answer:
        next(answer.iter_lines())
    assert ask(alice, "Write a long letter.", max_tokens=200).headers[MARK] == "miss"


def test_figures_are_in_stats_and_metrics(alice: httpx.Client):
    ask(alice, "Name a metal."), ask(alice, "Name a metal.")
    figures = alice.get("/stats").json()["cache"]
    assert figures["mode"] == "exact"
    assert figures["exact_hits"] > 0 and figures["entries"] > 0 and figures["saved_tokens"] > 0
    text = alice.get("/metrics").text
    assert 'sharewell_cache_lookups_total{category="default",result="exact"}' in text
    for name in ("bypassed_total", "saved_tokens_total", "saved_seconds_total", "entries"):
        assert f"sharewell_cache_{name} " in text


def test_the_openai_client_sees_the_header(cached: RunningServer):
    client = OpenAI(base_url=cached.url + "/v1", api_key=cached.keys["alice"])
    marks = []
    for _ in range(2):
        raw = client.chat.completions.with_raw_response.create(
            model="smollm2",
            messages=[{"role": "user", "content": "Name a planet."}],
            max_tokens=6,
            temperature=0,
        )
        raw.parse()
        marks.append(raw.headers[MARK])
    assert marks == ["miss", "hit"]
