"""Several processes on one cache file, and what is left of it when they are killed."""

from __future__ import annotations

import random
import subprocess
import sys
import time
from pathlib import Path

import pytest

_HERE = str(Path(__file__).parent)
if _HERE not in sys.path:
    sys.path.insert(0, _HERE)

from cache_writer import answer, opened  # noqa: E402


def writer(path: Path, name: str) -> subprocess.Popen[str]:
    script = Path(__file__).with_name("cache_writer.py")
    return subprocess.Popen([sys.executable, str(script), str(path), name], stdout=subprocess.PIPE, text=True)


def acknowledged(process: subprocess.Popen[str], least: int) -> list[str]:
    """Texts that the process says it stored, at least so many."""
    assert process.stdout is not None
    return [process.stdout.readline().strip() for _ in range(least)]


def rest_of(process: subprocess.Popen[str]) -> list[str]:
    """What it still said before it was killed; a line that was cut off was not acknowledged."""
    assert process.stdout is not None
    return [line.strip() for line in process.stdout.read().splitlines(keepends=True) if line.endswith("\n")]


def check(path: Path, texts: list[str]) -> None:
    """Every acknowledged answer is there, whole and the right one, but for those that were forgotten."""
    with opened(path) as cache:
        assert not cache.fault
        for text in texts:
            number = int(text.split()[-1])
            found = cache.lookup(text)
            if found.hit:
                assert found.response == answer(text)
                assert found.entry_text == text
            else:
                assert number % 50 == 29, text  # the ones that the writer invalidates
        store = cache.documents.store
        assert store is not None
        assert store._rows("PRAGMA integrity_check") == [("ok",)]
        assert sum(store.held().values()) == len(cache.index)


def kill_while_writing(path: Path, rounds: int) -> None:
    rng, said = random.Random(0), []
    for number in range(rounds):
        processes = [writer(path, f"{name}{number}") for name in ("a", "b")]
        for process in processes:
            said += acknowledged(process, 3)
        time.sleep(rng.uniform(0, 0.15))
        for process in rng.sample(processes, 2):
            process.kill()
        for process in processes:
            said += rest_of(process)
            process.wait()
            assert process.stdout is not None
            process.stdout.close()
    assert len(said) == len(set(said))
    check(path, said)


def test_two_processes_killed_while_they_write_leave_a_whole_file(tmp_path: Path):
    kill_while_writing(tmp_path / "cache", rounds=2)


@pytest.mark.nightly
@pytest.mark.timeout(1200)
def test_fifty_kills_leave_a_whole_file(tmp_path: Path):
    kill_while_writing(tmp_path / "cache", rounds=25)  # two processes each


def test_a_process_finds_what_another_writes_within_a_second(tmp_path: Path):
    process = writer(tmp_path / "cache", "a")
    try:
        texts = acknowledged(process, 1)
        with opened(tmp_path / "cache") as cache:
            deadline = time.monotonic() + 30
            for _ in range(40):
                texts += acknowledged(process, 1)
            wanted = texts[-1]
            while not cache.lookup(wanted).hit and time.monotonic() < deadline:
                time.sleep(0.02)
            assert cache.lookup(wanted).response == answer(wanted)
    finally:
        process.kill()
        rest_of(process)
        process.wait()
        assert process.stdout is not None
        process.stdout.close()
