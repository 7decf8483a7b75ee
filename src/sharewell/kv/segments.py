"""A segment: the keys and values of some tokens, kept so that other texts may use them."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import torch

if TYPE_CHECKING:
    from .paged import PagedKV
    from .spaces import DenseKV


class SegmentKV(Protocol):
    """The memory of a segment of n tokens: tensors of its own, or pinned pages."""

    n_layers: int
    n_tokens: int
    nbytes: int

    def read(self, layer: int, tokens: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values ``[len(tokens), kv_heads, head_dim]``; not to be written to."""
        ...

    def release(self) -> None:
        """The memory is needed no longer."""
        ...


class TensorKV:
    """Keys and values in tensors ``[layers, tokens, kv_heads, head_dim]``. Raises ValueError when they differ
    in shape or hold NaN or infinite values."""

    def __init__(self, k: torch.Tensor, v: torch.Tensor) -> None:
        if k.ndim != 4 or k.shape != v.shape:
            raise ValueError(
                "k and v must both be [layers, tokens, kv_heads, head_dim], "
                f"got {tuple(k.shape)} and {tuple(v.shape)}"
            )
        for name, x in (("k", k), ("v", v)):
            finite = torch.isfinite(x).flatten(1).all(1)
            if not bool(finite.all()):
                layer = int((~finite).nonzero()[0])
                raise ValueError(f"{name} must be finite, layer {layer} holds NaN or infinite values")
        self.k, self.v = k, v
        self.n_layers, self.n_tokens = k.shape[:2]
        self.nbytes = k.nbytes + v.nbytes

    def read(self, layer: int, tokens: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        at = tokens.to(self.k.device)
        return self.k[layer][at], self.v[layer][at]

    def release(self) -> None:
        """Nothing to give back: the tensors go with this object."""

    @classmethod
    def copied(
        cls,
        space: DenseKV | PagedKV,
        sequence: int,
        places: torch.Tensor,
        device: torch.device | str = "cpu",
    ) -> TensorKV:
        """A copy of ``places`` of a sequence's keys and values in every layer."""
        from .spaces import Rows

        rows = Rows(torch.full_like(places, sequence), places)
        pairs = [space.take(layer, rows) for layer in range(space.config.n_layers)]
        return cls(
            torch.stack([k.to(device) for k, _ in pairs]), torch.stack([v.to(device) for _, v in pairs])
        )


class PinnedPages:
    """A segment in pages that stay where they are: ``pages`` reads them, ``unpin`` gives them back.

    ``places``: int64 ``[n]``, where in the pages' sequence the segment's tokens are. ``nbytes`` counts the
    pinned blocks."""

    def __init__(self, pages: PagedKV, places: torch.Tensor, unpin: Callable[[], None]) -> None:
        self._pages, self._places, self._unpin = pages, places, unpin
        self.n_layers, self.n_tokens = pages.config.n_layers, len(places)
        blocks = int((places // pages.size).unique().numel())
        self.nbytes = blocks * pages.pool.layout.block_bytes

    def read(self, layer: int, tokens: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        from .spaces import Rows

        places = self._places[tokens]
        order = places.argsort()
        k, v = self._pages.take(layer, Rows(torch.zeros_like(places), places[order]))
        back = order.argsort()
        return k[back], v[back]

    def release(self) -> None:
        self._unpin()


@dataclass(frozen=True)
class Segment:
    """Tokens with their keys and values in one model, as somebody computed them.

    ``token_ids`` and ``positions`` (where the keys are rotated to): int64 ``[n]``. ``hidden``: layer ->
    ``[n, hidden]``, the states before that layer. ``influence``: float32 ``[n]``, the attention that later
    tokens gave each one. ``scope`` keeps users apart; ``writer`` says who computed it."""

    id: int
    model_key: str
    token_ids: torch.Tensor
    positions: torch.Tensor
    kv: SegmentKV = field(repr=False)
    hidden: Mapping[int, torch.Tensor] = field(default_factory=dict, repr=False)
    influence: torch.Tensor | None = field(default=None, repr=False)
    scope: str = ""
    writer: str = ""

    def __post_init__(self) -> None:
        n = len(self.token_ids)
        if not n:
            raise ValueError("token_ids must hold at least one token, got none")
        named = {"positions": self.positions, "influence": self.influence}
        named |= {f"hidden[{layer}]": h for layer, h in self.hidden.items()}
        for name, x in named.items():
            if x is not None and len(x) != n:
                raise ValueError(f"{name} must have one entry for each of the {n} tokens, got {len(x)}")
            if x is not None and x.is_floating_point() and not bool(torch.isfinite(x).all()):
                raise ValueError(f"{name} must be finite, it holds NaN or infinite values")
        if self.kv.n_tokens != n:
            raise ValueError(f"kv must hold the {n} tokens, got {self.kv.n_tokens}")

    def __len__(self) -> int:
        return len(self.token_ids)

    def read(self, layer: int, tokens: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values ``[len(tokens), kv_heads, head_dim]`` (:class:`~sharewell.kv.SegmentSource`)."""
        return self.kv.read(layer, tokens)

    @property
    def nbytes(self) -> int:
        """Bytes of keys, values, hidden states, influence and ids."""
        more = sum(h.nbytes for h in self.hidden.values())
        more += self.influence.nbytes if self.influence is not None else 0
        return self.kv.nbytes + more + self.token_ids.nbytes + self.positions.nbytes

    @property
    def token_layers(self) -> int:
        """(token, layer) pairs that a use of the whole segment saves."""
        return len(self) * self.kv.n_layers


def model_key(model: Any, *, adapter: str = "", quantisation: str = "") -> str:
    """A hash of everything that keys and values depend on besides the text: configuration (RoPE included),
    dtype, weights (every parameter's shape and 64 of its values), adapter and quantisation.

    ``model``: a transformers model or a decoder. Equal keys mean that segments may be exchanged."""
    inner = getattr(model, "model", model)
    config = getattr(model, "config", None)
    text = config.to_json_string() if hasattr(config, "to_json_string") else repr(config)  # pyright: ignore
    digest = hashlib.blake2b(digest_size=16)
    digest.update(repr((text, str(getattr(model, "dtype", "")), adapter, quantisation)).encode())
    revision = getattr(model, "revision", None)
    if revision is not None:
        digest.update(str(revision).encode())
    if isinstance(inner, torch.nn.Module):
        for name, p in sorted(inner.named_parameters()):
            digest.update(f"{name}{tuple(p.shape)}".encode())
            flat = p.detach().flatten()
            step = max(1, len(flat) // 64)
            digest.update(np.ascontiguousarray(flat[::step][:64].float().cpu().numpy()).tobytes())
    return digest.hexdigest()
