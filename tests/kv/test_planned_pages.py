"""Plans over the server's pages: with the fused decoder and with torch, alone and inside the engine."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, Qwen3Config

from sharewell import kernels
from sharewell.kv import (
    KVPlan,
    LowRank,
    OwnPlan,
    PagedForward,
    PlanError,
    PlannedForward,
    Read,
    ReusePlan,
    Segment,
    SourcePlan,
    TensorKV,
    UnsupportedModel,
)
from sharewell.models import Checkpoint, FusedDecoder, LoraAdapter, StockDecoder, load_transformers
from sharewell.serving.core import Planner

SIZE, BLOCKS, VOCAB, LAYERS = 16, 24, 160, 3
SHAPE: dict[str, Any] = {
    "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": LAYERS, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 32, "vocab_size": VOCAB, "max_position_embeddings": 256,
    "initializer_range": 0.2,
}  # fmt: skip
FORMATS = ["float32", "bfloat16", "int8"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("qwen3")
    with torch.random.fork_rng():
        torch.random.manual_seed(5)
        model = AutoModelForCausalLM.from_config(Qwen3Config(**SHAPE), dtype=torch.float32)
    model.save_pretrained(path)
    return path


def fused(folder: Path, format: str, **options: Any) -> PagedForward:
    decoder = FusedDecoder(Checkpoint(folder), format, max_length=200, **options)
    pages = PagedForward(decoder, BLOCKS, SIZE)
    pages.pool.data.fill_(0xFF)  # NaN wherever nothing was written
    return pages


def torchy(folder: Path) -> PagedForward:
    return PagedForward(StockDecoder.from_folder(folder), BLOCKS, SIZE)


def formats() -> list[str]:
    return FORMATS if kernels.available() else FORMATS[:1]


TABLE = np.random.default_rng(0).permutation(BLOCKS)[:8].astype(np.int32)


def ordinary(pages: PagedForward, ids: list[int], start: int = 0, adapter: int = -1) -> torch.Tensor:
    at = np.arange(start, start + len(ids))
    return pages(
        np.array(ids), at, TABLE[at // SIZE].astype(np.int64) * SIZE + at % SIZE,
        np.array([0, len(ids)], np.int32), np.array([at[-1] + 1], np.int32), TABLE[None],
        np.arange(len(ids)), np.array([adapter], np.int32),
    )[:, :VOCAB].clone()  # fmt: skip


def planned(
    pages: PagedForward, plan: KVPlan, ids: list[int], start: int = 0, rows: Any = None, adapter: int = -1
) -> Any:
    at = np.arange(start, start + len(ids))
    rows = np.arange(len(ids)) if rows is None else np.array(rows)
    logits, stats = pages.planned(plan, np.array(ids), at, TABLE, rows, adapter)
    return logits[:, :VOCAB], stats


def text(seed: int, n: int) -> list[int]:
    return np.random.default_rng(seed).integers(0, VOCAB, n).tolist()


class Watched(KVPlan):
    """Computes everything, and keeps what it observes."""

    def __init__(self) -> None:
        self.seen: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}

    def observe(self, layer: int, slots: Any, k: Any, v: Any, mass: Any = None) -> None:
        self.seen[layer] = k.clone(), v.clone()


@pytest.mark.parametrize("format", FORMATS)
def test_a_plan_that_computes_all_equals_the_ordinary_step_to_the_last_bit(folder: Path, format: str) -> None:
    if format not in formats():
        return  # the fused step has only float32 on this CPU
    pages = fused(folder, format)
    ids = text(1, 45)
    first, then = ordinary(pages, ids[:20]), ordinary(pages, ids[20:], 20)
    other = fused(folder, format)
    plan = Watched()
    a, stats = planned(other, plan, ids[:20])
    b, _ = planned(other, Watched(), ids[20:], 20)
    assert torch.equal(a, first) and torch.equal(b, then)
    assert stats.token_layers == 20 * LAYERS
    oracle = PlannedForward(StockDecoder.from_folder(folder))
    expected = Watched()
    oracle(ids[:20], expected)
    bound = {"float32": 1e-4, "bfloat16": 0.05, "int8": 0.5}[format]
    for layer, (k, v) in expected.seen.items():
        assert (plan.seen[layer][0].float() - k).abs().max() < bound * max(1.0, float(k.abs().max()))
        assert (plan.seen[layer][1].float() - v).abs().max() < bound * max(1.0, float(v.abs().max()))


class Partial(KVPlan):
    """Layer 0: most tokens; layer 1: few; layer 2: some that were left out come back. The rest is read."""

    def __init__(self, sets: list[list[int]], n: int, segment: Segment, hidden: torch.Tensor) -> None:
        self.sets, self.segment, self.given = [torch.tensor(s) for s in sets], segment, hidden
        self.every = torch.arange(n)

    def active(self, layer: int) -> torch.Tensor:
        return self.sets[layer]

    def read(self, layer: int) -> Iterable[tuple[torch.Tensor, Read]]:
        rest = self.every[~torch.isin(self.every, self.sets[layer])]
        return [(rest, Read(self.segment, rest))]

    def hidden(self, layer: int, slots: torch.Tensor) -> torch.Tensor:
        return self.given[slots]


def segment_of(seed: int, n: int, positions: torch.Tensor) -> Segment:
    generator = torch.Generator().manual_seed(seed)
    k, v = (torch.randn(LAYERS, n, 2, 32, generator=generator) for _ in range(2))
    return Segment(0, "m", torch.arange(n), positions, TensorKV(k, v))


@pytest.mark.parametrize("start", [0, 21])
@pytest.mark.parametrize("n", [5, 33, 60])
def test_partial_plans_agree_between_fused_pages_torch_pages_and_dense_buffers(
    folder: Path, n: int, start: int
) -> None:
    rng = np.random.default_rng(n + start)
    sets = [np.flatnonzero(rng.random(n) < share).tolist() for share in (0.8, 0.3, 0.6)]
    sets = [sorted({*s, n - 1}) for s in sets]
    segment = segment_of(n, n, torch.from_numpy(rng.integers(0, 150, n)))
    hidden = torch.randn(n, 64, generator=torch.Generator().manual_seed(n))
    past, ids = text(7, start), text(8, n)
    results = []
    for pages in (fused(folder, "float32"), torchy(folder)):
        if past:
            ordinary(pages, past)
        a, stats = planned(pages, Partial(sets, n, segment, hidden), ids, start, rows=sets[2])
        results.append(torch.cat([a, ordinary(pages, [3, 4, 5], start + n)]))
        assert stats.computed == [len(s) for s in sets]
        assert stats.tokens_read == [n - len(s) for s in sets]
    engine = PlannedForward(StockDecoder.from_folder(folder))
    space = engine.space()
    if past:
        engine(past, space=space)
    out = engine(ids, Partial(sets, n, segment, hidden), space=space, want=torch.tensor(sets[2]))
    results.append(torch.cat([out.logits, engine([3, 4, 5], space=space, want="all").logits]))
    assert (results[0] - results[2]).abs().max() < 3e-4
    assert (results[1] - results[2]).abs().max() < 3e-4


def test_layers_that_read_from_others_agree_on_fused_pages(folder: Path) -> None:
    ids, plan = text(9, 37), SourcePlan([0, 0, 2])
    out = PlannedForward(StockDecoder.from_folder(folder))(ids, plan, want="all")
    logits, _ = planned(fused(folder, "float32"), plan, ids)
    assert (logits - out.logits).abs().max() < 2e-4


def test_adapters_act_in_planned_passes(folder: Path) -> None:
    generator = torch.Generator().manual_seed(3)
    targets = {
        (0, "q_proj"): (torch.randn(4, 64, generator=generator), torch.randn(128, 4, generator=generator))
    }
    pages = fused(folder, "float32", max_adapters=1, max_lora_rank=8)
    pages.decoder.load_adapter(0, LoraAdapter("a", 4, 0.5, targets))
    ids = text(10, 20)
    with_adapter = ordinary(pages, ids, adapter=0)
    again, _ = planned(pages, Watched(), ids, adapter=0)
    without, _ = planned(pages, Watched(), ids)
    assert torch.equal(again, with_adapter) and (without - with_adapter).abs().max() > 0.01


def test_reuse_at_the_same_place_equals_computing(folder: Path) -> None:
    """Same prefix, same positions: what is read is what would be computed."""
    ids = text(11, 50)
    pages = fused(folder, "float32")
    expected = ordinary(pages, ids)
    out = PlannedForward(StockDecoder.from_folder(folder))(ids)
    segment = Segment(
        0,
        "m",
        torch.tensor(ids),
        torch.arange(50),
        TensorKV.copied(out.space, 0, torch.arange(50)),  # type: ignore
    )
    slots = torch.arange(10, 40)
    fresh = fused(folder, "float32")
    logits, stats = planned(fresh, ReusePlan([(slots, segment, slots)]), ids, rows=[49])
    assert (logits[0] - expected[49]).abs().max() < 1e-3
    assert stats.token_layers == 20 * LAYERS


def test_what_pages_cannot_do_is_said(folder: Path) -> None:
    pages, ids = fused(folder, "float32"), text(12, 10)

    class Full(KVPlan):
        mask = "full"

    class Low(KVPlan):
        def low_rank(self, layer: int) -> LowRank:
            return LowRank(torch.zeros(2, 64), torch.zeros(2, 64), 1.0)

    with pytest.raises(UnsupportedModel, match="causally only"):
        planned(pages, Full(), ids)
    with pytest.raises(UnsupportedModel, match="layer 0"):
        planned(pages, Low(), ids)
    with pytest.raises(UnsupportedModel, match="no plane z of width 2"):
        planned(torchy(folder), Low(), ids)
    with pytest.raises(PlanError, match="slot 0 is neither active nor read"):
        planned(pages, Partial2([3, 9]), ids, rows=[9])


class Partial2(KVPlan):
    def __init__(self, slots: list[int]) -> None:
        self.slots = torch.tensor(slots)

    def active(self, layer: int) -> torch.Tensor:
        return self.slots


def test_attention_mass_on_fused_pages_is_the_stock_decoders(folder: Path) -> None:
    class Mass(KVPlan):
        def __init__(self, to_self: bool) -> None:
            self.mass_of_self, self.got = to_self, []

        def wants_attention(self, layer: int) -> bool:
            return layer > 0

        def observe(self, layer: int, slots: Any, k: Any, v: Any, mass: Any = None) -> None:
            self.got.append(mass)

    ids = text(14, 41)
    for to_self in (True, False):
        ours, oracle = Mass(to_self), Mass(to_self)
        planned(fused(folder, "float32"), ours, ids)
        PlannedForward(StockDecoder.from_folder(folder))(ids, oracle)
        assert ours.got[0] is None and oracle.got[0] is None
        for layer in (1, 2):
            assert (ours.got[layer][0] - oracle.got[layer][0]).abs().max() < 1e-3
            total = float(ours.got[layer][0].sum())
            assert (abs(total - 41 * 4) < 1e-2) is to_self


# Inside the engine


class Remembering(Planner):
    """Keeps the keys and values of every finished prompt and reuses them in later ones."""

    def __init__(self, core: Any, runner: Any) -> None:
        self.core, self.runner = core, runner
        self.kept: list[Segment] = []
        self.failing = False

    def plan(self, sequence: Any) -> KVPlan | None:
        if self.failing:
            return Partial2([len(sequence.tokens) - 1])
        prompt = sequence.tokens
        for segment in self.kept:
            n, ids = len(segment), segment.token_ids.tolist()
            for start in range(len(prompt) - n):
                if prompt[start : start + n] == ids:
                    return FromPlace(start, n, segment)
        return None

    def leaving(self, sequence: Any) -> None:
        space = self.runner.forward.pages(self.core.blocks.table(sequence.id), sequence.computed)
        places = torch.arange(sequence.n_prompt)
        kv = TensorKV.copied(space, 0, places)
        self.kept.append(Segment(0, "m", torch.tensor(sequence.tokens[: sequence.n_prompt]), places, kv))


class FromPlace(KVPlan):
    """A segment's tokens from a place on; what a shared prefix covers already is left alone."""

    def __init__(self, start: int, n: int, segment: Segment) -> None:
        self.start, self.n, self.segment = start, n, segment

    def begin(self, call: Any) -> None:
        inside = (call.positions >= self.start) & (call.positions < self.start + self.n)
        self.slots, self.computed = inside.nonzero().flatten(), (~inside).nonzero().flatten()
        self.tokens = call.positions[inside] - self.start

    def active(self, layer: int) -> torch.Tensor | None:
        return self.computed if layer == 0 else None

    def read(self, layer: int) -> Iterable[tuple[torch.Tensor, Read]]:
        return [(self.slots, Read(self.segment, self.tokens))]


@pytest.fixture(params=["fused", "stock"])
def engine(request: pytest.FixtureRequest, tmp_path: Path) -> Any:
    from sharewell.serving.core import EngineConfig, EngineCore, EngineInfo
    from sharewell.serving.core.paged_runner import PagedRunner

    with torch.random.fork_rng():
        torch.random.manual_seed(6)
        config = LlamaConfig(**{**SHAPE, "eos_token_id": None, "bos_token_id": None})
        AutoModelForCausalLM.from_config(config, dtype=torch.float32).save_pretrained(tmp_path)
    settings = EngineConfig(
        str(tmp_path), dtype="float32", runner=request.param, num_blocks=40, max_batch_tokens=32, max_seqs=4,
        threads=1,
    )  # fmt: skip
    runner = PagedRunner(tmp_path, settings, 1)
    info = EngineInfo("m", "float32", "cpu", 256, VOCAB, (), 16, 40, 4, 1, "r")
    core = EngineCore(settings, runner, info, lambda: 0.0)
    return core, runner, tmp_path


def generate(core: Any, requests: list[Any]) -> dict[str, list[int]]:
    for request in requests:
        core.submit(request)
    out: dict[str, list[int]] = {r.request_id: [] for r in requests}
    while core.has_work:
        for o in core.step(0.0):
            assert o.error is None, o.error
            out[o.request_id] += o.token_ids
    return out


def request(name: str, ids: list[int], sharing: Any = None, n: int = 6) -> Any:
    from sharewell.serving.core import EngineRequest, SamplingParams

    sampling = SamplingParams(temperature=0, max_tokens=n, ignore_eos=True)
    return EngineRequest(name, tuple(ids), sampling, sharing=sharing)


def test_a_planned_request_decodes_beside_ordinary_ones_and_is_counted(engine: Any) -> None:
    core, runner, folder = engine
    planner = core.planner = Remembering(core, runner)
    shared, prefix, suffix = text(20, 60), text(21, 30), text(22, 9)
    generate(core, [request("first", shared, {})])
    assert len(planner.kept) == 1 and core.stats().planned_prompts == 0
    prompt = prefix + shared + suffix
    got = generate(
        core, [request("plain", text(23, 50)), request("shared", prompt, {}), request("b", prompt)]
    )
    stats = core.stats()
    assert stats.planned_prompts == 1
    assert stats.planned_token_layers == LAYERS * (30 + 9) and stats.reused_token_layers == LAYERS * 60

    def greedy(ids: list[int], plan: KVPlan | None = None) -> list[int]:
        oracle = PlannedForward(load_transformers(folder))
        out, tokens = oracle(ids, plan), []
        for _ in range(6):
            tokens.append(int(out.logits.argmax()))
            out = oracle([tokens[-1]], space=out.space)
        return tokens

    assert got["plain"] == greedy(text(23, 50)), "company with a plan changes nothing"
    assert got["b"] == greedy(prompt), "what a plan wrote is not taken for an exact prefix"
    assert got["shared"] == greedy(prompt, FromPlace(30, 60, planner.kept[0]))
    core.blocks.check_integrity()
    assert core.blocks.num_used == 0


def test_a_plan_that_fails_is_computed_in_full(engine: Any) -> None:
    core, runner, _ = engine
    core.planner = Remembering(core, runner)
    ids = text(24, 40)
    expected = generate(core, [request("a", ids)])["a"]
    core.planner.failing = True
    assert generate(core, [request("b", ids + text(25, 30), {})])["b"]
    core.planner.failing = False
    core.planner.kept.clear()
    assert generate(core, [request("c", ids)])["c"] == expected


def test_preempted_planned_requests_come_to_the_same_end(engine: Any) -> None:
    import dataclasses

    core, runner, _ = engine
    planner = core.planner = Remembering(core, runner)
    shared = text(26, 40)
    generate(core, [request("first", shared, {})])
    prompts = [text(30 + i, 5) + shared + text(40 + i, 8) for i in range(3)]
    kept = list(planner.kept)
    calm = generate(core, [request(f"r{i}", p, {}) for i, p in enumerate(prompts)])
    core.config = dataclasses.replace(core.config, forced_preemption_every=3)
    planner.kept = kept
    core.planner = planner
    disturbed = generate(core, [request(f"r{i}", p, {}) for i, p in enumerate(prompts)])
    assert core.stats().preemptions > 0
    assert {k: v[0] for k, v in disturbed.items()} == {k: v[0] for k, v in calm.items()}
    core.blocks.check_integrity()


def test_own_plan_is_what_a_request_without_sharing_gets(engine: Any) -> None:
    core, _, _ = engine
    core.submit(request("a", text(50, 8)))
    assert core.scheduler.waiting[0].kv_plan is None
    assert type(OwnPlan().source(3)) is int
