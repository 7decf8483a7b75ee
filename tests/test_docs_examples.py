"""Every marked example of README and docs does what a reader would see: it runs."""

from __future__ import annotations

import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
SERVER_IN_DOCS = "http://localhost:8000"
MARK = re.compile(r"^<!-- example(?P<server>: server)? -->$")
FENCE = re.compile(r"^```(?P<language>\w*)$")


@dataclass(frozen=True)
class Example:
    where: str  # file:line of the code's first line
    language: str
    needs_server: bool
    code: str


def examples(text: str, name: str) -> Iterator[Example]:
    """The marked blocks of a page. Raises ValueError for a mark without a python or bash block below it."""
    lines = text.splitlines()
    for number, line in enumerate(lines):
        if not line.startswith("<!-- example"):
            continue
        mark = MARK.match(line)
        fence = FENCE.match(lines[number + 1]) if number + 1 < len(lines) else None
        if mark is None or fence is None or fence["language"] not in ("python", "bash"):
            raise ValueError(
                f"{name}:{number + 1}: a mark must stand right above a ```python or ```bash block"
            )
        if "```" not in lines[number + 2 :]:
            raise ValueError(f"{name}:{number + 2}: the block is not closed")
        end = lines.index("```", number + 2)
        code = "\n".join(lines[number + 2 : end]) + "\n"
        yield Example(f"{name}:{number + 3}", fence["language"], mark["server"] is not None, code)


FOUND = [
    example
    for page in PAGES
    for example in examples(page.read_text(encoding="utf-8"), str(page.relative_to(ROOT)))
]


def environment(tmp_path: Path) -> dict[str, str]:
    """That of a reader with the environment activated; only pulled models are shared with the user's own."""
    folder = str(Path(sys.executable).parent)
    return {
        **os.environ,
        "PATH": folder + os.pathsep + os.environ.get("PATH", ""),
        "XDG_DATA_HOME": str(tmp_path),
    }


@pytest.fixture(scope="session")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Address of a server on the default model, started as the docs say."""
    folder = tmp_path_factory.mktemp("server")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    log = folder / "server.log"
    with log.open("wb") as out:
        process = subprocess.Popen(
            [sys.executable, "-m", "sharewell", "serve", "--port", str(port)],
            cwd=folder,
            env=environment(folder),
            stdout=out,
            stderr=subprocess.STDOUT,
        )
    url = f"http://localhost:{port}"
    try:
        deadline = time.monotonic() + 240
        while not answers(f"{url}/health"):
            if process.poll() is not None or time.monotonic() > deadline:
                pytest.fail("sharewell serve did not come up:\n" + log.read_text(errors="replace")[-4000:])
            time.sleep(0.2)
        yield url
    finally:
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(30)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def answers(url: str) -> bool:
    try:
        with urllib.request.urlopen(url, timeout=5) as response:
            return response.status == 200
    except (urllib.error.URLError, OSError):
        return False


@pytest.mark.parametrize("example", FOUND, ids=lambda e: e.where)
def test_example_runs(example: Example, tmp_path: Path, request: pytest.FixtureRequest):
    code, env = example.code, environment(tmp_path)
    if example.needs_server:
        env["SHAREWELL_URL"] = request.getfixturevalue("server")
        code = code.replace(SERVER_IN_DOCS, env["SHAREWELL_URL"])
    if example.language == "python":
        file = tmp_path / "example.py"
        file.write_text(code, encoding="utf-8")
        command = [sys.executable, str(file)]
    else:
        command = [shutil.which("bash") or "bash", "-euo", "pipefail", "-c", code]
    # In the checkout, as the reader is; examples write no files there.
    done = subprocess.run(
        command, cwd=ROOT, env=env, capture_output=True, text=True, check=False, timeout=240
    )
    assert done.returncode == 0, f"{example.where}\n{done.stdout}\n{done.stderr}"
    assert done.stdout.strip(), f"{example.where} printed nothing"


def test_readme_and_start_page_have_examples_for_client_and_command_line():
    for page in ("README.md", "docs/index.md"):
        kinds = {(e.language, e.needs_server) for e in FOUND if e.where.startswith(page)}
        assert {("python", True), ("bash", True), ("bash", False)} <= kinds


def test_marked_blocks_are_found_and_others_left_alone():
    page = "text\n```bash\nrm -rf x\n```\n<!-- example: server -->\n```python\nprint(1)\n\nprint(2)\n```\n"
    assert list(examples(page, "p.md")) == [Example("p.md:7", "python", True, "print(1)\n\nprint(2)\n")]


@pytest.mark.parametrize(
    "page",
    [
        "<!-- example -->\n\n```python\n1\n```\n",
        "<!-- example -->\n```json\n1\n```\n",
        "<!-- example:server -->\n```python\n1\n```\n",
        "<!-- example -->\n```python\n1\n",
        "<!-- example -->",
    ],
)
def test_a_mark_that_marks_nothing_is_an_error(page: str):
    with pytest.raises(ValueError, match=r"^p\.md:\d+: "):
        list(examples(page, "p.md"))
