"""Every field that OpenAI's own client can send is taken or refused by name: none is silently dropped."""

from __future__ import annotations

from typing import Any

import pytest
from openai.types import completion_create_params, embedding_create_params
from openai.types.chat import completion_create_params as chat_create_params
from openai.types.responses import response_create_params
from pydantic import ValidationError

from sharewell.serving.api.errors import ApiError
from sharewell.serving.api.schemas import (
    UNSUPPORTED,
    Body,
    ChatRequest,
    CompletionRequest,
    EmbeddingsRequest,
    ResponsesRequest,
    refuse_unsupported,
)

PAIRS: list[tuple[type[Body], Any]] = [
    (ChatRequest, chat_create_params.CompletionCreateParamsBase),
    (CompletionRequest, completion_create_params.CompletionCreateParamsBase),
    (ResponsesRequest, response_create_params.ResponseCreateParamsBase),
    (EmbeddingsRequest, embedding_create_params.EmbeddingCreateParams),
]
LEAST: dict[type[Body], dict[str, Any]] = {
    ChatRequest: {"model": "m", "messages": [{"role": "user", "content": "x"}]},
    CompletionRequest: {"model": "m", "prompt": "x"},
    ResponsesRequest: {"model": "m", "input": "x"},
    EmbeddingsRequest: {"model": "m", "input": "x"},
}


@pytest.mark.parametrize(("body", "params"), PAIRS, ids=lambda x: getattr(x, "__name__", ""))
def test_every_field_of_openai_is_known(body: type[Body], params: Any) -> None:
    theirs = set(params.__annotations__)
    ours = set(body.model_fields)
    assert theirs - ours - set(UNSUPPORTED.get(body.__name__, {})) == set()
    assert not ours & set(UNSUPPORTED.get(body.__name__, {}))


@pytest.mark.parametrize("body", LEAST)
def test_every_unsupported_field_is_refused_unless_it_says_not_used(body: type[Body]) -> None:
    for name, unused in UNSUPPORTED.get(body.__name__, {}).items():
        for value in unused:
            refuse_unsupported(body.model_validate({**LEAST[body], name: value}))
        with pytest.raises(ApiError) as refusal:
            refuse_unsupported(body.model_validate({**LEAST[body], name: {"some": "thing"}}))
        assert (refusal.value.status, refusal.value.param) == (400, name)
    refuse_unsupported(body.model_validate({**LEAST[body], "nobody_defines_this": 1}))


@pytest.mark.parametrize(
    "wrong",
    [
        {"prompt": ["x"] + [1] * 300_000},
        {"prompt": [[1.5] * 300_000]},
        {"prompt": [1] * 1_000_001},
        {"logit_bias": {str(i): "x" for i in range(300_000)}},
        {"stop": [1] * 300_000},
    ],
    ids=range(5),
)
def test_million_wrong_items_cost_few_complaints(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValidationError) as refusal:
        CompletionRequest.model_validate({**LEAST[CompletionRequest], **wrong})
    assert refusal.value.error_count() <= 5


def test_types_are_not_converted() -> None:
    wrong: list[tuple[str, Any]] = [
        ("temperature", "1"), ("temperature", True), ("max_tokens", 1.0), ("n", "1"), ("stream", 1),
        ("seed", "1"), ("logprobs", True), ("model", 1), ("prompt", [True]), ("echo", "yes"),
    ]  # fmt: skip
    for field, value in wrong:
        with pytest.raises(ValidationError):
            CompletionRequest.model_validate({**LEAST[CompletionRequest], field: value})
    assert CompletionRequest.model_validate({**LEAST[CompletionRequest], "temperature": 1}).temperature == 1
