"""The collision audit: attacks a copy of your own cache with harmless canaries, and measures its defences."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .arsenal import build_defences
    from .config import AuditConfig
    from .generator import Collision, CollisionSearch, SearchConfig
    from .gradients import GradientProposer, Proposer, RandomProposer, View, printable_words
    from .hashing import LocalityHash
    from .log import AttackLog
    from .outcome import AuditReport, DefenceResult, PairResult, Rate
    from .penalties import PassDefences, Perplexity, victim_words
    from .refusal import (
        AUDIT_PATH,
        NONCE_HEADER,
        AuditRefused,
        copy_cache,
        grant,
        loopback_cache_file,
    )
    from .runner import CollisionAudit
    from .sources import Canary, Question, canaries, load_questions, pair, shipped_questions
    from .timing import TimingLeak, learn_threshold, timing_leak
    from .timing_probe import TimingResult, probe_cache

_HOME = {
    "build_defences": "arsenal",
    "AuditConfig": "config",
    "Collision": "generator",
    "CollisionSearch": "generator",
    "SearchConfig": "generator",
    "GradientProposer": "gradients",
    "Proposer": "gradients",
    "RandomProposer": "gradients",
    "View": "gradients",
    "printable_words": "gradients",
    "LocalityHash": "hashing",
    "AttackLog": "log",
    "AuditReport": "outcome",
    "DefenceResult": "outcome",
    "PairResult": "outcome",
    "Rate": "outcome",
    "PassDefences": "penalties",
    "Perplexity": "penalties",
    "victim_words": "penalties",
    "AUDIT_PATH": "refusal",
    "AuditRefused": "refusal",
    "NONCE_HEADER": "refusal",
    "copy_cache": "refusal",
    "grant": "refusal",
    "loopback_cache_file": "refusal",
    "CollisionAudit": "runner",
    "Canary": "sources",
    "Question": "sources",
    "canaries": "sources",
    "load_questions": "sources",
    "pair": "sources",
    "shipped_questions": "sources",
    "TimingLeak": "timing",
    "learn_threshold": "timing",
    "timing_leak": "timing",
    "TimingResult": "timing_probe",
    "probe_cache": "timing_probe",
}
__all__ = sorted(_HOME)  # pyright: ignore[reportUnsupportedDunderAll]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f".{_HOME[name]}", __name__), name)
