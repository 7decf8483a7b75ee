"""Constrained output through llguidance: which tokens a JSON schema, regex or grammar allows next."""

from __future__ import annotations

import json
import threading
from collections import OrderedDict
from pathlib import Path

import numpy as np
from llguidance import LLMatcher, LLTokenizer

from .messages import GrammarSpec


class Grammars:
    """Compiles and caches grammars for one tokenizer. Construction is cheap; the tokenizer is prepared at first use."""

    def __init__(self, tokenizer_json: Path, vocab_size: int, eos_token_ids: tuple[int, ...], most: int = 64) -> None:
        self._path, self._vocab_size, self._eos = tokenizer_json, vocab_size, eos_token_ids
        self._tokenizer: LLTokenizer | None = None
        self._compiled: OrderedDict[GrammarSpec, LLMatcher] = OrderedDict()
        self._most = most
        self._lock = threading.Lock()

    def compile(self, spec: GrammarSpec) -> GrammarState:
        """A fresh state. Raises ValueError with llguidance's message for a grammar that it refuses."""
        with self._lock:
            if self._tokenizer is None:
                text = self._path.read_text("utf-8")
                self._tokenizer = LLTokenizer(text, n_vocab=self._vocab_size, eos_token=list(self._eos))
            matcher = self._compiled.get(spec)
            if matcher is None:
                matcher = LLMatcher(self._tokenizer, source_of(spec))
                if matcher.is_error():
                    raise ValueError(f"grammar ({spec.kind}): {matcher.get_error().strip().splitlines()[0]}")
                self._compiled[spec] = matcher
                if len(self._compiled) > self._most:
                    self._compiled.popitem(last=False)
            return GrammarState(matcher.deep_copy(), self._vocab_size)


def source_of(spec: GrammarSpec) -> str:
    """llguidance's form of a constraint. Raises ValueError for text that is not what its kind says."""
    if spec.kind == "json_object":
        return LLMatcher.grammar_from_json_schema({"type": "object"})
    if spec.kind == "json_schema":
        try:
            schema = json.loads(spec.source)
        except ValueError as error:
            raise ValueError(f"grammar (json_schema): the schema is not JSON: {error}") from None
        return LLMatcher.grammar_from_json_schema(schema)
    if spec.kind == "regex":
        return LLMatcher.grammar_from_regex(spec.source)
    if spec.kind == "choice":
        words = json.loads(spec.source)
        return LLMatcher.grammar_from_lark("start: " + " | ".join(json.dumps(w) for w in words))
    return LLMatcher.grammar_from_lark(spec.source)


class GrammarState:
    """Where one answer stands in its grammar; rebuilt from its tokens after a preemption or an engine's death."""

    def __init__(self, matcher: LLMatcher, vocab_size: int) -> None:
        self._matcher, self._vocab_size = matcher, vocab_size

    def mask(self, logits: np.ndarray) -> bool:
        """Set what is not allowed next to -inf, in place; False when nothing is allowed or the matcher failed."""
        bits = np.frombuffer(self._matcher.compute_bitmask(), np.uint8)
        allowed = np.unpackbits(bits, bitorder="little")[: len(logits)].astype(bool)
        if self._matcher.is_error() or not allowed.any():
            return False
        logits[: len(allowed)][~allowed] = -np.inf
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
