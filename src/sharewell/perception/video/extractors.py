"""Extractors by the names that the command line and the checkpoints use."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from importlib import import_module
from importlib.resources import files
from pathlib import Path
from typing import Any

from .extractor import FeatureExtractor, TorchExtractor
from .features import FeatureGrid
from .small import SMALL_NAME, load_small

NAMES = ("small", "efficientnet-lite0", "signal", "dir:PATH", "python:MODULE:FACTORY")


def shipped(file: str) -> Path:
    """A file of the detector that comes with the package."""
    return Path(str(files("sharewell"))) / "models" / "assets" / "liquidtad" / file


def load_extractor(
    name: str,
    *,
    fps: float | None = None,
    stride: int | None = None,
    num_frames: int | None = None,
    channels: int | None = None,
    skip_damaged: bool = False,
    threads: int = 0,
) -> FeatureExtractor:
    """``small``, ``efficientnet-lite0``, ``signal`` (needs ``channels``), ``dir:PATH``, or
    ``python:package.module:factory``, where ``factory()`` returns a :class:`FeatureExtractor`.

    None keeps the extractor's own grid. Raises ValueError naming what is wrong and what is allowed.
    """
    kind, _, rest = name.partition(":")
    given: dict[str, Any] = {
        k: v for k, v in (("fps", fps), ("stride", stride), ("num_frames", num_frames)) if v is not None
    }
    extractor: FeatureExtractor
    if name in ("small", SMALL_NAME):
        extractor = load_small(shipped("extractor.safetensors"))
    elif name == "efficientnet-lite0":
        from .efficientnet import load_efficientnet_lite0

        extractor = load_efficientnet_lite0()
    elif kind == "dir" and rest:
        from .local import FolderExtractor

        if given and set(given) != {"fps", "stride", "num_frames"}:
            raise ValueError(f"dir: needs fps, stride and num_frames together, got {sorted(given)}")
        return FolderExtractor(Path(rest), FeatureGrid(**given) if given else None)
    elif name == "signal":
        from .local import SIGNAL_GRID, SignalExtractor

        if channels is None or channels < 1:
            raise ValueError(f"signal needs the number of channels, got {channels}")
        return SignalExtractor(channels, replace(SIGNAL_GRID, **given))
    elif kind == "python" and rest.count(":") == 1:
        module, attribute = rest.split(":")
        try:
            extractor = getattr(import_module(module), attribute)()
        except (ImportError, AttributeError) as error:
            raise ValueError(f"extractor {name}: {error}") from None
        if not isinstance(extractor, FeatureExtractor):
            raise ValueError(
                f"extractor {name}: the factory must return a FeatureExtractor, got {type(extractor)}"
            )
    else:
        raise ValueError(f"extractor must be one of {', '.join(NAMES)}, got {name!r}")
    if isinstance(extractor, TorchExtractor):
        if (
            given
            and extractor.takes == "clips"
            and given.get("num_frames", extractor.grid.num_frames) != (extractor.grid.num_frames)
        ):
            raise ValueError(
                f"num_frames of {name} must be {extractor.grid.num_frames}, the length of its network's clips"
            )
        extractor = replace(
            extractor, grid=replace(extractor.grid, **given), skip_damaged=skip_damaged, threads=threads
        )
    elif given:
        raise ValueError(f"fps, stride and num_frames of {name} cannot be changed, got {sorted(given)}")
    return extractor


def extractor_of_checkpoint(features: Mapping[str, Any], **options: Any) -> FeatureExtractor:
    """The extractor whose features a detector was trained on, as its checkpoint says.

    ``features``: ``{"extractor", "stride", "num_frames", "fps"}``. Raises ValueError for one that cannot be
    had.
    """
    name = str(features.get("extractor", ""))
    if not name:
        raise ValueError(
            "the detector does not say which extractor made its features; name one with --extractor"
        )
    if name.startswith("dir:"):
        raise ValueError(
            f"the detector was trained on features of {name}; give the folder of this video's features: "
            "--extractor dir:PATH"
        )
    return load_extractor(
        name,
        fps=float(features["fps"]),
        stride=int(features["stride"]),
        num_frames=int(features["num_frames"]),
        **options,
    )
