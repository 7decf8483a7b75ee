"""Weights in the order in which the tiles of :mod:`sharewell.kernels.simd` read them.

Features come in panels of 64 (four vectors of 16 lanes) that follow each other as one stream, which the hardware
prefetches; the number of features is padded with zeros to whole panels. Groups are 32 columns, as in GGUF's Q4_1 and Q8_0.
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
    """A matrix ``[n, k]`` packed for the tiles; ``data`` is one contiguous stream of panels of 64 features."""

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
        """Address and sizes as the compiled step reads them: format, data, n_padded, k."""
        return [FORMATS[self.format], self.data.data_ptr(), self.n_padded, self.k]

    def rows(self, ids: torch.Tensor) -> torch.Tensor:
        """Rows ``ids`` (int64 ``[T]``) of the matrix, float32 ``[T, k]``: an embedding read from packed weights."""
        import torch

        panel, block, lane = ids // PAD, ids % PAD // 16, ids % 16
        if self.format in ("float32", "bfloat16"):
            return self.data[panel, :, block, lane].reshape(len(ids), self.k).float()
        q, d, m = self._parts()
        scale = d[panel, :, block, lane].float().repeat_interleave(GROUP, 1)
        if self.format == "int8":
            return q[panel, :, :, block, lane].reshape(len(ids), self.k).float() * scale
        word = q[panel, :, :, block, lane].reshape(len(ids), self.k // 8)
        octets = torch.stack([(word >> (4 * (j // 2) + 16 * (j % 2))) & 15 for j in range(8)], -1)
        return octets.reshape(len(ids), self.k).float() * scale + m[panel, :, block, lane].float().repeat_interleave(GROUP, 1)

    def _parts(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Views of a quantised stream: q, d ``[panels, groups, 4, 16]`` float16 and m (int4) likewise."""
        import torch

        panels, groups = self.n_padded // PAD, self.k // GROUP
        if self.format == "int8":
            q = self.data[:, :, :2048].view(torch.int8).view(panels, groups, 16, 4, 16, 2)
            d = self.data[:, :, 2048:].view(torch.float16).view(panels, groups, 4, 16)
            return q, d, d
        q = self.data[:, :, :1024].view(torch.int32).view(panels, groups, 4, 4, 16)
        d = self.data[:, :, 1024:1152].view(torch.float16).view(panels, groups, 4, 16)
        return q, d, self.data[:, :, 1152:].view(torch.float16).view(panels, groups, 4, 16)


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
        return PackedMatrix(format, n, k, _pad_rows(weight.float()).view(-1, 4, 16, k).permute(0, 3, 1, 2).contiguous())
    if k % 2:
        raise ValueError(f"k must be even for bfloat16 tiles, got {k}")
    pairs = _pad_rows(weight.to(torch.bfloat16)).view(-1, 4, 16, k // 2, 2)
    return PackedMatrix(format, n, k, pairs.permute(0, 3, 1, 2, 4).contiguous())


def pack_int8(q: torch.Tensor, d: torch.Tensor) -> PackedMatrix:
    """Pack int8 ``q [n, k]`` with scales ``d [n, k / 32]`` (value = d q, d rounded to float16)."""
    import torch

    n, k = q.shape
    _check_groups(k)
    pairs = _pad_rows(q.to(torch.int8)).view(-1, 4, 16, k // GROUP, 16, 2).permute(0, 3, 4, 1, 2, 5).contiguous()
    records = pairs.view(torch.uint8).view(-1, k // GROUP, 2048)
    return PackedMatrix("int8", n, k, torch.cat([records, _group_bytes(d)], -1).contiguous())


def pack_int4(q: torch.Tensor, d: torch.Tensor, m: torch.Tensor) -> PackedMatrix:
    """Pack ``q [n, k]`` in 0..15 with scales and offsets ``[n, k / 32]`` (value = d q + m, both rounded to float16)."""
    import torch

    n, k = q.shape
    _check_groups(k)
    pairs = _pad_rows(q.to(torch.int32)).view(-1, 4, 16, k // 8, 4, 2).permute(0, 3, 1, 2, 4, 5)
    word = torch.zeros(pairs.shape[:4], dtype=torch.int32)
    for p in range(4):
        word |= (pairs[..., p, 0] << (4 * p)) | (pairs[..., p, 1] << (16 + 4 * p))
    records = word.contiguous().view(torch.uint8).view(-1, k // GROUP, 1024)
    return PackedMatrix("int4", n, k, torch.cat([records, _group_bytes(d), _group_bytes(m)], -1).contiguous())


def quantize_int8(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Symmetric int8 in groups of 32 columns (Q8_0): ``(q [n, k] int8, d [n, k / 32] float16)``, to nearest."""
    import torch

    n, k = weight.shape
    _check_groups(k)
    groups = weight.float().view(n, k // GROUP, GROUP)
    d = (groups.abs().amax(-1) / 127).to(torch.float16)
    q = (groups / d.float().clamp(min=1e-30)[..., None]).round().clamp(-127, 127)
    return q.view(n, k).char(), d


def quantize_int4(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Asymmetric 4 bits in groups of 32 columns (Q4_1): ``(q [n, k] uint8 0..15, d, m [n, k / 32] float16)``."""
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
