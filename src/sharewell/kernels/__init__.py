"""Compute kernels that need no compiler on the user's machine, each tested against a plain twin."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .aie_model import AieModel, AieReport, board_timings
    from .aie_streams import StreamShape, simulate_streams
    from .attention import MAX_ITEM_ROWS, attention_entries, scratch_floats
    from .flash_lora import flash_lora_attention
    from .packing import (
        FORMATS,
        GROUP,
        PAD,
        PackedMatrix,
        pack_dense,
        pack_int4,
        pack_int8,
        quantize_int4,
        quantize_int8,
        unpack,
    )
    from .shape import DOWN, EMBEDS, GATE_UP, N_LAYERS, OUT, QKV
    from .simd import X_RECORD
    from .step import PHASES, decoder_step
    from .team import sync_words
    from .temporal_gemm import GemmStats, TemporalGemm, measure_rates
    from .temporal_linear import TemporalLinear
    from .temporal_operands import Fetch, open_safetensors
    from .temporal_plan import GemmPlan, MachineRates, TemporalGemmConfig, WorkspaceTooSmall
    from .temporal_resume import ResumeError

_HOME = {
    "AieModel": "aie_model",
    "AieReport": "aie_model",
    "DOWN": "shape",
    "EMBEDS": "shape",
    "FORMATS": "packing",
    "Fetch": "temporal_operands",
    "GATE_UP": "shape",
    "GROUP": "packing",
    "GemmPlan": "temporal_plan",
    "GemmStats": "temporal_gemm",
    "MAX_ITEM_ROWS": "attention",
    "MachineRates": "temporal_plan",
    "N_LAYERS": "shape",
    "OUT": "shape",
    "PAD": "packing",
    "PHASES": "step",
    "PackedMatrix": "packing",
    "QKV": "shape",
    "ResumeError": "temporal_resume",
    "StreamShape": "aie_streams",
    "TemporalGemm": "temporal_gemm",
    "TemporalGemmConfig": "temporal_plan",
    "TemporalLinear": "temporal_linear",
    "WorkspaceTooSmall": "temporal_plan",
    "X_RECORD": "simd",
    "attention_entries": "attention",
    "board_timings": "aie_model",
    "decoder_step": "step",
    "flash_lora_attention": "flash_lora",
    "measure_rates": "temporal_gemm",
    "open_safetensors": "temporal_operands",
    "pack_dense": "packing",
    "pack_int4": "packing",
    "pack_int8": "packing",
    "quantize_int4": "packing",
    "quantize_int8": "packing",
    "scratch_floats": "attention",
    "simulate_streams": "aie_streams",
    "sync_words": "team",
    "unpack": "packing",
}
__all__ = sorted([*_HOME, "available"])  # pyright: ignore[reportUnsupportedDunderAll]


def available() -> bool:
    """True where the bfloat16 and quantised kernels can run (AVX512-VNNI)."""
    from .simd import available as simd_available

    return simd_available()


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f".{_HOME[name]}", __name__), name)
