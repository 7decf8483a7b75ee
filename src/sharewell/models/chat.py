"""Chat templates: messages to the text that a model was trained on, in a Jinja sandbox."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

import jinja2
from jinja2.ext import loopcontrols
from jinja2.sandbox import ImmutableSandboxedEnvironment

from .config import ModelError

CHATML = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


class TemplateError(ValueError):
    """The template refused the messages (for example an order of roles it does not know)."""


def _tojson(value: Any, ensure_ascii: bool = False, indent: int | None = None, **options: Any) -> str:
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, **options)


def _raise(message: str) -> None:
    raise TemplateError(message)


class ChatTemplate:
    """The chat template of a model folder; ChatML when the folder has none. Raises ModelError for a broken
    one.
    """

    def __init__(self, folder: Path | str) -> None:
        folder = Path(folder)
        path = folder / "tokenizer_config.json"
        raw: dict[str, Any] = json.loads(path.read_text("utf-8")) if path.exists() else {}
        source = raw.get("chat_template")
        if (folder / "chat_template.jinja").exists():
            source = (folder / "chat_template.jinja").read_text("utf-8")
        if isinstance(source, list):  # several named templates
            named = {t["name"]: t["template"] for t in source}
            source = named.get("default") or next(iter(named.values()))
        self.source: str = source or CHATML
        self._tokens = {
            name: _token_text(raw.get(name)) for name in ("bos_token", "eos_token", "unk_token", "pad_token")
        }
        environment = ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols]
        )
        environment.filters["tojson"] = _tojson
        environment.globals["raise_exception"] = _raise
        environment.globals["strftime_now"] = lambda format: datetime.now().strftime(format)
        try:
            self._template = environment.from_string(self.source)
        except jinja2.TemplateError as error:
            raise ModelError(f"chat template of {folder} cannot be compiled: {error}") from None

    @property
    def supports_tools(self) -> bool:
        """True when the template itself shows tools to the model."""
        return "tools" in self.source

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        tools: Sequence[Mapping[str, Any]] | None = None,
        add_generation_prompt: bool = True,
        **variables: Any,
    ) -> str:
        """The prompt text. Raises TemplateError with the template's own words when it refuses the
        messages.
        """
        try:
            return self._template.render(
                messages=list(messages),
                tools=list(tools) if tools else None,
                add_generation_prompt=add_generation_prompt,
                **self._tokens,
                **variables,
            )
        except (jinja2.TemplateError, TypeError, KeyError, AttributeError) as error:
            raise TemplateError(f"the chat template refused the messages: {error}") from None


def _token_text(value: Any) -> str:
    return value.get("content", "") if isinstance(value, Mapping) else value or ""
