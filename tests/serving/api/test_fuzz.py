"""Whatever the OpenAPI document allows, and whatever it forbids, never gives a 5xx."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Iterator
from typing import Any

import pytest
import requests
import schemathesis
import uvicorn
from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st
from running_server import RunningServer
from schemathesis import Case, GenerationMode
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    response_schema_conformance,
    status_code_conformance,
)

from sharewell.serving.api import ServerConfig, create_app

SEED = 20260801
CHECKS = [not_a_server_error, status_code_conformance, content_type_conformance, response_schema_conformance]
OPERATIONS = [
    ("POST", "/v1/chat/completions"), ("POST", "/v1/completions"), ("POST", "/v1/responses"),
    ("GET", "/v1/responses/{response_id}"), ("DELETE", "/v1/responses/{response_id}"),
    ("POST", "/v1/embeddings"), ("GET", "/v1/sharewell/explain/{request_id}"),
    ("GET", "/v1/models"), ("GET", "/v1/models/{model_id}"), ("POST", "/tokenize"), ("POST", "/detokenize"),
    ("GET", "/health"), ("GET", "/metrics"), ("GET", "/stats"),
]  # fmt: skip


@pytest.fixture(scope="module")
def schema(server: RunningServer) -> Any:
    return schemathesis.openapi.from_url(f"{server.url}/openapi.json")


LIMITS = {
    "/v1/chat/completions": "max_completion_tokens",
    "/v1/completions": "max_tokens",
    "/v1/responses": "max_output_tokens",
}


def tamed(path: str, body: Any, *, known_model: bool) -> Any:
    """The body with little work in it: few tokens, choices and items; mostly for a model that exists."""
    if not isinstance(body, dict):
        return body
    body = dict(body)
    if known_model and "model" in body:
        body["model"] = "minilm" if path == "/v1/embeddings" else "smollm2"
    limit = LIMITS.get(path)
    if limit and (body.get(limit) is None or (type(body[limit]) is int and body[limit] > 3)):
        body[limit] = 3
    if type(body.get("n")) is int and body["n"] > 2:
        body["n"] = 2
    for name in ("prompt", "input", "messages"):
        if isinstance(body.get(name), list):
            body[name] = body[name][:3]
    return body


def fuzz(schema: Any, method: str, path: str, examples: int) -> None:
    operation = schema[path][method]
    either = st.one_of(*(operation.as_strategy(mode) for mode in GenerationMode))
    session = requests.Session()

    @seed(SEED)
    @settings(
        max_examples=examples,
        deadline=None,
        database=None,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),  # pyright: ignore[reportArgumentType]
    )
    @given(case=either, known=st.integers(0, 7))
    def check(case: Case, known: int) -> None:
        case.body = tamed(path, case.body, known_model=known > 0)
        case.validate_response(case.call(session=session, timeout=60), checks=CHECKS)

    with session:
        check()


def test_every_operation_of_the_document_is_tried(schema: Any) -> None:
    found = [(r.ok().method.upper(), r.ok().path) for r in schema.get_all_operations()]
    assert sorted(found) == sorted(OPERATIONS)


@pytest.mark.parametrize(("method", "path"), OPERATIONS)
def test_no_case_gives_a_server_error(schema: Any, method: str, path: str) -> None:
    fuzz(schema, method, path, 40 if method == "POST" else 10)


@pytest.mark.nightly
@pytest.mark.timeout(7200)
@pytest.mark.parametrize(("method", "path"), OPERATIONS)
def test_no_case_of_two_thousand_gives_a_server_error(schema: Any, method: str, path: str) -> None:
    fuzz(schema, method, path, 2000)


@pytest.fixture
def faulty() -> Iterator[str]:
    """A server whose tokenizer has a bug. It has no engine: the fault is in front of it."""
    app = create_app(ServerConfig())

    def broken(*_: Any, **__: Any) -> str:
        raise KeyError("injected")

    app.state.service.tokenizer.decode = broken
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    server = uvicorn.Server(uvicorn.Config(app, port=port, lifespan="off", log_level="critical"))
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    while not server.started:
        time.sleep(0.01)
    yield f"http://127.0.0.1:{port}"
    server.should_exit = True
    thread.join(10)


def test_injected_fault_surfaces_as_a_500(faulty: str) -> None:
    answer = requests.post(f"{faulty}/detokenize", json={"tokens": [1]}, timeout=10)
    assert answer.status_code == 500
    assert answer.json()["error"] == {
        "message": "internal error", "type": "server_error", "param": None, "code": "internal_error",
    }  # fmt: skip
    with pytest.raises(BaseException) as found:
        fuzz(schemathesis.openapi.from_url(f"{faulty}/openapi.json"), "POST", "/detokenize", 50)
    assert "Server error" in str(found.value) + repr(getattr(found.value, "exceptions", ""))
