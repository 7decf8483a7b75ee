"""The server's pages as a space of the engine, and the pass over them.

A fused decoder on tiled pages runs a pass as one compiled function, or a layer at a time where a plan has a
say. Any other decoder runs layer by layer in torch on token-major pages: CPU without the needed instructions,
CUDA, and the oracle."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch

from ..models import Decoder, FusedDecoder, TiledPool, WholeDecoder
from .attention import received
from .engine import LayerPass
from .layout import PageLayout
from .plans import Call, KVPlan, OwnPlan, PlanStats, UnsupportedModel
from .pool import PagePool
from .rope import RopeSpec, rope_of
from .tiles import TiledPlanes

if TYPE_CHECKING:
    from ..models import ModelConfig
    from .spaces import Rows

_NAMES = {torch.float32: "float32", torch.bfloat16: "bfloat16", torch.float16: "float16"}


class PagedKV:
    """Pages of the sequences of one step as a :class:`~sharewell.kv.KVSpace`.

    ``tables`` int64 ``[S, blocks]``; ``contexts``: places of each sequence, the step's own included. What
    earlier steps wrote is taken to be there."""

    def __init__(
        self,
        pool: PagePool,
        config: ModelConfig,
        tables: torch.Tensor,
        contexts: list[int],
        tiles: TiledPlanes | None = None,
    ) -> None:
        self.pool, self.config, self.tables, self.contexts, self.tiles = pool, config, tables, contexts, tiles
        self.size = pool.layout.block_size
        self.incomplete: set[int] = set()
        self._call: Call | None = None
        self._written: dict[int, torch.Tensor] = {}

    def begin(self, call: Call) -> None:
        self._call = call

    def context(self, sequence: int) -> int:
        return self.contexts[sequence]

    def holes(self, sequence: int) -> torch.Tensor | None:
        return None

    def _slots(self, rows: Rows) -> tuple[torch.Tensor, torch.Tensor]:
        return self.tables[rows.sequences, rows.places // self.size], rows.places % self.size

    def write(self, layer: int, rows: Rows, k: torch.Tensor, v: torch.Tensor) -> None:
        if self.tiles is not None:
            for s, mine in _by_sequence(rows):
                self.tiles.write(layer, self.tables[s], rows.places[mine], k[mine], v[mine])
            return
        block, offset = self._slots(rows)
        self.pool.plane("k", layer)[block, offset] = k.reshape(len(rows), -1)
        self.pool.plane("v", layer)[block, offset] = v.reshape(len(rows), -1)

    def take(self, layer: int, rows: Rows) -> tuple[torch.Tensor, torch.Tensor]:
        if self.tiles is not None:
            parts = [self.tiles.read(layer, self.tables[s], rows.places[m]) for s, m in _by_sequence(rows)]
            return torch.cat([k for k, _ in parts]), torch.cat([v for _, v in parts])
        block, offset = self._slots(rows)
        shape = len(rows), self.config.n_kv_heads, self.config.head_dim
        k, v = (self.pool.plane(name, layer)[block, offset].view(shape) for name in ("k", "v"))
        return k, v

    def write_low_rank(self, layer: int, rows: Rows, z: torch.Tensor) -> None:
        planes = self.pool.layout.planes
        if self.tiles is not None or "z" not in planes or planes["z"][0] != z.shape[-1]:
            raise UnsupportedModel(
                f"layer {layer}: these pages have no plane z of width {z.shape[-1]} for low-rank values"
            )
        block, offset = self._slots(rows)
        self.pool.plane("z", layer)[block, offset] = z.to(self.pool.plane("z", layer).dtype)

    def low_rank(self, layer: int, first: int, count: int, context: int) -> torch.Tensor:
        table = self.tables[first : first + count, : -(-context // self.size)]
        return self.pool.plane("z", layer)[table].flatten(1, 2)[:, :context]

    def keys_values(
        self, layer: int, first: int, count: int, context: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        table = self.tables[first : first + count, : -(-context // self.size)]
        shape = count, -1, self.config.n_kv_heads, self.config.head_dim
        k, v = (
            self.pool.plane(name, layer)[table].reshape(shape)[:, :context].transpose(1, 2)
            for name in ("k", "v")
        )
        return k, v

    def missing(self, layer: int, sequence: int) -> int | None:
        call = self._call
        assert call is not None
        mine = call.sequences == sequence
        left = mine & ~self._marked(layer)
        return int(call.positions[left][0]) if bool(left.any()) else None

    def lacks(self, layer: int) -> bool:
        return not bool(self._marked(layer).all())

    def _marked(self, layer: int) -> torch.Tensor:
        assert self._call is not None
        if layer not in self._written:
            self._written[layer] = torch.zeros_like(self._call.positions, dtype=torch.bool)
        return self._written[layer]

    def mark(self, layers: list[int], rows: Rows) -> None:
        call = self._call
        assert call is not None
        if len(rows) == len(call):
            for layer in layers:
                self._marked(layer).fill_(True)
            return
        width = max(self.contexts)
        at = torch.searchsorted(call.sequences * width + call.positions, rows.sequences * width + rows.places)
        for layer in layers:
            self._marked(layer)[at] = True

    @property
    def nbytes(self) -> int:
        layout = self.pool.layout
        return layout.block_bytes * sum(-(-context // self.size) for context in self.contexts)


def _by_sequence(rows: Rows) -> list[tuple[int, torch.Tensor]]:
    return [(s, (rows.sequences == s).nonzero().flatten()) for s in rows.sequences.unique().tolist()]


@dataclass(frozen=True)
class _Options:
    """What :class:`LayerPass` wants to know beside the plan."""

    rope_source: object
    attention: str = "sdpa"
    debug: bool = False

    @property
    def rope(self) -> RopeSpec:
        return rope_of(self.rope_source)


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
        self._options = _Options(decoder)
        self._tiled = self._tiles = None
        if isinstance(decoder, FusedDecoder):
            layout = self.pool.layout
            data = self.pool.data.numpy()
            self._tiled = TiledPool(
                data, block_size, layout.block_bytes, layout.layer_bytes, layout.offset("v")
            )
            self._tiles = TiledPlanes(self.pool, config.n_kv_heads, config.head_dim)

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
        counts = np.diff(query_starts)
        sequences = np.repeat(np.arange(len(counts)), counts)
        tables = torch.from_numpy(block_tables.astype(np.int64)).to(self.decoder.device)
        with torch.inference_mode():
            if not self._one_by_one:
                space = PagedKV(self.pool, self.decoder.config, tables, context_lens.tolist())
                return self._layerwise(token_ids, positions, sequences, space, logit_rows, adapter_slots)
            wanted = set(logit_rows.tolist())
            rows = []
            for t in range(len(token_ids)):
                s, part = int(sequences[t]), slice(t, t + 1)
                space = PagedKV(self.pool, self.decoder.config, tables[s : s + 1], [int(positions[t]) + 1])
                adapters = None if adapter_slots is None else adapter_slots[s : s + 1]
                logits = self._layerwise(
                    token_ids[part], positions[part], np.zeros(1, np.int64), space,
                    np.arange(int(t in wanted)), adapters,
                )  # fmt: skip
                if t in wanted:
                    rows.append(logits)
            return torch.cat(rows) if rows else torch.zeros(0, self.decoder.config.vocab_size)

    def _layerwise(
        self,
        token_ids: np.ndarray,
        positions: np.ndarray,
        sequences: np.ndarray,
        space: PagedKV,
        logit_rows: np.ndarray,
        adapter_slots: np.ndarray | None,
    ) -> torch.Tensor:
        decoder = self.decoder
        assert not isinstance(decoder, FusedDecoder)
        call = self._call(token_ids, positions, sequences, space)
        lora = None
        if adapter_slots is not None and adapter_slots.size and int(adapter_slots.max()) >= 0:
            lora = torch.from_numpy(adapter_slots[sequences]).to(decoder.device)
        running = LayerPass(decoder, call, OwnPlan(), self._options, lora)
        return running.run(torch.from_numpy(logit_rows).to(decoder.device)).cpu()

    def _call(
        self, token_ids: np.ndarray, positions: np.ndarray, sequences: np.ndarray, space: PagedKV
    ) -> Call:
        ids, where, owner = (
            torch.from_numpy(np.asarray(x, np.int64)).to(self.decoder.device)
            for x in (token_ids, positions, sequences)
        )
        return Call(ids, where, owner, self.decoder.config.n_layers, space)

    def planned(
        self,
        plan: KVPlan,
        token_ids: np.ndarray,
        positions: np.ndarray,
        block_table: np.ndarray,
        logit_rows: np.ndarray,
        adapter_slot: int = -1,
    ) -> tuple[torch.Tensor, PlanStats]:
        """One sequence's next tokens under ``plan``; its earlier tokens are in the pages of ``block_table``
        int32 ``[blocks]`` already. Float32 logits ``[R, vocab]`` of ``logit_rows`` and the counts. Raises
        PlanError, UnsupportedModel."""
        decoder = self.decoder
        space = self.pages(block_table, int(positions[-1]) + 1)
        call = self._call(token_ids, positions, np.zeros(len(token_ids), np.int64), space)
        wanted = torch.from_numpy(np.asarray(logit_rows, np.int64))
        with torch.inference_mode():
            if isinstance(decoder, FusedDecoder):
                assert self._tiled is not None
                fused = FusedPass(decoder, call, plan, self._options, self._tiled, adapter_slot)
                return fused.run(wanted).clone(), fused.stats
            lora = None
            if adapter_slot >= 0:
                lora = torch.full((len(call),), adapter_slot, dtype=torch.int32, device=decoder.device)
            running = LayerPass(decoder, call, plan, self._options, lora)
            return running.run(wanted.to(decoder.device)).cpu(), running.stats

    def pages(self, block_table: Sequence[int] | np.ndarray, context: int) -> PagedKV:
        """The first ``context`` places of one sequence's pages as a space, to copy or pin what is in them."""
        table = torch.from_numpy(np.array(block_table, np.int64))[None].to(self.decoder.device)
        return PagedKV(self.pool, self.decoder.config, table, [context], self._tiles)

    def copy_block(self, source: int, destination: int) -> None:
        """Copy a page (copy on write)."""
        self.pool.copy_block(source, destination)


class FusedPass(LayerPass):
    """The engine's loop with the fused decoder's compiled layer in place of the torch one; one sequence."""

    def __init__(
        self,
        decoder: FusedDecoder,
        call: Call,
        plan: KVPlan,
        options: _Options,
        pool: TiledPool,
        adapter_slot: int = -1,
    ) -> None:
        super().__init__(decoder, call, plan, options)  # pyright: ignore[reportArgumentType]
        if not self.causal:
            raise UnsupportedModel("the fused decoder attends causally only, the plan's mask is full")
        assert isinstance(call.space, PagedKV) and call.space.tiles is not None
        self._fused, self._pool, self._pages = decoder, pool, call.space
        self._adapter = np.array([adapter_slot], np.int32)
        table = call.space.tables[0].numpy()
        self._table = np.ascontiguousarray(table[None], np.int32)
        self._place_slots = table
        # A tile that this call begins may hold NaN behind its last token: a zero weight does not silence it.
        call.space.tiles.silence(call.space.tables[0], call.space.contexts[0])

    def run(self, wanted: torch.Tensor) -> torch.Tensor:
        call, plan, pages = self.call, self.plan, self._pages
        assert pages.tiles is not None
        h = torch.zeros(len(call), self.decoder.config.hidden_size)
        logits = torch.zeros(0, self.decoder.config.vocab_size)
        for layer in range(call.n_layers):
            h = self.select(layer, h)
            source = self.source(layer)
            if plan.low_rank(layer) is not None:
                raise UnsupportedModel(
                    f"layer {layer}: low-rank values need the stock decoder, this is fused"
                )
            self.fill(layer)
            self.stats.computed[layer] = len(h)
            if layer and self.watches and len(h):
                plan.states(layer, self.slots(), h)
            if not len(h):
                if layer == call.n_layers - 1:
                    self._indices(wanted)
                continue
            if source == layer:
                self.wrote(layer)  # by the compiled layer, before it attends
                self.check(layer)
            else:
                self.stats.projections_skipped[layer] = 0  # the compiled product has q, k and v in one
            places = self.positions.numpy()
            slots = self._place_slots[places // pages.size] * pages.size + places % pages.size
            last = layer == call.n_layers - 1
            rows = self._indices(wanted).numpy() if last else np.zeros(0, np.int64)
            tokens = call.token_ids if self.active is None else call.token_ids[self.active]
            h, logits = self._fused.run_layer(
                layer, h, tokens.numpy(), places, slots, self._table, self._pool, rows,
                source=source, adapter_slots=self._adapter,
            )  # fmt: skip
            k = v = None
            if source == layer and self._observes:
                k, v = pages.take(layer, self.rows)
            mass = [self._mass(source)] if plan.wants_attention(layer) else None
            plan.observe(layer, self.slots(), k, v, mass)
        self.finish()
        return logits

    def _mass(self, source: int) -> torch.Tensor:
        """Attention that each place got from the queries of the layer that just ran: ``[context]``."""
        pages, context = self._pages, self._pages.contexts[0]
        assert pages.tiles is not None
        keys, _ = pages.tiles.read(source, pages.tables[0], torch.arange(context))
        q = self._fused.last_queries(len(self.rows))
        return received(q, keys, self.positions, to_self=self.plan.mass_of_self, scale=1.0)

    @property
    def _observes(self) -> bool:
        """False for plans that look at nothing: reading tiles back costs time."""
        return type(self.plan).observe is not KVPlan.observe
