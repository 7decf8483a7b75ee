"""What a benchmark returns: rows that each answer one claim, with the machine they were measured on."""

from __future__ import annotations

import dataclasses
import json
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from .timing import median, spread

if TYPE_CHECKING:
    from rich.console import Console

FORMAT = "sharewell-report-1"
ENVIRONMENT_FIELDS = ("date", "commit", "cpu_model", "cores", "platform", "python")
PEER_NOT_INSTALLED = "peer not installed"
Better = Literal["higher", "lower"]
Scale = Literal["smoke", "full"]


def _require(ok: bool, name: str, allowed: str, value: object) -> None:
    if not ok:
        raise ValueError(f"{name} must be {allowed}, got {value!r}")


def _is_number(x: object) -> bool:
    return isinstance(x, int | float) and not isinstance(x, bool) and math.isfinite(x)


@dataclass(frozen=True)
class Row:
    """One figure beside its baseline. Raises ValueError naming the field and its range.

    ``claim`` says in words what the figure answers, ``target`` the ratio that the claim needs. Spreads are
    quartiles; ``ratio_spread`` those of the ratios of paired runs. ``baseline=None``: there was nothing to
    compare with, ``note`` says why (:data:`PEER_NOT_INSTALLED`), and no claim can be met.
    """

    metric: str
    ours: float
    baseline: float | None
    unit: str
    better: Better
    baseline_name: str = ""
    claim: str = ""
    ours_spread: tuple[float, float] | None = None
    baseline_spread: tuple[float, float] | None = None
    note: str = ""
    target: float | None = None
    ratio_spread: tuple[float, float] | None = None
    samples: int = 1

    __pydantic_config__ = {"extra": "forbid"}  # noqa: RUF012

    def __post_init__(self) -> None:
        _require(bool(self.metric.strip()), "metric", "a non-empty string", self.metric)
        _require(_is_number(self.ours), "ours", "a finite number", self.ours)
        _require(
            self.baseline is None or _is_number(self.baseline), "baseline", "None or finite", self.baseline
        )
        _require(self.better in ("higher", "lower"), "better", "higher or lower", self.better)
        named = self.baseline is None or bool(self.baseline_name.strip())
        _require(named, "baseline_name", "given when there is a baseline", self.baseline_name)
        for name in ("ours_spread", "baseline_spread", "ratio_spread"):
            pair = getattr(self, name)
            ok = pair is None or (len(pair) == 2 and all(map(_is_number, pair)) and pair[0] <= pair[1])
            _require(ok, name, "None or (low, high)", pair)
        _require(
            self.target is None or (_is_number(self.target) and self.target > 0),
            "target",
            "positive",
            self.target,
        )
        _require(self.samples >= 1, "samples", "at least 1", self.samples)

    @classmethod
    def from_samples(
        cls,
        metric: str,
        ours: Sequence[float],
        baseline: Sequence[float] | None,
        unit: str,
        better: Better,
        baseline_name: str = "",
        *,
        claim: str = "",
        target: float | None = None,
        note: str = "",
    ) -> Row:
        """Medians and quartiles of repeated runs; runs of equal number are taken as pairs (see
        ``interleave``)."""
        paired = None
        if baseline is not None and len(ours) == len(baseline) > 1:
            ratios = [ratio(a, b, better) for a, b in zip(ours, baseline, strict=True)]
            if all(r is not None and math.isfinite(r) for r in ratios):
                paired = spread([r for r in ratios if r is not None])
        return cls(
            metric,
            median(ours),
            None if baseline is None else median(baseline),
            unit,
            better,
            baseline_name,
            claim,
            spread(ours),
            None if baseline is None else spread(baseline),
            note,
            target,
            paired,
            len(ours),
        )

    @property
    def ratio(self) -> float | None:
        """How many times better ours is: above 1 ours wins, whatever the direction. None without baseline."""
        return None if self.baseline is None else ratio(self.ours, self.baseline, self.better)

    @property
    def met(self) -> bool | None:
        """Whether the ratio reaches ``target``; None without a target, False without a ratio."""
        if self.target is None:
            return None
        return self.ratio is not None and self.ratio >= self.target


def ratio(ours: float, baseline: float, better: Better) -> float | None:
    """``ours / baseline``, inverted when lower is better. Of two zeros 1, over one infinite; None below 0."""
    above, below = (ours, baseline) if better == "higher" else (baseline, ours)
    if above < 0 or below < 0:
        return None
    if below == 0:
        return 1.0 if above == 0 else math.inf
    return above / below


@dataclass(frozen=True)
class Report:
    """All rows of one run. ``environment`` is what :func:`environment` returns; ``extra`` any JSON values."""

    slug: str
    scale: Scale
    rows: tuple[Row, ...]
    environment: Mapping[str, Any]
    seed: int
    extra: Mapping[str, Any] = field(default_factory=dict)

    __pydantic_config__ = {"extra": "forbid"}  # noqa: RUF012

    def __post_init__(self) -> None:
        object.__setattr__(self, "rows", tuple(self.rows))
        _require(bool(self.slug.strip()), "slug", "a non-empty string", self.slug)
        _require(self.scale in ("smoke", "full"), "scale", "smoke or full", self.scale)
        _require(len(self.rows) > 0, "rows", "at least one row", self.rows)
        keys = [(row.metric, row.baseline_name) for row in self.rows]
        twice = [key for key in keys if keys.count(key) > 1]
        _require(not twice, "rows", "one per metric and baseline", twice)
        missing = [name for name in ENVIRONMENT_FIELDS if name not in self.environment]
        _require(not missing, "environment", "the record of bench.environment()", f"one without {missing}")
        _require(type(self.seed) is int, "seed", "a whole number", self.seed)

    def with_load(self, load: Mapping[str, float]) -> Report:
        """This report with ``load`` (see ``machine_load``) in its environment."""
        return dataclasses.replace(self, environment={**self.environment, "load": dict(load)})

    def to_dict(self) -> dict[str, Any]:
        """JSON values; each row also with its ``ratio`` (null when infinite or undefined) and ``met``."""
        out = dataclasses.asdict(self)
        for fields, row in zip(out["rows"], self.rows, strict=True):
            fields["ratio"] = row.ratio if row.ratio is not None and math.isfinite(row.ratio) else None
            fields["met"] = row.met
        return {"format": FORMAT, **out}

    @classmethod
    def from_dict(cls, document: Mapping[str, Any]) -> Report:
        """Inverse of :meth:`to_dict`.

        Raises ValueError for a wrong field, or a ratio that its figures do not give.
        """
        from pydantic import TypeAdapter, ValidationError

        if not isinstance(document, Mapping) or document.get("format") != FORMAT:
            raise ValueError(f"format must be {FORMAT!r}: this is no report")
        fields = {name: value for name, value in document.items() if name != "format"}
        rows = fields.get("rows")
        if not isinstance(rows, list) or not all(isinstance(row, Mapping) for row in rows):
            raise ValueError("rows must be a list of objects")
        computed = [(row.get("ratio"), row.get("met")) for row in rows]
        fields["rows"] = [{k: v for k, v in row.items() if k not in ("ratio", "met")} for row in rows]
        try:
            report = TypeAdapter(cls).validate_json(json.dumps(fields), strict=True)
        except ValidationError as error:
            first = error.errors()[0]
            where = ".".join(str(part) for part in first["loc"])
            raise ValueError(f"{where or 'report'}: {first['msg']}") from None
        for row, (said, met) in zip(report.rows, computed, strict=True):
            true = row.ratio if row.ratio is not None and math.isfinite(row.ratio) else None
            same = said == true if said is None or true is None else math.isclose(said, true, rel_tol=1e-9)
            _require(same and met == row.met, f"ratio of {row.metric!r}", f"{true} (met: {row.met})", said)
        return report

    @classmethod
    def json_schema(cls) -> dict[str, Any]:
        """JSON Schema of the file that :meth:`save` writes."""
        from pydantic import TypeAdapter

        schema = TypeAdapter(cls).json_schema()
        schema["properties"]["format"] = {"const": FORMAT}
        schema["properties"]["environment"]["required"] = list(ENVIRONMENT_FIELDS)
        schema["required"] = [*schema["required"], "format"]
        row = schema["$defs"]["Row"]
        row["properties"]["ratio"] = {"anyOf": [{"type": "number"}, {"type": "null"}]}
        row["properties"]["met"] = {"anyOf": [{"type": "boolean"}, {"type": "null"}]}
        row["required"] = [*row["required"], "ratio", "met"]
        return schema

    def save(self, path: str | Path) -> Path:
        """Write JSON in one atomic replace, making the folder when it is missing."""
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        beside = path.with_name(f".{path.name}.{os.getpid()}")
        beside.write_text(json.dumps(self.to_dict(), indent=2, allow_nan=False) + "\n", encoding="utf-8")
        beside.replace(path)
        return path

    @classmethod
    def load(cls, path: str | Path) -> Report:
        """Read a saved report. Raises ValueError naming the file and what is wrong with it."""
        path = Path(path)
        try:
            return cls.from_dict(json.loads(path.read_text(encoding="utf-8")))
        except ValueError as error:
            raise ValueError(f"{path.name}: {error}") from None

    def print(self, console: Console | None = None) -> None:
        """A table with the ratios, then the machine in one line."""
        from .table import print_report

        print_report(self, console)

    def plot(self, path: str | Path) -> Path:
        """Draw the ratios to an image (PNG, SVG or PDF by the suffix). Needs matplotlib."""
        from .plots import plot_report

        return plot_report(self, Path(path))
