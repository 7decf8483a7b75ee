"""One forward pass of packed, ragged tokens over paged keys and values.

A fused decoder on tiled pages runs the whole pass as one compiled function. Any other decoder runs layer by layer
here, in torch, on token-major pages: CPU without the needed instructions, CUDA, and the oracle.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch
import torch.nn.functional as F

from ..models import FusedDecoder, TiledPool
from .pool import PageLayout, PagePool

if TYPE_CHECKING:
    from ..models import Decoder

_NAMES = {torch.float32: "float32", torch.bfloat16: "bfloat16", torch.float16: "float16"}


class PagedForward:
    """A decoder with the pages of its keys and values (plane "k" and "v" for every layer)."""

    def __init__(self, decoder: Decoder | FusedDecoder, num_blocks: int, block_size: int) -> None:
        config = decoder.config
        self.decoder, self.block_size = decoder, block_size
        planes = dict.fromkeys(("k", "v"), (config.kv_width, _NAMES[decoder.dtype]))
        self.pool = PagePool(PageLayout(config.n_layers, block_size, planes), num_blocks, decoder.device)
        self._tiled = None
        if isinstance(decoder, FusedDecoder):
            layout = self.pool.layout
            data = self.pool.data.numpy()
            self._tiled = TiledPool(data, block_size, layout.block_bytes, layout.layer_bytes, layout.offset("v"))

    def __call__(
        self,
        token_ids: np.ndarray,
        positions: np.ndarray,
        slots: np.ndarray,
        query_starts: np.ndarray,
        context_lens: np.ndarray,
        block_tables: np.ndarray,
        logit_rows: np.ndarray,
        adapter_slots: np.ndarray | None = None,
    ) -> torch.Tensor:
        """Float32 logits ``[R, vocab]`` of ``logit_rows``. Shapes: ids, positions, slots int64 ``[T]``; query_starts int32
        ``[S + 1]``; context_lens int32 ``[S]``; block_tables int32 ``[S, blocks]``; adapter_slots int32 ``[S]``, -1 for none."""
        if isinstance(self.decoder, FusedDecoder):
            assert self._tiled is not None
            return self.decoder.step(
                token_ids, positions, slots, query_starts, block_tables, logit_rows, self._tiled, adapter_slots
            )
        return self._layerwise(token_ids, positions, slots, query_starts, context_lens, block_tables, logit_rows, adapter_slots)

    @torch.inference_mode()
    def _layerwise(
        self,
        token_ids: np.ndarray,
        positions: np.ndarray,
        slots: np.ndarray,
        query_starts: np.ndarray,
        context_lens: np.ndarray,
        block_tables: np.ndarray,
        logit_rows: np.ndarray,
        adapter_slots: np.ndarray | None,
    ) -> torch.Tensor:
        decoder = self.decoder
        assert not isinstance(decoder, FusedDecoder)
        config, device, size = decoder.config, decoder.device, self.block_size
        where = torch.from_numpy(positions).to(device)
        block, offset = (torch.from_numpy(x).to(device) for x in np.divmod(slots, size))
        lora = None
        if adapter_slots is not None and len(adapter_slots) and int(adapter_slots.max()) >= 0:
            lora = torch.from_numpy(np.repeat(adapter_slots, np.diff(query_starts))).to(device)
        spans = []
        for s, (first, end) in enumerate(zip(query_starts[:-1].tolist(), query_starts[1:].tolist(), strict=True)):
            context = int(context_lens[s])
            table = torch.from_numpy(block_tables[s, : -(-context // size)].astype(np.int64)).to(device)
            keys = torch.arange(context, device=device)
            mask = keys[None] <= where[first:end, None]
            if config.sliding_window:
                mask &= keys[None] > where[first:end, None] - config.sliding_window
            spans.append((first, end, context, table, mask))
        h = decoder.embed(torch.from_numpy(token_ids))
        for layer in range(config.n_layers):
            q, k, v = decoder.qkv(layer, h, where, lora)
            planes = self.pool.plane("k", layer), self.pool.plane("v", layer)
            planes[0][block, offset] = k.reshape(len(h), -1)
            planes[1][block, offset] = v.reshape(len(h), -1)
            out = torch.empty_like(q)
            for first, end, context, table, mask in spans:
                past = [p[table].reshape(-1, config.n_kv_heads, config.head_dim)[:context] for p in planes]
                out[first:end] = _attend(q[first:end], past[0], past[1], mask)
            h = decoder.attn_out(layer, h, out, lora)
            h = decoder.mlp(layer, h, lora)
        return decoder.head(h[torch.from_numpy(logit_rows).to(device)]).cpu()

    def copy_block(self, source: int, destination: int) -> None:
        """Copy a page (copy on write)."""
        self.pool.copy_block(source, destination)


def _attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Grouped attention of ``q [T, heads, d]`` over ``k, v [context, kv heads, d]``; a group's heads become rows."""
    tokens, heads, dim = q.shape
    kv_heads = k.shape[1]
    rows = q.view(tokens, kv_heads, heads // kv_heads, dim).permute(1, 2, 0, 3).reshape(kv_heads, -1, dim)
    grouped = mask.repeat(heads // kv_heads, 1)[None]
    out = F.scaled_dot_product_attention(rows, k.transpose(0, 1), v.transpose(0, 1), attn_mask=grouped)
    return out.view(kv_heads, -1, tokens, dim).permute(2, 0, 1, 3).reshape(tokens, heads, dim)
