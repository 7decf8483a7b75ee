"""The table of systems, and that each of its rows is backed by a benchmark, a test and a page."""

from __future__ import annotations

from pathlib import Path

import pytest

from sharewell.systems import System, find_system, load_systems

ROOT = Path(__file__).parents[1]
ROW = """
[[system]]
slug = "one-thing"
name = "One thing"
room = "kv"
object = "pages"
paper = "Somebody et al."
year = 2024
arxiv = ["2401.01234"]
claim = "half the bytes"
"""


def load(tmp_path: Path, text: str) -> tuple[System, ...]:
    path = tmp_path / "systems.toml"
    path.write_text(text, encoding="utf-8")
    return load_systems(path)


def test_a_row_is_read_as_it_is_written(tmp_path: Path):
    (row,) = load(tmp_path, ROW)
    assert row == System(
        "one-thing", "One thing", "kv", "pages", "Somebody et al.", 2024, ("2401.01234",), "half the bytes"
    )
    assert row.module_name == "one_thing"


@pytest.mark.parametrize(
    ("old", "new", "told"),
    [
        ('slug = "one-thing"', 'slug = "One Thing"', "slug must be lower-case words"),
        ("year = 2024", "year = 24", "year must be a year"),
        ("year = 2024", 'year = "2024"', "year must be a year"),
        ('["2401.01234"]', '["arXiv:1"]', "arxiv must be a list of ids"),
        ('["2401.01234"]', '"2401.01234"', "arxiv must be a list"),
        ('name = "One thing"', 'name = " "', "name must be a non-empty string"),
        ('room = "kv"', 'room = "k v"', "room must be the name of a package"),
        ('claim = "half the bytes"', "", "missing fields ['claim']"),
        ("year = 2024", 'year = 2024\ncolour = "red"', "unknown fields ['colour']"),
        ("[[system]]", "[[sytem]]", "tables only"),
        ("year = 2024", "year = ", "not valid TOML"),
    ],
)
def test_a_wrong_row_is_refused_by_name(tmp_path: Path, old: str, new: str, told: str):
    assert old in ROW
    with pytest.raises(ValueError) as error:
        load(tmp_path, ROW.replace(old, new))
    assert told in str(error.value)


def test_a_slug_stands_for_one_system(tmp_path: Path):
    with pytest.raises(ValueError, match="slug used twice: one-thing"):
        load(tmp_path, ROW + ROW)


def test_an_unknown_slug_is_answered_with_what_comes_close(tmp_path: Path):
    rows = load(tmp_path, ROW)
    assert find_system("one-thing", rows).room == "kv"
    with pytest.raises(ValueError, match="did you mean one-thing"):
        find_system("one-thin", rows)
    with pytest.raises(ValueError, match="run: sharewell systems"):
        find_system("zzz", rows)


@pytest.mark.parametrize("system", load_systems(), ids=lambda s: s.slug)
def test_every_system_has_its_room_benchmark_test_and_page(system: System):
    room, name = system.room, system.module_name
    parts = (
        f"src/sharewell/{room}/__init__.py",
        f"benchmarks/{room}/{name}.py",
        f"tests/{room}/test_{name}.py",
        f"docs/{room}/{system.slug}.md",
    )
    assert [part for part in parts if not (ROOT / part).is_file()] == []
