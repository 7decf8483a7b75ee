"""Coding: one adaptive entropy coder, lossless text compression, information measures and minimum-entropy
coupling."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from . import quasicryth
    from .carrier import CarrierMismatch, LMCarrier
    from .coding_game import GridWorld, ImpossibleObservation, MarkovCodingGame, Trajectory, soft_policy
    from .comparison import ABRow, ab_test
    from .coupling import Coupling, min_entropy_coupling
    from .info import DistributionError, entropy, mutual_information
    from .mecb import MECB, Encoder, ebim
    from .quasicryth import (
        QuasicrythCompressor,
        QuasicrythDecompressor,
        QuasicrythError,
        compress,
        decompress,
    )
    from .tiling import Arm, coverage, positions

# Public names and the file that has them; None is the module of that name itself.
_HOME = {
    "quasicryth": None,
    "QuasicrythCompressor": "quasicryth",
    "QuasicrythDecompressor": "quasicryth",
    "QuasicrythError": "quasicryth",
    "compress": "quasicryth",
    "decompress": "quasicryth",
    "Arm": "tiling",
    "coverage": "tiling",
    "positions": "tiling",
    "ABRow": "comparison",
    "ab_test": "comparison",
    "DistributionError": "info",
    "entropy": "info",
    "mutual_information": "info",
    "Coupling": "coupling",
    "min_entropy_coupling": "coupling",
    "MECB": "mecb",
    "Encoder": "mecb",
    "ebim": "mecb",
    "GridWorld": "coding_game",
    "ImpossibleObservation": "coding_game",
    "MarkovCodingGame": "coding_game",
    "Trajectory": "coding_game",
    "soft_policy": "coding_game",
    "CarrierMismatch": "carrier",
    "LMCarrier": "carrier",
}
__all__ = sorted(_HOME)  # pyright: ignore[reportUnsupportedDunderAll]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    home = _HOME[name]
    if home is None:
        return import_module(f".{name}", __name__)
    return getattr(import_module(f".{home}", __name__), name)
