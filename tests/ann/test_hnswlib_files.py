"""hnswlib's file format: a file of ours is read back, and damage is noticed."""

from __future__ import annotations

import struct
from pathlib import Path

import numpy as np
import pytest

from sharewell.ann import HNSWIndex, IndexFormatError, from_hnswlib, to_hnswlib


def rows(n: int = 1500, dim: int = 20) -> np.ndarray:
    return np.random.default_rng(0).standard_normal((n, dim)).astype(np.float32)


@pytest.fixture
def file(tmp_path: Path) -> Path:
    index = HNSWIndex(20, metric="l2", M=8)
    index.add(rows(), np.arange(1500) * 7)
    index.remove(np.arange(100) * 7)
    to_hnswlib(index, tmp_path / "index.bin")
    return tmp_path / "index.bin"


def test_an_exported_index_reads_back_the_same(file: Path):
    again = from_hnswlib(file, 20, "l2")
    assert len(again) == 1400 and again.stats().unreachable == 0
    found = again.search(rows()[200:260], 1, strategy="graph")
    np.testing.assert_array_equal(found.labels[:, 0], np.arange(200, 260) * 7)
    again.add(rows(1600)[1500:])
    assert len(again) == 1500


def test_the_header_has_the_fields_that_hnswlib_reads(file: Path):
    data = file.read_bytes()
    start0, capacity, n, size, label_at, vector_at = struct.unpack_from("<6Q", data)
    assert (start0, capacity, n, label_at, vector_at) == (0, 1400, 1400, 4 + 64 + 80, 4 + 64)
    assert size == 4 + 4 * 16 + 4 * 20 + 8
    top, entry, max_m, max_m0, m, mult, ef = struct.unpack_from("<iIQQQdQ", data, 48)
    assert (max_m, max_m0, m, ef) == (8, 16, 8, 200) and mult == pytest.approx(1 / np.log(8))
    assert 0 <= entry < 1400 and top >= 1


def test_deleted_elements_stay_deleted(file: Path):
    data = bytearray(file.read_bytes())
    size = 4 + 4 * 16 + 4 * 20 + 8
    data[96 + 5 * size + 2] |= 1  # hnswlib's mark of a deleted element
    file.write_bytes(data)
    again = from_hnswlib(file, 20, "l2")
    assert len(again) == 1399 and again.stats().tombstones == 1
    assert 105 * 7 not in again


@pytest.mark.parametrize("length", [0, 50, 96, 5000, -1])
def test_a_cut_file_is_refused(file: Path, length: int):
    file.write_bytes(file.read_bytes()[:length])
    with pytest.raises(IndexFormatError):
        from_hnswlib(file, 20, "l2")


def test_a_wrong_dimension_is_named(file: Path):
    with pytest.raises(IndexFormatError, match="20 dimensions, not 21"):
        from_hnswlib(file, 21, "l2")


def test_wild_links_are_refused(file: Path):
    data = bytearray(file.read_bytes())
    data[96 + 4 : 96 + 8] = struct.pack("<I", 10**6)
    file.write_bytes(data)
    with pytest.raises(IndexFormatError, match="links are damaged"):
        from_hnswlib(file, 20, "l2")


def test_int8_storage_has_no_hnswlib_form(tmp_path: Path):
    index = HNSWIndex(8, storage="int8")
    with pytest.raises(ValueError, match="storage must be float32"):
        to_hnswlib(index, tmp_path / "x")
