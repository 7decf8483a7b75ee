"""From chat messages and tools to the text that the model sees."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from ...models import ChatTemplate, TemplateError
from .errors import ApiError
from .schemas import Message, Tool
from .tools import CLOSE, OPEN, system_text

_RESERVED = frozenset({"messages", "tools", "add_generation_prompt", "self"})


def plain_messages(messages: Sequence[Message]) -> list[dict[str, Any]]:
    """Messages as templates take them: text parts joined, "developer" as "system", arguments as objects."""
    plain = []
    for message in messages:
        content = message.content
        if isinstance(content, list):
            content = "".join(part.text for part in content)
        role = "system" if message.role == "developer" else message.role
        entry: dict[str, Any] = {"role": role, "content": content or ""}
        if message.name is not None:
            entry["name"] = message.name
        if message.tool_call_id is not None:
            entry["tool_call_id"] = message.tool_call_id
        if message.tool_calls:
            entry["tool_calls"] = [
                {
                    "id": call.id,
                    "type": "function",
                    "function": {
                        "name": call.function.name,
                        "arguments": _arguments(call.function.arguments),
                    },
                }
                for call in message.tool_calls
            ]
        plain.append(entry)
    return plain


def _arguments(text: str) -> Any:
    """Arguments as an object, which is what templates write; as text when a model wrote something else."""
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        return text
    return value if isinstance(value, dict) else text


def _shown(messages: list[dict[str, Any]], tools: Sequence[Tool]) -> list[dict[str, Any]]:
    """Tools as part of the system message, calls and results as text: for a template without a place."""
    shown = []
    for message in messages:
        if message.get("tool_calls"):
            calls = "\n".join(
                f"{OPEN}\n{json.dumps(call['function'], ensure_ascii=False)}\n{CLOSE}"
                for call in message["tool_calls"]
            )
            message = {"role": "assistant", "content": (message["content"] + "\n" + calls).strip()}
        elif message["role"] in ("tool", "function"):
            message = {
                "role": "user",
                "content": f"<tool_response>\n{message['content']}\n</tool_response>",
            }
        shown.append(message)
    if tools:
        text = system_text(tools)
        if shown and shown[0]["role"] == "system":
            shown[0] = {**shown[0], "content": shown[0]["content"] + "\n\n" + text}
        else:
            shown.insert(0, {"role": "system", "content": text})
    return shown


def chat_prompt(
    template: ChatTemplate,
    messages: Sequence[Message],
    tools: Sequence[Tool] = (),
    variables: Mapping[str, Any] | None = None,
    *,
    add_generation_prompt: bool = True,
    param: str = "messages",
) -> str:
    """The prompt's text. Raises ApiError 400 when the template refuses the messages or a variable."""
    taken = next((name for name in variables or {} if name in _RESERVED), None)
    if taken is not None:
        where = f"chat_template_kwargs.{taken}"
        raise ApiError(400, f"{where} cannot be set", param=where, code="invalid_value")
    plain = plain_messages(messages)
    described = None
    if template.supports_tools:
        described = [t.model_dump(exclude_none=True) for t in tools] or None
    else:
        plain = _shown(plain, tools)
    try:
        return template.render(plain, described, add_generation_prompt, **(variables or {}))
    except TemplateError as error:
        raise ApiError(400, str(error), param=param, code="invalid_messages") from None
