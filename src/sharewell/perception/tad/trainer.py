"""The training loop: the same for every backbone, the same weights whether or not it was interrupted."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ...bench import Progress, no_progress
from ...simulation import Clock, WallClock
from . import distributed
from .checkpoint import MODEL_FILE, read_tensors, save_checkpoint, write_tensors
from .dataset import ANY_LABEL, FeatureDataset, Sample, collate
from .decode import Detection, predict
from .evaluate import THUMOS_TIOUS, MapResult, mean_average_precision
from .losses import loss_sums
from .model import TADModel
from .schedule import TrainConfig, learning_rate, make_optimizer
from .targets import batch_targets
from .windows import Detector

STATE_FILE = "state.safetensors"
LOG_FILE = "log.jsonl"
MAX_SKIPPED = 10


@dataclass(frozen=True)
class EpochLog:
    """One epoch: mean losses per step, and how many steps had a loss that was no number."""

    epoch: int
    classification: float
    regression: float
    lr: float
    skipped: int
    seconds: float
    average_map: float | None = None


@dataclass(frozen=True)
class FitResult:
    """``model`` holds the averaged (EMA) weights; ``skipped`` the videos of every step left out."""

    model: TADModel
    history: tuple[EpochLog, ...]
    skipped: tuple[tuple[str, ...], ...]
    evaluation: MapResult | None


class TrainingAborted(RuntimeError):
    """Too many steps had a loss that was no number; the message names the videos of their batches."""


def _generator(*words: int) -> torch.Generator:
    """A stream of random numbers that is a function of ``words``: nothing needs to be saved to resume it."""
    seed = int(np.random.SeedSequence(words).generate_state(1, np.uint64)[0] >> np.uint64(1))
    return torch.Generator().manual_seed(seed)


@dataclass
class _State:
    """What a resumed run needs beside the raw weights."""

    epoch: int
    step: int
    positives: float  # running mean that divides the loss
    history: list[EpochLog]
    skipped: list[tuple[str, ...]]


class _Trainer:
    def __init__(self, model: TADModel, train: FeatureDataset, config: TrainConfig) -> None:
        if train.width != model.config.c_in:
            raise ValueError(
                f"c_in must be the width of the features, {train.width}, got {model.config.c_in}"
            )
        names = (ANY_LABEL,) if train.class_agnostic else train.labels
        if len(names) != model.config.n_cls:
            raise ValueError(f"n_cls must be the number of labels, {len(names)}, got {model.config.n_cls}")
        if model.config.labels and model.config.labels != names:
            raise ValueError(f"labels must be those of the data set, {names}, got {model.config.labels}")
        model.config = replace(model.config, labels=names)  # so that detections carry their names
        self.model, self.train, self.config = model, train, config
        self.device = next(model.parameters()).device
        if config.precision == "float16" and self.device.type != "cuda":
            raise ValueError("precision float16 needs a CUDA device; bfloat16 works on the CPU")
        self.batch = min(config.batch_size, len(train))
        self.rank, self.world = distributed.rank(), distributed.world_size()
        if self.batch % self.world:
            raise ValueError(f"batch_size must be a multiple of the {self.world} processes, got {self.batch}")
        self.steps = len(train) // self.batch
        self.optimizer = make_optimizer(model, config)
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=config.precision == "float16")
        self.ema = {name: value.detach().clone() for name, value in model.state_dict().items()}
        self.state = _State(0, 0, model.config.initial_positives, [], [])
        self.network: nn.Module = model
        if self.world > 1:
            self.network = nn.parallel.DistributedDataParallel(model)

    # -- one epoch

    def batches(self, epoch: int) -> Iterator[tuple[list[Sample], Tensor | None]]:
        """This process's share of every batch, loaded one ahead. Which recordings come together, where they
        are cropped and which blocks they skip depend on (seed, epoch, recording) alone."""
        order = torch.randperm(len(self.train), generator=_generator(self.config.seed, epoch, 0)).tolist()
        shares = [
            order[first : first + self.batch][self.rank :: self.world]
            for first in range(0, self.steps * self.batch, self.batch)
        ]
        with ThreadPoolExecutor(1) as loader:
            upcoming = loader.submit(self._load, epoch, shares[0])
            for place in range(len(shares)):
                loaded = upcoming.result()
                if place + 1 < len(shares):
                    upcoming = loader.submit(self._load, epoch, shares[place + 1])
                yield loaded

    def _load(self, epoch: int, indices: Sequence[int]) -> tuple[list[Sample], Tensor | None]:
        samples, keeps = [], []
        for index in indices:
            generator = _generator(self.config.seed, epoch, 1, index)
            samples.append(self.train.crop(index, generator))
            keeps.append(self.model.draw_keep(1, generator))
        drawn = [keep for keep in keeps if keep is not None]
        return samples, torch.cat(drawn, dim=1) if drawn else None

    def run_epoch(self, progress: Progress) -> tuple[float, float, int]:
        """Mean losses and the number of skipped steps."""
        self.model.train()
        sums, counted, skipped = [0.0, 0.0], 0, 0
        epoch = self.state.epoch
        what = f"epoch {epoch + 1}/{self.config.total_epochs}"
        for done, (samples, keep) in enumerate(self.batches(epoch), 1):
            losses = self.step(samples, keep)
            if losses is None:
                skipped += 1
            else:
                sums = [a + b for a, b in zip(sums, losses, strict=True)]
                counted += 1
            progress(what, done, self.steps)
        return sums[0] / max(counted, 1), sums[1] / max(counted, 1), skipped

    def step(self, samples: Sequence[Sample], keep: Tensor | None) -> tuple[float, float] | None:
        """One update; None when the loss was no number and nothing was changed."""
        model, config = self.model.config, self.config
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(config, self.state.step, self.steps)
        self.state.step += 1
        features, mask = collate(samples, model.strides[-1])
        targets = batch_targets(
            model, features.shape[2], [s.segments for s in samples], [s.labels for s in samples]
        )
        dtype = getattr(torch, config.precision)
        features, mask = features.to(self.device), mask.to(self.device)
        keep = None if keep is None else keep.to(self.device)
        with torch.autocast(self.device.type, dtype, enabled=dtype != torch.float32):
            levels = self.network(features, mask, keep)
        sums = loss_sums(levels, targets, model.label_smoothing)
        positives = float(distributed.total(sums.positives.float()))
        normaliser = 0.9 * self.state.positives + 0.1 * max(positives, 1.0)
        # The gradients of the processes are averaged; times their number that is the sum over the batch.
        classification = sums.classification * (self.world / normaliser)
        regression = sums.regression * (self.world / normaliser)
        loss = classification + model.regression_weight * regression
        self.optimizer.zero_grad(set_to_none=True)
        finite = distributed.total((~torch.isfinite(loss.detach())).float()) == 0
        if not bool(finite):
            self._skip(samples)
            return None
        self.scaler.scale(loss).backward()
        self.scaler.unscale_(self.optimizer)
        norm = nn.utils.clip_grad_norm_(self.model.parameters(), config.clip_norm)
        if config.precision != "float16" and not bool(torch.isfinite(norm)):
            self._skip(samples)
            return None
        self.state.positives = normaliser
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self._average()
        both = distributed.total(torch.stack((classification.detach(), regression.detach()))) / self.world
        return float(both[0]), float(both[1])

    def _skip(self, samples: Sequence[Sample]) -> None:
        self.state.skipped.append(tuple(sample.video_id for sample in samples))
        if len(self.state.skipped) >= MAX_SKIPPED:
            batches = "; ".join(", ".join(batch) for batch in self.state.skipped)
            raise TrainingAborted(
                f"the loss was no number in {len(self.state.skipped)} steps; their videos: {batches}"
            )

    @torch.no_grad()
    def _average(self) -> None:
        decay = self.config.ema_decay
        for name, value in self.model.state_dict().items():
            self.ema[name].lerp_(value, 1 - decay)

    # -- between epochs

    def save(self, folder: Path, extra: dict[str, Any]) -> None:
        """Raw weights, averages, moments and counters, then the averaged model beside them."""
        tensors: dict[str, Tensor] = {}
        for name, value in self.model.state_dict().items():
            tensors[f"model/{name}"] = value
            tensors[f"ema/{name}"] = self.ema[name]
        for index, moments in self.optimizer.state_dict()["state"].items():
            for name, value in moments.items():
                tensors[f"optimizer/{index}/{name}"] = torch.as_tensor(value)
        metadata = {
            "config": self.model.config.to_dict(),
            "backbone": self.model.backbone,
            "train": asdict(self.config),
            "epoch": self.state.epoch,
            "step": self.state.step,
            "positives": self.state.positives.hex(),
            "history": [asdict(log) for log in self.state.history],
            "skipped": self.state.skipped,
            "scaler": self.scaler.state_dict(),
        }
        write_tensors(folder / STATE_FILE, tensors, metadata)
        save_checkpoint(folder / MODEL_FILE, self.averaged(), extra=extra)

    def averaged(self) -> TADModel:
        model = TADModel(self.model.config, self.model.backbone).to(self.device)
        model.load_state_dict(self.ema)
        return model.eval()

    def resume(self, folder: Path) -> None:
        """Go on from :meth:`save`. Raises ValueError when the run was started with other settings."""
        tensors, metadata = read_tensors(folder / STATE_FILE)
        asked = {
            "config": self.model.config.to_dict(),
            "backbone": self.model.backbone,
            "train": json.loads(json.dumps(asdict(self.config))),
        }
        for name, value in asked.items():
            if metadata[name] != value:
                raise ValueError(
                    f"{folder} was started with another {name}: {_difference(metadata[name], value)}"
                )
        groups: dict[str, dict[str, Tensor]] = {"model": {}, "ema": {}}
        moments: dict[int, dict[str, Tensor]] = {}
        for name, tensor in tensors.items():
            kind, rest = name.split("/", 1)
            if kind == "optimizer":
                index, moment = rest.split("/")
                moments.setdefault(int(index), {})[moment] = tensor
            else:
                groups[kind][rest] = tensor
        self.model.load_state_dict(groups["model"])
        self.ema = {name: value.to(self.device) for name, value in groups["ema"].items()}
        state = self.optimizer.state_dict()
        self.optimizer.load_state_dict({**state, "state": moments})
        if metadata["scaler"]:
            self.scaler.load_state_dict(metadata["scaler"])
        self.state = _State(
            metadata["epoch"],
            metadata["step"],
            float.fromhex(metadata["positives"]),
            [EpochLog(**log) for log in metadata["history"]],
            [tuple(batch) for batch in metadata["skipped"]],
        )


def _difference(old: Any, new: Any) -> str:
    if isinstance(old, dict) and isinstance(new, dict):
        changed = [
            f"{k} {old.get(k)!r} -> {new.get(k)!r}" for k in {**old, **new} if old.get(k) != new.get(k)
        ]
        return ", ".join(changed)
    return f"{old!r} -> {new!r}"


def predict_dataset(
    model: Detector, dataset: FeatureDataset, progress: Progress = no_progress
) -> dict[str, list[Detection]]:
    """Detections of every recording, by video."""
    out = {}
    for index in range(len(dataset)):
        sample = dataset[index]
        out[sample.video_id] = predict(model, sample.features, sample.meta)
        progress("detect", index + 1, len(dataset))
    return out


def evaluate_dataset(
    model: Detector,
    dataset: FeatureDataset,
    tious: Sequence[float] = THUMOS_TIOUS,
    progress: Progress = no_progress,
) -> MapResult:
    """mAP of a model on the annotated recordings of a data set."""
    truth = {record.video_id: dataset.annotations(record) for record in dataset.records}
    return mean_average_precision(truth, predict_dataset(model, dataset, progress), tious)


def fit(
    model: TADModel,
    train: FeatureDataset,
    val: FeatureDataset | None = None,
    config: TrainConfig | None = None,
    *,
    out: str | Path | None = None,
    resume: bool = False,
    progress: Progress = no_progress,
    clock: Clock | None = None,
    extra: dict[str, Any] | None = None,
    stop_after: int | None = None,
) -> FitResult:
    """Train ``model`` (in place: it ends with the averaged weights) and evaluate it on ``val``.

    ``out``: folder for ``model.safetensors`` (averaged weights, with ``extra``), ``state.safetensors`` and
    ``log.jsonl``, written after every epoch. ``resume``: go on from there; the weights are then those of a
    run that was never interrupted, bit for bit. ``stop_after``: end after so many epochs of the schedule. In
    a process group (torchrun) every process calls this alike; the first one writes and evaluates.

    A step whose loss is no number changes nothing, is counted and its videos listed; the tenth raises
    TrainingAborted. Raises ValueError for features or labels that do not fit the model.
    """
    config = config or TrainConfig()
    clock = clock or WallClock()
    trainer = _Trainer(model, train, config)
    folder = None if out is None else Path(out)
    if resume:
        if folder is None:
            raise ValueError("resume needs out, the folder of the run")
        trainer.resume(folder)
    elif folder is not None and (folder / STATE_FILE).exists():
        raise ValueError(f"{folder} holds a run already: resume it or choose another folder")
    distributed.barrier()
    first = trainer.rank == 0
    about = {**_feature_facts(train), **(extra or {})}
    last = min(config.total_epochs, stop_after or config.total_epochs)
    evaluation = None
    while trainer.state.epoch < last:
        began = clock.monotonic()
        classification, regression, skipped = trainer.run_epoch(progress if first else no_progress)
        trainer.state.epoch += 1
        epoch = trainer.state.epoch
        evaluation = None
        due = epoch == config.total_epochs or (config.eval_every and epoch % config.eval_every == 0)
        if val is not None and first and due:
            evaluation = evaluate_dataset(trainer.averaged(), val, config.tious, progress)
        log = EpochLog(
            epoch,
            classification,
            regression,
            trainer.optimizer.param_groups[0]["lr"],
            skipped,
            clock.monotonic() - began,
            None if evaluation is None else evaluation.average,
        )
        trainer.state.history.append(log)
        if folder is not None and first:
            trainer.save(folder, about)
            lines = (json.dumps(asdict(entry)) for entry in trainer.state.history)
            (folder / LOG_FILE).write_text("\n".join(lines) + "\n", encoding="utf-8")
        progress("epochs", epoch, config.total_epochs)
    if val is not None and first and evaluation is None and trainer.state.epoch == config.total_epochs:
        evaluation = evaluate_dataset(trainer.averaged(), val, config.tious, progress)  # resumed at its end
    distributed.barrier()
    model.load_state_dict(trainer.ema)
    model.eval()
    return FitResult(model, tuple(trainer.state.history), tuple(trainer.state.skipped), evaluation)


def _feature_facts(dataset: FeatureDataset) -> dict[str, Any]:
    return {
        "features": {
            "extractor": dataset.folder.extractor if dataset.folder else "",
            "stride": dataset.stride,
            "num_frames": dataset.num_frames,
            "fps": dataset.fps or (dataset.folder.fps if dataset.folder else None),
            "resize_to": dataset.resize_to,
        }
    }
