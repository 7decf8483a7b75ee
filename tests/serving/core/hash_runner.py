"""A runner whose logits are a hash of the keys and values that really lie in its pages.

The oracle for scheduling: the "keys and values" of a token are one 64-bit number that mixes the token, its
position, its adapter and everything before it as read through the block table. A wrong slot, table, position,
copy, reused page or stale prefix changes every later token, whatever the mix of requests; what a request must
answer is computed by :func:`reference` from its tokens alone, without pages. Integers only, so that equality
is exact."""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import os
import signal
import threading
import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from sharewell.serving.core.config import EngineConfig
from sharewell.serving.core.engine import EngineCore
from sharewell.serving.core.host import Built
from sharewell.serving.core.messages import EngineInfo, EngineRequest
from sharewell.serving.core.sampling import bias, draw, penalize

if TYPE_CHECKING:
    from sharewell.models import LoraAdapter
    from sharewell.serving.core.runner import StepBatch

MASK = 2**64 - 1
VOCAB, EOS, NAN_TOKEN = 97, 2, 96
POISON = 95  # as a prompt's first token: the engine that computes it dies


def _mix(x: int) -> int:
    """The finalizer of SplitMix64."""
    x = (x + 0x9E3779B97F4A7C15) & MASK
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & MASK
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & MASK
    return x ^ (x >> 31)


def _entry(token: int, position: int, adapter: int, past: int) -> int:
    return _mix(_mix(past ^ adapter) ^ _mix(token << 32 | position))


def _fold(entries: Sequence[int], start: int, past: int) -> int:
    """``past`` of the first ``start`` tokens, continued by ``entries``: order matters."""
    for i, entry in enumerate(entries, start):
        past = (past + entry * (2 * _mix(i) + 1)) & MASK
    return past


def logits_of(state: int, last_token: int, vocab: int = VOCAB) -> np.ndarray:
    """Float32 ``[vocab]`` in [0, 8), a function of everything read; NaN behind NAN_TOKEN."""
    if last_token == NAN_TOKEN:
        return np.full(vocab, np.nan, np.float32)
    x = np.arange(vocab, dtype=np.uint64) * np.uint64(0xD1342543DE82EF95) + np.uint64(state)
    x ^= x >> np.uint64(29)
    x *= np.uint64(0xBF58476D1CE4E5B9)
    x ^= x >> np.uint64(32)
    logits = (x >> np.uint64(40)).astype(np.float32) * np.float32(8 / 2**24)
    logits[NAN_TOKEN] = -np.inf  # only a prompt holds it
    return logits


def adapter_hash(adapter: LoraAdapter | None) -> int:
    """A number for an adapter's weights; 0 for the base model."""
    if adapter is None:
        return 0
    digest = hashlib.blake2b(str(adapter.scale).encode(), digest_size=8)
    for key, (a, b) in sorted(adapter.targets.items()):
        digest.update(repr(key).encode() + a.numpy().tobytes() + b.numpy().tobytes())
    return int.from_bytes(digest.digest(), "little")


class HashRunner:
    """Implements ``Runner`` on a numpy pool. Checks what it is given; ``before_run`` may raise, to be a
    fault."""

    takes_adapters = True

    def __init__(self, num_blocks: int, block_size: int, vocab: int = VOCAB, step_s: float = 0.0) -> None:
        self.block_size, self.vocab, self.step_s = block_size, vocab, step_s
        self.pool = np.random.default_rng(7).integers(0, 2**63, num_blocks * block_size, np.uint64)
        self.adapters: dict[int, int] = {}
        self.loads: list[tuple[int, str]] = []
        self.batches: list[tuple[int, int]] = []  # (sequences, tokens) of every step
        self.before_run: Callable[[StepBatch], None] = lambda batch: None

    def load_adapter(self, slot: int, adapter: LoraAdapter) -> None:
        self.adapters[slot] = adapter_hash(adapter)
        self.loads.append((slot, adapter.name))

    def run(self, batch: StepBatch) -> Any:
        self.before_run(batch)
        if self.step_s:
            time.sleep(self.step_s)
        size = self.block_size
        pages = self.pool.reshape(-1, size)
        for source, destination in batch.copies:
            pages[destination] = pages[source]
        starts = batch.query_starts.tolist()
        self.batches.append((len(starts) - 1, len(batch.token_ids)))
        assert len(batch.token_ids) == len(batch.positions) == len(batch.slots) == starts[-1]
        assert len(set(batch.slots.tolist())) == len(batch.slots), "two tokens are written to one slot"
        assert np.all(np.diff(batch.query_starts) > 0), "a sequence without tokens"
        assert np.all(np.diff(batch.logit_rows) > 0), "logit rows must ascend"
        states: dict[int, tuple[int, int]] = {}
        wanted = set(batch.logit_rows.tolist())
        for s, (first, end) in enumerate(itertools.pairwise(starts)):
            table, context = batch.block_tables[s], int(batch.context_lens[s])
            slot = int(batch.adapter_slots[s])
            adapter = self.adapters[slot] if slot >= 0 else 0
            positions = batch.positions[first:end].tolist()
            assert positions == list(range(context - (end - first), context)), (
                "positions and context disagree"
            )
            before = np.arange(positions[0])
            past = _fold(
                self.pool[table[before // size].astype(np.int64) * size + before % size].tolist(), 0, 0
            )
            for row in range(first, end):
                position, token = positions[row - first], int(batch.token_ids[row])
                assert int(batch.slots[row]) == int(table[position // size]) * size + position % size
                entry = _entry(token, position, adapter, past)
                self.pool[batch.slots[row]] = entry
                past = _fold((entry,), position, past)
                if row in wanted:
                    states[row] = (past, token)
        rows = [logits_of(*states[r], self.vocab) for r in batch.logit_rows.tolist()]
        return _Rows(np.stack(rows) if rows else np.zeros((0, self.vocab), np.float32))


class _Rows:
    """The one thing that the engine asks of a tensor; torch itself takes a second to import in every
    process."""

    def __init__(self, rows: np.ndarray) -> None:
        self._rows = rows

    def numpy(self) -> np.ndarray:
        return self._rows


class Reference:
    """The same function of tokens without pages."""

    def __init__(self, prompt: Sequence[int], adapter: int = 0, vocab: int = VOCAB) -> None:
        self._adapter, self._vocab = adapter, vocab
        self._past, self._length, self._last = 0, 0, 0
        for token in prompt:
            self.push(token)

    def push(self, token: int) -> None:
        """Go on by one token."""
        entry = _entry(token, self._length, self._adapter, self._past)
        self._past = _fold((entry,), self._length, self._past)
        self._length += 1
        self._last = token

    def logits(self) -> np.ndarray:
        """Float32 ``[vocab]`` behind the last token."""
        return logits_of(self._past, self._last, self._vocab)


def reference(
    request: EngineRequest, choice: int = 0, adapter: int = 0, room: int = 2**31
) -> tuple[list[int], str]:
    """Tokens and finish reason that ``request`` must get, alone or in company. ``room``: tokens that fit in
    all."""
    params = request.sampling
    state = Reference(request.prompt_ids, adapter)
    stops = set(params.stop_token_ids) | (set() if params.ignore_eos else {EOS})
    counts: dict[int, int] = {}
    for token in request.prompt_ids:
        counts[token] = counts.get(token, 0) + 1
    output: list[int] = []
    output_counts: dict[int, int] = {}
    limit = min(params.max_tokens, room - len(request.prompt_ids))
    while len(output) < limit:
        logits = state.logits()
        if np.isnan(logits).any():
            return output, "error"
        penalize(logits, params, counts, output_counts)
        bias(logits, params)
        if len(output) < params.min_tokens:
            logits[list(stops)] = -np.inf
        token = int(logits.argmax()) if params.greedy else draw(logits, params, choice, len(output))
        if token in stops:
            return output, "stop"
        output.append(token)
        counts[token] = counts.get(token, 0) + 1
        output_counts[token] = output_counts.get(token, 0) + 1
        state.push(token)
    return output, "length"


def tiny_adapter(name: str, seed: int) -> LoraAdapter:
    """A real LoraAdapter with weights of ``seed``."""
    import torch

    from sharewell.models import LoraAdapter

    generator = torch.Generator().manual_seed(seed)
    pair = torch.randn(2, 4, generator=generator), torch.randn(4, 2, generator=generator)
    return LoraAdapter(name, 2, 1.0, {(0, "q_proj"): pair})


def make_core(
    *,
    num_blocks: int = 64,
    context: int = 512,
    step_s: float = 0.0,
    vocab: int = VOCAB,
    tokenizer: Any = None,
    **settings: Any,
) -> tuple[EngineCore, HashRunner]:
    """An engine core over a :class:`HashRunner`."""
    config = EngineConfig(model="hash", num_blocks=num_blocks, **settings)
    runner = HashRunner(num_blocks, config.block_size, vocab, step_s)
    info = EngineInfo(
        model="hash",
        dtype="float32",
        device="cpu",
        context_length=context,
        vocab_size=vocab,
        eos_token_ids=(EOS,),
        block_size=config.block_size,
        num_blocks=num_blocks,
        max_seqs=config.max_seqs,
        threads=1,
        revision="r1",
    )
    return EngineCore(config, runner, info, time.monotonic, tokenizer), runner


def drain(core: EngineCore, now: float = 0.0, most: int = 100_000) -> dict[tuple[str, int], list[Any]]:
    """Step until nothing is left; outputs by (request, choice)."""
    outputs: dict[tuple[str, int], list[Any]] = {}
    for _ in range(most):
        if not core.has_work:
            return outputs
        for output in core.step(now):
            outputs.setdefault((output.request_id, output.index), []).append(output)
    raise AssertionError(f"still working after {most} steps")


def tokens_of(outputs: Sequence[Any]) -> list[int]:
    """All tokens of one choice."""
    return [t for o in outputs for t in o.token_ids]


def build(config: EngineConfig) -> Built:
    """What an engine process of the tests runs. ``config.model`` is "hash" or "hash:" and the seconds that a
    step takes."""
    _, _, step_s = config.model.partition(":")
    settings = {f.name: getattr(config, f.name) for f in dataclasses.fields(config)}
    settings.pop("model")
    if config.model == "hash:broken":
        raise ValueError("this model cannot be loaded")
    core, runner = make_core(
        **{**settings, "num_blocks": config.num_blocks or 256}, step_s=float(step_s or 0)
    )

    def before_run(batch: StepBatch) -> None:
        if POISON in batch.token_ids[batch.positions == 0]:
            if threading.current_thread() is threading.main_thread():
                os.kill(os.getpid(), signal.SIGKILL)
            raise RuntimeError("poison")

    def read_adapter(name: str, path: str) -> LoraAdapter:
        if not path.isdigit():
            raise ValueError(f"{path} is no adapter")
        return tiny_adapter(name, int(path))

    runner.before_run = before_run
    for name, path in config.adapters.items():
        core.load_adapter(name, read_adapter(name, path))
    return Built(core, read_adapter)
