"""A message hidden in the text of a language model, whose token distribution stays exactly that of the model.

The message is cut into blocks of a few bits. For each token the block that is least known so far is
compressed to the rate, coupled with the model's next-token distribution, and a token drawn given the true
block; the receiver, who runs the same model, updates its belief by Bayes. Source: Ebrahimi et al. 2024
(2410.21666), blockwise variant; the factored message follows Sokota et al. 2023 (2210.14889).

Probabilities are rounded to integers first: a rounding that differs between sender and receiver would part
their beliefs. A fingerprint of model and settings travels in the header, and another model is refused
before decoding."""

from __future__ import annotations

import json
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from hashlib import blake2b
from typing import Any, Protocol

import numpy as np

from .coding_game import action_given_message
from .info import entropy

FORMAT = "sharewell-stego-1"


class CarrierMismatch(ValueError):
    """The receiver's model or settings are not the sender's."""


class CarrierModel(Protocol):
    """A causal language model: ``start`` forgets all and reads a prompt, ``step`` reads one token more;
    both return the logits of the next token, float64 [vocabulary]. ``fingerprint``: of its weights."""

    fingerprint: str

    def start(self, token_ids: Sequence[int]) -> np.ndarray: ...

    def step(self, token_id: int) -> np.ndarray: ...


@dataclass(frozen=True)
class StegoText:
    """What is sent: the tokens, their text, and what the receiver needs to know beforehand."""

    tokens: tuple[int, ...]
    text: str
    n_bytes: int
    crc: int  # of the message
    fingerprint: str
    bits_per_token: float  # of message
    entropy_per_token: float  # of the model: the upper bound

    def to_json(self) -> str:
        """The header and the tokens."""
        fields = {"format": FORMAT, "fingerprint": self.fingerprint, "bytes": self.n_bytes, "crc": self.crc}
        return json.dumps({**fields, "tokens": list(self.tokens), "text": self.text})

    @classmethod
    def from_json(cls, text: str) -> StegoText:
        """Inverse of :meth:`to_json`. Raises ValueError for anything else."""
        try:
            fields = json.loads(text)
            if fields["format"] != FORMAT:
                raise ValueError
            tokens = fields["tokens"]
            checked = [fields["bytes"], fields["crc"], *tokens]
            if not all(type(x) is int and x >= 0 for x in checked) or not 1 <= fields["bytes"] <= 1 << 16:
                raise ValueError
            return cls(
                tuple(tokens),
                str(fields["text"]),
                fields["bytes"],
                fields["crc"],
                str(fields["fingerprint"]),
                0.0,
                0.0,
            )
        except (KeyError, TypeError, ValueError):
            raise ValueError(f"text must be a {FORMAT} document") from None


class TransformersCarrier:
    """A causal model of transformers as a :class:`CarrierModel`: batch 1, CPU, float32, logits in float64."""

    def __init__(self, model: Any) -> None:
        self._model = model.eval()
        self._cache: Any = None
        digest = blake2b(digest_size=8)
        for name, parameter in sorted(model.named_parameters()):
            sample = parameter.detach().reshape(-1)
            sample = sample[:: max(1, len(sample) // 64)].float().cpu().numpy()
            digest.update(name.encode() + sample.astype("<f4").tobytes())
        self.fingerprint = digest.hexdigest()

    def _run(self, token_ids: Sequence[int]) -> np.ndarray:
        import torch

        with torch.inference_mode():
            out = self._model(
                input_ids=torch.tensor([list(token_ids)]), past_key_values=self._cache, use_cache=True
            )
        self._cache = out.past_key_values
        return out.logits[0, -1].double().numpy()

    def start(self, token_ids: Sequence[int]) -> np.ndarray:
        """Forget all and read a prompt."""
        self._cache = None
        return self._run(token_ids)

    def step(self, token_id: int) -> np.ndarray:
        """Read one token more."""
        return self._run([token_id])


def integer_distribution(logits: np.ndarray, top_k: int | None, bits: int) -> tuple[np.ndarray, np.ndarray]:
    """(token ids, ascending by id; probabilities that are multiples of 2**-bits and sum to 1)."""
    logits = np.asarray(logits, np.float64)
    k = len(logits) if top_k is None else min(top_k, len(logits))
    ids = np.sort(np.argsort(-logits, kind="stable")[:k])
    p = np.exp(logits[ids] - logits[ids].max())
    p /= p.sum()
    counts = np.rint(p * (1 << bits)).astype(np.int64)
    counts[int(counts.argmax())] += (1 << bits) - counts.sum()
    kept = counts > 0
    return ids[kept], counts[kept] / (1 << bits)


class LMCarrier:
    """Hides messages in what a language model says.

    model: a :class:`CarrierModel`. tokenizer: anything with ``encode(text) -> ids`` and ``decode(ids) ->
    text``. top_k: tokens that may be drawn (None: all). rate: bits of a token's code as a share of a
    block's. block_bits: 1 to 12. precision_bits: probabilities are multiples of 2**-precision_bits.
    max_tokens: give up after. Raises ValueError naming the field and its range."""

    def __init__(
        self,
        model: CarrierModel,
        tokenizer: Any,
        top_k: int | None = 512,
        rate: float = 1.0,
        block_bits: int = 8,
        precision_bits: int = 16,
        max_tokens: int = 2000,
    ) -> None:
        for name, value, low, high in (
            ("top_k", 2 if top_k is None else top_k, 2, 1 << 20),
            ("block_bits", block_bits, 1, 12),
            ("precision_bits", precision_bits, 8, 30),
            ("max_tokens", max_tokens, 1, 1 << 20),
        ):
            if not low <= value <= high:
                raise ValueError(f"{name} must be in [{low}, {high}], got {value}")
        if not 1 / block_bits <= rate <= 1:  # under one bit a code may never tell the last two values apart
            raise ValueError(f"rate must be in [1 / block_bits, 1] = [{1 / block_bits:.3f}, 1], got {rate}")
        self.model, self.tokenizer, self.top_k = model, tokenizer, top_k
        self.rate_bits, self.block_bits = rate * block_bits, block_bits
        self.precision_bits, self.max_tokens = precision_bits, max_tokens
        settings = f"{FORMAT} {top_k} {rate} {block_bits} {precision_bits}"
        self.fingerprint = blake2b(f"{settings} {model.fingerprint}".encode(), digest_size=8).hexdigest()

    def _beliefs(self, n_bytes: int) -> np.ndarray:
        blocks, size = -(-8 * n_bytes // self.block_bits), 1 << self.block_bits
        return np.full((blocks, size), 1 / size)

    def _given(self, beliefs: np.ndarray, p: np.ndarray) -> tuple[int, np.ndarray]:
        """(the block that is known least, p(token | its value) [values, tokens])."""
        h = -(beliefs * np.log2(np.where(beliefs > 0, beliefs, 1))).sum(1)
        block = int(h.argmax())
        return block, action_given_message(beliefs[block], p, self.rate_bits)

    @staticmethod
    def _learn(beliefs: np.ndarray, block: int, likelihood: np.ndarray) -> None:
        posterior = beliefs[block] * likelihood
        mass = posterior.sum()
        if mass > 0:
            beliefs[block] = posterior / mass

    def _split(self, message: bytes) -> list[int]:
        number, width = int.from_bytes(message, "big"), self.block_bits
        blocks = -(-8 * len(message) // width)
        return [number >> (width * k) & ((1 << width) - 1) for k in range(blocks)]

    def encode(self, message: bytes, prompt: str, seed: int, confidence: float = 0.999) -> StegoText:
        """Text after ``prompt`` that carries ``message``: tokens until the receiver's guess is right and
        has this ``confidence`` in every block. ``seed`` fixes the draws and is not needed to decode. Raises
        ValueError when ``max_tokens`` do not suffice."""
        if not message:
            raise ValueError("message must have at least one byte, got none")
        rng = np.random.default_rng(seed)
        values = self._split(message)
        beliefs = self._beliefs(len(message))
        logits = self.model.start(self.tokenizer.encode(prompt))
        tokens: list[int] = []
        bits = 0.0
        while not all(b.argmax() == v and b[v] >= confidence for b, v in zip(beliefs, values, strict=True)):
            if len(tokens) == self.max_tokens:
                raise ValueError(f"max_tokens must allow for the message, {self.max_tokens} did not")
            ids, p = integer_distribution(logits, self.top_k, self.precision_bits)
            bits += entropy(p)
            block, given = self._given(beliefs, p)
            row = given[values[block]].cumsum()
            at = min(int(np.searchsorted(row, rng.random() * row[-1], side="right")), len(ids) - 1)
            self._learn(beliefs, block, given[:, at])
            tokens.append(int(ids[at]))
            logits = self.model.step(tokens[-1])
        n = len(tokens)
        return StegoText(
            tuple(tokens),
            self.tokenizer.decode(tokens),
            len(message),
            zlib.crc32(message),
            self.fingerprint,
            8 * len(message) / n,
            bits / n,
        )

    def decode(self, sent: StegoText, prompt: str) -> bytes:
        """The message. Raises CarrierMismatch for another model, other settings, or tokens that the model
        would not say; ValueError when what was received is not the whole message."""
        if sent.fingerprint != self.fingerprint:
            raise CarrierMismatch(
                f"made with model and settings {sent.fingerprint}, these are {self.fingerprint}"
            )
        beliefs = self._beliefs(sent.n_bytes)
        logits = self.model.start(self.tokenizer.encode(prompt))
        for number, token in enumerate(sent.tokens):
            ids, p = integer_distribution(logits, self.top_k, self.precision_bits)
            at = int(np.searchsorted(ids, token))
            if at == len(ids) or ids[at] != token:
                raise CarrierMismatch(f"token {number} is one that this model does not say here")
            block, given = self._given(beliefs, p)
            self._learn(beliefs, block, given[:, at])
            if number + 1 < len(sent.tokens):
                logits = self.model.step(token)
        number = sum(int(b.argmax()) << (self.block_bits * k) for k, b in enumerate(beliefs))
        left = sum(entropy(b) for b in beliefs)
        message = (number & ((1 << 8 * sent.n_bytes) - 1)).to_bytes(sent.n_bytes, "big")
        if zlib.crc32(message) != sent.crc:
            raise ValueError(f"message is not whole: {left:.2f} bits of it are still unknown")
        return message
