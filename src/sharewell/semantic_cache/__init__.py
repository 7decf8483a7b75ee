"""Answers that are asked again: exactly, or in other words, by rules of their own per kind of question."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .agreement import answers_agree
    from .audit import (
        AUDIT_PATH,
        NONCE_HEADER,
        AuditConfig,
        AuditRefused,
        CollisionAudit,
        grant,
        loopback_cache_file,
    )
    from .base import CacheVersionError, Context, Defence, Entry, Query, Verdict
    from .breakeven import BreakEvenSwitch, break_even_share
    from .cache import SemanticCache
    from .calibration import Calibration, Judged, choose_threshold, upper_bound
    from .categories import Cascade, CentroidClassifier, Classification, Classifier, RuleClassifier
    from .defences import (
        AnswerCheck,
        CropConsistency,
        Provenance,
        RarityScreen,
        SaltedEmbedder,
        ScopeGuard,
        SecondOpinion,
        TimingEqualiser,
        calibrate_defences,
        default_defences,
    )
    from .flight import SingleFlight
    from .load import LoadGauge, load_of
    from .lookup import Lookup
    from .namespace import Namespace, Request, fingerprint
    from .openai_client import cached
    from .policy import DEFAULT_POLICIES, CategoryPolicy
    from .settings import CacheSettings
    from .slots import SlotVerifier
    from .store import DocumentStore, StoreError

_HOME = {
    "answers_agree": "agreement",
    "CacheVersionError": "base",
    "Context": "base",
    "Defence": "base",
    "Entry": "base",
    "Query": "base",
    "Verdict": "base",
    "BreakEvenSwitch": "breakeven",
    "break_even_share": "breakeven",
    "CacheSettings": "settings",
    "SemanticCache": "cache",
    "Calibration": "calibration",
    "Judged": "calibration",
    "choose_threshold": "calibration",
    "upper_bound": "calibration",
    "Cascade": "categories",
    "CentroidClassifier": "categories",
    "Classification": "categories",
    "Classifier": "categories",
    "RuleClassifier": "categories",
    "SingleFlight": "flight",
    "LoadGauge": "load",
    "load_of": "load",
    "Lookup": "lookup",
    "Namespace": "namespace",
    "Request": "namespace",
    "fingerprint": "namespace",
    "cached": "openai_client",
    "CategoryPolicy": "policy",
    "DEFAULT_POLICIES": "policy",
    "SlotVerifier": "slots",
    "DocumentStore": "store",
    "StoreError": "store",
    "AUDIT_PATH": "audit",
    "AuditConfig": "audit",
    "AuditRefused": "audit",
    "CollisionAudit": "audit",
    "NONCE_HEADER": "audit",
    "grant": "audit",
    "loopback_cache_file": "audit",
    "AnswerCheck": "defences",
    "CropConsistency": "defences",
    "Provenance": "defences",
    "RarityScreen": "defences",
    "SaltedEmbedder": "defences",
    "ScopeGuard": "defences",
    "SecondOpinion": "defences",
    "TimingEqualiser": "defences",
    "calibrate_defences": "defences",
    "default_defences": "defences",
}
__all__ = sorted(_HOME)  # pyright: ignore[reportUnsupportedDunderAll]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f".{_HOME[name]}", __name__), name)
