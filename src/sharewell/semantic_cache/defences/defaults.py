"""What a cache is defended by when nobody says otherwise: what costs less than a tenth of the benign hits."""

from __future__ import annotations

from ...models import Embedder
from ..base import Defence
from ..slots import SlotVerifier
from .crops import CropConsistency
from .provenance import Provenance

# Thresholds belong to an embedder: these are the ones that the shipped thresholds were measured with.
_MEASURED = ("minilm-onnx-",)


def default_defences(embedder: Embedder | None) -> list[Defence]:
    """The slot verifier, the weakest part of crop consistency where its shipped threshold holds
    (all-MiniLM-L6-v2), and the record of who was served whose answer.

    None of them embeds anything at a hit. What they cost and stop is on the page of the collision audit.
    """
    made: list[Defence] = [SlotVerifier()]
    if embedder is not None and embedder.id.startswith(_MEASURED):
        made.append(CropConsistency(m=0))
    return [*made, Provenance()]
