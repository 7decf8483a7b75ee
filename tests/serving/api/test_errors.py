"""A request that cannot be answered is refused in OpenAI's form, with the field at fault."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Callable
from typing import Any

import httpx
import pytest
from running_server import ORIGIN, RunningServer

CHAT, TEXT, RESPONSES, EMBEDDINGS = (
    "/v1/chat/completions", "/v1/completions", "/v1/responses", "/v1/embeddings",
)  # fmt: skip
GOOD: dict[str, dict[str, Any]] = {
    CHAT: {"model": "smollm2", "messages": [{"role": "user", "content": "Hi"}], "max_tokens": 2},
    TEXT: {"model": "smollm2", "prompt": "Hi", "max_tokens": 2},
    RESPONSES: {"model": "smollm2", "input": "Hi", "max_output_tokens": 2},
    EMBEDDINGS: {"model": "minilm", "input": "Hi"},
}

IMAGE = {"type": "image_url", "image_url": {"url": "x"}}
MANY = {"type": "array", "items": {"enum": ["abc", "def"]}, "minItems": 1000}


def error_of(answer: httpx.Response, status: int) -> dict[str, Any]:
    assert answer.status_code == status, answer.text
    assert set(answer.json()) == {"error"}
    error = answer.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert error["message"]
    return error


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"{",
        b"[]",
        b'"x"',
        b"null",
        b"{} {}",
        b'{"n": NaN}',
        b'{"n": "\\ud800"}',
        b"\xff\xfe",
        b"[" * 5000,
    ],
)
@pytest.mark.parametrize("path", [*GOOD, "/tokenize", "/detokenize"])
def test_body_that_is_no_object_of_json_is_a_400(api: httpx.Client, path: str, body: bytes) -> None:
    if path == "/tokenize" and body == b"{}":
        return
    answer = api.post(path, content=body, headers={"content-type": "application/json"})
    assert error_of(answer, 400)["type"] == "invalid_request_error"


def test_body_of_another_type_is_told_which_is_wanted(api: httpx.Client) -> None:
    answer = api.post(CHAT, content=json.dumps(GOOD[CHAT]), headers={"content-type": "text/plain"})
    assert "Content-Type: application/json" in error_of(answer, 400)["message"]


@pytest.mark.parametrize(
    ("path", "fields", "param"),
    [
        (CHAT, {"temperature": "hot"}, "temperature"),
        (CHAT, {"temperature": 2.1}, "temperature"),
        (CHAT, {"temperature": True}, "temperature"),
        (CHAT, {"max_tokens": 1.5}, "max_tokens"),
        (CHAT, {"max_tokens": -1}, "max_tokens"),
        (CHAT, {"n": 0}, "n"),
        (CHAT, {"n": 129}, "n"),
        (CHAT, {"top_p": 0}, "top_p"),
        (CHAT, {"stop": ["a"] * 17}, "stop"),
        (CHAT, {"stop": 5}, "stop"),
        (CHAT, {"stream": "yes"}, "stream"),
        (CHAT, {"logit_bias": {"x": 1}}, "logit_bias.x"),
        (CHAT, {"logit_bias": {"1": 101}}, "logit_bias.1"),
        (CHAT, {"logit_bias": {str(i): 1 for i in range(1025)}}, "logit_bias"),
        (CHAT, {"seed": 2**63}, "seed"),
        (CHAT, {"top_logprobs": 2}, "top_logprobs"),
        (CHAT, {"logprobs": True, "top_logprobs": 21}, "top_logprobs"),
        (CHAT, {"min_tokens": 5}, "min_tokens"),
        (CHAT, {"messages": []}, "messages"),
        (CHAT, {"messages": [{"role": "robot", "content": "x"}]}, "messages.0.role"),
        (CHAT, {"messages": [{"role": "user", "content": [IMAGE]}]}, "messages.0.content.0.type"),
        (CHAT, {"tool_choice": "required"}, "tool_choice"),
        (CHAT, {"tools": [{"type": "function", "function": {"name": "no spaces"}}]}, "tools.0.function.name"),
        (CHAT, {"response_format": {"type": "xml"}}, "response_format.type"),
        (CHAT, {"response_format": {"type": "json_schema"}}, "response_format.json_schema"),
        (CHAT, {"sharewell": {"relay": "always"}}, "sharewell.relay"),
        (TEXT, {"prompt": []}, "prompt"),
        (TEXT, {"prompt": [[]]}, "prompt"),
        (TEXT, {"prompt": [-1]}, "prompt.0"),
        (TEXT, {"prompt": [49152]}, "prompt"),
        (TEXT, {"prompt": ["a"] * 256, "n": 3}, "n"),
        (TEXT, {"logprobs": 21}, "logprobs"),
        (RESPONSES, {"input": []}, "input"),
        (RESPONSES, {"input": [{"role": "user", "content": [IMAGE]}]}, "input.0.content.0.type"),
        (RESPONSES, {"text": {"format": {"type": "json_schema"}}}, "text.format.schema"),
        (EMBEDDINGS, {"input": []}, "input"),
        (EMBEDDINGS, {"input": [""]}, "input"),
        (EMBEDDINGS, {"input": [10**6]}, "input"),
        (EMBEDDINGS, {"dimensions": 385}, "dimensions"),
        (EMBEDDINGS, {"encoding_format": "hex"}, "encoding_format"),
    ],
)  # fmt: skip
def test_wrong_value_is_a_400_that_names_the_field(
    api: httpx.Client, path: str, fields: dict, param: str
) -> None:
    error = error_of(api.post(path, json={**GOOD[path], **fields}), 400)
    assert error["param"] == param, error


@pytest.mark.parametrize(
    ("path", "name", "value"),
    [
        *((CHAT, n, v) for n, v in {
            "audio": {"voice": "alloy"}, "modalities": ["audio"], "prediction": {"type": "content"},
            "web_search_options": {}, "functions": [{"name": "f"}], "function_call": "auto",
            "reasoning_effort": "low", "verbosity": "low", "service_tier": "flex", "store": True,
            "metadata": {"a": "b"},
        }.items()),
        (TEXT, "suffix", "x"), (TEXT, "best_of", 2),
        *((RESPONSES, n, v) for n, v in {
            "tools": [{"type": "web_search"}], "tool_choice": "required", "include": ["x"],
            "reasoning": {"effort": "low"}, "background": True, "conversation": "c", "prompt": {"id": "p"},
            "max_tool_calls": 1, "truncation": "auto", "top_logprobs": 1, "service_tier": "flex",
        }.items()),
    ],
)  # fmt: skip
def test_field_that_openai_has_and_we_lack_is_refused_by_name(
    api: httpx.Client, path: str, name: str, value: Any
) -> None:
    error = error_of(api.post(path, json={**GOOD[path], name: value}), 400)
    assert (error["param"], error["code"]) == (name, "unsupported_parameter")


@pytest.mark.parametrize("path", GOOD)
def test_unknown_field_is_ignored_and_logged(api: httpx.Client, server: RunningServer, path: str) -> None:
    name = "unheard_of_" + path.rpartition("/")[2]
    assert api.post(path, json={**GOOD[path], name: {"x": [1]}}).status_code == 200
    assert f"ignored unknown field '{name}'" in server.log()


def test_prompt_longer_than_the_model_is_told_both_lengths(api: httpx.Client) -> None:
    long = "word " * 9000
    bodies = {
        CHAT: ({"messages": [{"role": "user", "content": long}]}, "messages"),
        TEXT: ({"prompt": [5] * 9001}, "prompt"),
        RESPONSES: ({"input": long}, "input"),
    }
    for path, (fields, param) in bodies.items():
        error = error_of(api.post(path, json={**GOOD[path], **fields}), 400)
        assert (error["param"], error["code"]) == (param, "context_length_exceeded")
        assert "8192" in error["message"]
        assert any(f"{n}" in error["message"] for n in range(9001, 9040))
    error = error_of(api.post(CHAT, json={**GOOD[CHAT], "max_tokens": 9999}), 400)
    assert error["param"] == "max_tokens"
    assert "8192" in error["message"]
    assert "9999" in error["message"]
    error = error_of(api.post(EMBEDDINGS, json={"model": "minilm", "input": ["x", "word " * 300]}), 400)
    assert error["code"] == "context_length_exceeded"
    assert "302" in error["message"]
    assert "256" in error["message"]
    huge = "a " * (1 << 20)
    for path, (_, param) in bodies.items():
        value = [{"role": "user", "content": huge}] if path == CHAT else huge
        error = error_of(api.post(path, json={**GOOD[path], param: value}), 400)
        assert (error["param"], error["code"]) == (param, "context_length_exceeded")
        assert "8192" in error["message"]
        assert "2097" in error["message"]  # thousand characters, and what the template adds
    cut = api.post(EMBEDDINGS, json={"model": "minilm", "input": "word " * 300, "truncate": True})
    assert cut.json()["usage"]["prompt_tokens"] == 256


@pytest.mark.parametrize("path", GOOD)
def test_unknown_model_is_a_404(api: httpx.Client, path: str) -> None:
    for name in ("unheard", "smollm2:unheard", ":pirate", "unheard:pirate"):
        error = error_of(api.post(path, json={**GOOD[path], "model": name}), 404)
        assert (error["param"], error["code"]) == ("model", "model_not_found")


def test_unknown_path_method_and_ids_have_the_same_form(api: httpx.Client) -> None:
    assert error_of(api.get("/v1/files"), 404)["code"] == "not_found"
    assert error_of(api.get(CHAT), 405)["message"]
    assert error_of(api.get("/v1/models/none"), 404)["code"] == "model_not_found"
    assert error_of(api.get("/v1/responses/none"), 404)["code"] == "response_not_found"
    assert error_of(api.delete("/v1/responses/none"), 404)["code"] == "response_not_found"
    body = {**GOOD[RESPONSES], "previous_response_id": "none"}
    assert error_of(api.post(RESPONSES, json=body), 404)["param"] == "previous_response_id"


def test_million_wrong_items_cost_one_complaint(api: httpx.Client) -> None:
    begun = time.process_time()
    for fields in ({"prompt": ["x"] + [1] * 500_000}, {"prompt": [[1.5] * 500_000]}):
        answer = api.post(TEXT, json={**GOOD[TEXT], **fields})
        assert len(error_of(answer, 400)["message"]) < 500
    assert time.process_time() - begun < 60


def test_browser_of_an_allowed_origin_may_call(api: httpx.Client) -> None:
    asked = {
        "Origin": ORIGIN,
        "Access-Control-Request-Method": "POST",
        "Access-Control-Request-Headers": "authorization",
    }
    assert api.options(CHAT, headers=asked).headers["access-control-allow-origin"] == ORIGIN
    assert (
        api.post(CHAT, json={}, headers={"Origin": ORIGIN}).headers["access-control-allow-origin"] == ORIGIN
    )
    other = api.get("/health", headers={"Origin": "https://other.example"})
    assert "access-control-allow-origin" not in other.headers


LONG: dict[str, dict[str, Any]] = {
    CHAT: {**GOOD[CHAT], "max_tokens": 3000, "ignore_eos": True},
    TEXT: {**GOOD[TEXT], "max_tokens": 3000, "ignore_eos": True, "n": 2},
    RESPONSES: {
        **GOOD[RESPONSES],
        "max_output_tokens": 3000,
        "text": {"format": {"type": "json_schema", "schema": MANY}},
    },
}


@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.parametrize("path", LONG)
async def test_client_that_goes_away_ends_its_request(server: RunningServer, path: str, stream: bool) -> None:
    async with httpx.AsyncClient(base_url=server.url, timeout=60) as api:

        async def engine() -> dict[str, Any]:
            return (await api.get("/stats")).json()["engine"]

        async def ask() -> None:
            async with api.stream("POST", path, json={**LONG[path], "stream": stream}) as answer:
                async for _ in answer.aiter_raw():
                    pass

        async def until(ready: Callable[[dict[str, Any]], bool]) -> dict[str, Any]:
            deadline = time.monotonic() + 60
            while not ready(now := await engine()) and time.monotonic() < deadline:  # noqa: ASYNC110
                await asyncio.sleep(0.02)
            return now

        begun = (await engine())["generated_tokens"]
        asking = asyncio.ensure_future(ask())
        await until(lambda now: now["running"] > 0 and now["generated_tokens"] > begun + 2)
        asking.cancel()
        await asyncio.wait([asking])
        gone = await until(lambda now: now["running"] == 0)
        assert gone["running"] == gone["waiting"] == gone["blocks_used"] == 0
        assert gone["generated_tokens"] - begun < 1000  # of 3,000 or 6,000
