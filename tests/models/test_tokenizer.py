from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sharewell.models import IncrementalDetokenizer, ModelError, Tokenizer, resolve_model

# SmolLM2's vocabulary lacks the bytes of six control characters and of planes 4 to 15.
ALPHABET = st.characters(
    max_codepoint=0x3FFFF, exclude_categories=("Cs",), exclude_characters="\x04\x06\x13\x14\x16\x1d"
)
TEXTS = st.text(ALPHABET, max_size=40) | st.sampled_from(
    ["🙂 naïve 漢字 ñ", "a\u0301e\u0301", "👩‍👩‍👧‍👦", "\x01\x7f\n\t  x", "１２３"]
)


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer(resolve_model("smollm2", progress=False))


def test_text_survives_the_round_trip(tokenizer: Tokenizer) -> None:
    @given(TEXTS)
    def check(text: str) -> None:
        assert tokenizer.decode(tokenizer.encode(text), skip_special_tokens=False) == text

    check()


def test_pieces_add_up_to_the_whole_text(tokenizer: Tokenizer) -> None:
    @given(TEXTS, st.lists(st.integers(1, 4), max_size=40))
    def check(text: str, sizes: list[int]) -> None:
        ids = tokenizer.encode(text)
        pieces, at = [], 0
        stream = IncrementalDetokenizer(tokenizer)
        for size in [*sizes, len(ids)]:
            pieces.append(stream.push(ids[at : at + size]))
            at += size
        pieces.append(stream.flush())
        assert "".join(pieces) == tokenizer.decode(ids)
        assert "\ufffd" not in "".join(pieces) or "\ufffd" in text

    check()


def test_incomplete_characters_are_held_back_until_their_bytes_are_there(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode("x🙂")
    assert len(ids) > 2  # the character takes several tokens
    stream = IncrementalDetokenizer(tokenizer)
    assert [stream.push([i]) for i in ids] == ["x", *[""] * (len(ids) - 2), "🙂"]
    assert stream.flush() == ""


def test_what_never_becomes_a_character_comes_out_at_the_end(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode("🙂")[:-1]
    stream = IncrementalDetokenizer(tokenizer)
    assert stream.push(ids) == ""
    assert stream.flush() == tokenizer.decode(ids)
    assert "\ufffd" in tokenizer.decode(ids)
    assert stream.push(tokenizer.encode("after")) == "after"


def test_random_ids_add_up_too(tokenizer: Tokenizer) -> None:
    @given(st.lists(st.integers(0, 49_151), max_size=60))
    def check(ids: list[int]) -> None:
        stream = IncrementalDetokenizer(tokenizer, skip_special_tokens=False)
        text = "".join([*(stream.push([i]) for i in ids), stream.flush()])
        # Bytes that are not UTF-8 may be grouped into replacement characters in another way, never lost.
        assert text.replace("\ufffd", "") == tokenizer.decode(ids, skip_special_tokens=False).replace(
            "\ufffd", ""
        )

    check()


def test_special_tokens_give_no_text(tokenizer: Tokenizer) -> None:
    end = tokenizer.id_of("<|im_end|>")
    assert end is not None
    assert end in tokenizer.special_ids
    stream = IncrementalDetokenizer(tokenizer)
    assert stream.push([*tokenizer.encode("done"), end]) + stream.flush() == "done"


def test_bytes_of_tokens_concatenate_to_the_text(tokenizer: Tokenizer) -> None:
    @given(TEXTS)
    def check(text: str) -> None:
        assert b"".join(map(tokenizer.token_bytes, tokenizer.encode(text))) == text.encode()

    check()
    assert tokenizer.token_bytes(10**6) == b""
    assert tokenizer.vocab_size == 49_152


def test_folders_without_a_tokenizer_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"holds no tokenizer\.json"):
        Tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(ModelError, match=r"tokenizer\.json cannot be read"):
        Tokenizer(tmp_path)
