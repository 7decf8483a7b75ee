"""LoRA roles over one cache beside a cache each: bytes, first tokens, right answers, and the kernel.

Roles for the quality rows are those of ``tools/train/lora_roles.py``; the full scale trains what its runs
folder lacks (about a minute of CPU a seed)."""

from __future__ import annotations

import time
from collections.abc import Callable
from itertools import permutations
from statistics import median
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from sharewell.bench import Progress, Report, Row, environment, interleave, values
from sharewell.kernels import flash_lora_attention
from sharewell.kv import (
    LoraShareConfig,
    MultiLoraSession,
    PlanCache,
    SharedLoraCache,
    cache_argument,
    share_A,
    similarity,
)
from tools.train import lora_roles

MODES = ("none", "base", "base_lr", "full")
SEPARATE, FULL = "a cache for each role", "full sharing"
SEEDS = 3


# Time, bytes, tokens


def backbone(layers: int, seed: int) -> Any:
    """A Llama with SmolLM2's width and heads (3 KV heads of 64), random weights, and three adapters that
    share A: 30 million parameters with 8 layers."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM, LlamaConfig

    config = LlamaConfig(
        hidden_size=576, intermediate_size=1536, num_hidden_layers=layers, num_attention_heads=9,
        num_key_value_heads=3, head_dim=64, vocab_size=4096, max_position_embeddings=8192,
        bos_token_id=None, eos_token_id=None, pad_token_id=0,
    )  # fmt: skip
    settings: dict[str, Any] = {"r": 8, "lora_alpha": 16, "target_modules": ["q_proj", "v_proj"]}
    with torch.random.fork_rng():
        torch.random.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
        model = get_peft_model(model, LoraConfig(**settings), adapter_name="plan")
        for role in ("act", "review"):
            model.add_adapter(role, LoraConfig(**settings))
        for name, weight in model.named_parameters():
            if "lora_B" in name:
                weight.data.normal_(std=0.02)
    share_A(model, "plan")
    return model.eval()


class _FirstToken:
    """A logits processor that notes when the first logits are there."""

    def __init__(self) -> None:
        self.at: float | None = None

    def __call__(self, ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        self.at = self.at or time.process_time()
        return scores


def turns_of(
    model: Any, mode: str, tokens: int, answer: int, seed: int
) -> tuple[MultiLoraSession, list[float]]:
    """Six turns of three roles on a transcript that ends with ``tokens`` tokens: the session, and the CPU
    seconds to the first token of each turn."""
    rng = np.random.default_rng(seed)
    more = tokens // 50
    lengths = [tokens - 5 * more - 6 * answer] + [more] * 5
    session = MultiLoraSession(model, {r: r for r in lora_roles.ROLES}, LoraShareConfig(mode))  # pyright: ignore[reportArgumentType]
    first = []
    for turn, length in enumerate(lengths):
        seen, begun = _FirstToken(), time.process_time()
        session.run(
            lora_roles.ROLES[turn % 3], rng.integers(1, 4096, length).tolist(), max_new_tokens=answer,
            min_new_tokens=answer, do_sample=False, logits_processor=[seen],
        )  # fmt: skip
        assert seen.at is not None
        first.append(seen.at - begun)
    return session, first


def session_rows(
    layers: int, tokens: int, answer: int, repeats: int, seed: int, progress: Progress
) -> tuple[list[Row], dict[str, Any]]:
    model = backbone(layers, seed)
    first: dict[str, list[list[float]]] = {mode: [] for mode in MODES}
    last: dict[str, MultiLoraSession] = {}

    def contender(mode: str) -> Callable[[], None]:
        def converse() -> None:
            last[mode], seconds = turns_of(model, mode, tokens, answer, seed)
            first[mode].append(seconds)

        return converse

    samples = interleave({mode: contender(mode) for mode in MODES}, repeats, progress=progress)
    waited = {mode: [sum(turns) for turns in first[mode][-repeats:]] for mode in MODES}
    whole = {mode: values(samples[mode], "cpu_s") for mode in MODES}
    memory = {mode: last[mode].memory() for mode in MODES}
    computed = {mode: sum(last[mode].computed.values()) for mode in MODES}
    parameters = sum(p.numel() for name, p in model.named_parameters() if "lora_" not in name)
    size = f"{parameters / 1e6:.0f}M parameters, 3 roles, 6 turns, {tokens:,} tokens"

    def waits(ours: str, theirs: str, name: str, claim: str, target: float | None) -> Row:
        return Row.from_samples(
            f"CPU time to first tokens of 6 turns, {ours}", waited[ours], waited[theirs], "s", "lower", name,
            claim=claim, target=target, note=size,
        )  # fmt: skip

    separate = memory["none"].separate
    rows = [
        Row("KV bytes, base_lr", memory["base_lr"].total, separate, "B", "lower", SEPARATE,
            "1/3 and a little: at most 0.35 of separate caches", note=size, target=1 / 0.35),
        Row("KV bytes, base", memory["base"].total, separate, "B", "lower", SEPARATE,
            "1/3 + r / (2 x 192)", note=size),
        Row("tokens computed, base_lr", computed["base_lr"], computed["none"], "tokens", "lower", SEPARATE,
            "the transcript once, not once a role", note=size, target=2.0),
        Row("tokens computed, base", computed["base"], computed["none"], "tokens", "lower", SEPARATE,
            "as many as separate caches, less key and value projections", note=size),
        waits("base_lr", "none", SEPARATE, "at most half (paper: 4.2 times sooner at 33.7k tokens)", 2.0),
        waits("base_lr", "full", FULL, "within 10 % of full sharing (paper: 1 %)", 1 / 1.1),
        waits("base", "none", SEPARATE, "paper: 1.6 times sooner", None),
        Row.from_samples("CPU time of the conversation, base_lr", whole["base_lr"], whole["none"], "s",
                         "lower", SEPARATE, claim="paper: 2.5 times the throughput",
                         note=f"{size}, {6 * answer} of them answered"),
    ]  # fmt: skip
    turns = {mode: [round(median(x), 4) for x in zip(*first[mode][-repeats:], strict=True)] for mode in MODES}
    return rows, {"ttft_cpu_s_by_turn": turns, "computed": computed}


# Quality


class Classroom:
    """The trained roles of a seed, asked over caches of every mode."""

    def __init__(self, model: Any, seed: int, transcripts: int) -> None:
        self.model, self.seed = model, seed
        self.argument = cache_argument(model.get_base_model().forward) or "past_key_values"
        found = lora_roles.exercises(transcripts, np.random.default_rng((seed, 99)))
        self.records, self.keys, self.values = torch.from_numpy(found[0]), found[1], found[2]

    def _call(self, cache: Any, ids: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            return self.model(input_ids=ids, use_cache=True, **{self.argument: cache}).logits

    def _ask(self, role: str, call: Callable[[torch.Tensor], torch.Tensor]) -> float:
        """Percent of right answers; each answer is fed back before the next instruction."""
        right = []
        asked = lora_roles.instructions(self.keys)
        wanted = lora_roles.answers(self.values, role, self.seed)
        said = None
        for i in range(lora_roles.ASKED):
            new = asked[:, i : i + 1] if said is None else torch.cat([said, asked[:, i : i + 1]], 1)
            said = call(new)[:, -1:].argmax(-1)
            right.append((said[:, 0] == wanted[:, i]).float().mean())
        return 100 * float(torch.stack(right).mean())

    def right(self, mode: str, writers: tuple[str, ...]) -> dict[str, float]:
        """Percent right of each role when ``writers`` wrote a third of the transcript each."""
        pieces = self.records.chunk(len(writers), 1)
        roles = {role: role for role in lora_roles.ROLES}
        found = {}
        if mode in ("base", "base_lr"):
            cache = SharedLoraCache(self.model, roles, LoraShareConfig(mode))  # pyright: ignore[reportArgumentType]

            def view(role: str) -> SharedLoraCache:
                mine = cache.fork(role)
                if mine.covered() < mine.stored:
                    with mine.attached(skip=True):
                        self._call(mine, self.records[:, mine.covered() : mine.stored])
                return mine

            for writer, piece in zip(writers, pieces, strict=True):
                mine = view(writer)
                with mine.attached():
                    self._call(mine, piece)
            for role in roles:
                mine = view(role)
                with mine.attached():
                    found[role] = self._ask(role, lambda ids, mine=mine: self._call(mine, ids))
                mine.truncate(self.records.shape[1])
            return found
        shared = PlanCache(lora_roles.LAYERS)
        for writer, piece in zip(writers, pieces, strict=True):
            self.model.set_adapter(writer)
            self._call(shared, piece)
        for role in roles:
            self.model.set_adapter(role)
            mine = shared
            if mode == "none":
                mine = PlanCache(lora_roles.LAYERS)
                self._call(mine, self.records)
            found[role] = self._ask(role, lambda ids, mine=mine: self._call(mine, ids))
            mine.crop(self.records.shape[1] - mine.get_seq_length())
        return found

    def without_values(self) -> float:
        """Percent right with separate caches when the value adapters are off: what they are worth."""
        weights = [p for name, p in self.model.named_parameters() if "v_proj.lora_B" in name]
        kept = [w.detach().clone() for w in weights]
        for w in weights:
            w.data.zero_()
        found = self.right("none", lora_roles.ROLES)
        for w, old in zip(weights, kept, strict=True):
            w.data.copy_(old)
        return sum(found.values()) / len(found)

    def alike(self) -> dict[str, float | None]:
        """Cosines between roles over the first transcripts."""
        roles = {role: role for role in lora_roles.ROLES}
        found = [vars(similarity(self.model, roles, row.tolist())) for row in self.records[:8]]
        return {name: float(np.mean([f[name] for f in found])) for name in found[0]}


def quality_rows(
    seeds: int, transcripts: int, progress: Progress, steps: int | None = None
) -> tuple[list[Row], dict[str, Any]]:
    scores: dict[str, list[float]] = {mode: [] for mode in (*MODES, "values off")}
    spread_of_writers, records, alike = [], [], []
    for seed in range(seeds):
        progress("training roles that are missing", seed, seeds)
        if steps is None:
            model, record = lora_roles.train(seed, runs=lora_roles.runs_folder())
        else:
            model, record = lora_roles.train(seed, runs=None, steps=steps, role_steps=steps)
        records.append(record)
        room = Classroom(model, seed, transcripts)
        by_writers: dict[str, list[float]] = {mode: [] for mode in MODES}
        for writers in permutations(lora_roles.ROLES):
            for mode in MODES:
                found = room.right(mode, writers)
                by_writers[mode].append(sum(found.values()) / len(found))
        for mode in MODES:
            scores[mode].append(float(np.mean(by_writers[mode])))
        spread_of_writers.append([round(x, 2) for x in by_writers["base_lr"]])
        scores["values off"].append(room.without_values())
        alike.append(room.alike())
    progress("training roles that are missing", seeds, seeds)
    asked = transcripts * lora_roles.ASKED * len(lora_roles.ROLES)
    note = f"{asked:,} answers x 6 orders of writers, {seeds} seed{'s' if seeds > 1 else ''}"

    def row(metric: str, ours: str, theirs: str, name: str, claim: str, points: float | None) -> Row:
        b = median(scores[theirs])
        target = None if points is None else (b + points) / b if b > 0 else None
        return Row.from_samples(metric, scores[ours], scores[theirs], "% right", "higher", name,
                                claim=claim, target=target, note=note)  # fmt: skip

    rows = [
        row("right answers, base_lr", "base_lr", "none", SEPARATE,
            "within 2 points (paper: 0.2 to 1.4)", -2.0),
        row("right answers, base", "base", "none", SEPARATE, "paper: 0.1 to 0.7 points lost", -2.0),
        row("right answers, base_lr, against full sharing", "base_lr", "full", FULL,
            "full sharing loses at least 3 points more (paper: 2.5 to 5.3 in all)", 3.0),
        row("right answers, separate caches", "none", "values off", "value adapters off",
            "the task needs the value adapters", None),
    ]  # fmt: skip
    return rows, {"percent_right": scores, "base_lr_by_order_of_writers": spread_of_writers,
                  "similarity": alike, "training": records}  # fmt: skip


# Kernel


def kernel_rows(context: int, repeats: int, inner: int, progress: Progress) -> list[Row]:
    """One query over SmolLM2's heads, against computing the values first."""
    rows = []
    for dtype, name in ((torch.float32, "fp32"), (torch.bfloat16, "bf16")):
        g = torch.Generator().manual_seed(0)
        q, k, v, z, b = (
            (torch.randn(*shape, generator=g) * 0.3).to(dtype)
            for shape in ((1, 9, 1, 64), (1, 3, context, 64), (1, 3, context, 64), (1, context, 8), (8, 192))
        )
        by_head = b.view(8, 3, 64).transpose(0, 1).contiguous()

        def expanded() -> torch.Tensor:
            full = torch.baddbmm(v[0], z.expand(3, -1, -1), by_head, alpha=2.0)[None]  # noqa: B023
            return F.scaled_dot_product_attention(q.view(1, 3, 3, 64), k, full).view(1, 9, 1, 64)  # noqa: B023

        def ours(backend: Any) -> Callable[[], None]:
            def attend() -> None:
                for _ in range(inner):
                    flash_lora_attention(q, k, v, z, b, 2.0, backend=backend)  # noqa: B023

            return attend

        def theirs() -> None:
            for _ in range(inner):
                expanded()  # noqa: B023

        off = (flash_lora_attention(q, k, v, z, b, 2.0) - expanded()).abs().max()
        assert float(off) < 0.02, f"the kernel is off by {float(off)}"
        samples = interleave(
            {"two products": ours("matmul"), "[V | Z]": ours("sdpa"), "expanded": theirs},
            repeats,
            progress=progress,
        )
        speed = {kind: [inner / t for t in values(found, "cpu_s")] for kind, found in samples.items()}
        for kind, found in speed.items():
            if kind == "expanded":
                continue
            bar = kind == "two products" and dtype == torch.float32
            rows.append(
                Row.from_samples(
                    f"attention of a decoded token, {kind}, {name}",
                    found,
                    speed["expanded"],
                    "per CPU s",
                    "higher",
                    "values computed first",
                    claim="at least 1.2 times (paper: 1.35 times, CUDA)" if bar else "",
                    target=1.2 if bar else None,
                    note=f"context {context:,}, 9 heads on 3 of 64, rank 8",
                )
            )
    return rows


def run(scale: str, *, seed: int, progress: Progress) -> Report:
    """``smoke`` is a small conversation and hardly trained roles; ``full`` the sizes of the claims."""
    torch.set_num_threads(1)
    if scale == "full":
        rows, extra = session_rows(8, 4096, 16, 3, seed, progress)
        quality, more = quality_rows(SEEDS, 256, progress)
        rows += quality + kernel_rows(16_384, 9, 20, progress)
    else:
        rows, extra = session_rows(2, 400, 4, 2, seed, progress)
        quality, more = quality_rows(1, 16, progress, steps=30)
        rows += quality + kernel_rows(2_048, 3, 5, progress)
    return Report("lragent", scale, tuple(rows), environment(), seed, {**extra, **more})  # pyright: ignore[reportArgumentType]
