"""Checks beside the threshold: each makes it harder to get a planted answer served, at a measured price.

Only scope isolation is a guarantee; the others are mitigations (see the docs page of the collision audit).
"""

from .answer_check import AnswerCheck
from .calibrate import BenignPair, Calibration, calibrate_defences
from .crops import CropConsistency
from .defaults import default_defences
from .provenance import HitRecord, Provenance
from .rarity import CharacterModel, RarityScreen
from .salting import SaltedEmbedder
from .scope import ScopeGuard
from .scored import ScoredDefence
from .second_opinion import SecondOpinion
from .timing import TimingEqualiser

__all__ = [
    "AnswerCheck",
    "BenignPair",
    "Calibration",
    "CharacterModel",
    "CropConsistency",
    "HitRecord",
    "Provenance",
    "RarityScreen",
    "SaltedEmbedder",
    "ScopeGuard",
    "ScoredDefence",
    "SecondOpinion",
    "TimingEqualiser",
    "calibrate_defences",
    "default_defences",
]
