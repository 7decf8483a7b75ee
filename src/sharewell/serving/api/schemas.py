"""Request bodies, with OpenAI's names and ranges.

Unknown fields are ignored and logged; fields that OpenAI defines and this server does not support are refused
by name (:func:`refuse_unsupported`).
"""

from __future__ import annotations

import logging
from typing import Annotated, Any, Literal

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    Strict,
    StrictBool,
    StrictInt,
    StrictStr,
    model_validator,
)

from .errors import ApiError

log = logging.getLogger(__name__)
_reported: set[str] = set()

Name = Annotated[StrictStr, Field(min_length=1, max_length=512)]
TokenId = Annotated[StrictInt, Field(ge=0, lt=2**31)]
# fail_fast: a list of a million wrong items would otherwise give a million complaints, a kilobyte each
TokenIds = Annotated[list[TokenId], Field(max_length=1_000_000, fail_fast=True)]
Count = Annotated[StrictInt, Field(ge=0, le=2**31)]
Number = Annotated[float, Strict()]  # takes integers too, but no strings and no booleans
Metadata = Annotated[dict[str, Annotated[StrictStr, Field(max_length=512)]], Field(max_length=16)]
StopText = Annotated[StrictStr, Field(max_length=1000)]
Stop = Annotated[list[StopText], Field(max_length=16, fail_fast=True)] | StopText | None
MAX_BIASES = 1024


def _few(value: Any) -> Any:
    """Refuses a large ``logit_bias`` before each of its entries is looked at."""
    if isinstance(value, dict) and len(value) > MAX_BIASES:
        raise ValueError(f"at most {MAX_BIASES} entries are taken, got {len(value)}")
    return value


Biases = Annotated[
    dict[Annotated[StrictStr, Field(pattern=r"^[0-9]{1,9}$")], Annotated[Number, Field(ge=-100, le=100)]],
    BeforeValidator(_few),
    Field(max_length=MAX_BIASES),
]


class Body(BaseModel):
    """Base of all bodies."""

    model_config = ConfigDict(extra="allow")

    @model_validator(mode="after")
    def _log_unknown(self) -> Any:
        known = UNSUPPORTED.get(type(self).__name__, {})
        for name in self.model_extra or {}:
            if name not in known and name not in _reported and len(_reported) < 1000:
                _reported.add(name)  # once a name, so that a client cannot fill the log
                log.warning("ignored unknown field %.80r of a %s", name, type(self).__name__)
        return self


class StreamOptions(Body):
    include_usage: StrictBool = False
    include_obfuscation: StrictBool | None = None  # pads chunks against eavesdroppers of their lengths; no-op


class JsonSchema(Body):
    name: StrictStr = "answer"
    description: StrictStr | None = None
    schema_: dict[str, Any] = Field(default_factory=dict, alias="schema")
    strict: StrictBool | None = None


class ResponseFormat(Body):
    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchema | None = None


class FunctionDef(Body):
    name: Annotated[StrictStr, Field(min_length=1, max_length=64, pattern=r"^[a-zA-Z0-9_-]+$")]
    description: StrictStr | None = None
    parameters: dict[str, Any] | None = None
    strict: StrictBool | None = None


class Tool(Body):
    type: Literal["function"]
    function: FunctionDef


class NamedFunction(Body):
    name: StrictStr


class ToolChoice(Body):
    type: Literal["function"] = "function"
    function: NamedFunction


class CalledFunction(Body):
    name: StrictStr
    arguments: StrictStr = "{}"


class ToolCall(Body):
    id: StrictStr = ""
    type: Literal["function"] = "function"
    function: CalledFunction


class TextPart(Body):
    type: Literal["text", "input_text", "output_text"]
    text: StrictStr


class Message(Body):
    role: Literal["system", "developer", "user", "assistant", "tool", "function"]
    content: StrictStr | Annotated[list[TextPart], Field(max_length=4096, fail_fast=True)] | None = None
    name: StrictStr | None = None
    tool_calls: Annotated[list[ToolCall], Field(max_length=128, fail_fast=True)] | None = None
    tool_call_id: StrictStr | None = None
    # what clients send back of an earlier answer; none of it is part of the prompt
    refusal: StrictStr | None = None
    annotations: list[Any] | None = None
    audio: None = None
    function_call: None = None


Messages = Annotated[list[Message], Field(min_length=1, max_length=4096, fail_fast=True)]
Tools = Annotated[list[Tool], Field(max_length=128, fail_fast=True)]


class Extensions(Body):
    """``sharewell``: this server's own settings. ``segments``: ids of answers whose tokens may be relayed."""

    cache: Literal["off", "exact", "semantic"] | None = None
    relay: Literal["off", "auto"] | None = None
    segments: Annotated[list[Name], Field(max_length=64, fail_fast=True)] | None = None


class Generation(Body):
    """Fields that chat and text completions share."""

    model: Name
    stream: StrictBool | None = False
    stream_options: StreamOptions | None = None
    max_tokens: Count | None = None
    temperature: Annotated[Number, Field(ge=0, le=2)] | None = None
    top_p: Annotated[Number, Field(gt=0, le=1)] | None = None
    top_k: Annotated[StrictInt, Field(ge=-1, le=2**31)] | None = None
    min_p: Annotated[Number, Field(ge=0, le=1)] | None = None
    presence_penalty: Annotated[Number, Field(ge=-2, le=2)] | None = None
    frequency_penalty: Annotated[Number, Field(ge=-2, le=2)] | None = None
    repetition_penalty: Annotated[Number, Field(ge=0.01, le=10)] | None = None
    min_tokens: Count | None = None
    n: Annotated[StrictInt, Field(ge=1, le=128)] | None = None
    stop: Stop = None
    stop_token_ids: Annotated[list[TokenId], Field(max_length=64, fail_fast=True)] | None = None
    ignore_eos: StrictBool = False
    seed: Annotated[StrictInt, Field(ge=-(2**63), lt=2**63)] | None = None
    logit_bias: Biases | None = None
    priority: Annotated[StrictInt, Field(ge=-(2**31), lt=2**31)] = 0
    user: StrictStr | None = None
    sharewell: Extensions | None = None


class ChatRequest(Generation):
    """POST /v1/chat/completions."""

    messages: Messages
    max_completion_tokens: Count | None = None
    logprobs: StrictBool | None = None
    top_logprobs: Annotated[StrictInt, Field(ge=0, le=20)] | None = None
    response_format: ResponseFormat | None = None
    tools: Tools | None = None
    tool_choice: Literal["none", "auto", "required"] | ToolChoice | None = None
    parallel_tool_calls: StrictBool | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    prompt_cache_key: StrictStr | None = None  # a hint; prefixes are shared without it
    safety_identifier: StrictStr | None = None


class CompletionRequest(Generation):
    """POST /v1/completions."""

    prompt: (
        StrictStr
        | Annotated[list[TokenId], Field(min_length=1, max_length=1_000_000, fail_fast=True)]
        | Annotated[list[StrictStr], Field(min_length=1, max_length=256, fail_fast=True)]
        | Annotated[list[TokenIds], Field(min_length=1, max_length=256, fail_fast=True)]
    )
    echo: StrictBool | None = False
    logprobs: Annotated[StrictInt, Field(ge=0, le=20)] | None = None
    response_format: ResponseFormat | None = None


class ResponseInputPart(Body):
    type: Literal["input_text", "output_text", "text"]
    text: StrictStr


class ResponseInput(Body):
    """One message of a response's input; answers may be sent back as they came."""

    type: Literal["message"] = "message"
    role: Literal["user", "assistant", "system", "developer"]
    content: StrictStr | Annotated[list[ResponseInputPart], Field(max_length=4096, fail_fast=True)]
    id: StrictStr | None = None
    status: StrictStr | None = None


class ResponseFormatFlat(Body):
    """``text.format`` of a response: like ``response_format``, with the schema one level up."""

    type: Literal["text", "json_object", "json_schema"] = "text"
    name: StrictStr | None = None
    description: StrictStr | None = None
    schema_: dict[str, Any] | None = Field(default=None, alias="schema")
    strict: StrictBool | None = None


class ResponseText(Body):
    format: ResponseFormatFlat | None = None
    verbosity: Literal["medium"] | None = None


class ResponsesRequest(Body):
    """POST /v1/responses: text in, text out."""

    model: Name
    input: StrictStr | Annotated[list[ResponseInput], Field(min_length=1, max_length=4096, fail_fast=True)]
    instructions: StrictStr | None = None
    previous_response_id: StrictStr | None = None
    store: StrictBool | None = True
    stream: StrictBool | None = False
    stream_options: StreamOptions | None = None
    max_output_tokens: Annotated[StrictInt, Field(ge=1, le=2**31)] | None = None
    temperature: Annotated[Number, Field(ge=0, le=2)] | None = None
    top_p: Annotated[Number, Field(gt=0, le=1)] | None = None
    seed: Annotated[StrictInt, Field(ge=-(2**63), lt=2**63)] | None = None
    metadata: Metadata | None = None
    text: ResponseText | None = None
    parallel_tool_calls: StrictBool | None = None
    priority: Annotated[StrictInt, Field(ge=-(2**31), lt=2**31)] = 0
    prompt_cache_key: StrictStr | None = None
    safety_identifier: StrictStr | None = None
    user: StrictStr | None = None
    sharewell: Extensions | None = None


class EmbeddingsRequest(Body):
    """POST /v1/embeddings. ``truncate`` cuts texts that are longer than the model takes instead of refusing
    them."""

    model: Name
    input: (
        StrictStr
        | Annotated[list[TokenId], Field(min_length=1, max_length=100_000, fail_fast=True)]
        | Annotated[list[StrictStr], Field(min_length=1, max_length=2048, fail_fast=True)]
        | Annotated[list[TokenIds], Field(min_length=1, max_length=2048, fail_fast=True)]
    )
    encoding_format: Literal["float", "base64"] | None = "float"
    dimensions: Annotated[StrictInt, Field(ge=1, le=65536)] | None = None
    truncate: StrictBool = False
    user: StrictStr | None = None


class TokenizeRequest(Body):
    """POST /tokenize: a prompt, or messages through the chat template."""

    model: Name | None = None
    prompt: StrictStr | None = None
    messages: Messages | None = None
    tools: Tools | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    add_generation_prompt: StrictBool = True
    add_special_tokens: StrictBool = True


class DetokenizeRequest(Body):
    """POST /detokenize."""

    model: Name | None = None
    tokens: TokenIds


# Fields that OpenAI defines and this server does not support, with the values that mean "not used".
_TIER = (None, "auto", "default")
UNSUPPORTED: dict[str, dict[str, tuple[Any, ...]]] = {
    "ChatRequest": {
        "audio": (None,), "modalities": (None, ["text"]), "prediction": (None,),
        "web_search_options": (None,),
        "functions": (None, []), "function_call": (None, "none"), "reasoning_effort": (None, "none"),
        "verbosity": (None, "medium"), "service_tier": _TIER, "store": (None, False), "metadata": (None, {}),
        "prompt_cache_retention": (None, "in_memory", "in-memory"), "prompt_cache_options": (None,),
        "moderation": (None,),
    },
    "CompletionRequest": {"suffix": (None, ""), "best_of": (None, 1)},
    "ResponsesRequest": {
        "tools": (None, []), "tool_choice": (None, "auto", "none"), "include": (None, []),
        "reasoning": (None, {}, {"effort": None}, {"effort": "none"}, {"effort": None, "summary": None}),
        "background": (None, False), "conversation": (None,), "prompt": (None,), "max_tool_calls": (None,),
        "truncation": (None, "disabled"), "top_logprobs": (None, 0), "service_tier": _TIER,
        "prompt_cache_retention": (None, "in_memory", "in-memory"), "prompt_cache_options": (None,),
        "context_management": (None, []), "moderation": (None,), "image": (None,),
        "background_options": (None,), "access_programs": (None, []),
    },
}  # fmt: skip


def refuse_unsupported(body: Body) -> None:
    """400 naming the first field that OpenAI defines, the request uses and this server does not support."""
    for name, unused in UNSUPPORTED.get(type(body).__name__, {}).items():
        value = (body.model_extra or {}).get(name)
        if not any(value == u and type(value) is type(u) for u in unused):
            message = f"{name} is not supported by this server"
            raise ApiError(400, message, param=name, code="unsupported_parameter")
