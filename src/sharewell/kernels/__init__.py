"""Compute kernels that need no compiler on the user's machine, each tested against a plain twin."""

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


def available() -> bool:
    """True where the bfloat16 and quantised kernels can run (AVX512-BF16)."""
    from .simd import available as simd_available

    return simd_available()


__all__ = [
    "FORMATS",
    "GROUP",
    "PAD",
    "PackedMatrix",
    "available",
    "pack_dense",
    "pack_int4",
    "pack_int8",
    "quantize_int4",
    "quantize_int8",
    "unpack",
]
