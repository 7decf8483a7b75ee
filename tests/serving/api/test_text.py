"""What is shown of a growing answer does not depend on how it was cut into pieces."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sharewell.models import IncrementalDetokenizer, Tokenizer
from sharewell.serving.api.text import StopScanner

letters = st.text("ab", max_size=24)
words = st.lists(st.text("ab", min_size=1, max_size=4), min_size=1, max_size=4)


def shown(pieces: list[str], stops: list[str]) -> tuple[str, str | None]:
    scanner = StopScanner(stops)
    text = "".join(scanner.push(piece) for piece in pieces)
    return text + (scanner.flush() if scanner.stopped is None else ""), scanner.stopped


def reference(text: str, stops: list[str]) -> tuple[str, str | None]:
    """The shortest beginning that ends with a stop string, without the longest such string."""
    for end in range(1, len(text) + 1):
        ending = [s for s in stops if text[:end].endswith(s)]
        if ending:
            longest = max(ending, key=len)
            return text[: end - len(longest)], longest
    return text, None


def cut(text: str, places: list[int]) -> list[str]:
    bounds = [0, *sorted(min(p, len(text)) for p in places), len(text)]
    return [text[a:b] for a, b in pairwise(bounds)]


@given(letters, words, st.lists(st.integers(0, 24), max_size=8))
@settings(max_examples=400)
def test_stop_is_found_wherever_the_text_is_cut(text: str, stops: list[str], places: list[int]) -> None:
    assert shown(cut(text, places), stops) == reference(text, stops)


@given(letters, words)
def test_nothing_that_is_shown_is_taken_back(text: str, stops: list[str]) -> None:
    scanner, so_far = StopScanner(stops), ""
    for letter in text:
        so_far += scanner.push(letter)
        assert reference(text, stops)[0].startswith(so_far)


def test_text_without_stops_is_passed_on_at_once() -> None:
    scanner = StopScanner([""])
    assert scanner.push("abc") == "abc"
    assert scanner.stopped is None


@pytest.mark.parametrize(
    "text", ["naïve café", "日本語のテキスト", "👩‍👩‍👧‍👦 family 🏴󠁧󠁢󠁳󠁣󠁴󠁿", "tab\tand\nnewline", "\ufffd kept"]
)
def test_characters_come_whole_from_token_to_token(smollm2: Path, text: str) -> None:
    tokenizer = Tokenizer(smollm2)
    detokenizer = IncrementalDetokenizer(tokenizer)
    pieces = [detokenizer.push([token]) for token in tokenizer.encode(text)] + [detokenizer.flush()]
    assert "".join(pieces) == text
    whole = [p for p in pieces if p]
    assert text.count("\ufffd") == sum(p.count("\ufffd") for p in whole)
