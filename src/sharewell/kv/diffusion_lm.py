"""The denoising loop of masked diffusion language models (LLaDA, arXiv 2502.09992; Dream, arXiv 2508.15487),
with keys and values kept between its steps as :class:`~sharewell.kv.DKVConfig` says.

The model is any decoder that the engine of the room runs; here its attention is bidirectional. A step passes
the positions that are computed to the engine, each at its own place; all others are read from the space that
the steps share.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch

from .dkv import Bidirectional, DenoisingState, DKVConfig, computed_positions, predictors
from .engine import PlannedForward
from .plans import PlanError

if TYPE_CHECKING:
    from .spaces import DenseKV

Remasking = Literal["low_confidence", "entropy", "random"]
REMASKING = ("low_confidence", "entropy", "random")


class NotFiniteLogits(FloatingPointError):
    """A model computed NaN or infinite logits; the message names the step and the layer where it began."""


@dataclass
class DenoisingStats:
    """Work done: ``passes`` through the model, ``positions`` computed in them and ``positions_without`` a
    cache, over all rows; ``bytes_held`` by keys and values at the most."""

    passes: int = 0
    positions: int = 0
    positions_without: int = 0
    bytes_held: int = 0
    per_step: list[int] = field(default_factory=list)

    @property
    def share(self) -> float:
        """Computed positions as a part of those without a cache."""
        return self.positions / max(1, self.positions_without)


@dataclass(frozen=True)
class DenoisingStep:
    """After a step: what it decided, bool ``[B, L]``, the token ids so far, int64 ``[B, L]`` (prompt first,
    then the answer; a shorter row ends before ``L``), and the keys and values kept."""

    index: int
    decided: torch.Tensor
    ids: torch.Tensor
    space: DenseKV
    stats: DenoisingStats


@dataclass(frozen=True)
class DiffusionOutput:
    """``answers`` int64 ``[B, gen_length]``; ``stats`` of all steps."""

    answers: torch.Tensor
    stats: DenoisingStats


def generate_masked_diffusion(
    model: Any, input_ids: Any, gen_length: int, steps: int, **options: Any
) -> DiffusionOutput:
    """The answers to ``input_ids``; arguments as :func:`denoise`'s."""
    rows = _prompts(input_ids, options.get("attention_mask"))
    *_, last = denoise(model, input_ids, gen_length, steps, **options)
    answers = torch.stack([last.ids[r, len(p) : len(p) + gen_length] for r, p in enumerate(rows)])
    return DiffusionOutput(answers, last.stats)


def denoise(
    model: Any,
    input_ids: torch.Tensor | Sequence[Sequence[int]],
    gen_length: int,
    steps: int,
    *,
    mask_id: int,
    attention_mask: torch.Tensor | None = None,
    block_length: int | None = None,
    temperature: float = 0.0,
    remasking: Remasking = "low_confidence",
    cache: DKVConfig | None = None,
    guidance: float = 0.0,
    eos_id: int | None = None,
    seed: int = 0,
    budget_bytes: int | None = None,
) -> Iterator[DenoisingStep]:
    """Decide ``gen_length`` tokens behind each prompt in ``steps`` steps; yields after each step.

    ``model``: what :func:`~sharewell.kv.decoder_for` takes, or a PlannedForward. ``input_ids``: ``[B, P]``
    (with ``attention_mask`` for padding on either side) or lists of any lengths. The answer is filled block
    by block of ``block_length`` (default: all at once), as many steps in each. Each step decides equally many
    positions, the remainder first: those whose token the model is most sure of ("low_confidence": its
    probability, "entropy": the whole distribution's) or in an order drawn beforehand ("random").
    ``temperature`` > 0 draws tokens, with noise that depends on ``seed``, step, row and position alone.
    ``guidance`` > 0 runs each row a second time with its prompt masked, with a cache of its own, and moves
    the logits away from it by that factor. A row ends early when it has decided ``eos_id`` and everything
    before; it is filled with it. ``budget_bytes`` for keys and values.

    Raises ValueError naming the argument, or NotFiniteLogits.
    """
    engine = model if isinstance(model, PlannedForward) else PlannedForward(model)
    cache = cache or DKVConfig("none")
    rows = _prompts(input_ids, attention_mask)
    block_length = gen_length if block_length is None else block_length
    _check(rows, gen_length, steps, block_length, mask_id, remasking, temperature, cache, guidance)
    run = _Denoising(engine, rows, gen_length, mask_id, cache, guidance, seed, budget_bytes)
    yield from run.blocks(steps, block_length, temperature, remasking, eos_id)


def _prompts(input_ids: Any, attention_mask: torch.Tensor | None) -> list[torch.Tensor]:
    rows = [torch.as_tensor(row, dtype=torch.int64).flatten() for row in input_ids]
    if attention_mask is not None:
        if len(attention_mask) != len(rows) or any(
            len(a) != len(r) for a, r in zip(attention_mask, rows, strict=True)
        ):
            raise ValueError(
                f"attention_mask must have the shape of input_ids, got {tuple(attention_mask.shape)}"
            )
        rows = [row[keep.bool()] for row, keep in zip(rows, attention_mask, strict=True)]
    return rows


def _check(
    rows: list[torch.Tensor],
    gen_length: int,
    steps: int,
    block_length: int,
    mask_id: int,
    remasking: str,
    temperature: float,
    cache: DKVConfig,
    guidance: float,
) -> None:
    if not rows or any(not len(row) for row in rows):
        raise ValueError("input_ids must hold a prompt of at least one token for each row, got an empty one")
    if gen_length < 1:
        raise ValueError(f"gen_length must be at least 1, got {gen_length}")
    if block_length < 1 or gen_length % block_length:
        raise ValueError(
            f"gen_length must be a multiple of block_length, got {gen_length} and {block_length}"
        )
    blocks = gen_length // block_length
    if steps < blocks or steps % blocks:
        raise ValueError(f"steps must be a multiple of the number of blocks, {blocks}, got {steps}")
    if steps > gen_length:
        raise ValueError(f"steps must be at most gen_length, {gen_length}: each decides a token, got {steps}")
    if remasking not in REMASKING:
        raise ValueError(f"remasking must be one of {', '.join(REMASKING)}, got {remasking!r}")
    if temperature < 0:
        raise ValueError(f"temperature must be at least 0, got {temperature}")
    if guidance < 0:
        raise ValueError(f"guidance must be at least 0, got {guidance}")
    if cache.variant == "greedy" and remasking != "random":
        raise ValueError(f"variant greedy must know the order: remasking must be random, got {remasking!r}")
    if cache.variant == "greedy" and cache.window > gen_length:
        raise ValueError(f"window must be at most gen_length, {gen_length}, got {cache.window}")
    for row, ids in enumerate(rows):
        if bool((ids == mask_id).any()):
            at = int((ids == mask_id).nonzero()[0])
            raise ValueError(f"prompt {row} must not contain mask_id, {mask_id}, got it at position {at}")


class _Denoising:
    """The state of one call of :func:`denoise`: ``B`` rows of at most ``L`` positions."""

    def __init__(
        self,
        engine: PlannedForward,
        rows: list[torch.Tensor],
        gen_length: int,
        mask_id: int,
        cache: DKVConfig,
        guidance: float,
        seed: int,
        budget_bytes: int | None,
    ) -> None:
        self.engine, self.cache, self.mask_id, self.guidance, self.seed = (
            engine,
            cache,
            mask_id,
            guidance,
            seed,
        )
        n, length = len(rows), max(map(len, rows)) + gen_length
        place = torch.arange(length)
        starts = torch.tensor([len(row) for row in rows])[:, None]
        self.starts, self.gen_length = starts, gen_length
        self.exists = place < starts + gen_length
        self.prompt = (place < starts).expand(n, -1)
        self.ids = torch.full((n, length), mask_id)
        for row, ids in enumerate(rows):
            self.ids[row, : len(ids)] = ids
        self.decided, self.before = self.prompt.clone(), self.prompt.clone()
        self.live = torch.ones(n, 1, dtype=torch.bool)
        self.best = torch.full((n, length), mask_id)  # the candidate of each position when last computed
        self.confidence = torch.full((n, length), -torch.inf, dtype=torch.float64)
        self.stats = DenoisingStats()
        copies = 2 if guidance else 1
        config, size = engine.decoder.config, engine.decoder.dtype.itemsize
        needed = copies * n * length * config.n_layers * 2 * config.kv_width * size
        if budget_bytes is not None and needed > budget_bytes:
            raise ValueError(
                f"budget_bytes must be at least {needed:,} for these keys and values, got {budget_bytes:,}"
            )
        self.space = engine.space(copies * n, length)
        self.plan = Bidirectional()

    def blocks(
        self, steps: int, block_length: int, temperature: float, remasking: str, eos_id: int | None
    ) -> Iterator[DenoisingStep]:
        count = self.gen_length // block_length
        per_block, place = steps // count, torch.arange(self.ids.shape[1])
        order = self._order() if remasking == "random" else None
        for number in range(count):
            first = self.starts + number * block_length
            block = (place >= first) & (place < first + block_length)
            self.before = self.decided.clone()
            sizes = [block_length // per_block + (i < block_length % per_block) for i in range(per_block)]
            for step, size in enumerate(sizes):
                coming = None
                if order is not None:
                    coming = self._most(order, block & ~self.decided & self.live, size)
                index = number * per_block + step
                self._compute(index, step, block, coming, temperature, remasking)
                wanted = coming
                if wanted is None:
                    wanted = self._most(self.confidence, block & ~self.decided & self.live, size)
                self.ids = torch.where(wanted, self.best, self.ids)
                self.before, self.decided = self.decided, self.decided | wanted
                if eos_id is not None:
                    wanted = wanted | self._end_rows(eos_id)
                yield DenoisingStep(index, wanted, self.ids.clone(), self.space, self.stats)
                if not bool(self.live.any()):
                    return

    def _order(self) -> torch.Tensor:
        """Random priorities of the answers' positions; the same in every variant."""
        rng = np.random.Generator(np.random.Philox(key=[self.seed, 2**63]))
        drawn = torch.full(self.ids.shape, -torch.inf, dtype=torch.float64)
        drawn[self.exists & ~self.prompt] = torch.from_numpy(
            rng.random((len(self.ids), self.gen_length))
        ).flatten()
        return drawn

    @staticmethod
    def _most(priority: torch.Tensor, among: torch.Tensor, count: int) -> torch.Tensor:
        """The ``count`` positions of each row that have the highest priority ``among`` these; ties: the
        first."""
        among = among & (priority > -torch.inf)
        ranked = torch.where(among, priority, -torch.inf).sort(dim=1, descending=True, stable=True)
        chosen = torch.zeros_like(among)
        chosen.scatter_(1, ranked.indices[:, :count], ranked.values[:, :count] > -torch.inf)
        return chosen

    def _compute(
        self,
        index: int,
        step: int,
        block: torch.Tensor,
        coming: torch.Tensor | None,
        temperature: float,
        remasking: str,
    ) -> None:
        """One pass; notes the candidates of all undecided positions of the block that it computes."""
        state = DenoisingState(
            step, index == 0, self.exists, self.prompt, self.decided, self.before, block, coming
        )
        queries = computed_positions(self.cache, state) & self.live
        open_ = block & ~self.decided & self.live
        read_at = predictors(self.cache, open_) & queries
        logits = self._forward(index, queries, read_at).double()
        rows, places = read_at.nonzero(as_tuple=True)
        targets = places if self.cache.shift is None else places + 1
        logits[:, self.mask_id] = -torch.inf
        if temperature > 0:
            noisy = logits / temperature + self._gumbel(
                index, rows.tolist(), targets.tolist(), logits.shape[1]
            )
        else:
            noisy = logits
        best = noisy.argmax(1)
        log_p = logits.log_softmax(1)
        if remasking == "entropy":
            sure = (log_p.exp() * log_p.clamp(min=-1e300)).sum(1)
        else:
            sure = log_p.gather(1, best[:, None])[:, 0].exp()
        self.best[rows, targets] = best
        self.confidence[rows, targets] = sure
        self.stats.passes += 1
        computed = int(queries.sum())
        self.stats.per_step.append(computed)
        self.stats.positions += computed
        self.stats.positions_without += int((self.exists & self.live).sum())
        self.stats.bytes_held = max(self.stats.bytes_held, self.space.nbytes)

    def _forward(self, index: int, queries: torch.Tensor, read_at: torch.Tensor) -> torch.Tensor:
        """Float logits of the positions ``read_at``, in row-major order."""
        ids, mask = self.ids, queries
        if self.guidance:
            ids = torch.cat([ids, ids.masked_fill(self.prompt, self.mask_id)])
            mask, read_at = torch.cat([queries] * 2), torch.cat([read_at] * 2)
        counts = mask.sum(1).tolist()
        packed = ids[mask].split(counts)
        places = mask.nonzero()[:, 1].split(counts)
        slots = read_at[mask].nonzero().flatten()
        call = {"positions": list(places), "space": self.space, "want": slots}
        logits = self.engine(list(packed), self.plan, **call).logits.cpu()
        if not bool(torch.isfinite(logits).all()):
            raise NotFiniteLogits(f"step {index}: logits are not finite ({self._blame(list(packed), call)})")
        if self.guidance:
            plain, masked = logits.chunk(2)
            logits = masked + (self.guidance + 1) * (plain - masked)
        return logits

    def _blame(self, packed: list[torch.Tensor], call: dict[str, Any]) -> str:
        """Where the numbers went wrong: the pass again, layer by layer."""
        engine = PlannedForward(self.engine.decoder, debug=True)
        try:
            engine(packed, self.plan, **call)
        except PlanError as error:
            return str(error)
        return "the head computed NaN or infinite values"

    def _gumbel(self, index: int, rows: list[int], places: list[int], width: int) -> torch.Tensor:
        """Gumbel noise in float64: in lower precision it changes what is drawn."""
        noise = np.empty((len(rows), width))
        for i, (row, place) in enumerate(zip(rows, places, strict=True)):
            counter = [0, row, place, index]
            noise[i] = np.random.Generator(np.random.Philox(key=[self.seed, 0], counter=counter)).gumbel(
                size=width
            )
        return torch.from_numpy(noise)

    def _end_rows(self, eos_id: int) -> torch.Tensor:
        """Rows that have decided their end and all before it leave; the rest of them is the end again.
        Returns what that decides."""
        filled = torch.zeros_like(self.decided)
        for row in self.live[:, 0].nonzero().flatten().tolist():
            first = int(self.starts[row])
            answer = slice(first, first + self.gen_length)
            ends = (self.decided[row, answer] & (self.ids[row, answer] == eos_id)).nonzero().flatten()
            if len(ends) and bool(self.decided[row, first : first + int(ends[0])].all()):
                behind = slice(first + int(ends[0]), answer.stop)
                filled[row, behind] = ~self.decided[row, behind]
                self.ids[row, behind] = eos_id
                self.decided[row, answer] = True
                self.live[row] = False
        return filled
