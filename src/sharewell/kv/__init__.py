"""Keys and values: pages and who owns them, plans that share them, and the engine that runs a decoder under a
plan."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .allocators import Allocator, BlocksTaken, LRUAllocator, OutOfBlocks
    from .blocks import Allocation, BlockManager
    from .depth_cache import (
        DepthSharedCache,
        NotTrainedForSharing,
        SkippedProjections,
        skip_follower_projections,
    )
    from .depth_measure import DepthReport, DepthReportConfig, DepthRow, depth_report, windows_of
    from .depth_sharing import (
        CheckedDepthPlan,
        DepthShareError,
        DepthSharePlan,
        cache_argument,
        choose_layers,
        depth_loss,
        groups,
        kv_bytes_per_token,
        layer_types,
        note_training,
        retained_count,
        sources_of,
        trained_for_sharing,
    )
    from .depth_training import (
        CrossLayerCallback,
        DepthShareConfig,
        RandomCrossLayerCache,
        RoutedTraining,
        draw_routing,
        enable_rcla,
    )
    from .diffusion_lm import (
        DenoisingStats,
        DenoisingStep,
        DiffusionOutput,
        NotFiniteLogits,
        denoise,
        generate_masked_diffusion,
    )
    from .diffusion_models import MaskedDiffusionLM, load_masked_diffusion
    from .dkv import DKVConfig
    from .dlm_measure import CacheRow, CacheTrial, compare_caches
    from .engine import Output, PlannedForward, decoder_for
    from .hf_cache import PlanCache
    from .layout import PageLayout
    from .lora_measure import ModeReport, Similarity, lora_report, similarity
    from .lora_session import DivergedPrompt, MultiLoraSession, SessionMemory, Turn
    from .lora_sharing import LoraShareConfig, LoraShareError, SharedLoraCache
    from .lora_training import share_A, train_shared_A
    from .paged import PagedForward, PagedKV
    from .plans import (
        Call,
        KVPlan,
        LowRank,
        OwnPlan,
        PlanError,
        PlanStats,
        Read,
        ReusePlan,
        SegmentSource,
        SourcePlan,
        UnsupportedModel,
    )
    from .pool import PagePool
    from .prefix import PrefixIndex, block_hashes
    from .relay import RelayConfig, RelayPlan, StudyPlan, origin_spans
    from .relay_baselines import CacheBlendPlan, DirectReusePlan, EpicPlan, TailPlan
    from .relay_pieces import Piece, PiecePlan, RelayDeclined
    from .relay_profile import HandOver, LayerProfile, profile_for, profile_layers
    from .relay_session import Generation, HandOverReport, RelaySession
    from .rope import RopeSpec, move_keys, rope_of
    from .runs import RunAllocator
    from .segments import PinnedPages, Segment, SegmentKV, TensorKV, model_key
    from .shared import SharedAllocator
    from .spaces import DenseKV, KVSpace, Rows
    from .store import KVSegmentStore, Match, SegmentId, StoreStats

_HOME = {
    "Allocation": "blocks",
    "Allocator": "allocators",
    "block_hashes": "prefix",
    "BlockManager": "blocks",
    "BlocksTaken": "allocators",
    "cache_argument": "depth_sharing",
    "CacheBlendPlan": "relay_baselines",
    "CacheRow": "dlm_measure",
    "CacheTrial": "dlm_measure",
    "Call": "plans",
    "CheckedDepthPlan": "depth_sharing",
    "choose_layers": "depth_sharing",
    "compare_caches": "dlm_measure",
    "CrossLayerCallback": "depth_training",
    "decoder_for": "engine",
    "denoise": "diffusion_lm",
    "DenoisingStats": "diffusion_lm",
    "DenoisingStep": "diffusion_lm",
    "DenseKV": "spaces",
    "depth_loss": "depth_sharing",
    "depth_report": "depth_measure",
    "DepthReport": "depth_measure",
    "DepthReportConfig": "depth_measure",
    "DepthRow": "depth_measure",
    "DepthShareConfig": "depth_training",
    "DepthSharedCache": "depth_cache",
    "DepthShareError": "depth_sharing",
    "DepthSharePlan": "depth_sharing",
    "DiffusionOutput": "diffusion_lm",
    "DirectReusePlan": "relay_baselines",
    "DivergedPrompt": "lora_session",
    "DKVConfig": "dkv",
    "draw_routing": "depth_training",
    "enable_rcla": "depth_training",
    "EpicPlan": "relay_baselines",
    "generate_masked_diffusion": "diffusion_lm",
    "Generation": "relay_session",
    "groups": "depth_sharing",
    "HandOver": "relay_profile",
    "HandOverReport": "relay_session",
    "kv_bytes_per_token": "depth_sharing",
    "KVPlan": "plans",
    "KVSegmentStore": "store",
    "KVSpace": "spaces",
    "layer_types": "depth_sharing",
    "LayerProfile": "relay_profile",
    "load_masked_diffusion": "diffusion_models",
    "lora_report": "lora_measure",
    "LoraShareConfig": "lora_sharing",
    "LoraShareError": "lora_sharing",
    "LowRank": "plans",
    "LRUAllocator": "allocators",
    "MaskedDiffusionLM": "diffusion_models",
    "Match": "store",
    "model_key": "segments",
    "ModeReport": "lora_measure",
    "move_keys": "rope",
    "MultiLoraSession": "lora_session",
    "note_training": "depth_sharing",
    "NotFiniteLogits": "diffusion_lm",
    "NotTrainedForSharing": "depth_cache",
    "origin_spans": "relay",
    "OutOfBlocks": "allocators",
    "Output": "engine",
    "OwnPlan": "plans",
    "PagedForward": "paged",
    "PagedKV": "paged",
    "PageLayout": "layout",
    "PagePool": "pool",
    "Piece": "relay_pieces",
    "PiecePlan": "relay_pieces",
    "PinnedPages": "segments",
    "PlanCache": "hf_cache",
    "PlanError": "plans",
    "PlannedForward": "engine",
    "PlanStats": "plans",
    "PrefixIndex": "prefix",
    "profile_for": "relay_profile",
    "profile_layers": "relay_profile",
    "RandomCrossLayerCache": "depth_training",
    "Read": "plans",
    "RelayConfig": "relay",
    "RelayDeclined": "relay_pieces",
    "RelayPlan": "relay",
    "RelaySession": "relay_session",
    "retained_count": "depth_sharing",
    "ReusePlan": "plans",
    "rope_of": "rope",
    "RopeSpec": "rope",
    "RoutedTraining": "depth_training",
    "Rows": "spaces",
    "RunAllocator": "runs",
    "Segment": "segments",
    "SegmentId": "store",
    "SegmentKV": "segments",
    "SegmentSource": "plans",
    "SessionMemory": "lora_session",
    "share_A": "lora_training",
    "SharedAllocator": "shared",
    "SharedLoraCache": "lora_sharing",
    "Similarity": "lora_measure",
    "similarity": "lora_measure",
    "skip_follower_projections": "depth_cache",
    "SkippedProjections": "depth_cache",
    "SourcePlan": "plans",
    "sources_of": "depth_sharing",
    "StoreStats": "store",
    "StudyPlan": "relay",
    "TailPlan": "relay_baselines",
    "TensorKV": "segments",
    "train_shared_A": "lora_training",
    "trained_for_sharing": "depth_sharing",
    "Turn": "lora_session",
    "UnsupportedModel": "plans",
    "windows_of": "depth_measure",
}
__all__ = sorted(_HOME)  # pyright: ignore[reportUnsupportedDunderAll]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f".{_HOME[name]}", __name__), name)
