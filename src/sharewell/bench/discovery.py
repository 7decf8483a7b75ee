"""Where benchmarks are: ``benchmarks/<room>/<slug>.py`` of the checkout, one per row of systems.toml."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path

from ..systems import System, find_system, load_systems
from .progress import Progress, no_progress
from .report import Report, Scale


@dataclass(frozen=True)
class Benchmark:
    """One benchmark file. It defines ``run(scale: str, *, seed: int, progress: Progress) -> Report``."""

    system: System
    root: Path  # of the checkout

    @property
    def path(self) -> Path:
        return self.root / "benchmarks" / self.system.room / f"{self.system.module_name}.py"

    def result_path(self, scale: Scale) -> Path:
        """Where the report of a run is kept and committed."""
        return self.root / "benchmarks" / "results" / f"{self.system.slug}-{scale}.json"

    def run(self, scale: Scale, *, seed: int = 0, progress: Progress = no_progress) -> Report:
        """Import the file and run it. Raises TypeError when it returns another report than was asked for."""
        # The checkout's root on the path makes `benchmarks` a namespace package, so that benchmark files may
        # share code and processes that they spawn find them again.
        if str(self.root) not in sys.path:
            sys.path.insert(0, str(self.root))
        module = import_module(f"benchmarks.{self.system.room}.{self.system.module_name}")
        report = module.run(scale, seed=seed, progress=progress)
        asked = (self.system.slug, scale, seed)
        if not isinstance(report, Report) or (report.slug, report.scale, report.seed) != asked:
            raise TypeError(f"{self.path.name}: run() must return the Report of {asked}, got {report!r}")
        return report


def find_root(start: Path | None = None) -> Path:
    """Root of the checkout: ``start`` (the current folder) or a folder above it, else the package's own.

    Raises ValueError when there is none: an installed wheel carries no benchmarks.
    """
    start = (start or Path.cwd()).resolve()
    source = Path(__file__).resolve()
    for folder in (start, *start.parents, *source.parents):
        if (folder / "src" / "sharewell").is_dir():
            return folder
    raise ValueError("benchmarks live in the source tree: clone the repository and run this inside it")


def list_benchmarks(root: Path | None = None) -> list[Benchmark]:
    """One for each system, in the order of the table, whether its file exists or not."""
    root = root or find_root()
    return [Benchmark(system, root) for system in load_systems()]


def find_benchmark(slug: str, root: Path | None = None) -> Benchmark:
    """The benchmark of a system. Raises ValueError for an unknown slug or a missing file."""
    system = find_system(slug)
    benchmark = Benchmark(system, root or find_root())
    if not benchmark.path.is_file():
        raise ValueError(
            f"{slug} has no benchmark: {benchmark.path.relative_to(benchmark.root)} does not exist"
        )
    return benchmark
