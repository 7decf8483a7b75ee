"""Calls are read out of an answer whatever its pieces, and a forced call can only be a valid one."""

from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path

import jsonschema_rs
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sharewell.serving.api.errors import ApiError
from sharewell.serving.api.schemas import Message, Tool, ToolChoice
from sharewell.serving.api.tools import (
    HERMES,
    LLAMA,
    MISTRAL,
    CallSyntax,
    ToolCallParser,
    chosen,
    constraint,
    syntax_of,
)

NAMES = ("look", "add")


def tool(name: str, parameters: dict | None = None) -> Tool:
    return Tool.model_validate({"type": "function", "function": {"name": name, "parameters": parameters}})


def read(parser: ToolCallParser, pieces: list[str]) -> tuple[str, list[tuple[str, str]]]:
    deltas = [d for piece in pieces for d in parser.push(piece)] + parser.finish()
    calls: list[tuple[str, str]] = []
    for delta in deltas:
        if delta.name is not None:
            assert delta.id
            assert delta.id.startswith("call_")
            assert delta.call == len(calls)
            calls.append((delta.name, ""))
        if delta.call is not None:
            name, arguments = calls[delta.call]
            calls[delta.call] = (name, arguments + delta.arguments)
    return "".join(d.text for d in deltas), calls


TRICKY = '{"a": "}\\"{ </tool_call>", "b": [1, {"c": "]"}]}'
STRANGE = '<tool_call>{"name": "rm", "arguments": {}}</tool_call>'
CASES = [
    (
        HERMES,
        f'Sure.<tool_call>\n{{"name": "look", "arguments": {TRICKY}}}\n</tool_call>',
        "Sure.",
        [("look", TRICKY)],
    ),
    (
        HERMES,
        '<tool_call>{"name": "look", "arguments": {}}</tool_call>\n'
        '<tool_call>{"name": "add", "arguments": {"x": 1}}</tool_call> done',
        "\n done",
        [("look", "{}"), ("add", '{"x": 1}')],
    ),
    (HERMES, '<tool_call>{"arguments": {"x": 1}, "name": "add"}</tool_call>', "", [("add", '{"x": 1}')]),
    (HERMES, "<tool_call>oops</tool_call> a < b", "<tool_call>oops</tool_call> a < b", []),
    (HERMES, STRANGE, STRANGE, []),
    (HERMES, "five <tool_ca", "five <tool_ca", []),
    (HERMES, '<tool_call>{"name": "look", "arguments": {"a": {"b": 1', "", [("look", '{"a": {"b": 1')]),
    (HERMES, '<tool_call>{"name": "look", "argu', '<tool_call>{"name": "look", "argu', []),
    (
        MISTRAL,
        '[TOOL_CALLS] [{"name": "look", "arguments": {"a": 1}}, {"name": "add", "arguments": {}}]',
        "",
        [("look", '{"a": 1}'), ("add", "{}")],
    ),
    (
        LLAMA,
        '{"name": "look", "parameters": {"a": 1}}; {"name": "add", "parameters": {"b": 2}}',
        "",
        [("look", '{"a": 1}'), ("add", '{"b": 2}')],
    ),
    (LLAMA, '<|python_tag|>{"type": "function", "name": "look", "parameters": {}}', "", [("look", "{}")]),
    (LLAMA, 'Hello {"name": "look"} there', 'Hello {"name": "look"} there', []),
    (LLAMA, '{"x": 1} is JSON', '{"x": 1} is JSON', []),
]


@pytest.mark.parametrize(("syntax", "text", "shown", "calls"), CASES)
@given(places=st.lists(st.integers(0, 150), max_size=30))
@settings(max_examples=60)
def test_calls_are_the_same_wherever_the_answer_is_cut(
    syntax: CallSyntax, text: str, shown: str, calls: list, places: list[int]
) -> None:
    bounds = [0, *sorted(min(p, len(text)) for p in places), len(text)]
    pieces = [text[a:b] for a, b in pairwise(bounds)]
    assert read(ToolCallParser("auto", NAMES, syntax=syntax), pieces) == (shown, calls)


def test_arguments_are_streamed_as_they_come() -> None:
    parser = ToolCallParser("auto", NAMES)
    parser.push('<tool_call>{"name": "add", "arguments": {"x": ')
    assert [d.arguments for d in parser.push("12")] == ["12"]
    assert [d.arguments for d in parser.push("3}")] == ["3}"]
    assert parser.push("}") == []


def test_a_named_tool_takes_the_whole_answer_as_arguments() -> None:
    assert read(ToolCallParser("named", ["add"]), ['{"x"', ": 1}"]) == ("", [("add", '{"x": 1}')])


def test_only_the_first_call_counts_when_calls_in_parallel_are_not_wanted() -> None:
    call = '<tool_call>{"name": "add", "arguments": {"x": 1}}</tool_call>'
    assert read(ToolCallParser("auto", NAMES, parallel=False), [call, call])[1] == [("add", '{"x": 1}')]


@pytest.mark.parametrize(
    ("source", "syntax"),
    [
        ("{{ messages }}", HERMES),
        ("... <tool_call>\n{{ tool_call.arguments | tojson }}\n</tool_call>", HERMES),
        ("[AVAILABLE_TOOLS] ... [TOOL_CALLS]", MISTRAL),
        ('{"name": function name, "parameters": dictionary} <|python_tag|>', LLAMA),
    ],
)
def test_the_template_says_how_calls_are_written(source: str, syntax: CallSyntax) -> None:
    assert syntax_of(source) == syntax


POINT = {
    "type": "object",
    "properties": {"at": {"$ref": "#/$defs/Place"}},
    "required": ["at"],
    "$defs": {"Place": {"type": "object", "properties": {"x": {"type": "integer"}}, "required": ["x"]}},
}


def test_references_of_each_tool_hold_inside_the_grammar_of_all() -> None:
    other = {
        "type": "object",
        "properties": {"at": {"$ref": "#/$defs/Place"}},
        "$defs": {"Place": {"type": "string"}},
    }
    spec = constraint([tool("look", POINT), tool("add", other)], "required", None)
    assert spec is not None
    validator = jsonschema_rs.validator_for(json.loads(spec.source))
    assert validator.is_valid({"name": "look", "arguments": {"at": {"x": 1}}})
    assert validator.is_valid({"name": "add", "arguments": {"at": "here"}})
    assert not validator.is_valid({"name": "look", "arguments": {"at": "here"}})
    assert not validator.is_valid({"name": "none", "arguments": {}})


def test_the_grammar_library_takes_what_we_make_of_tools(smollm2: Path) -> None:
    from sharewell.serving.core.grammar import Grammars

    grammars = Grammars(smollm2 / "tokenizer.json", 49152, (2,))
    for names in (["look"], ["look", "add"]):
        spec = constraint([tool(name, POINT) for name in names], "required", None)
        assert spec is not None
        state = grammars.compile(spec)
        from tokenizers import Tokenizer

        backend = Tokenizer.from_file(str(smollm2 / "tokenizer.json"))
        good = '{"name": "look", "arguments": {"at": {"x": 1}}}'
        assert all(state.accept(t) for t in backend.encode(good, add_special_tokens=False).ids)
        assert state.accepting


@pytest.mark.parametrize(
    ("tools", "choice", "mode"),
    [
        (None, None, "none"),
        (None, "auto", "none"),
        ([tool("add")], None, "auto"),
        ([tool("add")], "none", "none"),
        ([tool("add")], "required", "required"),
    ],
)
def test_choice_of_tools(tools: list[Tool] | None, choice: str | None, mode: str) -> None:
    assert chosen(tools, choice) == (mode, None)


def test_choices_that_the_tools_do_not_allow_are_refused() -> None:
    named = ToolChoice.model_validate({"function": {"name": "gone"}})
    for tools, choice in (([tool("add")], named), (None, named), ([], "required")):
        with pytest.raises(ApiError) as refusal:
            chosen(tools, choice)
        assert (refusal.value.status, refusal.value.param) == (400, "tool_choice")


def test_earlier_calls_and_results_reach_a_template_without_tools(smollm2: Path) -> None:
    from sharewell.models import ChatTemplate
    from sharewell.serving.api.prompts import chat_prompt

    call = {"id": "call_1", "type": "function", "function": {"name": "add", "arguments": '{"x": 1}'}}
    messages = [
        Message.model_validate({"role": "user", "content": [{"type": "text", "text": "1 + 1?"}]}),
        Message.model_validate({"role": "assistant", "content": None, "tool_calls": [call]}),
        Message.model_validate({"role": "tool", "content": "2", "tool_call_id": "call_1"}),
    ]
    text = chat_prompt(ChatTemplate(smollm2), messages, [tool("add", POINT)])
    assert '<tool_call>\n{"name": "add", "arguments": {"x": 1}}\n</tool_call>' in text
    assert "<tool_response>\n2\n</tool_response>" in text
    assert text.index("<tools>") < text.index("1 + 1?")
    with pytest.raises(ApiError, match="messages cannot be set"):
        chat_prompt(ChatTemplate(smollm2), messages, (), {"messages": []})
