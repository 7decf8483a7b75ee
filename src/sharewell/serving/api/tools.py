"""Tool calls: showing tools to a model, constraining its answer to one, and reading calls out of its text."""

from __future__ import annotations

import json
import re
import secrets
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from ..core.messages import GrammarSpec
from .errors import ApiError
from .schemas import Tool, ToolChoice
from .text import overlap

OPEN, CLOSE = "<tool_call>", "</tool_call>"
Mode = Literal["none", "auto", "required", "named"]


def system_text(tools: Sequence[Tool]) -> str:
    """Tools for a template that has no place for them, in the form that Hermes-like models know."""
    described = "\n".join(
        json.dumps({"type": "function", "function": t.function.model_dump(exclude_none=True)}) for t in tools
    )
    return (
        "You may call functions to help with the user's request. Available functions:\n<tools>\n"
        f"{described}\n</tools>\nTo call one, answer with a JSON object between {OPEN} and {CLOSE}:\n"
        f'{OPEN}\n{{"name": <function name>, "arguments": <arguments object>}}\n{CLOSE}'
    )


def chosen(tools: Sequence[Tool] | None, choice: str | ToolChoice | None) -> tuple[Mode, Tool | None]:
    """How the request wants tools used. Raises ApiError 400 for a choice that the tools do not allow."""
    if isinstance(choice, ToolChoice):
        tool = next((t for t in tools or () if t.function.name == choice.function.name), None)
        if tool is None:
            raise ApiError(
                400,
                f"tool_choice names {choice.function.name!r}, which is not in tools",
                param="tool_choice",
                code="invalid_value",
            )
        return "named", tool
    if not tools:
        if choice == "required":
            message = "tool_choice is 'required' but tools is empty"
            raise ApiError(400, message, param="tool_choice", code="invalid_value")
        return "none", None
    if choice == "none":
        return "none", None
    return ("required", None) if choice == "required" else ("auto", None)


def constraint(tools: Sequence[Tool], mode: Mode, tool: Tool | None) -> GrammarSpec | None:
    """The grammar of a forced call: the arguments alone for a named tool, name and arguments for any."""
    if mode == "named":
        assert tool is not None
        return GrammarSpec("json_schema", json.dumps(_parameters(tool)))
    if mode != "required":
        return None
    # Each tool's schema moves to a place of its own, and its references with it.
    places = {f"tool{i}": _moved(_parameters(t), f"#/$defs/tool{i}") for i, t in enumerate(tools)}
    options = [
        {
            "type": "object",
            "properties": {"name": {"const": t.function.name}, "arguments": {"$ref": f"#/$defs/tool{i}"}},
            "required": ["name", "arguments"],
            "additionalProperties": False,
        }
        for i, t in enumerate(tools)
    ]
    root = dict(options[0]) if len(options) == 1 else {"anyOf": options}
    return GrammarSpec("json_schema", json.dumps({**root, "$defs": places}))


def _parameters(tool: Tool) -> dict[str, Any]:
    return tool.function.parameters or {"type": "object", "properties": {}}


def _moved(schema: Any, root: str) -> Any:
    """``schema`` with every reference to its own root pointing to ``root``."""
    if isinstance(schema, list):
        return [_moved(item, root) for item in schema]
    if not isinstance(schema, dict):
        return schema
    return {
        name: root + value[1:]
        if name == "$ref" and isinstance(value, str) and value.startswith("#")
        else _moved(value, root)
        for name, value in schema.items()
    }


@dataclass(frozen=True)
class CallSyntax:
    """How a family of models writes calls.

    A call is a JSON object with a name and arguments; calls stand between ``open`` and ``close`` or, when
    ``bare``, make up the whole answer. ``special``: ``open`` is a special token, so the text must show those.
    """

    open: str = OPEN
    close: str = CLOSE
    bare: bool = False
    special: bool = False


HERMES = CallSyntax()
MISTRAL = CallSyntax("[TOOL_CALLS]", "", special=True)
LLAMA = CallSyntax("<|python_tag|>", "", bare=True, special=True)


def syntax_of(template_source: str) -> CallSyntax:
    """The syntax that a chat template shows its model; Hermes' where it shows none (we then teach that)."""
    if OPEN in template_source:
        return HERMES
    if MISTRAL.open in template_source:
        return MISTRAL
    if LLAMA.open in template_source or '"parameters"' in template_source:
        return LLAMA
    return HERMES


@dataclass
class Delta:
    """A part of an answer: ``text``, or of call number ``call`` its id and name (once) or ``arguments``."""

    text: str = ""
    call: int | None = None
    id: str | None = None
    name: str | None = None
    arguments: str = ""


class _ValueEnd:
    """Finds the end of one JSON value in a text that comes in pieces."""

    def __init__(self) -> None:
        self.begun = False
        self._depth = 0
        self._in_string = self._escaped = self._scalar = False

    def push(self, text: str) -> int | None:
        """Index behind the value's last character, None while it goes on."""
        self.begun = self.begun or bool(text)
        for i, c in enumerate(text):
            if self._in_string:
                if self._escaped:
                    self._escaped = False
                elif c == "\\":
                    self._escaped = True
                elif c == '"':
                    self._in_string = False
                    if not self._depth:
                        return i + 1
            elif self._scalar:
                if c in ",]} \t\r\n":
                    return i
            elif c == '"':
                self._in_string = True
            elif c in "{[":
                self._depth += 1
            elif c in "}]":
                self._depth -= 1
                if self._depth <= 0:
                    return i + 1
            elif not self._depth and not c.isspace():
                self._scalar = True
        return None


_HEAD = re.compile(
    r'\s*\{\s*(?:"type"\s*:\s*"function"\s*,\s*)?"name"\s*:\s*("(?:[^"\\]|\\.)*")\s*,\s*"(?:arguments|parameters)"\s*:\s*'
)
_BETWEEN = " \t\r\n,;[]"  # what may stand around calls: white space, and the marks of a list


class ToolCallParser:
    """Splits an answer that grows into text and calls.

    mode "auto" looks for calls written in ``syntax``; "required" takes the whole answer as one call; "named"
    takes it as the arguments of the one name in ``names``. Arguments go out as they come. What looks like a
    call but is none, or of a function that is not in ``names``, comes out as text.
    """

    def __init__(
        self, mode: Mode, names: Collection[str], *, syntax: CallSyntax = HERMES, parallel: bool = True
    ) -> None:
        self._names, self._syntax, self._parallel = names, syntax, parallel
        self._buffer = ""
        self._end: _ValueEnd | None = None  # set while arguments come
        self._skipping = False  # a further call that parallel_tool_calls=False does not want
        self._opened = ""  # what opened the calls, to be shown when there is none
        self.calls = 0
        self._mode = mode
        self._state: Literal["text", "calls", "tail", "named"] = "text"
        if mode == "named":
            self._state = "named"
        elif mode == "required" or syntax.bare:
            self._state = "calls"

    def push(self, text: str) -> list[Delta]:
        """What ``text`` makes certain."""
        self._buffer += text
        return self._advance(final=False)

    def finish(self) -> list[Delta]:
        """What is left at the end of the answer."""
        return self._advance(final=True)

    def _advance(self, final: bool) -> list[Delta]:
        out: list[Delta] = []
        while self._step(final, out):
            pass
        return out

    def _step(self, final: bool, out: list[Delta]) -> bool:
        """One move; False when more text is needed (or, when ``final``, nothing is left)."""
        if self._state == "named":
            if not self.calls and (self._buffer or final):
                self._start(next(iter(self._names)), out)
            self._argue(self._buffer, out)
            self._buffer = ""
            return False
        if self._end is not None:
            return self._arguments(out)
        if self._state == "tail":
            return self._tail()
        if self._state == "calls":
            return self._head(final, out)
        return self._text(final, out)

    def _text(self, final: bool, out: list[Delta]) -> bool:
        word = self._syntax.open
        at = self._buffer.find(word) if self._mode == "auto" else -1
        keep = 0 if final or self._mode != "auto" else overlap(self._buffer, word)
        shown = self._buffer[:at] if at >= 0 else self._buffer[: len(self._buffer) - keep]
        if shown:
            out.append(Delta(text=shown))
        self._buffer = self._buffer[len(shown) :]
        if at < 0:
            return False
        self._buffer = self._buffer[len(word) :]
        self._state, self._opened = "calls", word
        return True

    def _head(self, final: bool, out: list[Delta]) -> bool:
        """Between calls: a call begins, the list of calls ends, or it is no call at all."""
        rest = self._buffer.lstrip(_BETWEEN)
        between = self._buffer[: len(self._buffer) - len(rest)]
        close = self._syntax.close if self._mode == "auto" else ""
        opening = self._syntax.open if self._syntax.bare and not self._opened else ""
        if opening and rest.startswith(opening):
            self._opened, self._buffer = opening, rest[len(opening) :]
            return True
        if close and rest.startswith(close):
            if self._opened:  # no call came in between
                out.append(Delta(text=self._opened + between + close))
            self._buffer, self._state, self._opened = rest[len(close) :], "text", ""
            return True
        head = _HEAD.match(rest)
        if head is not None and (name := _string(head[1])) in self._names:
            self._skipping = self.calls > 0 and not self._parallel
            if not self._skipping:
                self._start(name or "", out)
            self._buffer, self._opened = rest[head.end() :], ""
            self._end = _ValueEnd()
            return True
        size = len(rest)
        if rest.startswith("{"):
            end = _ValueEnd().push(rest)
            if end is None and not final:
                return False
            size = end or size
            if self._whole_call(rest[:size], out):
                self._buffer, self._opened = rest[size:], ""
                return True
        elif not final and any(word.startswith(rest) for word in (close, opening)):
            return False
        else:
            size = 1
        if not rest and not (final and self._opened):
            return False
        # Not a call: what opened it is text, and what follows may still hold one.
        out.append(Delta(text=self._opened + between + rest[:size]))
        self._buffer, self._state, self._opened = rest[size:], "text", ""
        return bool(self._buffer)

    def _whole_call(self, text: str, out: list[Delta]) -> bool:
        """Report a complete object that names its function and arguments in an unusual order."""
        try:
            value = json.loads(text)
        except (ValueError, RecursionError):
            return False
        if not isinstance(value, dict) or value.get("name") not in tuple(self._names):
            return False
        if self._parallel or not self.calls:
            arguments = value.get("arguments", value.get("parameters", {}))
            self._start(value["name"], out)
            self._argue(arguments if isinstance(arguments, str) else json.dumps(arguments), out)
        return True

    def _arguments(self, out: list[Delta]) -> bool:
        assert self._end is not None
        if not self._end.begun:
            self._buffer = self._buffer.lstrip()
        if not self._buffer:
            return False
        end = self._end.push(self._buffer)
        part = self._buffer if end is None else self._buffer[:end]
        if not self._skipping:
            self._argue(part, out)
        self._buffer = self._buffer[len(part) :]
        if end is None:
            return False
        self._end, self._state = None, "tail"
        return True

    def _tail(self) -> bool:
        """Behind the arguments: up to the brace that closes the call."""
        at = self._buffer.find("}")
        if at < 0:
            self._buffer = ""
            return False
        self._buffer, self._state = self._buffer[at + 1 :], "calls"
        return True

    def _start(self, name: str, out: list[Delta]) -> None:
        self.calls += 1
        out.append(Delta(call=self.calls - 1, id="call_" + secrets.token_hex(12), name=name))

    def _argue(self, text: str, out: list[Delta]) -> None:
        if text:
            out.append(Delta(call=self.calls - 1, arguments=text))


def _string(text: str) -> str | None:
    try:
        return json.loads(text)
    except ValueError:
        return None
