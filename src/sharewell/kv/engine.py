"""The engine of the room: a decoder, layer by layer, over packed ragged tokens under a plan.

This is the only loop over layers. :class:`PlannedForward` runs it over dense buffers for whoever has a model
in hand; :class:`~sharewell.kv.PagedForward` runs it over the server's pages."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import torch

from ..models import Decoder, ModelConfig, ModelError, StockDecoder, WholeDecoder
from .attention import Group, attend, groups_of
from .plans import Call, KVPlan, OwnPlan, PlanError, PlanStats, Read, UnsupportedModel
from .rope import RopeSpec, Turn, rope_of, turn_between
from .spaces import DenseKV, Rows

if TYPE_CHECKING:
    from .plans import LowRank

Attention = Literal["sdpa", "eager"]
Ids = torch.Tensor | Sequence[int] | Sequence[Sequence[int]] | Sequence[torch.Tensor]


def decoder_for(model: Any) -> Decoder:
    """The layer-wise decoder of a transformers model (Llama, SmolLM2, Mistral, Qwen2, Qwen3, Gemma), or
    ``model`` itself when it has that interface already (:class:`~sharewell.models.Decoder`).

    Raises UnsupportedModel with the class and what is missing."""
    if isinstance(model, Decoder):
        return model
    name, config = type(model).__name__, getattr(model, "config", None)
    if config is None or not hasattr(config, "to_dict"):
        raise UnsupportedModel(f"{name} has neither the Decoder interface nor a transformers configuration")
    raw = config.to_dict()
    raw["architectures"] = [name]
    try:
        return StockDecoder(model, ModelConfig.from_raw(raw, {}, f"the configuration of {name}"))
    except ModelError as error:
        raise UnsupportedModel(str(error)) from None


@dataclass(frozen=True)
class Output:
    """``logits [R, vocab]`` of ``slots`` (int64 ``[R]``); ``space`` holds the keys and values, for the next
    pass."""

    logits: torch.Tensor
    slots: torch.Tensor
    stats: PlanStats
    space: DenseKV
    call: Call


class PlannedForward:
    """Runs ``model`` (what :func:`decoder_for` takes) under plans.

    ``attention``: "sdpa" (torch's kernels) or "eager" (explicit softmax, the reference; with a float64 model
    everything is float64). ``debug`` looks for NaN in what every layer computes and reads."""

    def __init__(self, model: Any, attention: Attention = "sdpa", *, debug: bool = False) -> None:
        if attention not in ("sdpa", "eager"):
            raise ValueError(f"attention must be sdpa or eager, got {attention!r}")
        self.decoder = decoder_for(model)
        self.attention, self.debug = attention, debug
        self._rope: RopeSpec | None = None

    @property
    def rope(self) -> RopeSpec:
        """How this model's keys are moved. Raises UnsupportedModel where they cannot be."""
        if self._rope is None:
            self._rope = rope_of(self.decoder)
        return self._rope

    def space(self, n_sequences: int = 1, capacity: int = 0) -> DenseKV:
        """An empty space that fits the model."""
        decoder = self.decoder
        return DenseKV(
            decoder.config, n_sequences, dtype=decoder.dtype, device=decoder.device, capacity=capacity
        )

    def __call__(
        self,
        ids: Ids,
        plan: KVPlan | None = None,
        *,
        positions: Ids | None = None,
        attention_mask: torch.Tensor | None = None,
        space: DenseKV | None = None,
        want: Literal["last", "all"] | torch.Tensor = "last",
        adapter: int = -1,
    ) -> Output:
        """One pass.

        ``ids``: one sequence ``[T]``, a batch ``[B, T]`` (with ``attention_mask`` for padding on either
        side), or a list of lists of any lengths. ``positions`` has the same form; default: each sequence goes
        on where ``space`` ends. ``want``: whose logits, the last slot of each sequence, all, or these slots.
        Raises PlanError, or ValueError for what is not a call."""
        packed, sequences, where = _packed(ids, positions, attention_mask, space)
        decoder, device = self.decoder, self.decoder.device
        if space is None:
            space = self.space(int(sequences[-1]) + 1)
        call = Call(packed.to(device), where.to(device), sequences.to(device), decoder.config.n_layers, space)
        if isinstance(want, str):
            if want not in ("last", "all"):
                raise ValueError(f"want must be last, all or slots, got {want!r}")
            slots = torch.arange(len(packed))
            if want == "last":
                ends = torch.ones(len(packed), dtype=torch.bool)
                ends[:-1] = sequences[1:] != sequences[:-1]
                slots = slots[ends]
        else:
            slots = want.cpu().long()
            if len(slots) and not 0 <= int(slots.min()) <= int(slots.max()) < len(packed):
                raise ValueError(f"wanted slots must be in [0, {len(packed)}), got {slots.tolist()}")
        with torch.no_grad():
            lora = None
            if adapter >= 0:
                lora = torch.full((len(packed),), adapter, dtype=torch.int32, device=device)
            running = LayerPass(decoder, call, plan or OwnPlan(), self, lora)
            logits = running.run(slots.to(device))
        return Output(logits, slots, running.stats, space, call)


def _packed(
    ids: Ids, positions: Ids | None, attention_mask: torch.Tensor | None, space: DenseKV | None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Token ids, sequences and positions, each int64 ``[T]``. Raises ValueError."""
    rows = _rows(ids, "ids")
    if attention_mask is not None:
        keep = attention_mask.cpu().bool()
        if tuple(keep.shape) != (len(rows), len(rows[0])) or any(len(r) != len(rows[0]) for r in rows):
            raise ValueError(
                f"attention_mask must have the shape of ids, got {tuple(keep.shape)} "
                f"for {len(rows)} sequences of {[len(r) for r in rows]} tokens"
            )
        rows = [row[keep[i]] for i, row in enumerate(rows)]
    starts = [space.context(s) if space is not None else 0 for s in range(len(rows))]
    if positions is None:
        where = [torch.arange(a, a + len(r)) for a, r in zip(starts, rows, strict=True)]
    else:
        where = _rows(positions, "positions")
        if [len(w) for w in where] != [len(r) for r in rows]:
            raise ValueError(
                f"positions must have one for each token, got {[len(w) for w in where]} "
                f"for sequences of {[len(r) for r in rows]} tokens"
            )
    packed, at = torch.cat(rows), torch.cat(where)
    if not len(packed):
        raise ValueError("ids must hold at least one token, got none")
    sequences = torch.repeat_interleave(torch.arange(len(rows)), torch.tensor([len(r) for r in rows]))
    falling = (sequences[1:] == sequences[:-1]) & (at[1:] <= at[:-1])
    if bool(falling.any()):
        slot = int(falling.nonzero()[0]) + 1
        raise ValueError(
            f"positions of a sequence must be ascending, got {int(at[slot])} after {int(at[slot - 1])}"
        )
    return packed, sequences, at


def _rows(values: Ids, name: str) -> list[torch.Tensor]:
    if isinstance(values, torch.Tensor):
        if values.ndim not in (1, 2):
            raise ValueError(f"{name} must have 1 or 2 dimensions, got {values.ndim}")
        return list(values.cpu().long()) if values.ndim == 2 else [values.cpu().long()]
    if len(values) and not isinstance(values[0], int):
        return [torch.as_tensor(row, dtype=torch.int64).flatten() for row in values]
    return [torch.as_tensor(values, dtype=torch.int64)]


class LayerPass:
    """One pass of a decoder over a call under a plan; ``options`` has ``attention``, ``debug``, ``rope``."""

    def __init__(
        self,
        decoder: Decoder | WholeDecoder,
        call: Call,
        plan: KVPlan,
        options: Any,
        lora: torch.Tensor | None = None,
    ) -> None:
        self.decoder, self.call, self.plan, self.options, self.lora = decoder, call, plan, options, lora
        self.space = call.space
        self.space.begin(call)
        self.stats = PlanStats.of(call.n_layers)
        self.plain = type(plan) is OwnPlan
        self.causal = plan.mask == "causal"
        if plan.mask not in ("causal", "full"):
            raise PlanError(f"mask must be causal or full, got {plan.mask!r}")
        self.active: torch.Tensor | None = None  # None: all slots
        self.positions, self.rows = call.positions, _rows_of(call, None)
        self.groups: list[Group] = []
        self.layer_lora = lora
        self._regroup()
        self.watches = type(plan).states is not KVPlan.states
        self._turns: dict[int, tuple[Read, Turn]] = {}  # by the identity of a read that comes again
        self._written: list[int] = []  # by all slots of the call
        self._marked: set[int] = set()  # by some
        plan.begin(call)

    def run(self, wanted: torch.Tensor) -> torch.Tensor:
        """Logits of the slots ``wanted``."""
        decoder, call = self.decoder, self.call
        if isinstance(decoder, WholeDecoder):
            logits = decoder.run(call.token_ids, call.positions, self._whole, wanted)
        else:
            h = decoder.embed(call.token_ids)
            for layer in range(call.n_layers):
                h = self.layer(decoder, layer, h)
            logits = decoder.head(h[self._indices(wanted)])
        self.finish()
        return logits

    def layer(self, decoder: Decoder, layer: int, h: torch.Tensor) -> torch.Tensor:
        """One layer: ``h`` of the active slots before it to ``h`` of the active slots after it."""
        if self.plain:
            q, k, v = decoder.qkv(layer, h, self.positions, self.layer_lora)
            self.stats.computed[layer] = len(h)
            self._put(layer, k, v)
            self.check(layer)
            o, _ = self._attend(layer, q, None, False)
        else:
            h = self.select(layer, h)
            if not len(h):
                self.fill(layer)
                return h
            if layer and self.watches:
                self.plan.states(layer, self.slots(), h)
            o = self._planned(decoder, layer, h)
        h = decoder.attn_out(layer, h, o, self.layer_lora)
        h = decoder.mlp(layer, h, self.layer_lora)
        if self.options.debug and not bool(torch.isfinite(h).all()):
            raise PlanError(f"layer {layer} computed NaN or infinite values")
        return h

    def _planned(self, decoder: Decoder, layer: int, h: torch.Tensor) -> torch.Tensor:
        plan, stats = self.plan, self.stats
        source = self.source(layer)
        low = plan.low_rank(layer)
        self.fill(layer)
        stats.computed[layer] = len(h)
        k = v = None
        if source == layer:
            q, k, v = decoder.qkv(layer, h, self.positions, self.layer_lora)
            self._put(layer, k, v)
            if low is not None:
                z = decoder.attn_in(layer, h) @ low.a.to(h).T
                self.space.write_low_rank(layer, self.rows, z)
            self.check(layer)
        else:
            q = decoder.queries(layer, h, self.positions, self.layer_lora)
            stats.projections_skipped[layer] = 2 * len(h)
        o, mass = self._attend(source, q, low, plan.wants_attention(layer))
        plan.observe(layer, self.slots(), k, v, mass)
        return o

    def _whole(
        self, layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float | None = None
    ) -> torch.Tensor:
        """The attention of a model that runs through its own code: every slot is active in every layer."""
        if self.plain:
            self.stats.computed[layer] = len(q)
            self._put(layer, k, v)
            self.check(layer)
            return self._attend(layer, q, None, False, scale)[0]
        plan = self.plan
        chosen = plan.active(layer)
        if chosen is not None and len(chosen) != len(self.call):
            raise UnsupportedModel(
                f"layer {layer}: this model runs through its own code, so a plan cannot leave out slots"
            )
        source, low = self.source(layer), plan.low_rank(layer)
        if low is not None:
            raise UnsupportedModel(
                f"layer {layer}: this model runs through its own code, so values have no low-rank part"
            )
        self.fill(layer)
        self.stats.computed[layer] = len(q)
        if source == layer:
            self._put(layer, k, v)
            self.check(layer)
        o, mass = self._attend(source, q, None, plan.wants_attention(layer), scale)
        own = source == layer
        plan.observe(layer, self.slots(), k if own else None, v if own else None, mass)
        return o

    # Which slots

    def slots(self) -> torch.Tensor:
        """The active slots."""
        if self.active is None:
            return torch.arange(len(self.call), device=self.call.positions.device)
        return self.active

    def select(self, layer: int, h: torch.Tensor) -> torch.Tensor:
        """``h`` of the slots that are active at ``layer``, from that of those active before. Raises
        PlanError."""
        chosen = self.plan.active(layer)
        if chosen is None or (self.active is not None and chosen is self.active):
            return h
        n, device = len(self.call), h.device
        chosen = chosen.to(device)
        self._check_slots(layer, chosen, "active")
        if len(chosen) == n and self.active is None:
            return h
        if self.active is not None and torch.equal(chosen, self.active):
            return h
        if self.active is None:
            h = h[chosen]
        else:
            row = torch.full((n,), -1, dtype=torch.int64, device=device)
            row[self.active] = torch.arange(len(self.active), device=device)
            at = row[chosen]
            new = (at < 0).nonzero().flatten()
            before, h = h, h[at.clamp(min=0)] if len(h) else h.new_zeros(len(chosen), h.shape[1])
            if len(new):
                given = self.plan.hidden(layer, chosen[new])
                if given is None or tuple(given.shape) != (len(new), before.shape[1]):
                    got = "none" if given is None else str(tuple(given.shape))
                    raise PlanError(
                        f"layer {layer}: slot {int(chosen[new[0]])} becomes active and needs a hidden state "
                        f"[{len(new)}, {before.shape[1]}] from the plan, got {got}"
                    )
                h = h.clone()
                h[new] = given.to(h)
        self.activate(chosen)
        return h

    def activate(self, chosen: torch.Tensor) -> None:
        """``chosen`` are the active slots from here on."""
        self.active = None if len(chosen) == len(self.call) else chosen
        self.positions = self.call.positions[chosen]
        self.rows = _rows_of(self.call, self.active)
        self.layer_lora = None if self.lora is None else self.lora[chosen]
        self._regroup()

    def _regroup(self) -> None:
        window = getattr(self.decoder.config, "sliding_window", None)
        self.groups = groups_of(self.rows, self.space, self.causal, window)

    def _check_slots(self, layer: int, slots: torch.Tensor, what: str) -> None:
        n = len(self.call)
        if slots.ndim != 1 or slots.dtype != torch.int64:
            raise PlanError(
                f"layer {layer}: {what} slots must be int64 [n], got {slots.dtype} {tuple(slots.shape)}"
            )
        if len(slots) and not 0 <= int(slots.min()) <= int(slots.max()) < n:
            worst = int(slots.min()) if int(slots.min()) < 0 else int(slots.max())
            raise PlanError(f"layer {layer}: {what} slots must be in [0, {n}), got {worst}")
        if len(slots) > 1 and not bool((slots[1:] > slots[:-1]).all()):
            raise PlanError(f"layer {layer}: {what} slots must be ascending and distinct")

    def _indices(self, wanted: torch.Tensor) -> torch.Tensor:
        """Rows of the active slots that are ``wanted``. Raises PlanError for one that is not active."""
        if self.active is None:
            return wanted
        at = torch.searchsorted(self.active, wanted)
        found = at.clamp(max=max(0, len(self.active) - 1))
        bad = (
            (self.active[found] != wanted) if len(self.active) else torch.ones_like(wanted, dtype=torch.bool)
        )
        if bool(bad.any()):
            slot = int(wanted[bad][0])
            raise PlanError(
                f"layer {self.call.n_layers - 1}: logits of slot {slot} are wanted, but it is not active"
            )
        return at

    # Keys and values

    def source(self, layer: int) -> int:
        """The layer whose keys and values ``layer`` attends to. Raises PlanError."""
        source = self.plan.source(layer)
        if not 0 <= source <= layer:
            raise PlanError(f"layer {layer}: source must be in [0, {layer}], got {source}")
        return source

    def fill(self, layer: int) -> None:
        """Put what the plan reads at ``layer`` in place. Raises PlanError."""
        for slots, read in self.plan.read(layer):
            slots = slots.to(self.call.positions.device)
            self._check_slots(layer, slots, "read")
            if not len(slots):
                continue
            if self.active is None or bool(torch.isin(slots, self.active).any()):
                both = slots if self.active is None else slots[torch.isin(slots, self.active)]
                raise PlanError(f"layer {layer}: slot {int(both[0])} is both active and read")
            rows = _rows_of(self.call, slots)
            k, v = self._fetch(layer, slots, rows, read)
            self.space.write(layer, rows, k, v)
            self.space.mark([layer], rows)
            self._marked.add(layer)
            self.stats.tokens_read[layer] += len(slots)

    def _fetch(
        self, layer: int, slots: torch.Tensor, rows: Rows, read: Read
    ) -> tuple[torch.Tensor, torch.Tensor]:
        stats, decoder = self.stats, self.decoder
        origin = layer if read.layer is None else read.layer
        if read.segment is None:
            if not 0 <= origin < layer:
                raise PlanError(
                    f"layer {layer}: without a segment, layer must be in [0, {layer}), got {read.layer}"
                )
            k, v = self.space.take(origin, rows)
        else:
            tokens = read.tokens
            if tokens is None or len(tokens) != len(slots):
                raise PlanError(
                    f"layer {layer}: read of {len(slots)} slots must name as many tokens of the segment, "
                    f"got {None if tokens is None else len(tokens)}"
                )
            k, v = read.segment.read(origin, tokens)
        stats.bytes_read[layer] += k.nbytes + v.nbytes
        if read.segment is not None and read.move:
            assert read.tokens is not None
            start = read.segment.positions[read.tokens.to(read.segment.positions.device)]
            known = self._turns.get(id(read))
            if known is None:  # the read is kept, so that no other one gets its identity
                turn = turn_between(start.to(decoder.device), rows.places, self.options.rope)
                known = self._turns[id(read)] = read, turn
            k = known[1](k.to(decoder.device))
        if read.transform is not None:
            k, v = read.transform(k, v)
        expected = (len(slots), decoder.config.n_kv_heads, decoder.config.head_dim)
        if tuple(k.shape) != expected or tuple(v.shape) != expected:
            raise PlanError(
                f"layer {layer}: keys and values read must have shape {expected}, "
                f"got {tuple(k.shape)} and {tuple(v.shape)}"
            )
        if k.dtype != decoder.dtype or v.dtype != decoder.dtype or v.device != decoder.device:
            stats.converted += len(slots)
            k, v = k.to(decoder.device, decoder.dtype), v.to(decoder.device, decoder.dtype)
        if self.options.debug and not bool(torch.isfinite(k).all() & torch.isfinite(v).all()):
            raise PlanError(f"layer {layer}: keys or values read hold NaN or infinite values")
        return k, v

    def _put(self, layer: int, k: torch.Tensor, v: torch.Tensor) -> None:
        self.space.write(layer, self.rows, k, v)
        self.wrote(layer)

    def wrote(self, layer: int) -> None:
        """The active slots have their keys and values at ``layer``."""
        if self._trusted(layer):
            self._written.append(layer)
        else:
            self._marked.add(layer)
            self.space.mark([layer], self.rows)

    def _trusted(self, layer: int) -> bool:
        """True when every token holds something at ``layer`` once the active slots do."""
        return self.active is None and layer not in self.space.incomplete

    def check(self, layer: int) -> None:
        """Every token that the queries may see holds something at ``layer``. Raises PlanError."""
        if self.plan.present or self._trusted(layer):
            return
        for sequence in self.call.sequences.unique().tolist():
            place = self.space.missing(layer, sequence)
            if place is None:
                continue
            mine = (self.call.sequences == sequence) & (self.call.positions == place)
            found = mine.nonzero().flatten()
            slot = f"slot {int(found[0])}" if len(found) else f"position {place} of sequence {sequence}"
            raise PlanError(
                f"layer {layer}: {slot} is neither active nor read, and nothing was ever written there"
            )

    def _attend(
        self,
        source: int,
        q: torch.Tensor,
        low: LowRank | None,
        mass: bool,
        scale: float | None = None,
    ) -> tuple[torch.Tensor, list[torch.Tensor] | None]:
        return attend(
            q, self.groups, self.space, source, eager=self.options.attention == "eager", low=low, mass=mass,
            scale=scale, others_only=None if self.plan.mass_of_self else self.positions,
        )  # fmt: skip

    def finish(self) -> None:
        """Note what was written, and end the plan's pass."""
        incomplete = self.space.incomplete
        if self._written:
            self.space.mark(self._written, _rows_of(self.call, None))
        for layer in set(range(self.call.n_layers)).difference(self._written):
            if layer in self._marked and not self.space.lacks(layer):
                incomplete.discard(layer)
            else:
                incomplete.add(layer)
        self.stats.bytes_held = self.space.nbytes
        self.plan.finish(self.call)


def _rows_of(call: Call, slots: torch.Tensor | None) -> Rows:
    """Sequences and places of ``slots`` (None: all), and the block that they form if they do."""
    if slots is None:
        sequences, places = call.sequences, call.positions
    else:
        sequences, places = call.sequences[slots], call.positions[slots]
    n = len(places)
    if not n:
        return Rows(sequences, places)
    count = int(sequences[-1]) + 1
    first, end = int(places[0]), int(places[-1]) + 1
    if n == count * (end - first):
        grid = places.view(count, -1)
        if count == 1 or (bool((grid[:, 0] == first).all()) and bool((grid[:, -1] == end - 1).all())):
            rows = sequences.view(count, -1)
            if count == 1 or bool((rows[:, 0] == rows[:, -1]).all() & (rows[1:, 0] > rows[:-1, 0]).all()):
                return Rows(sequences, places, (count, first, end))
    return Rows(sequences, places)
