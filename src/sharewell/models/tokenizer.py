"""Text to token ids and back, on the ``tokenizers`` library alone (transformers takes seconds to import)."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from functools import cached_property
from pathlib import Path

from tokenizers import Tokenizer as Backend

from .config import ModelError


class Tokenizer:
    """The tokenizer of a model folder (``tokenizer.json``).

    Raises ModelError when it is missing or unreadable.
    """

    def __init__(self, folder: Path | str) -> None:
        path = Path(folder) / "tokenizer.json"
        if not path.exists():
            raise ModelError(f"{folder} holds no tokenizer.json")
        try:
            self.backend = Backend.from_file(str(path))
        except Exception as error:  # the library raises bare Exception
            raise ModelError(f"{path} cannot be read: {error}") from None
        self.special_ids = frozenset(
            i for i, t in self.backend.get_added_tokens_decoder().items() if t.special
        )
        raw = json.loads(self.backend.to_str())
        self._byte_level = "ByteLevel" in json.dumps(raw.get("decoder")) or "ByteLevel" in json.dumps(
            raw.get("pre_tokenizer")
        )

    @property
    def vocab_size(self) -> int:
        """Number of token ids, added tokens included."""
        return self.backend.get_vocab_size(with_added_tokens=True)

    def encode(self, text: str, add_special_tokens: bool = False) -> list[int]:
        """Token ids of ``text``; special tokens that stand in it as text become their ids."""
        return self.backend.encode(text, add_special_tokens=add_special_tokens).ids

    def decode(self, ids: Iterable[int], skip_special_tokens: bool = True) -> str:
        """Text of ``ids``; bytes that are not UTF-8 become U+FFFD."""
        return self.backend.decode(list(ids), skip_special_tokens=skip_special_tokens)

    def id_of(self, token: str) -> int | None:
        """Id of the token spelled ``token``, or None."""
        return self.backend.token_to_id(token)

    def token_bytes(self, token_id: int) -> bytes:
        """The bytes that ``token_id`` adds to a text; empty for an id without a token."""
        piece = self.backend.id_to_token(token_id)
        if piece is None:
            return b""
        if token_id in self._added or not self._byte_level:
            if len(piece) == 6 and piece.startswith("<0x") and piece.endswith(">"):
                return bytes([int(piece[3:5], 16)])
            return piece.replace("\u2581", " ").encode("utf-8")
        return bytes(_CHAR_TO_BYTE[c] for c in piece if c in _CHAR_TO_BYTE)

    @cached_property
    def _added(self) -> frozenset[int]:
        return frozenset(self.backend.get_added_tokens_decoder())


def _byte_alphabet() -> dict[str, int]:
    """GPT-2's printable stand-ins for the 256 bytes."""
    printable = [*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    table = {chr(b): b for b in printable}
    for i, b in enumerate(b for b in range(256) if b not in set(printable)):
        table[chr(256 + i)] = b
    return table


_CHAR_TO_BYTE = _byte_alphabet()


class IncrementalDetokenizer:
    """Text piece by piece, equal in sum to decoding at once; holds back characters whose bytes are not
    complete.

    Special tokens give no text. Work per token does not grow with the length of the answer.
    """

    def __init__(
        self, tokenizer: Tokenizer, prompt_tail_ids: Sequence[int] = (), skip_special_tokens: bool = True
    ) -> None:
        self._tokenizer = tokenizer
        self._skip = skip_special_tokens
        # A decoder may treat a text's first token differently (a leading space), so decode behind a known
        # tail.
        self._ids: list[int] = list(prompt_tail_ids[-4:])
        self._prefix = len(self._ids)
        self._known = self._decode(self._ids)

    def _decode(self, ids: Sequence[int]) -> str:
        return self._tokenizer.decode(ids, skip_special_tokens=self._skip)

    def push(self, ids: Iterable[int]) -> str:
        """The text that ``ids`` complete."""
        out = []
        for token in ids:
            self._ids.append(token)
            text = self._decode(self._ids)
            if text.endswith("\ufffd") and len(self._ids) - self._prefix < 8:
                continue  # a character lacks bytes; after 8 tokens it stays a replacement character
            out.append(text[len(self._known) :])
            self._ids = self._ids[self._prefix :] if len(self._ids) > self._prefix else self._ids
            self._ids = self._ids[-4:]
            self._prefix = len(self._ids)
            self._known = self._decode(self._ids)
        return "".join(out)

    def flush(self) -> str:
        """What was held back, as far as it can be decoded."""
        text = self._decode(self._ids)[len(self._known) :]
        self._ids, self._prefix, self._known = [], 0, ""
        return text
