"""Constrained output through llguidance: which tokens a JSON schema, regex or grammar allows next."""

from __future__ import annotations

import json
import threading
from collections import OrderedDict
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from llguidance import LLMatcher, LLTokenizer

from .messages import GrammarSpec

if TYPE_CHECKING:
    from llguidance._lib import JsonCompileOptions

# Any white space between two marks of JSON, but not without end: small models like to go on with it for ever.
_JSON: JsonCompileOptions = {"whitespace_pattern": r"[ \t\r\n]{1,32}"}


class Grammars:
    """Compiles and caches grammars for one tokenizer. Construction is cheap; the tokenizer is prepared at
    first use.

    Any thread may call :meth:`compile`: the host compiles beforehand in a thread of its own, so that a slow
    grammar (llguidance lets go of the interpreter meanwhile, and bounds its own work) holds up no step."""

    def __init__(
        self, tokenizer_json: Path, vocab_size: int, eos_token_ids: tuple[int, ...], most: int = 64
    ) -> None:
        self._path, self._vocab_size, self._eos = tokenizer_json, vocab_size, eos_token_ids
        self._tokenizer: LLTokenizer | None = None
        self._compiled: OrderedDict[GrammarSpec, LLMatcher] = OrderedDict()
        self._most = most
        self._lock, self._preparing = threading.Lock(), threading.Lock()

    def compile(self, spec: GrammarSpec) -> GrammarState:
        """A fresh state. Raises ValueError with llguidance's message for a grammar that it refuses."""
        with self._lock:
            matcher = self._compiled.get(spec)
            if matcher is not None:
                self._compiled.move_to_end(spec)
                return GrammarState(matcher.deep_copy(), self._vocab_size)
        matcher = LLMatcher(self._prepared(), source_of(spec), log_level=0)
        if matcher.is_error():
            message = matcher.get_error().strip().splitlines()
            raise ValueError(f"grammar ({spec.kind}): {message[0] if message else 'refused'}")
        with self._lock:
            self._compiled[spec] = matcher
            if len(self._compiled) > self._most:
                self._compiled.popitem(last=False)
            return GrammarState(matcher.deep_copy(), self._vocab_size)

    def ready(self, spec: GrammarSpec) -> bool:
        """True when :meth:`compile` would find it in the cache."""
        with self._lock:
            return spec in self._compiled

    def _prepared(self) -> LLTokenizer:
        with self._preparing:
            if self._tokenizer is None:
                text = self._path.read_text("utf-8")
                self._tokenizer = LLTokenizer(text, n_vocab=self._vocab_size, eos_token=list(self._eos))
            return self._tokenizer


def source_of(spec: GrammarSpec) -> str:
    """llguidance's form of a constraint. Raises ValueError for text that is not what its kind says."""
    if spec.kind == "json_object":
        return LLMatcher.grammar_from_json_schema({"type": "object"}, overrides=_JSON)
    if spec.kind == "json_schema":
        try:
            schema = json.loads(spec.source)
        except ValueError as error:
            raise ValueError(f"grammar (json_schema): the schema is not JSON: {error}") from None
        if not isinstance(schema, dict | bool):
            raise ValueError(
                f"grammar (json_schema): the schema must be an object, got {type(schema).__name__}"
            )
        return LLMatcher.grammar_from_json_schema(json.dumps(schema), overrides=_JSON)
    if spec.kind == "regex":
        return LLMatcher.grammar_from_regex(spec.source)
    if spec.kind == "choice":
        try:
            words = json.loads(spec.source)
        except ValueError as error:
            raise ValueError(f"grammar (choice): the source is not JSON: {error}") from None
        if not isinstance(words, list) or not words or not all(isinstance(w, str) for w in words):
            raise ValueError("grammar (choice): the source must be a JSON list of at least one string")
        return LLMatcher.grammar_from_lark("start: " + " | ".join(json.dumps(w) for w in words))
    return LLMatcher.grammar_from_lark(spec.source)


class GrammarState:
    """Where one answer stands in its grammar; rebuilt from its tokens after a preemption or an engine's
    death."""

    def __init__(self, matcher: LLMatcher, vocab_size: int) -> None:
        self._matcher, self._vocab_size = matcher, vocab_size

    def mask(self, logits: np.ndarray) -> bool:
        """Set what is not allowed next to -inf, in place; False when nothing is allowed or the matcher
        failed."""
        bits = np.frombuffer(self._matcher.compute_bitmask(), np.uint8)
        if self._matcher.is_error():
            return False
        allowed = np.unpackbits(bits, count=min(len(logits), 8 * len(bits)), bitorder="little").view(bool)
        if not allowed.any():
            return False
        np.copyto(logits[: len(allowed)], -np.inf, where=~allowed)
        logits[len(allowed) :] = -np.inf
        return True

    def accept(self, token: int) -> bool:
        """Go on by ``token``; False when it is not allowed."""
        return bool(self._matcher.consume_token(token))

    @property
    def complete(self) -> bool:
        """Nothing may follow but the end."""
        return bool(self._matcher.is_stopped())

    @property
    def accepting(self) -> bool:
        """The answer may end here."""
        return bool(self._matcher.is_accepting())
