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
    from .engine import Output, PlannedForward, decoder_for
    from .hf_cache import PlanCache
    from .layout import PageLayout
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
    "Call": "plans",
    "CheckedDepthPlan": "depth_sharing",
    "choose_layers": "depth_sharing",
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
    "DKVConfig": "dkv",
    "draw_routing": "depth_training",
    "enable_rcla": "depth_training",
    "generate_masked_diffusion": "diffusion_lm",
    "groups": "depth_sharing",
    "kv_bytes_per_token": "depth_sharing",
    "KVPlan": "plans",
    "KVSegmentStore": "store",
    "KVSpace": "spaces",
    "layer_types": "depth_sharing",
    "load_masked_diffusion": "diffusion_models",
    "LowRank": "plans",
    "LRUAllocator": "allocators",
    "MaskedDiffusionLM": "diffusion_models",
    "Match": "store",
    "model_key": "segments",
    "move_keys": "rope",
    "note_training": "depth_sharing",
    "NotFiniteLogits": "diffusion_lm",
    "NotTrainedForSharing": "depth_cache",
    "OutOfBlocks": "allocators",
    "Output": "engine",
    "OwnPlan": "plans",
    "PagedForward": "paged",
    "PagedKV": "paged",
    "PageLayout": "layout",
    "PagePool": "pool",
    "PinnedPages": "segments",
    "PlanCache": "hf_cache",
    "PlanError": "plans",
    "PlannedForward": "engine",
    "PlanStats": "plans",
    "PrefixIndex": "prefix",
    "RandomCrossLayerCache": "depth_training",
    "Read": "plans",
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
    "SharedAllocator": "shared",
    "skip_follower_projections": "depth_cache",
    "SkippedProjections": "depth_cache",
    "SourcePlan": "plans",
    "sources_of": "depth_sharing",
    "StoreStats": "store",
    "TensorKV": "segments",
    "trained_for_sharing": "depth_sharing",
    "UnsupportedModel": "plans",
    "windows_of": "depth_measure",
}
__all__ = sorted(_HOME)  # pyright: ignore[reportUnsupportedDunderAll]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f".{_HOME[name]}", __name__), name)
