"""What a chat request may ask for, and that it is done."""

from __future__ import annotations

import json
from typing import Any

import httpx
import jsonschema_rs
import pytest

STORY = [{"role": "user", "content": "Tell me a story about the sea."}]


def ask(api: httpx.Client, **fields: Any) -> dict[str, Any]:
    body = {"model": "smollm2", "messages": STORY, "temperature": 0, "max_tokens": 24, **fields}
    answer = api.post("/v1/chat/completions", json=body)
    assert answer.status_code == 200, answer.text
    return answer.json()


def events(api: httpx.Client, path: str = "/v1/chat/completions", **fields: Any) -> list[dict[str, Any]]:
    body = {"model": "smollm2", "temperature": 0, "max_tokens": 24, "stream": True, **fields}
    if path.endswith("chat/completions"):
        body.setdefault("messages", STORY)
    found = []
    with api.stream("POST", path, json=body) as answer:
        assert answer.status_code == 200
        assert answer.headers["content-type"].startswith("text/event-stream")
        for line in answer.iter_lines():
            if line.startswith("data: "):
                found.append(line.removeprefix("data: "))
    assert found[-1] == "[DONE]"
    return [json.loads(line) for line in found[:-1]]


def text_of(answer: dict[str, Any], index: int = 0) -> str:
    return answer["choices"][index]["message"]["content"]


def streamed_text(chunks: list[dict[str, Any]], index: int = 0) -> str:
    choices = [c for chunk in chunks for c in chunk["choices"] if c["index"] == index]
    return "".join(c["delta"].get("content") or "" for c in choices)


@pytest.fixture(scope="module")
def story(server: Any) -> str:
    with server.client() as api:
        return text_of(ask(api))


@pytest.mark.parametrize(("place", "length"), [(0.2, 9), (0.4, 1), (0.6, 3), (0.8, 5)])
def test_answer_ends_exactly_before_its_stop_string(
    api: httpx.Client, story: str, place: float, length: int
) -> None:
    at = int(len(story) * place)
    stop = story[at : at + length]
    expected = story[: story.index(stop)]
    whole = ask(api, stop=[stop, "never\x00seen"])
    assert text_of(whole) == expected
    assert whole["choices"][0]["finish_reason"] == "stop"
    chunks = events(api, stop=stop)
    assert streamed_text(chunks) == expected
    assert chunks[-1]["choices"][0]["finish_reason"] == "stop"


def test_stop_string_that_never_comes_takes_nothing_away(api: httpx.Client, story: str) -> None:
    assert text_of(ask(api, stop=[story[-3:] + "\x00", "\x00"])) == story


@pytest.mark.parametrize("text", ["日本語 🌊", "naïve – “quoted”", "👩‍👩‍👧‍👦"])
def test_characters_of_several_tokens_arrive_whole(api: httpx.Client, text: str) -> None:
    schema = {"type": "string", "const": text}
    format = {"type": "json_schema", "json_schema": {"name": "fixed", "schema": schema}}
    chunks = events(api, response_format=format, max_tokens=64)
    assert json.loads(streamed_text(chunks)) == text
    assert not any("\ufffd" in json.dumps(chunk, ensure_ascii=False) for chunk in chunks)
    assert json.loads(text_of(ask(api, response_format=format, max_tokens=64))) == text


def test_usage_counts_tokens_and_what_was_shared(api: httpx.Client) -> None:
    long = [{"role": "system", "content": "You keep a lighthouse. " * 20}, *STORY]
    first = ask(api, messages=long, max_tokens=4)["usage"]
    again = ask(api, messages=long, max_tokens=4)["usage"]
    counted = api.post("/tokenize", json={"messages": long}).json()["count"]
    assert first["prompt_tokens"] == again["prompt_tokens"] == counted
    assert again["total_tokens"] == counted + 4
    shared = again["prompt_tokens_details"]["cached_tokens"]
    assert counted - 17 <= shared < counted
    chunks = events(api, messages=long, max_tokens=4, stream_options={"include_usage": True})
    assert chunks[-1]["usage"] == again
    assert all("usage" not in chunk for chunk in events(api, max_tokens=2))


def test_max_completion_tokens_is_the_limit(api: httpx.Client) -> None:
    assert ask(api, max_tokens=None, max_completion_tokens=5)["usage"]["completion_tokens"] == 5
    assert ask(api, max_tokens=9, max_completion_tokens=5)["usage"]["completion_tokens"] == 5
    assert ask(api, max_tokens=0)["usage"]["completion_tokens"] == 0


def test_choices_differ_and_a_seed_repeats_them(api: httpx.Client) -> None:
    sampled = {"n": 3, "temperature": 1.5, "seed": 11, "max_tokens": 12}
    first, again = ask(api, **sampled), ask(api, **sampled)
    texts = [text_of(first, i) for i in range(3)]
    assert len(set(texts)) == 3
    assert texts == [text_of(again, i) for i in range(3)]
    assert first["usage"]["completion_tokens"] == 36
    assert [text_of(ask(api, **{**sampled, "seed": 12}), i) for i in range(3)] != texts
    chunks = events(api, **sampled)
    assert [streamed_text(chunks, i) for i in range(3)] == texts


def test_logprobs_are_of_the_tokens_and_sum_below_one(api: httpx.Client) -> None:
    answer = ask(api, logprobs=True, top_logprobs=5, max_tokens=8)
    content = answer["choices"][0]["logprobs"]["content"]
    assert len(content) == 8
    assert b"".join(bytes(c["bytes"]) for c in content).decode() == text_of(answer)
    for entry in content:
        top = entry["top_logprobs"]
        assert len(top) == 5
        assert top[0]["token"] == entry["token"]  # greedy
        assert [t["logprob"] for t in top] == sorted((t["logprob"] for t in top), reverse=True)
        assert entry["logprob"] == top[0]["logprob"] <= 0
    chunks = events(api, logprobs=True, top_logprobs=5, max_tokens=8)
    parts = [c["choices"][0]["logprobs"] for c in chunks if c["choices"][0]["logprobs"]]
    assert [e for part in parts for e in part["content"]] == content
    assert ask(api, logprobs=True, max_tokens=1)["choices"][0]["logprobs"]["content"][0]["top_logprobs"] == []


def test_logit_bias_forbids_and_forces_tokens(api: httpx.Client, story: str) -> None:
    tokens = api.post("/tokenize", json={"prompt": story}).json()["tokens"]
    forbidden = text_of(ask(api, logit_bias={str(tokens[0]): -100}))
    assert not forbidden.startswith(api.post("/detokenize", json={"tokens": tokens[:1]}).json()["prompt"])
    forced = ask(api, logit_bias={"100": 100}, max_tokens=4)
    assert text_of(forced) == api.post("/detokenize", json={"tokens": [100] * 4}).json()["prompt"]


def test_penalties_and_filters_change_the_answer(api: httpx.Client, story: str) -> None:
    assert text_of(ask(api, repetition_penalty=1.5)) != story
    assert text_of(ask(api, presence_penalty=2, frequency_penalty=2)) != story
    assert text_of(ask(api, temperature=2, top_k=1)) == story
    assert text_of(ask(api, temperature=2, top_p=1e-9)) == story
    assert text_of(ask(api, temperature=2, min_p=1)) == story


def test_json_object_is_json(api: httpx.Client) -> None:
    asked = [{"role": "user", "content": "Give me a JSON object with the key name and a short name."}]
    answer = ask(api, messages=asked, response_format={"type": "json_object"}, max_tokens=120)
    assert answer["choices"][0]["finish_reason"] == "stop"
    assert isinstance(json.loads(text_of(answer)), dict)


SCHEMA = {
    "type": "object",
    "properties": {
        "kind": {"enum": ["river", "lake"]},
        "km": {"type": "integer", "minimum": 1, "maximum": 9999},
    },
    "required": ["kind", "km"],
    "additionalProperties": False,
}


@pytest.mark.parametrize("temperature", [0, 1.3])
def test_json_schema_is_kept_at_any_temperature(api: httpx.Client, temperature: float) -> None:
    format = {"type": "json_schema", "json_schema": {"name": "water", "schema": SCHEMA, "strict": True}}
    answer = ask(api, response_format=format, n=3, seed=5, temperature=temperature, max_tokens=80)
    ended = [i for i in range(3) if answer["choices"][i]["finish_reason"] == "stop"]
    assert ended
    for i in ended:
        assert jsonschema_rs.is_valid(SCHEMA, json.loads(text_of(answer, i)))


def test_a_choice_that_met_its_stop_string_computes_no_more(api: httpx.Client) -> None:
    """Of ten sampled choices those that meet the letter stop there, and the engine with them."""

    def generated() -> int:
        return api.get("/stats").json()["engine"]["generated_tokens"]

    before = generated()
    answer = ask(api, n=10, seed=3, temperature=1.5, max_tokens=60, stop=["e"])
    assert all(c["finish_reason"] == "stop" for c in answer["choices"])
    in_flight = 3 * 10  # tokens on their way when a choice ends
    assert generated() - before <= answer["usage"]["completion_tokens"] + in_flight


def test_schema_that_the_grammar_library_refuses_is_named(api: httpx.Client) -> None:
    format = {"type": "json_schema", "json_schema": {"schema": {"type": "unheard"}}}
    answer = api.post(
        "/v1/chat/completions", json={"model": "smollm2", "messages": STORY, "response_format": format}
    )
    assert answer.status_code == 400
    assert answer.json()["error"]["param"] == "response_format"
    assert answer.json()["error"]["code"] == "invalid_grammar"


def function(name: str, description: str, properties: dict[str, Any]) -> dict[str, Any]:
    parameters = {
        "type": "object",
        "properties": properties,
        "required": list(properties),
        "additionalProperties": False,
    }
    return {
        "type": "function",
        "function": {"name": name, "description": description, "parameters": parameters},
    }


TOOLS = [
    function("weather", "Weather of a city", {"city": {"type": "string", "maxLength": 20}}),
    function("now", "The time", {}),
]
WEATHER = [{"role": "user", "content": "What is the weather in Paris?"}]


@pytest.mark.parametrize("choice", ["required", {"type": "function", "function": {"name": "weather"}}])
def test_forced_call_is_valid_and_streams_in_pieces(api: httpx.Client, choice: Any) -> None:
    fields = {"messages": WEATHER, "tools": TOOLS, "tool_choice": choice, "max_tokens": 64}
    answer = ask(api, **fields)["choices"][0]
    assert answer["finish_reason"] == "tool_calls"
    (call,) = answer["message"]["tool_calls"]
    parameters = {t["function"]["name"]: t["function"]["parameters"] for t in TOOLS}[call["function"]["name"]]
    assert jsonschema_rs.is_valid(parameters, json.loads(call["function"]["arguments"]))
    assert answer["message"]["content"] is None
    chunks = events(api, **fields)
    parts = [p for c in chunks for p in c["choices"][0]["delta"].get("tool_calls", [])]
    assert parts[0]["function"]["name"] == call["function"]["name"]
    assert parts[0]["id"].startswith("call_")
    assert all("id" not in p for p in parts[1:])
    assert "".join(p["function"]["arguments"] for p in parts) == call["function"]["arguments"]
    if call["function"]["name"] == "weather":
        assert len(parts) > 3
    assert chunks[-1]["choices"][0]["finish_reason"] == "tool_calls"


def test_call_that_the_model_decides_on_is_recognised(api: httpx.Client) -> None:
    """The model is small, so the conversation shows it twice how; what it copies is then a call."""
    asked: list[dict[str, Any]] = []
    for city in ("Oslo", "Rome"):
        text = f'<tool_call>\n{{"name": "weather", "arguments": {{"city": "{city}"}}}}\n</tool_call>'
        asked += [
            {"role": "user", "content": f"What is the weather in {city}?"},
            {"role": "assistant", "content": text},
        ]
    asked.append(WEATHER[0])
    fields = {"messages": asked, "tools": TOOLS, "max_tokens": 60}
    answer = ask(api, **fields)["choices"][0]
    assert answer["finish_reason"] == "tool_calls"
    (call,) = answer["message"]["tool_calls"]
    assert call["function"]["name"] == "weather"
    assert json.loads(call["function"]["arguments"]) == {"city": "Paris"}
    chunks = events(api, **fields)
    parts = [p for c in chunks for p in c["choices"][0]["delta"].get("tool_calls", [])]
    assert "".join(p["function"]["arguments"] for p in parts) == call["function"]["arguments"]
    assert len(parts) > 2
    as_text = ask(api, **fields, tool_choice="none")["choices"][0]["message"]
    assert "tool_calls" not in as_text
    assert "<tool_call>" in as_text["content"]


def test_tools_are_shown_to_the_model_and_results_are_taken(api: httpx.Client) -> None:
    bare = ask(api, messages=WEATHER, max_tokens=1)["usage"]["prompt_tokens"]
    shown = ask(api, messages=WEATHER, tools=TOOLS, max_tokens=1)["usage"]["prompt_tokens"]
    hidden = ask(api, messages=WEATHER, tools=TOOLS, tool_choice="none", max_tokens=1)["usage"][
        "prompt_tokens"
    ]
    assert hidden == bare < shown
    call = {
        "id": "call_1",
        "type": "function",
        "function": {"name": "weather", "arguments": '{"city": "Paris"}'},
    }
    history = [
        *WEATHER,
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "call_1", "content": "Sunny, 21 degrees."},
    ]
    assert "unny" in text_of(ask(api, messages=history, tools=TOOLS, max_tokens=40))


def test_adapter_is_a_model_of_its_own(api: httpx.Client, story: str) -> None:
    pirate = ask(api, model="smollm2:pirate")
    assert pirate["model"] == "smollm2:pirate"
    assert text_of(pirate) != story
    assert text_of(ask(api)) == story
    assert text_of(ask(api, model="gpt-4o-mini")) == story


def test_parts_developer_role_and_template_variables_are_taken(api: httpx.Client) -> None:
    plain = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hello there"}]
    parts = [{"type": "text", "text": "Hello "}, {"type": "text", "text": "there"}]
    other = [{"role": "developer", "content": "Be brief."}, {"role": "user", "content": parts}]
    assert text_of(ask(api, messages=plain)) == text_of(
        ask(api, messages=other, chat_template_kwargs={"enable_thinking": False})
    )


def test_priority_and_hints_are_taken(api: httpx.Client, story: str) -> None:
    fields = {"priority": -5, "user": "u", "prompt_cache_key": "k", "safety_identifier": "s", "store": False}
    assert text_of(ask(api, **fields, sharewell={"cache": "off"})) == story


def test_answer_needs_no_limit(api: httpx.Client) -> None:
    asked = [{"role": "user", "content": "Answer with the word yes only."}]
    answer = ask(api, messages=asked, max_tokens=None, stop=["."])
    assert answer["choices"][0]["finish_reason"] == "stop"
