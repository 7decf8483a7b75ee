"""Features of a whole folder of videos. Killed at any moment, it goes on with the first video that is not
done."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from .decode import VIDEO_SUFFIXES, DecodeStats
from .errors import VideoDecodeError
from .extractor import FeatureExtractor, StreamingExtractor, collect
from .features import ExtractedFolder


@dataclass(frozen=True)
class ExtractionReport:
    """Names of the videos: ``done`` now, ``skipped`` because they were done before, ``partial`` (damaged,
    with the features before the damage kept; they are in ``done`` as well) and ``failed`` with the reason."""

    done: tuple[str, ...]
    skipped: tuple[str, ...]
    partial: tuple[tuple[str, str], ...]
    failed: tuple[tuple[str, str], ...]


def find_sources(paths: Sequence[Path], suffixes: Iterable[str] = VIDEO_SUFFIXES) -> list[Path]:
    """Files as they are, folders with all that is below them and has one of the suffixes; sorted.

    Raises FileNotFoundError, or ValueError when nothing is found or two files would have features of one
    name.
    """
    wanted = {suffix.lower() for suffix in suffixes}
    found: list[Path] = []
    for path in paths:
        if not path.exists():
            raise FileNotFoundError(f"no file or folder {path}")
        inside = path.rglob("*") if path.is_dir() else (path,)
        found += sorted(
            p
            for p in inside
            if p.is_file()
            and (not path.is_dir() or p.suffix.lower() in wanted)
            and not p.name.startswith(".")
        )
    found = list(dict.fromkeys(found))
    if not found:
        raise ValueError(f"no files ending in {', '.join(sorted(wanted))} in {', '.join(map(str, paths))}")
    by_name: dict[str, Path] = {}
    for path in found:
        if (other := by_name.setdefault(path.stem, path)) != path:
            raise ValueError(f"{other} and {path} would both have the features {path.stem}.npy: rename one")
    return found


def extract_folder(
    sources: Sequence[Path],
    extractor: FeatureExtractor,
    out: Path,
    *,
    force: bool = False,
    progress: Callable[[str, float, float], None] = lambda what, done, total: None,
) -> ExtractionReport:
    """``<out>/<stem>.npy`` and ``.json`` of every source, and ``features.json``.

    A source counts as done while its size and time of change are those of its record. A damaged video never
    stops the others. Raises ValueError when ``out`` holds features of other settings.
    """
    folder = ExtractedFolder(out)
    folder.prepare(extractor.settings)
    done: list[str] = []
    skipped: list[str] = []
    partial: list[tuple[str, str]] = []
    failed: list[tuple[str, str]] = []
    for number, source in enumerate(sources):
        name, stat = source.stem, source.stat()
        same = {"source": source.name, "source_bytes": stat.st_size, "source_mtime_ns": stat.st_mtime_ns}
        record = folder.record(name)
        if not force and record is not None and all(record.get(k) == v for k, v in same.items()):
            skipped.append(name)
        else:
            stats = DecodeStats()
            try:
                if isinstance(extractor, StreamingExtractor):
                    features = collect(extractor, source, stats)
                else:
                    features = extractor.extract(source)
            except (VideoDecodeError, ValueError, OSError) as error:
                failed.append((name, str(error)))
            else:
                whole = features.complete and not stats.damaged
                folder.save(
                    name,
                    features,
                    {
                        **same,
                        "features": len(features.array),
                        "damaged": stats.damaged,
                        "damage": stats.damage,
                    },
                )
                done.append(name)
                if not whole:
                    partial.append((name, "; ".join(stats.damage)))
        progress("videos", number + 1, len(sources))
    folder.write_settings(extractor.settings)
    return ExtractionReport(tuple(done), tuple(skipped), tuple(partial), tuple(failed))
