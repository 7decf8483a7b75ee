"""Where the keys and values of running sequences live while plans compute them: the space of a pass.

A place is a sequence's position. :class:`DenseKV` keeps growing buffers for whoever runs a model by hand; the
server's pages (:mod:`sharewell.kv.paged`) are the other space."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import torch

from .plans import PlanError

if TYPE_CHECKING:
    from ..models import ModelConfig
    from .plans import Call

_GROWTH = 256  # places that a full buffer grows by at least


@dataclass(frozen=True)
class Rows:
    """Some tokens of a call as a space addresses them. ``block`` is (sequences, first place, end) when they
    are the same unbroken places of the sequences 0, 1, ...: then a slice does."""

    sequences: torch.Tensor
    places: torch.Tensor
    block: tuple[int, int, int] | None = None

    def __len__(self) -> int:
        return len(self.places)


class KVSpace(Protocol):
    """Keys and values by (layer, sequence, place).

    ``incomplete``: layers at which some token may hold nothing; the engine keeps it."""

    incomplete: set[int]

    def begin(self, call: Call) -> None:
        """Make room for the places of ``call``."""
        ...

    def context(self, sequence: int) -> int:
        """Places of ``sequence``, those of the running call included."""
        ...

    def holes(self, sequence: int) -> torch.Tensor | None:
        """Bool ``[context]``, True where a token exists; None when one does everywhere."""
        ...

    def write(self, layer: int, rows: Rows, k: torch.Tensor, v: torch.Tensor) -> None:
        """Put ``k, v [n, kv_heads, head_dim]`` in place."""
        ...

    def write_low_rank(self, layer: int, rows: Rows, z: torch.Tensor) -> None:
        """Put ``z [n, rank]`` in place."""
        ...

    def take(self, layer: int, rows: Rows) -> tuple[torch.Tensor, torch.Tensor]:
        """Copies ``[n, kv_heads, head_dim]`` of keys and values."""
        ...

    def keys_values(
        self, layer: int, first: int, count: int, context: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Views ``[count, kv_heads, context, head_dim]`` of the sequences ``first ...``."""
        ...

    def low_rank(self, layer: int, first: int, count: int, context: int) -> torch.Tensor:
        """View ``[count, context, rank]``."""
        ...

    def missing(self, layer: int, sequence: int) -> int | None:
        """The first place that exists but holds nothing at ``layer``; None when there is none."""
        ...

    def lacks(self, layer: int) -> bool:
        """True when a token of any sequence holds nothing at ``layer``."""
        ...

    def mark(self, layers: list[int], rows: Rows) -> None:
        """``rows`` now hold something at ``layers``."""
        ...

    @property
    def nbytes(self) -> int:
        """Bytes held for tokens that exist."""
        ...


class DenseKV:
    """Growing buffers of ``n_sequences`` sequences; layers that nobody writes hold nothing.

    After an error in the middle of a pass its places hold nothing reliable: :meth:`forget` them."""

    def __init__(
        self,
        config: ModelConfig,
        n_sequences: int = 1,
        *,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
        capacity: int = 0,
    ) -> None:
        if n_sequences < 1 or capacity < 0:
            raise ValueError(
                f"n_sequences must be at least 1 and capacity at least 0, got {n_sequences} and {capacity}"
            )
        self.config, self.n_sequences, self.dtype = config, n_sequences, dtype
        self.device = torch.device(device)
        self.capacity = 0
        self._kv: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}
        self._z: dict[int, torch.Tensor] = {}
        self._exists = torch.zeros(n_sequences, 0, dtype=torch.bool)
        self._written = torch.zeros(config.n_layers, n_sequences, 0, dtype=torch.bool)
        self.lengths = [0] * n_sequences
        self._broken = [False] * n_sequences
        self.incomplete: set[int] = set()
        self._grow(capacity)

    def _grow(self, needed: int) -> None:
        if needed <= self.capacity:
            return
        more = max(needed, self.capacity + max(_GROWTH, self.capacity // 2) if self.capacity else needed)
        extra = more - self.capacity

        def wider(old: torch.Tensor, dim: int) -> torch.Tensor:
            shape = list(old.shape)
            shape[dim] = extra
            return torch.cat([old, old.new_zeros(shape)], dim)

        self._kv = {layer: (wider(k, 2), wider(v, 2)) for layer, (k, v) in self._kv.items()}
        self._z = {layer: wider(z, 1) for layer, z in self._z.items()}
        self._exists, self._written = wider(self._exists, 1), wider(self._written, 2)
        self.capacity = more

    def begin(self, call: Call) -> None:
        sequences, places = call.sequences.cpu(), call.positions.cpu()
        top, low = int(sequences.max()), int(places.min())
        self._check(top)
        if low < 0:
            raise PlanError(f"positions must be at least 0, got {low}")
        self._grow(int(places.max()) + 1)
        self._exists[sequences, places] = True
        for s in sequences.unique().tolist():
            mine = places[sequences == s]
            first, end, old = int(mine[0]), int(mine[-1]) + 1, self.lengths[s]
            self.lengths[s] = max(old, end)
            if first > old or len(mine) != end - first or self._broken[s]:
                self._broken[s] = not bool(self._exists[s, : self.lengths[s]].all())

    def context(self, sequence: int) -> int:
        self._check(sequence)
        return self.lengths[sequence]

    def _check(self, sequence: int) -> None:
        if sequence >= self.n_sequences:
            raise PlanError(
                f"the space holds {self.n_sequences} sequences, the call names sequence {sequence}"
            )

    def holes(self, sequence: int) -> torch.Tensor | None:
        if not self._broken[sequence]:
            return None
        return self._exists[sequence, : self.lengths[sequence]].to(self.device)

    def _layer(self, layer: int) -> tuple[torch.Tensor, torch.Tensor]:
        if layer not in self._kv:
            c = self.config
            shape = self.n_sequences, c.n_kv_heads, self.capacity, c.head_dim
            self._kv[layer] = (
                torch.zeros(shape, dtype=self.dtype, device=self.device),
                torch.zeros(shape, dtype=self.dtype, device=self.device),
            )
        return self._kv[layer]

    def write(self, layer: int, rows: Rows, k: torch.Tensor, v: torch.Tensor) -> None:
        keys, values = self._layer(layer)
        if rows.block is not None:
            n, first, end = rows.block
            shape = n, end - first, *k.shape[1:]
            keys[:n, :, first:end] = k.view(shape).transpose(1, 2)
            values[:n, :, first:end] = v.reshape(shape).transpose(1, 2)
        else:
            keys[rows.sequences, :, rows.places] = k
            values[rows.sequences, :, rows.places] = v

    def write_low_rank(self, layer: int, rows: Rows, z: torch.Tensor) -> None:
        if layer not in self._z:
            shape = self.n_sequences, self.capacity, z.shape[-1]
            self._z[layer] = torch.zeros(shape, dtype=z.dtype, device=z.device)
        self._z[layer][rows.sequences, rows.places] = z

    def take(self, layer: int, rows: Rows) -> tuple[torch.Tensor, torch.Tensor]:
        keys, values = self._layer(layer)
        return keys[rows.sequences, :, rows.places], values[rows.sequences, :, rows.places]

    def keys_values(
        self, layer: int, first: int, count: int, context: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        if layer not in self._kv:
            raise PlanError(
                f"layer {layer} holds no keys and values: no token was ever computed or read there"
            )
        keys, values = self._kv[layer]
        part = slice(first, first + count)
        return keys[part, :, :context], values[part, :, :context]

    def low_rank(self, layer: int, first: int, count: int, context: int) -> torch.Tensor:
        return self._z[layer][first : first + count, :context]

    def missing(self, layer: int, sequence: int) -> int | None:
        end = self.lengths[sequence]
        bad = self._exists[sequence, :end] & ~self._written[layer, sequence, :end]
        return int(bad.to(torch.uint8).argmax()) if bool(bad.any()) else None

    def lacks(self, layer: int) -> bool:
        return bool((self._exists & ~self._written[layer]).any())

    def mark(self, layers: list[int], rows: Rows) -> None:
        if rows.block is not None:
            n, first, end = rows.block
            self._written[layers, :n, first:end] = True
        else:
            sequences, places = rows.sequences.cpu(), rows.places.cpu()
            for layer in layers:
                self._written[layer, sequences, places] = True

    def forget(self, sequence: int, first: int = 0, end: int | None = None) -> None:
        """The places ``first ... end - 1`` (default: to the end) of ``sequence`` exist no longer."""
        length = self.lengths[sequence]
        end = length if end is None else min(end, length)
        self._exists[sequence, first:end] = False
        self._written[:, sequence, first:end] = False
        left = self._exists[sequence, :length].nonzero().flatten()
        self.lengths[sequence] = int(left[-1]) + 1 if len(left) else 0
        self._broken[sequence] = len(left) != self.lengths[sequence]

    @property
    def nbytes(self) -> int:
        tokens = int(self._exists.sum())
        size = self.dtype.itemsize
        held = len(self._kv) * 2 * self.config.kv_width * size
        held += sum(z.shape[-1] * z.element_size() for z in self._z.values())
        return tokens * held
