"""Clients that exist use the server with nothing but its address."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import openai
import pytest
from langchain_core.messages import HumanMessage, SystemMessage
from langchain_openai import ChatOpenAI
from pydantic import BaseModel
from running_server import RunningServer

ASK: list[Any] = [{"role": "user", "content": "Name three rivers of Europe."}]


@pytest.fixture
def client(server: RunningServer) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="not needed", max_retries=0) as made:
        yield made


def test_openai_chat_streams_what_it_answers_whole(client: openai.OpenAI) -> None:
    whole = client.chat.completions.create(model="smollm2", messages=ASK, temperature=0, max_tokens=24)
    stream = client.chat.completions.create(
        model="smollm2", messages=ASK, temperature=0, max_tokens=24, stream=True,
        stream_options={"include_usage": True},
    )  # fmt: skip
    chunks = list(stream)
    text = "".join(c.choices[0].delta.content or "" for c in chunks if c.choices)
    assert text == whole.choices[0].message.content != ""
    assert sum(bool(c.choices and c.choices[0].delta.content) for c in chunks) > 10
    assert whole.usage is not None
    assert whole.usage.completion_tokens == 24
    last = chunks[-1]
    assert last.choices == []
    assert last.usage is not None
    assert (last.usage.prompt_tokens, last.usage.completion_tokens) == (whole.usage.prompt_tokens, 24)
    assert all(c.usage is None for c in chunks[:-1])
    assert chunks[0].choices[0].delta.role == "assistant"
    assert [c.choices[0].finish_reason for c in chunks if c.choices][-1] == "length"


def test_openai_completion_streams_what_it_answers_whole(client: openai.OpenAI) -> None:
    asked: dict[str, Any] = {
        "model": "smollm2",
        "prompt": "The capital of France is",
        "temperature": 0,
        "max_tokens": 8,
    }
    whole = client.completions.create(**asked)
    chunks = list(client.completions.create(**asked, stream=True))
    assert "".join(c.choices[0].text for c in chunks) == whole.choices[0].text
    assert "Paris" in whole.choices[0].text


def test_openai_responses_stream_and_go_on_from_one_another(client: openai.OpenAI) -> None:
    first = client.responses.create(
        model="smollm2", input="My name is Ada.", temperature=0, max_output_tokens=12
    )
    assert first.output_text
    assert first.status in ("completed", "incomplete")
    assert client.responses.retrieve(first.id).output_text == first.output_text
    asked: dict[str, Any] = {
        "model": "smollm2", "input": "What is my name?", "temperature": 0, "max_output_tokens": 16,
        "previous_response_id": first.id,
    }  # fmt: skip
    whole = client.responses.create(**asked)
    assert whole.usage is not None
    assert first.usage is not None
    assert whole.usage.input_tokens > first.usage.input_tokens + first.usage.output_tokens
    with client.responses.stream(**asked) as stream:
        events = list(stream)
    kinds = [event.type for event in events]
    assert kinds[0] == "response.created"
    assert kinds.count("response.output_text.delta") > 5
    last = events[-1]
    assert last.type == "response.completed" or last.type == "response.incomplete"  # noqa: PLR1714
    assert last.response.output_text == whole.output_text
    assert [event.sequence_number for event in events] == list(range(len(events)))
    client.responses.delete(first.id)
    with pytest.raises(openai.NotFoundError):
        client.responses.create(**asked)


def test_openai_embeddings_are_those_of_the_embedder(client: openai.OpenAI) -> None:
    from sharewell.models import load_embedder

    texts = ["A river in Europe.", "Une rivière", "x"]
    made = client.embeddings.create(model="all-MiniLM-L6-v2", input=texts)
    expected = load_embedder("minilm").embed(texts)
    assert np.array([d.embedding for d in made.data], np.float32) == pytest.approx(expected, abs=1e-6)
    plain = client.embeddings.create(model="minilm", input=texts[0], encoding_format="float")
    assert plain.data[0].embedding == pytest.approx(expected[0], abs=1e-6)
    short = np.array(
        client.embeddings.create(model="minilm", input=texts[0], dimensions=64).data[0].embedding
    )
    assert short == pytest.approx(expected[0, :64] / np.linalg.norm(expected[0, :64]), abs=1e-6)


def test_openai_models_and_errors(client: openai.OpenAI) -> None:
    names = [model.id for model in client.models.list()]
    assert names == ["smollm2", "gpt-4o-mini", "smollm2:pirate", "all-MiniLM-L6-v2"]
    assert all(client.models.retrieve(name).id == name for name in names)
    with pytest.raises(openai.NotFoundError) as missing:
        client.chat.completions.create(model="gpt-5", messages=ASK)
    assert missing.value.code == "model_not_found"
    with pytest.raises(openai.BadRequestError) as refused:
        client.chat.completions.create(
            model="smollm2", messages=ASK, audio={"voice": "alloy", "format": "wav"}
        )
    assert (refused.value.param, refused.value.code) == ("audio", "unsupported_parameter")


def test_openai_parses_answers_and_calls_into_its_own_types(client: openai.OpenAI) -> None:
    class River(BaseModel):
        name: str
        long: bool

    parsed = client.chat.completions.parse(
        model="smollm2", messages=ASK, response_format=River, temperature=0, max_tokens=80
    )
    assert parsed.choices[0].finish_reason == "stop"
    assert isinstance(parsed.choices[0].message.parsed, River)
    called = client.chat.completions.parse(
        model="smollm2", messages=ASK, tools=[openai.pydantic_function_tool(River)], tool_choice="required",
        temperature=0, max_tokens=80,
    )  # fmt: skip
    calls = called.choices[0].message.tool_calls
    assert called.choices[0].finish_reason == "tool_calls"
    assert calls
    assert isinstance(calls[0].function.parsed_arguments, River)


def test_llm_command_line_tool(server: RunningServer, tmp_path: Path) -> None:
    (tmp_path / "extra-openai-models.yaml").write_text(
        f"- model_id: local\n  model_name: smollm2\n  api_base: {server.url}/v1\n"
    )
    llm = str(Path(sys.executable).with_name("llm"))
    options = ("-o", "temperature", "0", "-o", "max_tokens", "12")
    done = subprocess.run(
        [llm, "-m", "local", *options, "Name three rivers of Europe."],
        env={**os.environ, "LLM_USER_PATH": str(tmp_path)},
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    assert len(done.stdout.split()) > 3


def test_langchain_chat_model(server: RunningServer) -> None:
    settings: dict[str, Any] = {"base_url": f"{server.url}/v1", "api_key": "none", "model": "smollm2"}
    model = ChatOpenAI(**settings, temperature=0, max_tokens=16)  # pyright: ignore[reportCallIssue]
    messages = [SystemMessage("You are brief."), HumanMessage("Name three rivers of Europe.")]
    whole = model.invoke(messages)
    assert whole.usage_metadata is not None
    assert whole.usage_metadata["output_tokens"] == 16
    assert "".join(str(chunk.content) for chunk in model.stream(messages)) == whole.content != ""

    def add(x: int, y: int) -> int:
        """Add two numbers."""
        return x + y

    bound = model.bind_tools([add], tool_choice="add")
    call = bound.invoke("What is 3 plus 4?").tool_calls[0]
    assert call["name"] == "add"
    assert all(isinstance(call["args"][name], int) for name in ("x", "y"))
    streamed = None
    for chunk in bound.stream("What is 3 plus 4?"):
        streamed = chunk if streamed is None else streamed + chunk
    assert streamed is not None
    assert streamed.tool_calls[0]["args"] == call["args"]  # pyright: ignore[reportAttributeAccessIssue]
