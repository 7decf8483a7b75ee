"""What a detector is made of, and what decides about its detections."""

from __future__ import annotations

import dataclasses
import json
import math
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal

DecaySharing = Literal["hierarchical", "shared", "none"]
Backbone = Literal["liquid", "actionformer", "maxpool"]
BACKBONES = ("liquid", "actionformer", "maxpool")
DECAY_SHARING = ("hierarchical", "shared", "none")


def require(ok: bool, name: str, allowed: str, value: object) -> None:
    """Raises ValueError that names the field, what is allowed and what came."""
    if not ok:
        raise ValueError(f"{name} must be {allowed}, got {value!r}")


@dataclass(frozen=True)
class DecodeConfig:
    """From scores at points to segments (ActionFormer, arXiv 2202.07925, sec. 3.4 and its public settings).

    ``min_length`` is in feature rows; ``voting_iou`` refines segments only in the class-agnostic path.
    """

    min_score: float = 1e-3
    top_k_per_level: int = 2000
    min_length: float = 0.05
    nms_sigma: float = 0.5
    nms_min_score: float = 1e-3
    max_detections: int = 200
    voting_iou: float | None = None
    class_agnostic: bool = False

    def __post_init__(self) -> None:
        require(0 <= self.min_score < 1, "min_score", "in [0, 1)", self.min_score)
        require(self.top_k_per_level >= 1, "top_k_per_level", "at least 1", self.top_k_per_level)
        require(self.min_length >= 0, "min_length", "at least 0", self.min_length)
        require(self.nms_sigma > 0, "nms_sigma", "positive", self.nms_sigma)
        require(0 <= self.nms_min_score < 1, "nms_min_score", "in [0, 1)", self.nms_min_score)
        require(self.max_detections >= 1, "max_detections", "at least 1", self.max_detections)
        ok = self.voting_iou is None or 0 < self.voting_iou <= 1
        require(ok, "voting_iou", "None or in (0, 1]", self.voting_iou)


@dataclass(frozen=True)
class LiquidTADConfig:
    """Shape of a detector; the same for every backbone.

    ``arch`` counts (embedding convolutions, stem blocks, pyramid blocks), so the pyramid has ``arch[2] + 1``
    levels at strides 1, 2, 4, ... of a feature row. ``labels`` names the classes, ``n_cls`` of them (empty:
    ``class_0``, ...). ``max_length`` is the longest crop in training, in rows. ``initial_positives`` starts
    the running count of positive points that divides the loss.
    """

    c_in: int
    n_cls: int
    dim: int = 512
    arch: tuple[int, int, int] = (2, 2, 5)
    labels: tuple[str, ...] = ()
    max_length: int = 2304
    decay_sharing: DecaySharing = "hierarchical"
    decay_learned: bool = True
    relaxation: bool = True
    physical_time: bool = False
    kernel_size: int = 0
    rho_init: float = 0.5413
    drop_path: float = 0.1
    heads: int = 4
    window: int = 19
    center_radius: float = 1.5
    regression_weight: float = 1.0
    label_smoothing: float = 0.0
    initial_positives: float = 100.0
    decode: DecodeConfig = dataclasses.field(default_factory=DecodeConfig)

    def __post_init__(self) -> None:
        object.__setattr__(self, "arch", tuple(self.arch))
        object.__setattr__(self, "labels", tuple(self.labels))
        for name in ("c_in", "n_cls", "dim", "heads", "max_length"):
            value = getattr(self, name)
            require(isinstance(value, int) and value >= 1, name, "a whole number of at least 1", value)
        ok = len(self.arch) == 3 and all(isinstance(n, int) for n in self.arch)
        ok = ok and self.arch[0] >= 1 and self.arch[1] >= 0 and 0 <= self.arch[2] <= 12
        require(ok, "arch", "(>= 1, >= 0, 0..12) blocks", self.arch)
        require(
            len(self.labels) in (0, self.n_cls),
            "labels",
            f"empty or n_cls = {self.n_cls} names",
            self.labels,
        )
        require(len(set(self.labels)) == len(self.labels), "labels", "distinct", self.labels)
        require(
            self.decay_sharing in DECAY_SHARING,
            "decay_sharing",
            " | ".join(DECAY_SHARING),
            self.decay_sharing,
        )
        require(self.kernel_size >= 0, "kernel_size", "at least 0 (0: no kernel mode)", self.kernel_size)
        require(math.isfinite(self.rho_init), "rho_init", "finite", self.rho_init)
        require(0 <= self.drop_path < 1, "drop_path", "in [0, 1)", self.drop_path)
        require(self.dim % self.heads == 0, "heads", f"a divisor of dim = {self.dim}", self.heads)
        require(self.window >= 1 and self.window % 2 == 1, "window", "odd and at least 1", self.window)
        require(self.center_radius > 0, "center_radius", "positive", self.center_radius)
        require(self.regression_weight >= 0, "regression_weight", "at least 0", self.regression_weight)
        require(0 <= self.label_smoothing < 1, "label_smoothing", "in [0, 1)", self.label_smoothing)
        require(self.initial_positives >= 1, "initial_positives", "at least 1", self.initial_positives)

    @property
    def levels(self) -> int:
        return self.arch[2] + 1

    @property
    def strides(self) -> tuple[int, ...]:
        """Of the levels, in feature rows."""
        return tuple(2**level for level in range(self.levels))

    @property
    def regression_ranges(self) -> tuple[tuple[float, float], ...]:
        """Per level, in feature rows: the distances to the farther end that it answers for, ends included."""
        edges = [0.0, *(4.0 * 2**level for level in range(self.levels - 1)), 1e4]
        return tuple(pairwise(edges))

    @property
    def names(self) -> tuple[str, ...]:
        """A name for each class."""
        return self.labels or tuple(f"class_{index}" for index in range(self.n_cls))

    def padded(self, length: int) -> int:
        """``length`` rows rounded up to a multiple of the last stride, at least one."""
        last = self.strides[-1]
        return max(1, -(-length // last)) * last

    @classmethod
    def thumos14(cls, **changes: Any) -> LiquidTADConfig:
        """THUMOS-14 on I3D features (2048 wide), 20 classes: 10.82 M parameters as LiquidTAD."""
        return cls(**{"c_in": 2048, "n_cls": 20, **changes})

    @classmethod
    def activitynet13(cls, **changes: Any) -> LiquidTADConfig:
        """ActivityNet-1.3 on TSP features (512 wide) resized to 192 rows; one class, named by a video
        classifier afterwards."""
        decode = DecodeConfig(nms_sigma=0.75, max_detections=100, voting_iou=0.9, class_agnostic=True)
        preset: dict[str, Any] = {
            "c_in": 512,
            "n_cls": 1,
            "dim": 256,
            "max_length": 192,
            "window": 7,
            "regression_weight": 2.0,
            "label_smoothing": 0.1,
            "initial_positives": 200.0,
            "decode": decode,
        }
        return cls(**{**preset, **changes})

    @classmethod
    def tiny(cls, c_in: int, n_cls: int, **changes: Any) -> LiquidTADConfig:
        """For sensors, small extractors and two CPU cores: 128 wide, five levels."""
        return cls(**{"c_in": c_in, "n_cls": n_cls, "dim": 128, "arch": (2, 2, 4), **changes})

    def to_dict(self) -> dict[str, Any]:
        """JSON values; :meth:`from_dict` reads them back."""
        return json.loads(json.dumps(dataclasses.asdict(self)))

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> LiquidTADConfig:
        """Inverse of :meth:`to_dict`. Raises ValueError naming an unknown or wrong field."""
        return from_mapping(cls, {**values, "decode": from_mapping(DecodeConfig, values.get("decode", {}))})


def from_mapping(cls: Any, values: Mapping[str, Any]) -> Any:
    """Build a config dataclass. Raises ValueError for fields that it does not have or lacks."""
    known = {field.name for field in dataclasses.fields(cls)}
    unknown = sorted(set(values) - known)
    if unknown:
        raise ValueError(f"unknown setting {', '.join(unknown)}; known: {', '.join(sorted(known))}")
    try:
        return cls(**values)
    except TypeError as error:
        raise ValueError(f"{cls.__name__}: {error}") from None


def read_toml(path: str | Path) -> dict[str, Any]:
    """The tables of a TOML file. Raises ValueError naming the file when it is not one."""
    try:
        return tomllib.loads(Path(path).read_text(encoding="utf-8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is no valid TOML: {error}") from None
