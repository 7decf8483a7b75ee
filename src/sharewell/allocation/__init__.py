"""Allocation: divisible budgets, unequal machines, and rankings from a gossiped log."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .archive import DamagedFile
    from .baselines import BestFit, FirstComeFirstServed, FirstPriceAuction, GreedyAuction, RandomAuction
    from .bound import BoundResult, LPBound
    from .certificate import Certificate, certify
    from .core import (
        Allocation,
        Mechanism,
        Objective,
        Problem,
        ProblemError,
        Request,
        Resource,
        check_allocation,
        explain,
        jain,
        metrics,
        objective_value,
    )
    from .fixedpoint import FixedPoint, Game, Result, StalledUser, run
    from .gossip import DamagedLog, GossipLog, LogConflict, LogLimits, MergeReport
    from .grank import ClickLog, ClickLogConflict, GRank, GRankEstimator
    from .identity import Identity
    from .interference import InterferenceGame, NoisyGame
    from .mohaf import Mohaf, MohafConfig
    from .peers import Peer
    from .rank_metrics import list_distance, ndcg, reciprocal_rank
    from .rank_simulation import SimConfig, SimResult, Simulation, simulate
    from .ranking import ClickRow, GRankConfig, Item, Ranked, RankIndex
    from .schedules import Asynchronous, DecayingStep, Schedule, Sequential, Simultaneous
    from .stream import AuctionStream
    from .traces import read_tables, write_allocation
    from .waterfilling import ReverseFill, project, reverse_waterfill, waterfill
    from .wire import GossipFormatError

_HOME = {
    "DamagedFile": "archive",
    "BestFit": "baselines",
    "FirstComeFirstServed": "baselines",
    "FirstPriceAuction": "baselines",
    "GreedyAuction": "baselines",
    "RandomAuction": "baselines",
    "BoundResult": "bound",
    "LPBound": "bound",
    "Certificate": "certificate",
    "certify": "certificate",
    "Allocation": "core",
    "Mechanism": "core",
    "Objective": "core",
    "Problem": "core",
    "ProblemError": "core",
    "Request": "core",
    "Resource": "core",
    "check_allocation": "core",
    "explain": "core",
    "jain": "core",
    "metrics": "core",
    "objective_value": "core",
    "FixedPoint": "fixedpoint",
    "Game": "fixedpoint",
    "Result": "fixedpoint",
    "StalledUser": "fixedpoint",
    "run": "fixedpoint",
    "DamagedLog": "gossip",
    "GossipLog": "gossip",
    "Identity": "identity",
    "LogConflict": "gossip",
    "LogLimits": "gossip",
    "MergeReport": "gossip",
    "ClickLog": "grank",
    "ClickLogConflict": "grank",
    "GRank": "grank",
    "GRankEstimator": "grank",
    "InterferenceGame": "interference",
    "NoisyGame": "interference",
    "Mohaf": "mohaf",
    "MohafConfig": "mohaf",
    "Peer": "peers",
    "list_distance": "rank_metrics",
    "ndcg": "rank_metrics",
    "reciprocal_rank": "rank_metrics",
    "SimConfig": "rank_simulation",
    "SimResult": "rank_simulation",
    "Simulation": "rank_simulation",
    "simulate": "rank_simulation",
    "ClickRow": "ranking",
    "GRankConfig": "ranking",
    "Item": "ranking",
    "RankIndex": "ranking",
    "Ranked": "ranking",
    "Asynchronous": "schedules",
    "DecayingStep": "schedules",
    "Schedule": "schedules",
    "Sequential": "schedules",
    "Simultaneous": "schedules",
    "AuctionStream": "stream",
    "read_tables": "traces",
    "write_allocation": "traces",
    "ReverseFill": "waterfilling",
    "project": "waterfilling",
    "reverse_waterfill": "waterfilling",
    "waterfill": "waterfilling",
    "GossipFormatError": "wire",
}
__all__ = sorted(_HOME)  # pyright: ignore[reportUnsupportedDunderAll]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f".{_HOME[name]}", __name__), name)
