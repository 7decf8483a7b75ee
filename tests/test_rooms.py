"""Between rooms: what one room uses of another is what that room exports."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

import sharewell

SOURCE = Path(sharewell.__file__).parent
ROOMS = sorted(path.parent.name for path in SOURCE.glob("*/__init__.py"))


def exports(room: str) -> set[str]:
    return set(getattr(getattr(sharewell, room), "__all__", ()))


def imports(path: Path) -> Iterator[tuple[int, str, tuple[str, ...]]]:
    """(line, absolute module, names) of every import in a file."""
    package = ("sharewell", *path.relative_to(SOURCE).parts[:-1])
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield node.lineno, alias.name, ()
        elif isinstance(node, ast.ImportFrom):
            base = ".".join(package[: len(package) - node.level + 1]) if node.level else ""
            module = ".".join(part for part in (base, node.module or "") if part)
            yield node.lineno, module, tuple(alias.name for alias in node.names)


def reaching_inside(path: Path) -> list[str]:
    """Imports of a file that take from another room what that room does not export."""
    home = path.relative_to(SOURCE).parts[0]
    found = []
    for line, module, names in imports(path):
        parts = module.split(".")
        if parts[0] != "sharewell" or len(parts) < 2 or parts[1] not in ROOMS or parts[1] == home:
            continue
        public = exports(parts[1])
        if len(parts) > 2 or any(name not in public for name in names):
            found.append(f"{path.relative_to(SOURCE)}:{line}: {module} {', '.join(names)}")
    return found


@pytest.mark.parametrize("room", ROOMS)
def test_a_room_exports_names_that_exist(room: str):
    module = getattr(sharewell, room)
    assert [name for name in exports(room) if not hasattr(module, name)] == []


@pytest.mark.parametrize("room", ROOMS)
def test_a_room_uses_of_other_rooms_only_what_they_export(room: str):
    files = sorted((SOURCE / room).rglob("*.py"))
    assert files
    assert [line for path in files for line in reaching_inside(path)] == []


def test_reaching_inside_another_room_is_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(f"{__name__}.SOURCE", tmp_path)
    file = tmp_path / "serving" / "core" / "thing.py"
    file.parent.mkdir(parents=True)
    file.write_text(
        "from ...kv import BlockManager\n"
        "from ...kv.blocks import BlockManager\n"
        "from ..api import app\n"
        "from ...bench import secret\n"
        "import sharewell.models.config\n"
    )
    assert [line.split(":")[1] for line in reaching_inside(file)] == ["2", "4", "5"]
