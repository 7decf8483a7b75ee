"""Relaying in the engine: what one request decoded is reused in the prompt of another that opts in."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig

from sharewell.kv import RelayConfig, UnsupportedModel
from sharewell.serving.core import EngineConfig, EngineCore, EngineInfo, EngineRequest, SamplingParams
from sharewell.serving.core.paged_runner import PagedRunner
from sharewell.serving.core.relaying import RelayPlanner, RelaySettings

VOCAB, LAYERS = 300, 4
OPEN = RelayConfig(layers=(1, 1, 3), max_recompute=1.0)
ALL = RelayConfig(tau_dev=0.0, layers=(0, 1, 3), max_recompute=1.0)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("tiny")
    config = LlamaConfig(
        hidden_size=64, intermediate_size=96, num_hidden_layers=LAYERS, num_attention_heads=4,
        num_key_value_heads=2, vocab_size=VOCAB, max_position_embeddings=512, initializer_range=0.2,
        head_dim=32, eos_token_id=None, bos_token_id=None,
    )  # fmt: skip
    with torch.random.fork_rng():
        torch.random.manual_seed(4)
        AutoModelForCausalLM.from_config(config, dtype=torch.float32).save_pretrained(path)
    return path


def build(
    folder: Path, runner: str = "auto", blocks: int = 60, config: Any = OPEN, **settings: Any
) -> EngineCore:
    engine = EngineConfig(
        str(folder), dtype="float32", runner=runner, num_blocks=blocks, max_batch_tokens=64, max_seqs=4,  # type: ignore
        threads=1,
    )  # fmt: skip
    paged = PagedRunner(folder, engine, 1)
    info = EngineInfo("m", "float32", "cpu", 400, VOCAB, (), 16, blocks, 4, 1, "r")
    core = EngineCore(engine, paged, info, lambda: 0.0)
    options = {"share": 0.5, "sample": 0.0, **settings}
    core.planner = RelayPlanner(core, paged.forward, RelaySettings(**options), config=config)
    return core


def text(seed: int, n: int) -> list[int]:
    return np.random.default_rng(seed).integers(0, VOCAB, n).tolist()


def request(name: str, ids: list[int], n: int = 40, salt: str = "", sharing: Any = None) -> EngineRequest:
    sampling = SamplingParams(temperature=0, max_tokens=n, ignore_eos=True)
    sharing = {"relay": "auto"} if sharing is None else sharing
    return EngineRequest(name, tuple(ids), sampling, cache_salt=salt, sharing=sharing or None)


def answer(core: EngineCore, *requests: EngineRequest) -> tuple[dict[str, list[int]], dict[str, Any]]:
    for r in requests:
        core.submit(r)
    tokens: dict[str, list[int]] = {r.request_id: [] for r in requests}
    reports: dict[str, Any] = {}
    while core.has_work:
        for o in core.step(0.0):
            assert o.error is None
            tokens[o.request_id] += o.token_ids
            if o.sharing is not None:
                assert o.request_id not in reports
                reports[o.request_id] = o.sharing
    return tokens, reports


@pytest.mark.parametrize("runner", ["auto", "stock"])
def test_an_answer_is_relayed_into_another_prompt(folder: Path, runner: str) -> None:
    core = build(folder, runner)
    a, _ = answer(core, request("a", text(1, 20)))
    prompt = [*text(2, 30), *a["a"], *text(3, 8)]
    _, reports = answer(core, request("b", prompt, 5))
    report = reports["b"]
    # the last decoded token has no keys and values yet: 39 are found
    assert report["relayed"] + report["recomputed"] == 39 and report["relayed"] > 0
    assert report["spans"][0][0] == 0 and report["spans"][-1][1] == len(prompt)
    assert all(x[1] == y[0] for x, y in zip(report["spans"], report["spans"][1:], strict=False))
    assert {s[3] for s in report["spans"] if s[2] == "relayed"} == {"a"}
    stats = core.stats()
    assert stats.relayed_prompts == 1 and stats.relayed_tokens == report["relayed"]
    assert stats.reused_token_layers > 0 and stats.relay_segments == 1
    core.blocks.check_integrity()


def test_everything_recomputed_gives_the_tokens_of_full_prefill(folder: Path) -> None:
    core = build(folder, config=ALL)
    a, _ = answer(core, request("a", text(4, 20)))
    prompt = [*text(5, 30), *a["a"], *text(6, 8)]
    relayed, reports = answer(core, request("b", prompt, 12))
    assert reports["b"]["recomputed"] == 39
    plain, _ = answer(core, request("c", prompt, 12, sharing={}))
    assert relayed["b"] == plain["c"]


def test_only_named_answers_of_the_same_scope_are_used(folder: Path) -> None:
    core = build(folder)
    a, _ = answer(core, request("a", text(7, 20), salt="alice"))
    prompt = [*text(8, 30), *a["a"], *text(9, 8)]

    def relayed(name: str, **more: Any) -> int:
        return answer(core, request(name, prompt, 1, **more))[1][name]["relayed"]

    assert relayed("named", salt="alice", sharing={"relay": "auto", "segments": ("a",)}) > 0
    assert relayed("bob", salt="bob") == 0
    assert relayed("none", salt="alice", sharing={"relay": "auto", "segments": ("other",)}) == 0
    _, reports = answer(core, request("off", prompt, 1, salt="alice", sharing={"relay": "off"}))
    assert reports == {}


def test_without_opting_in_nothing_is_kept(folder: Path) -> None:
    core = build(folder)
    answer(core, request("a", text(10, 20), sharing={}))
    assert core.stats().relay_segments == 0 and core.blocks.num_used == 0


def test_what_was_exact_is_shared_with_others_and_what_was_relayed_is_not(folder: Path) -> None:
    core = build(folder)
    a, _ = answer(core, request("a", text(11, 20)))
    prompt = [*text(12, 40), *a["a"], *text(13, 30)]
    answer(core, request("b", prompt, 1))
    core.submit(request("c", prompt, 1, sharing={}))
    outputs = []
    while core.has_work:
        outputs += core.step(0.0)
    assert max(o.cached_tokens for o in outputs) == 32  # two blocks in front of the relayed text


def test_an_evicted_segment_is_computed(folder: Path) -> None:
    core = build(folder)
    a, _ = answer(core, request("a", text(14, 20)))
    prompt = [*text(15, 30), *a["a"], *text(16, 8)]
    core.submit(request("b", prompt, 6))
    planner: Any = core.planner
    planner.store.clear()  # between lookup and use
    got: list[int] = []
    while core.has_work:
        for o in core.step(0.0):
            got += o.token_ids
            if o.sharing:
                assert o.sharing["relayed"] == 0
    assert got == answer(core, request("c", prompt, 6, sharing={}))[0]["c"]
    assert core.stats().relay_missing == 1


def test_segments_give_way_to_requests(folder: Path) -> None:
    core = build(folder, blocks=24)
    for i in range(4):
        answer(core, request(f"a{i}", text(20 + i, 20)))
    assert core.stats().relay_segments > 0
    out, _ = answer(core, request("large", text(30, 350), 20, sharing={}))
    assert len(out["large"]) == 20 and core.stats().relay_segments == 0
    core.blocks.check_integrity()


def test_a_damaged_segment_is_dropped_and_the_prompt_computed(folder: Path) -> None:
    core = build(folder)
    a, _ = answer(core, request("a", text(31, 20)))
    planner: Any = core.planner
    entry = next(iter(planner.store._entries.values()))
    pages = entry.segment.kv._pages
    pages.pool._blocks[pages.tables[0]] = 0xFF
    prompt = [*text(32, 30), *a["a"], *text(33, 8)]
    got, reports = answer(core, request("b", prompt, 6))
    assert reports["b"]["relayed"] == 0 and "NaN" in reports["b"]["note"]
    assert core.stats().relay_damaged == 1 and core.stats().relay_declined == 1
    assert 0 not in planner.store
    plain, _ = answer(build(folder), request("c", prompt, 6, sharing={}))
    assert got["b"] == plain["c"]


def test_the_guard_measures_when_idle_and_falls_back_above_the_bound(folder: Path) -> None:
    core = build(folder, sample=1.0, fallback_kl=1e-9)
    a, _ = answer(core, request("a", text(34, 20)))
    prompt = [*text(35, 30), *a["a"], *text(36, 8)]
    answer(core, request("b", prompt, 12))
    stats = core.stats()
    assert stats.relay_samples == 1 and stats.relay_kl_sum > 1e-6 and stats.relay_fallen_back
    assert stats.relay_recent[0][0] == "b"
    _, reports = answer(core, request("c", prompt, 6))
    assert reports["c"]["relayed"] == 0 and "fallen back" in reports["c"]["note"]
    exact = build(folder, config=ALL, sample=1.0, fallback_kl=1e-6)
    answer(exact, request("a", text(34, 20)))
    answer(exact, request("b", prompt, 12))
    assert exact.stats().relay_samples == 1 and not exact.stats().relay_fallen_back


def test_cancelled_agents_leave_no_pages_behind(folder: Path) -> None:
    core = build(folder, sample=1.0)
    rng = np.random.default_rng(0)
    known: list[int] = text(40, 30)
    for i in range(60):
        prompt = [*text(100 + i, 10), *known[-60:], *text(200 + i, 5)]
        core.submit(request(f"r{i}", prompt, 30))
        for _ in range(int(rng.integers(0, 30))):
            for o in core.step(0.0):
                known += o.token_ids
        if i % 2:
            core.cancel(f"r{i}")
    while core.has_work:
        core.step(0.0)
    planner: Any = core.planner
    assert planner.store.stats().bytes_used <= planner.store.budget_bytes
    assert not planner._live and planner.store.stats().pinned == 0
    planner.store.clear()
    core.blocks.check_integrity()
    assert core.blocks.num_used == 0


def test_bad_settings_and_models_are_refused(folder: Path) -> None:
    for field, value in (("share", 0), ("sample", 2), ("fallback_kl", 0)):
        with pytest.raises(ValueError, match=field):
            RelaySettings(**{field: value})
    core = build(folder)
    forward: Any = core.planner._forward  # type: ignore
    import dataclasses

    windowed = dataclasses.replace(forward.decoder.config, sliding_window=16)
    was, forward.decoder.config = forward.decoder.config, windowed
    try:
        with pytest.raises(UnsupportedModel, match="layer 0 has a sliding window"):
            RelayPlanner(core, forward, RelaySettings())
    finally:
        forward.decoder.config = was
