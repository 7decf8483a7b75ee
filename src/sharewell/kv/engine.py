"""One forward pass of packed, ragged tokens over paged keys and values.

A fused decoder on tiled pages runs the whole pass as one compiled function. Any other decoder runs layer by
layer here, in torch, on token-major pages: CPU without the needed instructions, CUDA, and the oracle."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
import torch.nn.functional as F

from ..models import FusedDecoder, TiledPool, WholeDecoder
from .layout import PageLayout
from .pool import PagePool

if TYPE_CHECKING:
    from ..models import Decoder

_NAMES = {torch.float32: "float32", torch.bfloat16: "bfloat16", torch.float16: "float16"}


@dataclass(frozen=True)
class _Tokens:
    """The packed tokens of a step; ``sequences`` says whose row of ``tables`` and ``adapters`` each one
    uses."""

    ids: np.ndarray
    positions: np.ndarray
    slots: np.ndarray
    sequences: np.ndarray
    tables: np.ndarray
    adapters: np.ndarray

    def only(self, t: int) -> _Tokens:
        part = slice(t, t + 1)
        s = int(self.sequences[t])
        return _Tokens(
            self.ids[part],
            self.positions[part],
            self.slots[part],
            np.zeros(1, np.int64),
            self.tables[s : s + 1],
            self.adapters[s : s + 1],
        )


class PagedForward:
    """A decoder with the pages of its keys and values (plane "k" and "v" for every layer).

    ``one_by_one`` passes each token through a layerwise decoder by itself, so that its result does not depend
    on which others happen to be in the step; the fused decoder's never does."""

    def __init__(
        self,
        decoder: Decoder | WholeDecoder | FusedDecoder,
        num_blocks: int,
        block_size: int,
        one_by_one: bool = False,
    ) -> None:
        config = decoder.config
        self.decoder, self.block_size, self._one_by_one = decoder, block_size, one_by_one
        plane = config.kv_width, _NAMES[decoder.dtype]
        planes: dict[str, tuple[int, str]] = {"k": plane, "v": plane}
        self.pool = PagePool(PageLayout(config.n_layers, block_size, planes), num_blocks, decoder.device)
        self._tiled = None
        if isinstance(decoder, FusedDecoder):
            layout = self.pool.layout
            data = self.pool.data.numpy()
            self._tiled = TiledPool(
                data, block_size, layout.block_bytes, layout.layer_bytes, layout.offset("v")
            )

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
        """Float32 logits ``[R, vocab]`` of ``logit_rows``. Shapes: ids, positions, slots int64 ``[T]``;
        query_starts int32 ``[S + 1]``; context_lens int32 ``[S]``; block_tables int32 ``[S, blocks]``;
        adapter_slots int32 ``[S]``, -1 for none."""
        if isinstance(self.decoder, FusedDecoder):
            assert self._tiled is not None
            return self.decoder.step(
                token_ids,
                positions,
                slots,
                query_starts,
                block_tables,
                logit_rows,
                self._tiled,
                adapter_slots,
            )
        if adapter_slots is None:
            adapter_slots = np.full(len(context_lens), -1, np.int32)
        counts = np.diff(query_starts)
        tokens = _Tokens(
            token_ids,
            positions,
            slots,
            np.repeat(np.arange(len(counts)), counts),
            block_tables,
            adapter_slots,
        )
        with torch.inference_mode():
            if not self._one_by_one:
                return self._layerwise(tokens, logit_rows)
            wanted = set(logit_rows.tolist())
            rows = []
            for t in range(len(token_ids)):
                logits = self._layerwise(tokens.only(t), np.arange(int(t in wanted)))
                if t in wanted:
                    rows.append(logits)
            return torch.cat(rows) if rows else torch.zeros(0, self.decoder.config.vocab_size)

    def _layerwise(self, tokens: _Tokens, logit_rows: np.ndarray) -> torch.Tensor:
        decoder = self.decoder
        assert not isinstance(decoder, FusedDecoder)
        config, device, size = decoder.config, decoder.device, self.block_size
        where = torch.from_numpy(tokens.positions).to(device)
        block, offset = (torch.from_numpy(x).to(device) for x in np.divmod(tokens.slots, size))
        lora = None
        if tokens.adapters.size and int(tokens.adapters.max()) >= 0:
            lora = torch.from_numpy(tokens.adapters[tokens.sequences]).to(device)
        spans = []
        for s in np.unique(tokens.sequences).tolist():
            first, end = np.searchsorted(tokens.sequences, [s, s + 1]).tolist()
            context = int(tokens.positions[end - 1]) + 1
            table = torch.from_numpy(tokens.tables[s, : -(-context // size)].astype(np.int64)).to(device)
            keys = torch.arange(context, device=device)
            mask = keys[None] <= where[first:end, None]
            if config.sliding_window:
                mask &= keys[None] > where[first:end, None] - config.sliding_window
            spans.append((first, end, context, table, mask))

        def attend(
            layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float | None = None
        ) -> torch.Tensor:
            planes = self.pool.plane("k", layer), self.pool.plane("v", layer)
            planes[0][block, offset] = k.reshape(len(q), -1)
            planes[1][block, offset] = v.reshape(len(q), -1)
            out = torch.empty_like(q)
            for first, end, context, table, mask in spans:
                past = [p[table].reshape(-1, config.n_kv_heads, config.head_dim)[:context] for p in planes]
                out[first:end] = _attend(q[first:end], past[0], past[1], mask, scale)
            return out

        ids, rows = torch.from_numpy(tokens.ids), torch.from_numpy(logit_rows).to(device)
        if isinstance(decoder, WholeDecoder):
            return decoder.run(ids, where, attend, rows).cpu()
        h = decoder.embed(ids)
        for layer in range(config.n_layers):
            q, k, v = decoder.qkv(layer, h, where, lora)
            h = decoder.attn_out(layer, h, attend(layer, q, k, v), lora)
            h = decoder.mlp(layer, h, lora)
        return decoder.head(h[rows]).cpu()

    def copy_block(self, source: int, destination: int) -> None:
        """Copy a page (copy on write)."""
        self.pool.copy_block(source, destination)


def _attend(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor, scale: float | None = None
) -> torch.Tensor:
    """Grouped attention of ``q [T, heads, d]`` over ``k, v [context, kv heads, d]``; a group's heads become
    rows."""
    tokens, heads, dim = q.shape
    kv_heads = k.shape[1]
    rows = q.view(tokens, kv_heads, heads // kv_heads, dim).permute(1, 2, 0, 3).reshape(kv_heads, -1, dim)
    grouped = mask.repeat(heads // kv_heads, 1)[None]
    out = F.scaled_dot_product_attention(
        rows, k.transpose(0, 1), v.transpose(0, 1), attn_mask=grouped, scale=scale
    )
    return out.view(kv_heads, -1, tokens, dim).permute(2, 0, 1, 3).reshape(tokens, heads, dim)
