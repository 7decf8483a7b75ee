"""Tool calls: showing tools to a model, constraining its answer to one, and reading calls out of its text."""

from __future__ import annotations

import json
import re
import secrets
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from ..core.messages import GrammarSpec
from .errors import ApiError
from .schemas import Tool, ToolChoice

OPEN, CLOSE = "<tool_call>", "</tool_call>"
_HEAD = re.compile(r'\s*\{\s*"name"\s*:\s*"((?:[^"\\]|\\.)*)"\s*,\s*"(?:arguments|parameters)"\s*:\s*')


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


def chosen(
    tools: Sequence[Tool] | None, choice: str | ToolChoice | None
) -> tuple[Literal["none", "auto", "required", "named"], Tool | None]:
    """How the request wants tools used. Raises ApiError 400 for a choice that the tools do not allow."""
    if isinstance(choice, ToolChoice):
        tool = next((t for t in tools or () if t.function.name == choice.function.name), None)
        if tool is None:
            raise ApiError(
                400, f"tool_choice names {choice.function.name!r}, which is not in tools", param="tool_choice"
            )
        return "named", tool
    if not tools:
        if choice == "required":
            raise ApiError(400, "tool_choice is 'required' but tools is empty", param="tool_choice")
        return "none", None
    if choice == "none":
        return "none", None
    return ("required", None) if choice == "required" else ("auto", None)


def constraint(tools: Sequence[Tool], mode: str, tool: Tool | None) -> GrammarSpec | None:
    """Grammar that makes the answer a call: the arguments alone for a named tool, name and arguments for any."""
    if mode == "named":
        assert tool is not None
        return GrammarSpec("json_schema", json.dumps(_parameters(tool)))
    if mode != "required":
        return None
    options = [
        {
            "type": "object",
            "properties": {"name": {"const": t.function.name}, "arguments": _parameters(t)},
            "required": ["name", "arguments"],
            "additionalProperties": False,
        }
        for t in tools
    ]
    return GrammarSpec("json_schema", json.dumps(options[0] if len(options) == 1 else {"anyOf": options}))


def _parameters(tool: Tool) -> dict[str, Any]:
    return tool.function.parameters or {"type": "object", "properties": {}}


@dataclass
class Delta:
    """A part of an answer: plain ``text``, or of call number ``call`` its id and name (once) or more ``arguments``."""

    text: str = ""
    call: int | None = None
    id: str | None = None
    name: str | None = None
    arguments: str = ""


class ToolCallParser:
    """Splits an answer that grows into text and calls.

    mode "auto" looks for calls between the tags; "required" takes the whole answer as one call; "named" takes it as the
    arguments of ``name``. What looks like a call but is none comes out as text in the end.
    """

    def __init__(self, mode: str, name: str | None = None, parallel: bool = True) -> None:
        self._mode, self._parallel = mode, parallel
        self._buffer = ""
        self._inside = mode in ("required", "named")
        self._raw = ""
        self._named = False
        self._sent = 0
        self.calls = 0
        self._name = name

    def push(self, text: str) -> list[Delta]:
        """What ``text`` makes certain."""
        out: list[Delta] = []
        self._buffer += text
        while self._buffer:
            if self._mode == "named":
                if not self._named:
                    out.append(self._start(self._name or ""))
                out.append(Delta(call=self.calls - 1, arguments=self._buffer))
                self._buffer = ""
            elif not self._inside:
                at = self._buffer.find(OPEN)
                keep = 0 if at >= 0 else _overlap(self._buffer, OPEN)
                shown = self._buffer[:at] if at >= 0 else self._buffer[: len(self._buffer) - keep]
                if shown:
                    out.append(Delta(text=shown))
                self._buffer = self._buffer[len(shown) :]
                if at < 0:
                    break
                self._buffer = self._buffer[len(OPEN) :]
                self._inside, self._raw, self._named, self._sent = True, "", False, 0
            else:
                at = self._buffer.find(CLOSE) if self._mode == "auto" else -1
                keep = 0 if at >= 0 or self._mode != "auto" else _overlap(self._buffer, CLOSE)
                end = at if at >= 0 else len(self._buffer) - keep
                self._raw += self._buffer[:end]
                self._buffer = self._buffer[end:]
                out += self._advance(final=at >= 0)
                if at < 0:
                    break
                self._buffer = self._buffer[len(CLOSE) :]
                self._inside = False
        return out

    def finish(self) -> list[Delta]:
        """What is left at the end of the answer."""
        out: list[Delta] = []
        if self._inside and self._mode != "named":
            self._raw += self._buffer
            self._buffer = ""
            out += self._advance(final=True)
        elif self._buffer:
            out.append(Delta(text=self._buffer))
        self._buffer = ""
        return out

    def _start(self, name: str) -> Delta:
        self._named = True
        self.calls += 1
        return Delta(call=self.calls - 1, id="call_" + secrets.token_hex(12), name=name)

    def _advance(self, final: bool) -> list[Delta]:
        """Arguments go out as they come, but for the last brace, which closes the call and not its arguments."""
        head = _HEAD.match(self._raw)
        if head is None:
            return (
                [Delta(text=OPEN + self._raw + CLOSE if self._mode == "auto" else self._raw)] if final else []
            )
        if not self._parallel and self.calls and not self._named:
            return []
        out: list[Delta] = []
        if not self._named:
            out.append(self._start(json.loads(f'"{head[1]}"')))
        arguments = self._raw[head.end() :]
        trimmed = arguments.rstrip()
        certain = trimmed.removesuffix("}").rstrip() if final else trimmed.rstrip("} \n\t\r")
        if len(certain) > self._sent:
            out.append(Delta(call=self.calls - 1, arguments=certain[self._sent :]))
            self._sent = len(certain)
        return out


def _overlap(text: str, tag: str) -> int:
    return next((n for n in range(min(len(text), len(tag) - 1), 0, -1) if text.endswith(tag[:n])), 0)
