"""Weights in the order in which the tiles of :mod:`sharewell.kernels.simd` read them.

Features come in panels of 64 (four vectors of 16 lanes) that follow each other as one stream, which the
hardware prefetches; the number of features is padded with zeros to whole panels. Groups are 32 columns, as
in GGUF's Q4_1 and Q8_0.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    import torch

Format = Literal["float32", "bfloat16", "int8", "int4"]
FORMATS: dict[str, int] = {"float32": 0, "bfloat16": 1, "int8": 2, "int4": 3}
GROUP = 32
PAD = 64


@dataclass(frozen=True)
class PackedMatrix:
    """A matrix ``[n, k]`` packed for the tiles; ``data`` is one contiguous stream of panels of 64
    features.
    """

    format: Format
    n: int
    k: int
    data: torch.Tensor

    @property
    def n_padded(self) -> int:
        return -(-self.n // PAD) * PAD

    @property
    def nbytes(self) -> int:
        return self.data.numel() * self.data.element_size()

    def row(self) -> list[int]:
        """What the compiled step reads: format, data, n_padded, k, address of the format's product."""
        from .gemm import product_entry

        return [
            FORMATS[self.format], self.data.data_ptr(), self.n_padded, self.k, product_entry(self.format),
        ]  # fmt: skip

    def rows(self, ids: torch.Tensor) -> torch.Tensor:
        """Rows ``ids`` (int64 ``[T]``) of the matrix, float32 ``[T, k]``: an embedding read from packed
        weights.
        """
        import torch

        panel, block, lane = ids // PAD, ids % PAD // 16, ids % 16
        if self.format in ("float32", "bfloat16"):
            return self.data[panel, :, block, lane].reshape(len(ids), self.k).float()
        q, d, m = self._parts()
        scale = d[panel, :, block, lane].float().repeat_interleave(GROUP, 1)
        octets = q[panel, :, :, block, lane]
        if self.format == "int8":
            return (octets.reshape(len(ids), self.k).int() - 128).float() * scale
        octets = torch.stack([octets & 15, octets >> 4], 2)
        minimum = m[panel, :, block, lane].float().repeat_interleave(GROUP, 1)
        return octets.reshape(len(ids), self.k).float() * scale + minimum

    def _parts(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Views of a quantised stream: q ``[panels, groups, 4 or 8, 4, 16, 4]`` uint8; d and m (int4) float16
        ``[panels, groups, 4, 16]``."""
        import torch

        panels, groups = self.n_padded // PAD, self.k // GROUP
        end = 2048 if self.format == "int8" else 1024
        q = self.data[:, :, :end].view(panels, groups, -1, 4, 16, 4)
        d = self.data[:, :, end : end + 128].view(torch.float16).view(panels, groups, 4, 16)
        m = (
            d
            if self.format == "int8"
            else self.data[:, :, 1152:].view(torch.float16).view(panels, groups, 4, 16)
        )
        return q, d, m


def _pad_rows(matrix: torch.Tensor) -> torch.Tensor:
    import torch

    short = -matrix.shape[0] % PAD
    return torch.nn.functional.pad(matrix, (0, 0, 0, short)) if short else matrix


def _group_bytes(values: torch.Tensor) -> torch.Tensor:
    """``[n, groups]`` as the bytes of float16 ``[n / 64, groups, 64]``."""
    import torch

    panels = _pad_rows(values.to(torch.float16)).view(-1, PAD, values.shape[1]).transpose(1, 2).contiguous()
    return panels.view(torch.uint8)


def pack_dense(weight: torch.Tensor, format: Literal["float32", "bfloat16"]) -> PackedMatrix:
    """Pack ``[n, k]`` as panels ``[k, 4, 16]`` float32 or ``[k / 2, 4, 16, 2]`` bfloat16 (k even)."""
    import torch

    n, k = weight.shape
    if format == "float32":
        return PackedMatrix(
            format, n, k, _pad_rows(weight.float()).view(-1, 4, 16, k).permute(0, 3, 1, 2).contiguous()
        )
    if k % 2:
        raise ValueError(f"k must be even for bfloat16 tiles, got {k}")
    pairs = _pad_rows(weight.to(torch.bfloat16)).view(-1, 4, 16, k // 2, 2)
    return PackedMatrix(format, n, k, pairs.permute(0, 3, 1, 2, 4).contiguous())


def pack_int8(q: torch.Tensor, d: torch.Tensor) -> PackedMatrix:
    """Pack int8 ``q [n, k]`` with scales ``d [n, k / 32]`` (value = d q, d rounded to float16)."""
    import torch

    n, k = q.shape
    _check_groups(k)
    unsigned = _pad_rows((q.to(torch.int16) + 128).to(torch.uint8))
    octets = unsigned.view(-1, 4, 16, k // GROUP, 8, 4).permute(0, 3, 4, 1, 2, 5)
    records = octets.reshape(-1, k // GROUP, 2048)
    return PackedMatrix("int8", n, k, torch.cat([records, _group_bytes(d)], -1).contiguous())


def pack_int4(q: torch.Tensor, d: torch.Tensor, m: torch.Tensor) -> PackedMatrix:
    """Pack ``q [n, k]`` in 0..15 with scales and offsets ``[n, k / 32]`` (value = d q + m, both rounded to
    float16).
    """
    import torch

    n, k = q.shape
    _check_groups(k)
    halves = _pad_rows(q.to(torch.uint8)).view(-1, 4, 16, k // GROUP, 2, 4, 4)
    octets = (halves[..., 0, :, :] | (halves[..., 1, :, :] << 4)).permute(0, 3, 4, 1, 2, 5)
    records = octets.reshape(-1, k // GROUP, 1024)
    return PackedMatrix("int4", n, k, torch.cat([records, _group_bytes(d), _group_bytes(m)], -1).contiguous())


def quantize_int8(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Symmetric int8 in groups of 32 columns (Q8_0): ``(q [n, k] int8, d [n, k / 32] float16)``, to
    nearest.
    """
    import torch

    n, k = weight.shape
    _check_groups(k)
    groups = weight.float().view(n, k // GROUP, GROUP)
    d = (groups.abs().amax(-1) / 127).to(torch.float16)
    q = (groups / d.float().clamp(min=1e-30)[..., None]).round().clamp(-127, 127)
    return q.view(n, k).char(), d


def quantize_int4(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Asymmetric 4 bits in groups of 32 columns (Q4_1): ``(q [n, k] uint8 0..15, d, m [n, k / 32]
    float16)``.
    """
    import torch

    n, k = weight.shape
    _check_groups(k)
    groups = weight.float().view(n, k // GROUP, GROUP)
    m = groups.amin(-1).to(torch.float16)
    d = ((groups.amax(-1) - m.float()) / 15).to(torch.float16)
    q = ((groups - m.float()[..., None]) / d.float().clamp(min=1e-30)[..., None]).round().clamp(0, 15)
    return q.view(n, k).byte(), d, m


def _check_groups(k: int) -> None:
    if k % GROUP:
        raise ValueError(f"k must be a multiple of {GROUP} for group-quantised weights, got {k}")


def unpack(matrix: PackedMatrix) -> torch.Tensor:
    """The float32 matrix ``[n, k]`` that ``matrix`` stands for: the plain twin for tests and fallbacks."""
    import torch

    return matrix.rows(torch.arange(matrix.n))
