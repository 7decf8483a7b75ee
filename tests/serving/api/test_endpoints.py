"""The small endpoints."""

from __future__ import annotations

import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families


@pytest.mark.parametrize("text", ["", "Hello <|im_end|> there", "日本語 👩‍👩‍👧‍👦", "a" * 5000])
def test_tokens_become_the_text_again(api: httpx.Client, text: str) -> None:
    made = api.post("/tokenize", json={"model": "smollm2", "prompt": text}).json()
    assert made["count"] == len(made["tokens"])
    assert made["max_model_len"] == 8192
    assert api.post("/detokenize", json={"tokens": made["tokens"]}).json() == {"prompt": text}


def test_messages_are_counted_as_the_template_writes_them(api: httpx.Client) -> None:
    messages = [{"role": "system", "content": "S"}, {"role": "user", "content": "U"}]
    made = api.post("/tokenize", json={"messages": messages}).json()["tokens"]
    text = api.post("/detokenize", json={"tokens": made}).json()["prompt"]
    assert text == "<|im_start|>system\nS<|im_end|>\n<|im_start|>user\nU<|im_end|>\n<|im_start|>assistant\n"
    open_end = api.post("/tokenize", json={"messages": messages, "add_generation_prompt": False}).json()[
        "count"
    ]
    assert open_end < len(made)
    for body in ({}, {"prompt": "x", "messages": messages}):
        assert api.post("/tokenize", json=body).json()["error"]["param"] == "prompt"
    assert api.post("/detokenize", json={"tokens": [49152]}).json()["error"]["param"] == "tokens"


def test_models_say_what_they_are(api: httpx.Client) -> None:
    models = {m["id"]: m for m in api.get("/v1/models").json()["data"]}
    assert models["smollm2"]["max_model_len"] == 8192
    assert models["smollm2"]["dtype"] in ("int4", "bfloat16", "float32")
    assert models["smollm2:pirate"]["parent"] == "smollm2"
    assert models["smollm2"]["parent"] is None
    assert "dtype" not in models["all-MiniLM-L6-v2"]
    assert api.get("/v1/models/smollm2:pirate").json() == models["smollm2:pirate"]


def test_metrics_are_prometheus_and_count_requests(api: httpx.Client) -> None:
    def counted() -> float:
        families = {f.name: f for f in text_string_to_metric_families(api.get("/metrics").text)}
        assert {"sharewell_ttft_seconds", "sharewell_generated_tokens", "sharewell_blocks_free"} <= set(
            families
        )
        return sum(
            s.value
            for s in families["sharewell_requests"].samples
            if s.labels == {"endpoint": "/v1/completions", "status": "200"} and s.name.endswith("_total")
        )

    before = counted()
    api.post("/v1/completions", json={"model": "smollm2", "prompt": "Hi", "max_tokens": 1})
    assert counted() == before + 1


def test_health_and_openapi_document_are_there(api: httpx.Client) -> None:
    assert api.get("/health").json() == {"status": "ok"}
    document = api.get("/openapi.json").json()
    assert {"/v1/chat/completions", "/v1/completions", "/v1/responses", "/v1/embeddings"} <= set(
        document["paths"]
    )
    assert not any("422" in o["responses"] for path in document["paths"].values() for o in path.values())
