"""The command line: it is light, it teaches, and a mistake of the user ends in one line."""

from __future__ import annotations

import json
import resource
import subprocess
import sys

import pytest

from sharewell import __version__
from sharewell.cli import COMMANDS, main

HEAVY = ("torch", "transformers", "numba", "numpy", "fastapi", "pydantic", "matplotlib", "onnxruntime")


def child(*args: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, *args], capture_output=True, text=True, check=False, timeout=120)


def cpu_s(*args: str) -> float:
    """Least CPU time of five runs of a Python process: what a busy machine adds is never part of the
    least."""
    used = []
    for _ in range(5):
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        assert child(*args).returncode == 0
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        used.append(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)
    return min(used)


def loaded_modules(code: str) -> set[str]:
    done = child("-c", f"import sys\n{code}\nprint('\\n' + ' '.join(sys.modules))")
    assert done.returncode == 0, done.stderr
    return set(done.stdout.splitlines()[-1].split())


def test_importing_the_package_loads_nothing_heavy_and_takes_little_cpu_time():
    loaded = loaded_modules("import sharewell")
    assert not loaded & {*HEAVY, "rich", "typer"}
    assert cpu_s("-c", "import sharewell") < 0.2


def test_help_loads_no_room_and_takes_little_cpu_time():
    loaded = loaded_modules("from sharewell.cli import main\nassert main(['--help']) == 0")
    assert not loaded & set(HEAVY)
    assert not {name for name in loaded if name.startswith("sharewell.")} - {"sharewell.cli"}
    assert cpu_s("-m", "sharewell", "--help") < 0.5


def test_help_lists_every_command_with_its_line(capsys: pytest.CaptureFixture[str]):
    assert main(["--help"]) == 0
    shown = " ".join(capsys.readouterr().out.split())
    for command in COMMANDS:
        assert f"{command.name} {command.help}" in shown


@pytest.mark.parametrize("command", COMMANDS, ids=lambda c: c.name)
def test_every_listed_command_loads_without_torch_and_shows_an_example(command):
    done = child(
        "-c",
        "import sys\nfrom sharewell.cli import COMMANDS\n"
        f"loaded = next(c for c in COMMANDS if c.name == {command.name!r}).load()\n"
        "assert 'torch' not in sys.modules\n"
        "verbs = list(getattr(loaded, 'commands', {'': loaded}).values())\n"
        "print([verb.name for verb in verbs if 'xample' not in (verb.help or '')])",
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "[]", "these commands have no example in their help"


def test_a_room_is_reached_as_an_attribute_of_the_package():
    assert "sharewell.kv" not in loaded_modules("import sharewell")
    assert "sharewell.kv" in loaded_modules("import sharewell\nsharewell.kv")
    done = child("-c", "import sharewell\nsharewell.no_such_room")
    assert "has no attribute 'no_such_room'" in done.stderr


def test_version_is_that_of_the_package(capsys: pytest.CaptureFixture[str]):
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"sharewell {__version__}\n"


@pytest.mark.parametrize(
    ("args", "told"),
    [
        (["sistems"], "Did you mean 'systems'"),
        (["systems", "--colour"], "No such option"),
        (["systems", "--room", "attic"], "must be one of"),
        (["bench", "enginee"], "did you mean engine"),
        (["bench", "engine", "--scale", "huge"], "--scale"),
        (["bench", "engine", "--seed", "-1"], "--seed"),
        (["bench", "engine", "--all"], "not both"),
        (["bench", "--json", "x.json"], "name the system"),
        (["bench", "engine", "--plot", "x.txt"], ".png"),
    ],
)
def test_wrong_use_prints_one_line_and_exits_with_2(
    args: list[str], told: str, capsys: pytest.CaptureFixture[str]
):
    assert main(args) == 2
    shown = capsys.readouterr()
    assert shown.out == ""
    assert shown.err.startswith("error: ") and shown.err.count("\n") == 1
    assert told in shown.err


def test_nothing_at_all_prints_the_help(capsys: pytest.CaptureFixture[str]):
    assert main([]) == 2
    shown = capsys.readouterr()
    assert "Usage: sharewell" in shown.out and "error" not in shown.err


def test_a_missing_dependency_names_the_extra_to_install():
    code = (
        "import sys\n"
        "from sharewell.cli import main\n"
        "class WithoutTorch:\n"  # stands for an installation in which the room's imports fail
        "    def find_spec(self, name, path=None, target=None):\n"
        "        if name == 'sharewell.models.cli':\n"
        "            raise ModuleNotFoundError(\"No module named 'torch'\", name='torch')\n"
        "sys.meta_path.insert(0, WithoutTorch())\n"
        "sys.exit(main(['models', 'list']))"
    )
    done = child("-c", code)
    assert done.returncode == 2
    assert done.stderr == "error: torch is not installed; run: pip install 'sharewell[models]'\n"


def test_debug_shows_the_traceback_behind_a_mistake(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("SHAREWELL_DEBUG", "1")
    with pytest.raises(ValueError, match="no system is called"):
        main(["bench", "nothing-like-it"])


def test_systems_as_json_are_the_rows_of_the_table(capsys: pytest.CaptureFixture[str]):
    assert main(["systems", "--room", "serving", "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)
    assert "engine" in [row["slug"] for row in rows]
    assert {row["room"] for row in rows} == {"serving"}
