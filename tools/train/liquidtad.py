"""Train what ``sharewell detect`` ships: the small extractor and the digit-motion detector.

    python -m tools.train.liquidtad     # from the root of the checkout; about six minutes of one core

Writes extractor.safetensors, detector.safetensors and manifest.toml into
src/sharewell/models/assets/liquidtad/. One seed decides videos, weights and order; sums run on one thread.
"""

from __future__ import annotations

import argparse
import hashlib
import tempfile
from pathlib import Path

import torch
from safetensors.torch import save_file

from benchmarks.perception.digit_task import TaskSize, prepare, train_detector, train_extractor
from sharewell.bench import progress_bars
from sharewell.perception import save_checkpoint
from sharewell.perception.video.digits import MOTIONS
from sharewell.perception.video.extractors import shipped
from sharewell.perception.video.small import SMALL_NAME

SIZE = TaskSize(extractor_videos=48, train_videos=96, test_videos=48, extractor_epochs=10, epochs=30)
SEED = 1000  # the benchmark uses small seeds, so it never tests on what this trained on
ABOUT = (
    "This detector finds handwritten digits that shift, spin, grow, blink or swap, in videos from "
    "'sharewell tad demo'. It says nothing about other videos."
)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=shipped("."))
    parser.add_argument("--work", type=Path, help="keep the videos and features there")
    chosen = parser.parse_args()
    torch.set_num_threads(1)  # sums in one order
    with tempfile.TemporaryDirectory() as scratch, progress_bars() as progress:
        work = chosen.work or Path(scratch)
        extractor, accuracy = train_extractor(work / "extractor", SIZE, SEED, progress)
        data = prepare(work, extractor, SIZE, SEED, progress)
        result = train_detector(data.annotations, data.features, SIZE, SEED, progress)
    assert result.evaluation is not None
    chosen.out.mkdir(parents=True, exist_ok=True)
    grid = extractor.grid
    save_file(extractor.module.state_dict(), str(chosen.out / "extractor.safetensors"))
    save_checkpoint(
        chosen.out / "detector.safetensors",
        result.model,
        extra={
            "features": {
                "extractor": SMALL_NAME,
                "stride": grid.stride,
                "num_frames": grid.num_frames,
                "fps": grid.fps,
            },
            "about": ABOUT,
            "demonstration": True,
        },
    )
    for name in ("extractor", "detector"):
        (chosen.out / f"{name}.safetensors").chmod(0o644)
    score = 100 * result.evaluation.average
    lines = ["# What `sharewell detect` and the extractor `small` load. Made by the script named here."]
    for name, about in (
        ("extractor", "MotionNet, 96 numbers from 4 frames of 48 x 48 pixels"),
        ("detector", f"LiquidTAD, 128 wide, 5 levels, on the extractor's features; {', '.join(MOTIONS)}"),
    ):
        digest = hashlib.sha256((chosen.out / f"{name}.safetensors").read_bytes()).hexdigest()
        lines += [
            "",
            f"[{name}]",
            f'file = "{name}.safetensors"',
            f'sha256 = "{digest}"',
            'script = "tools/train/liquidtad.py"',
            f"seed = {SEED}",
            'licence = "Apache-2.0"',
            'data = "digits of scikit-learn (UCI optical recognition, CC BY 4.0), rendered"',
            f'about = "{about}"',
        ]
        if name == "detector":
            lines += [
                "demonstration = true",
                f"average_map = {score:.2f}  # tIoU 0.3:0.1:0.7, {SIZE.test_videos} videos, unseen digits",
            ]
        else:
            lines.append(f"training_accuracy = {accuracy:.4f}  # of windows, last epoch")
    (chosen.out / "manifest.toml").write_text("\n".join(lines) + "\n", encoding="utf-8")
    per_label = {label: round(100 * float(ap.mean()), 1) for label, ap in result.evaluation.ap.items()}
    print(f"average mAP {score:.2f} {per_label}, windows named rightly in training {accuracy:.3f}")


if __name__ == "__main__":
    main()
