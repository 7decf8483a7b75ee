"""What a cache is defended by when nobody says otherwise."""

from __future__ import annotations

from ...models import Embedder
from ..base import Defence
from ..slots import SlotVerifier
from .crops import CropConsistency

# Thresholds belong to an embedder: these are the ones that the shipped thresholds were measured with.
_MEASURED = ("minilm-onnx-",)


def default_defences(embedder: Embedder | None) -> list[Defence]:
    """The slot verifier, and crop consistency where its shipped thresholds hold (all-MiniLM-L6-v2)."""
    made: list[Defence] = [SlotVerifier()]
    if embedder is not None and embedder.id.startswith(_MEASURED):
        made.append(CropConsistency())
    return made
