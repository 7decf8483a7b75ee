"""Training: what is learned, what an interruption changes (nothing), and what a broken loss does."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from sharewell.perception import (
    FeatureDataset,
    LiquidTADConfig,
    TADModel,
    TrainConfig,
    TrainingAborted,
    checkpoint_extra,
    evaluate_dataset,
    fit,
    load_checkpoint,
    save_checkpoint,
)
from sharewell.perception.tad.schedule import learning_rate, make_optimizer
from sharewell.perception.tad.trainer import _Trainer
from sharewell.simulation import VirtualClock

from .toy import ToyTask, toy, toy_model, trained, write_toy

QUICK = TrainConfig(lr=2e-3, epochs=3, warmup_epochs=1, batch_size=2, ema_decay=0.9)


def equal(a: Path, b: Path) -> bool:
    return a.read_bytes() == b.read_bytes()


def test_the_task_is_learned_and_labels_that_lie_are_not():
    result = trained()
    assert result.evaluation is not None and result.evaluation.average > 0.7
    assert result.history[-1].classification < 0.3 * result.history[0].classification
    # What the detector finds is in the features: on another video's labels it is no better than chance.
    test = toy().dataset("test")
    test.records = [
        type(record)(record.video_id, record.subset, record.duration_s, record.fps, other.annotations[:1])
        for record, other in zip(test.records, reversed(test.records), strict=True)
    ]
    for record in test.records:
        object.__setattr__(record, "annotations", tuple(
            type(a)(a.start + 30, a.end + 30, a.label) for a in record.annotations
        ))  # fmt: skip
    assert evaluate_dataset(result.model, test).average < 0.3


@pytest.mark.parametrize("backbone", ["liquid", "actionformer"])
def test_an_interrupted_run_ends_with_the_same_bits(backbone: str, tmp_path: Path):
    data = toy().dataset("training", max_length=64)
    changes: dict[str, Any] = {"initial_positives": 10.0, "drop_path": 0.3}
    whole = fit(
        toy_model(backbone, **changes), data, None, QUICK, out=tmp_path / "whole", clock=VirtualClock()
    )
    broken = tmp_path / "broken"
    fit(toy_model(backbone, **changes), data, None, QUICK, out=broken, clock=VirtualClock(), stop_after=2)
    assert not equal(tmp_path / "whole" / "model.safetensors", broken / "model.safetensors")
    # Other initial weights: what counts is in the folder.
    resumed = fit(
        toy_model(backbone, 7, **changes), data, None, QUICK, out=broken, clock=VirtualClock(), resume=True
    )
    for name in ("model.safetensors", "state.safetensors", "log.jsonl"):
        assert equal(tmp_path / "whole" / name, broken / name)
    assert resumed.history == whole.history
    assert all(
        torch.equal(a, b) for a, b in zip(whole.model.parameters(), resumed.model.parameters(), strict=True)
    )


def test_a_crash_in_the_middle_of_an_epoch_loses_that_epoch_only(tmp_path: Path):
    data = toy().dataset("training", max_length=64)
    fit(toy_model(), data, None, QUICK, out=tmp_path / "whole", clock=VirtualClock())

    class Crash(Exception):
        pass

    def crash(what: str, done: float, total: float) -> None:
        if what.startswith("epoch 3") and done == 2:
            raise Crash

    with pytest.raises(Crash):
        fit(toy_model(), data, None, QUICK, out=tmp_path / "run", clock=VirtualClock(), progress=crash)
    fit(toy_model(), data, None, QUICK, out=tmp_path / "run", clock=VirtualClock(), resume=True)
    assert equal(tmp_path / "whole" / "state.safetensors", tmp_path / "run" / "state.safetensors")


def test_a_run_is_neither_overwritten_nor_resumed_with_other_settings(tmp_path: Path):
    data = toy().dataset("training", max_length=64)
    fit(toy_model(), data, None, QUICK, out=tmp_path, stop_after=1)
    with pytest.raises(ValueError, match="holds a run already"):
        fit(toy_model(), data, None, QUICK, out=tmp_path)
    with pytest.raises(ValueError, match=r"another train: lr 0.002 -> 0.001"):
        fit(toy_model(), data, None, TrainConfig(**{**vars(QUICK), "lr": 1e-3}), out=tmp_path, resume=True)
    with pytest.raises(ValueError, match="another backbone: 'liquid' -> 'maxpool'"):
        fit(toy_model("maxpool"), data, None, QUICK, out=tmp_path, resume=True)
    with pytest.raises(ValueError, match="resume needs out"):
        fit(toy_model(), data, None, QUICK, resume=True)


def poisoned(dataset: FeatureDataset, bad: set[str]) -> FeatureDataset:
    """The features of some videos overflow on the way: finite in the file, no number in the loss."""

    class Poisoned(FeatureDataset):
        def __init__(self) -> None:
            self.__dict__.update(dataset.__dict__)

        def __getitem__(self, index: int):
            sample = super().__getitem__(index)
            if sample.video_id in bad:
                sample.features[:, 0] = 3e38
            return sample

    return Poisoned()


def test_a_loss_that_is_no_number_changes_nothing_and_is_counted():
    data = poisoned(toy().dataset("training"), {"v2"})
    config = TrainConfig(lr=1e-3, epochs=2, warmup_epochs=0, batch_size=1)
    result = fit(toy_model(), data, None, config)
    assert result.skipped == (("v2",), ("v2",))
    assert [log.skipped for log in result.history] == [1, 1]
    assert all(torch.isfinite(p).all() for p in result.model.parameters())


def test_the_tenth_such_step_ends_training_and_names_the_videos():
    data = poisoned(toy().dataset("training"), {f"v{n}" for n in range(6)})
    with pytest.raises(TrainingAborted, match=r"no number in 10 steps; their videos: v\d; v\d"):
        fit(toy_model(), data, None, TrainConfig(epochs=5, batch_size=1))


def test_videos_without_actions_train_as_background(tmp_path: Path):
    task = write_toy(tmp_path, videos=4)
    text = task.annotations.read_text()
    (tmp_path / "none.json").write_text(text.replace('"segment"', '"was"').replace('"annotations"', '"old"'))
    data = FeatureDataset(tmp_path / "none.json", tmp_path, 1, 1, labels=("down", "up"))
    result = fit(toy_model(), data, None, QUICK)
    assert result.history[-1].regression == 0 and np.isfinite(result.history[-1].classification)


def test_averaged_weights_are_the_running_mean():
    data = toy().dataset("training", max_length=64)
    trainer = _Trainer(
        toy_model(), data, TrainConfig(lr=1e-2, epochs=1, warmup_epochs=0, batch_size=2, ema_decay=0.7)
    )
    expected = {name: p.detach().clone() for name, p in trainer.model.named_parameters()}
    trainer.model.train()
    for samples, keep in trainer.batches(0):
        trainer.step(samples, keep)
        for name, p in trainer.model.named_parameters():
            expected[name] = 0.7 * expected[name] + 0.3 * p.detach()
    assert all(torch.allclose(trainer.ema[name], expected[name], atol=1e-6) for name in expected)


def test_learning_rate_rises_and_falls():
    config = TrainConfig(lr=1.0, epochs=10, warmup_epochs=5)
    rates = [learning_rate(config, step, 4) for step in range(60)]
    assert rates[0] == pytest.approx(0, abs=1e-7) and rates[10] == pytest.approx(0.5, abs=1e-6)
    assert rates[20] == 1 and rates[40] == pytest.approx(0.5, abs=1e-6)
    assert np.all(np.diff(rates[:21]) > 0) and np.all(np.diff(rates[20:]) < 0)


def test_only_convolutions_decay():
    model = toy_model()
    decayed, kept = make_optimizer(model, QUICK).param_groups
    assert decayed["weight_decay"] == 0.05 and kept["weight_decay"] == 0
    assert all(p.ndim == 3 for p in decayed["params"])
    names = {id(p): name for name, p in model.named_parameters()}
    free = {names[id(p)] for p in kept["params"]}
    assert {"pyramid.decay.rho", "pyramid.decay.delta", "scales"} <= free
    assert all("norm" in n or "bias" in n or "decay" in n or "neck" in n or n == "scales" for n in free)


def test_mixed_precision_trains_like_float32():
    data = toy().dataset("training", max_length=64)
    losses = {}
    for precision in ("float32", "bfloat16"):
        config = TrainConfig(**{**vars(QUICK), "precision": precision})
        losses[precision] = (
            fit(toy_model(initial_positives=10), data, None, config).history[-1].classification
        )
    assert losses["bfloat16"] == pytest.approx(losses["float32"], rel=0.1)
    with pytest.raises(ValueError, match="precision float16 needs a CUDA device"):
        fit(toy_model(), data, None, TrainConfig(precision="float16"))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("precision", ["float32", "bfloat16", "float16"])
def test_training_on_a_gpu_learns_too(precision: Any):
    config = TrainConfig(
        lr=8e-3, epochs=10, warmup_epochs=1, batch_size=2, ema_decay=0.9, precision=precision
    )
    model = toy_model(initial_positives=10).cuda()
    result = fit(model, toy().dataset("training"), toy().dataset("test"), config)
    assert result.evaluation is not None and result.evaluation.average > 0.7


PROCESS = """
import sys
from pathlib import Path
from sharewell.perception.tad import distributed
from sharewell.perception import FeatureDataset, TADModel, LiquidTADConfig, TrainConfig, fit
distributed.join_from_environment()
folder, out = Path(sys.argv[1]), Path(sys.argv[2])
data = FeatureDataset(folder / "annotations.json", folder, 1, 1, subsets=["training"], max_length=64)
config = LiquidTADConfig(12, 2, dim=16, arch=(1, 1, 2), heads=2, drop_path=0.3)
fit(TADModel(config), data, None, TrainConfig(lr=2e-3, epochs=1, warmup_epochs=1, batch_size=4), out=out)
distributed.leave()
"""


def test_two_processes_give_the_weights_of_one(tmp_path: Path):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    processes = []
    for rank in range(2):
        group = {"WORLD_SIZE": "2", "RANK": str(rank), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        command = [sys.executable, "-c", PROCESS, str(toy().folder), str(tmp_path / "two")]
        processes.append(subprocess.Popen(command, env={**os.environ, **group}, stderr=subprocess.PIPE))
    data = toy().dataset("training", max_length=64)
    model = TADModel(LiquidTADConfig(12, 2, dim=16, arch=(1, 1, 2), heads=2, drop_path=0.3))
    config = TrainConfig(lr=2e-3, epochs=1, warmup_epochs=1, batch_size=4)
    one = fit(model, data, None, config).model
    for process in processes:
        _, errors = process.communicate(timeout=120)
        assert process.returncode == 0, errors.decode()[-3000:]
    two = load_checkpoint(tmp_path / "two")
    for (name, a), b in zip(one.state_dict().items(), two.state_dict().values(), strict=True):
        assert torch.allclose(a, b, atol=1e-5), name


# -- checkpoints


def test_a_checkpoint_gives_back_the_detector_and_what_was_noted(tmp_path: Path):
    model = toy_model("actionformer", labels=("a", "b"))
    save_checkpoint(tmp_path, model, extra={"features": {"extractor": "small"}})
    again = load_checkpoint(tmp_path / "model.safetensors")
    assert again.config == model.config and again.backbone == "actionformer" and not again.training
    assert all(
        torch.equal(a, b)
        for a, b in zip(model.state_dict().values(), again.state_dict().values(), strict=True)
    )
    assert checkpoint_extra(tmp_path) == {"features": {"extractor": "small"}}


def test_what_is_no_checkpoint_is_named(tmp_path: Path):
    (tmp_path / "x.safetensors").write_bytes(b"nothing of the kind")
    with pytest.raises(ValueError, match=r"x\.safetensors is no safetensors file"):
        load_checkpoint(tmp_path / "x.safetensors")
    with pytest.raises(FileNotFoundError, match="does not exist"):
        load_checkpoint(tmp_path / "y.safetensors")
    from safetensors.torch import save_file

    save_file({"a": torch.zeros(1)}, str(tmp_path / "z.safetensors"))
    with pytest.raises(ValueError, match=r"z\.safetensors is no detector"):
        load_checkpoint(tmp_path / "z.safetensors")


def test_data_that_does_not_fit_the_model_is_named():
    task: ToyTask = toy()
    data = task.dataset("training")
    with pytest.raises(ValueError, match="c_in must be the width of the features, 12, got 5"):
        fit(toy_model(c_in=5), data)
    with pytest.raises(ValueError, match="n_cls must be the number of labels, 2, got 3"):
        fit(toy_model(n_cls=3), data)
    with pytest.raises(ValueError, match="labels must be those of the data set"):
        fit(toy_model(labels=("x", "y")), data)
    with pytest.raises(ValueError, match="epochs must be at least 1"):
        TrainConfig(epochs=0)
