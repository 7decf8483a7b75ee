"""The extractor that ships: a small convolutional network over four sampled frames, 96 numbers.

It looks at brightness and its change only, in 48 x 48 pixels, and costs about a millisecond a window on one
core. It was trained on the digit motions of :mod:`.digits` and knows what moves how in front of what; for
pictures of the world take ``efficientnet-lite0`` or features of your own.
"""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import torch
from torch import Tensor, nn

from .extractor import TorchExtractor
from .features import FeatureGrid

SMALL_NAME = "small-v1"  # the version counts: features of other weights are other features
SMALL_DIM = 96
SMALL_FRAMES = 4
SMALL_PIXELS = 48


class MotionNet(nn.Module):
    """[n, 3, frames, 48, 48] in [0, 1] -> [n, 96]: brightness of every frame and its differences, four
    convolutions, average and maximum over the picture, one linear layer."""

    luma: Tensor

    def __init__(self, frames: int = SMALL_FRAMES, dim: int = SMALL_DIM) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        widths = (2 * frames - 1, 24, 48, 64, 96)
        for i, (a, b) in enumerate(pairwise(widths)):
            kernel, stride = (5, 2) if i == 0 else (3, 2 if i < 3 else 1)
            layers += [nn.Conv2d(a, b, kernel, stride, kernel // 2, bias=False), nn.BatchNorm2d(b), nn.ReLU()]
        self.trunk = nn.Sequential(*layers)
        self.out = nn.Linear(2 * widths[-1], dim)
        self.register_buffer("luma", torch.tensor([0.299, 0.587, 0.114]).view(1, 3, 1, 1, 1))

    def forward(self, clip: Tensor) -> Tensor:
        gray = (clip * self.luma).sum(1) - 0.5
        x = self.trunk(torch.cat([gray, 4 * gray.diff(dim=1)], dim=1)).flatten(2)
        return torch.relu(self.out(torch.cat([x.mean(2), x.amax(2)], dim=1)))


def wrap_motion_net(net: MotionNet, name: str = SMALL_NAME) -> TorchExtractor:
    """The network as an extractor on its own grid: 4 frames a second, windows of 4, one a frame."""
    return TorchExtractor(
        name,
        net,
        SMALL_DIM,
        FeatureGrid(4.0, 1, SMALL_FRAMES),
        takes="clips",
        width=SMALL_PIXELS,
        height=SMALL_PIXELS,
        mean=(0.0, 0.0, 0.0),
        std=(1.0, 1.0, 1.0),
        batch=64,
    )


def load_small(weights: Path) -> TorchExtractor:
    """Raises FileNotFoundError, or ValueError for weights of another network."""
    from safetensors.torch import load_file

    if not weights.is_file():
        raise FileNotFoundError(f"no extractor weights {weights}")
    net = MotionNet()
    try:
        net.load_state_dict(load_file(weights))
    except RuntimeError as error:
        raise ValueError(f"{weights}: not the weights of the small extractor ({error})") from None
    return wrap_motion_net(net)
