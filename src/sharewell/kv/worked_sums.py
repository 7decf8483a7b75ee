"""The task of the small masked diffusion model that ships: sums with their carries, and sorting, checked
exactly.

A prompt is 16 problems of 8 characters, an answer 16 solutions of 8: ``"342+143;"`` is answered by
``"1111040;"`` (the carries out of the highest, middle and lowest place, then the sum; all numbers are in base
5), ``"<430142;"`` by ``">012344;"``. So prompt and answer have 128 characters each, and every solution can be
judged by itself. Base 5 because the table of sums of two digits is what takes longest to learn.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

BASE = 5
ALPHABET = "01234+<>;"
MASK_ID = len(ALPHABET)
VOCAB_SIZE = 10
WIDTH = 8
PROBLEMS = 16


def encode(text: str) -> list[int]:
    """Token ids, one per character. Raises ValueError naming a character that the alphabet lacks."""
    for character in text:
        if character not in ALPHABET:
            raise ValueError(f"text must consist of {ALPHABET!r}, got {character!r}")
    return [ALPHABET.index(c) for c in text]


def decode(ids: list[int] | np.ndarray) -> str:
    """The text of token ids; what has no character is shown as ``_``."""
    return "".join(ALPHABET[i] if 0 <= i < len(ALPHABET) else "_" for i in map(int, ids))


def solve(problem: str) -> str:
    """The solution, 8 characters, of a problem of 8 characters."""
    if problem[0] == "<":
        return ">" + "".join(sorted(problem[1:7])) + ";"
    a, b = int(problem[:3], BASE), int(problem[4:7], BASE)
    carries = [(a % m + b % m) // m for m in (BASE**3, BASE**2, BASE)]
    digits = [(a + b) // m % BASE for m in (BASE**3, BASE**2, BASE, 1)]
    return "".join(map(str, carries + digits)) + ";"


@dataclass(frozen=True)
class WorkedSums:
    """A generator of exercises of ``problems`` problems each; the same ``seed`` gives the same ones."""

    problems: int = PROBLEMS
    seed: int = 0

    def batch(self, n: int) -> tuple[np.ndarray, np.ndarray]:
        """``n`` exercises: prompts and answers, int64 ``[n, 8 * problems]`` each."""
        rng = np.random.default_rng(self.seed)
        shape = n, self.problems
        digits = rng.integers(0, BASE, (*shape, 6))
        sorting = rng.random(shape) < 0.5
        plus, less, more, end = (ALPHABET.index(c) for c in "+<>;")
        prompt = np.full((*shape, WIDTH), end)
        prompt[..., :3], prompt[..., 3], prompt[..., 4:7] = digits[..., :3], plus, digits[..., 3:]
        prompt[sorting, 0], prompt[sorting, 1:7] = less, digits[sorting]
        a, b = (digits[..., i : i + 3] @ np.array([BASE**2, BASE, 1]) for i in (0, 3))
        answer = np.full((*shape, WIDTH), end)
        for place, modulus in enumerate((BASE**3, BASE**2, BASE)):
            answer[..., place] = (a % modulus + b % modulus) // modulus
        for place in range(4):
            answer[..., 3 + place] = (a + b) // BASE ** (3 - place) % BASE
        answer[sorting, 0], answer[sorting, 1:7] = more, np.sort(digits[sorting])
        return prompt.reshape(n, -1), answer.reshape(n, -1)


def score(prompts: np.ndarray, answers: np.ndarray) -> np.ndarray:
    """Which solutions are right: bool ``[n, problems]`` of answers ``[n, 8 * problems]``."""
    right = []
    for prompt, answer in zip(prompts, answers, strict=True):
        asked, said = decode(prompt), decode(answer)
        starts = range(0, len(asked), WIDTH)
        right.append([said[i : i + WIDTH] == solve(asked[i : i + WIDTH]) for i in starts])
    return np.array(right)
