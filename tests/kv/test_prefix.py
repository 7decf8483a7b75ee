"""Block hashes: a chain, scoped by its salt; and the index over them."""

from __future__ import annotations

import hashlib

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sharewell.kv import PrefixIndex, block_hashes

texts = st.lists(st.integers(0, 2**31 - 1), max_size=40)


@given(texts, st.integers(1, 9), st.binary(max_size=20))
def test_each_hash_is_blake2b_of_the_one_before_and_the_tokens(
    tokens: list[int], size: int, salt: bytes
) -> None:
    hashes = block_hashes(tokens, size, salt=salt)
    assert len(hashes) == len(tokens) // size
    previous = hashlib.blake2b(salt, digest_size=16).digest()
    for i, block_hash in enumerate(hashes):
        words = b"".join(t.to_bytes(4, "little") for t in tokens[i * size : (i + 1) * size])
        previous = hashlib.blake2b(previous + words, digest_size=16).digest()
        assert block_hash == previous


@given(texts, st.integers(1, 9), st.integers(0, 4))
def test_a_chain_goes_on_from_any_of_its_blocks(tokens: list[int], size: int, cut: int) -> None:
    whole = block_hashes(tokens, size, salt=b"s")
    cut = min(cut, len(whole))
    parent = whole[cut - 1] if cut else None
    assert whole[:cut] + block_hashes(tokens[cut * size :], size, salt=b"s", parent=parent) == whole
    assert block_hashes(np.array(tokens), size, salt=b"s") == whole


@given(st.lists(st.integers(0, 9), min_size=4, max_size=40), st.integers(0, 39))
def test_one_changed_token_changes_its_block_and_all_behind_it(tokens: list[int], at: int) -> None:
    at %= len(tokens)
    other = tokens.copy()
    other[at] += 1
    a, b = block_hashes(tokens, 4, salt=b"s"), block_hashes(other, 4, salt=b"s")
    assert [x == y for x, y in zip(a, b, strict=True)] == [i < at // 4 for i in range(len(a))]


def test_salts_share_nothing() -> None:
    tokens = list(range(64))
    chains = [block_hashes(tokens, 4, salt=salt) for salt in (b"", b"a", b"b", b"ab")]
    assert len({h for chain in chains for h in chain}) == 4 * 16


def test_bad_sizes_and_tokens_are_refused() -> None:
    with pytest.raises(ValueError, match="block_size must be at least 1, got 0"):
        block_hashes([1], 0, salt=b"")
    with pytest.raises(OverflowError):
        block_hashes([2**31], 1, salt=b"")


def test_the_first_block_of_a_content_stays() -> None:
    index = PrefixIndex()
    assert index.add(b"a", 1) and not index.add(b"a", 2) and index.add(b"a", 1)
    assert index.get(b"a") == 1 and b"a" in index and len(index) == 1 and dict(index) == {b"a": 1}
    index.add(b"c", 3)
    assert index.match([b"a", b"b", b"c"]) == 1 and index.match([]) == 0
    index.remove(b"a")
    assert index.get(b"a") is None
    with pytest.raises(KeyError):
        index.remove(b"a")
