"""A whole experiment in one TOML file: model, training, and how to read the data."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from .annotations import read_records
from .config import DecodeConfig, LiquidTADConfig, from_mapping, read_toml, require
from .dataset import ANY_LABEL, FeatureDataset
from .evaluate import parse_tious
from .schedule import TrainConfig

FOLDER = Path(__file__).with_name("recipes")
PRESETS = ("thumos14", "activitynet13", "tiny")
HOLD_OUT = 5  # without subsets in the annotations, every fifth video is for evaluation


@dataclass(frozen=True)
class DataConfig:
    """How annotation and feature files are read; see :class:`FeatureDataset`. Of ``val_subsets`` those count
    that do not train."""

    stride: float | None = None
    num_frames: float | None = None
    fps: float | None = None
    prefix: str = ""
    resize_to: int | None = None
    max_length: int = 2304
    class_agnostic: bool = False
    train_subsets: tuple[str, ...] = ("training",)
    val_subsets: tuple[str, ...] = ("validation",)
    tiou: str = "0.3:0.7:0.1"
    missing: str = "error"

    def __post_init__(self) -> None:
        object.__setattr__(self, "train_subsets", tuple(self.train_subsets))
        object.__setattr__(self, "val_subsets", tuple(self.val_subsets))
        parse_tious(self.tiou)


@dataclass(frozen=True)
class Recipe:
    """``model``: a preset's name under "preset", and what to change of it."""

    model: Mapping[str, Any] = field(default_factory=lambda: {"preset": "tiny"})
    train: TrainConfig = field(default_factory=TrainConfig)
    data: DataConfig = field(default_factory=DataConfig)

    def __post_init__(self) -> None:
        preset = self.model.get("preset", "tiny")
        require(preset in PRESETS, "model.preset", " | ".join(PRESETS), preset)

    @classmethod
    def load(cls, name: str | Path) -> Recipe:
        """``thumos14``, ``activitynet13``, ``tiny`` or a TOML file. ValueError says what is wrong."""
        path = FOLDER / f"{name}.toml" if str(name) in PRESETS else Path(name)
        if not path.is_file():
            raise ValueError(f"recipe must be {', '.join(PRESETS)} or a TOML file, got {str(name)!r}")
        return cls.from_dict(read_toml(path))

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Recipe:
        unknown = sorted(set(values) - {"model", "train", "data"})
        require(not unknown, "recipe", "tables model, train and data", unknown)
        return cls(
            dict(values.get("model", {})),
            from_mapping(TrainConfig, values.get("train", {})),
            from_mapping(DataConfig, values.get("data", {})),
        )

    def changed(self, **settings: Any) -> Recipe:
        """With the settings that are not None; each goes to the table that has it."""
        given = {name: value for name, value in settings.items() if value is not None}
        tables = {
            table: {k: v for k, v in given.items() if k in {f.name for f in fields(owner)}}
            for table, owner in (("train", TrainConfig), ("data", DataConfig))
        }
        return replace(
            self, train=replace(self.train, **tables["train"]), data=replace(self.data, **tables["data"])
        )

    def model_config(self, c_in: int, labels: tuple[str, ...]) -> LiquidTADConfig:
        """For features ``c_in`` wide and these classes."""
        changes = {name: value for name, value in self.model.items() if name != "preset"}
        if "decode" in changes:
            changes["decode"] = from_mapping(DecodeConfig, changes["decode"])
        known = {f.name for f in fields(LiquidTADConfig)}
        unknown = sorted(set(changes) - known)
        require(not unknown, "model", f"settings of LiquidTADConfig ({', '.join(sorted(known))})", unknown)
        names = (ANY_LABEL,) if self.data.class_agnostic else labels
        sizes: dict[str, Any] = {"c_in": c_in, "n_cls": len(names), "labels": names, **changes}
        preset = self.model.get("preset", "tiny")
        if preset == "tiny":
            return LiquidTADConfig.tiny(sizes.pop("c_in"), sizes.pop("n_cls"), **sizes)
        return getattr(LiquidTADConfig, preset)(**sizes)

    def open(
        self, annotations: str | Path, features: str | Path, labels: tuple[str, ...] | None = None
    ) -> tuple[FeatureDataset, FeatureDataset | None]:
        """The training and the evaluation part. The second is None when no video is left for it.

        Annotations without subsets: every fifth video, in order of their names, is for evaluation.
        """
        records = read_records(annotations)
        present = {record.subset for record in records.values()}
        train_on = {s.lower() for s in self.data.train_subsets} & present
        val_on = ({s.lower() for s in self.data.val_subsets} & present) - train_on
        # "validation" trains in some files and evaluates in others: the last of the list is the surest.
        if len(train_on) > 1 and not val_on:
            first = next(s for s in reversed(self.data.train_subsets) if s.lower() in train_on)
            val_on, train_on = train_on - {first.lower()}, {first.lower()}
        if present <= {""}:
            names = sorted(records)
            held = names[HOLD_OUT - 1 :: HOLD_OUT]
            parts = [[n for n in names if n not in held], held]
        else:
            parts = [[n for n, r in records.items() if r.subset in on] for on in (train_on, val_on)]
        if not parts[0]:
            raise ValueError(
                f"train_subsets must name some of {sorted(present)} in {Path(annotations).name}, "
                f"got {list(self.data.train_subsets)}"
            )
        train, val = (
            FeatureDataset(
                annotations,
                features,
                self.data.stride,
                self.data.num_frames,
                self.data.fps,
                videos=part,
                labels=labels,
                class_agnostic=self.data.class_agnostic,
                max_length=self.data.max_length,
                resize_to=self.data.resize_to,
                prefix=self.data.prefix,
                missing=self.data.missing,
            )
            if part
            else None
            for part in parts
        )
        assert train is not None
        return train, val
