"""Depth sharing: training with random sources, and inference with a cache in some layers only."""

from __future__ import annotations

import importlib.util
import json
import math
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import transformers as t
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM, DynamicCache

from sharewell.cli import main
from sharewell.kv import (
    CrossLayerCallback,
    DepthShareConfig,
    DepthSharedCache,
    DepthShareError,
    DepthSharePlan,
    NotTrainedForSharing,
    PagedForward,
    PlanError,
    PlannedForward,
    RandomCrossLayerCache,
    choose_layers,
    decoder_for,
    depth_loss,
    draw_routing,
    enable_rcla,
    groups,
    kv_bytes_per_token,
    layer_types,
    retained_count,
    skip_follower_projections,
    sources_of,
    trained_for_sharing,
)
from sharewell.models import load_transformers, shipped_manifest, shipped_models

VOCAB, LAYERS = 61, 5
SHAPE: dict[str, Any] = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": LAYERS, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 8, "vocab_size": VOCAB, "max_position_embeddings": 256,
    "initializer_range": 0.2, "bos_token_id": 0, "eos_token_id": None, "pad_token_id": 2,
}  # fmt: skip
FAMILIES = {
    "gqa": lambda: t.LlamaConfig(**SHAPE),
    "mha": lambda: t.LlamaConfig(**{**SHAPE, "num_key_value_heads": 4}),
    "qwen3": lambda: t.Qwen3Config(**SHAPE),
}
MIXED = ["sliding_attention", "full_attention", "sliding_attention", "sliding_attention", "full_attention"]


def build(family: str = "gqa", **more: Any) -> Any:
    config = FAMILIES[family]()
    for name, value in more.items():
        setattr(config, name, value)
    with torch.random.fork_rng():
        torch.random.manual_seed(5)
        return AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()


def mixed_model() -> Any:
    config = t.Qwen2Config(**SHAPE, layer_types=MIXED, use_sliding_window=True, sliding_window=6)
    with torch.random.fork_rng():
        torch.random.manual_seed(6)
        return AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()


def ids_of(seed: int, *shape: int) -> torch.Tensor:
    return torch.randint(3, VOCAB, shape, generator=torch.Generator().manual_seed(seed))


def grads(model: Any) -> dict[str, torch.Tensor]:
    out = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return out


def explicit_forward(model: Any, ids: torch.Tensor, sources: Sequence[int]) -> torch.Tensor:
    """Logits of a Llama whose layer l attends to keys and values of layer sources[l], written out."""
    c, inner = model.config, model.model
    h, n = inner.embed_tokens(ids), ids.shape[1]
    angle = torch.arange(n)[:, None] / (1e4 ** (torch.arange(0, 8, 2) / 8))
    cos, sin = (torch.cat([f(angle), f(angle)], -1) for f in (torch.cos, torch.sin))
    kept: list[tuple[torch.Tensor, torch.Tensor]] = []
    for layer, source in zip(inner.layers, sources, strict=True):
        x, a = layer.input_layernorm(h), layer.self_attn
        q, k, v = (p(x).view(len(ids), n, -1, 8).transpose(1, 2) for p in (a.q_proj, a.k_proj, a.v_proj))
        q, k = (y * cos + torch.cat([-y[..., 4:], y[..., :4]], -1) * sin for y in (q, k))
        kept.append((k, v))
        repeats = c.num_attention_heads // c.num_key_value_heads
        k, v = (y.repeat_interleave(repeats, 1) for y in kept[source])
        scores = (q @ k.transpose(-1, -2) / math.sqrt(8)).masked_fill(~torch.ones(n, n).tril().bool(), -1e9)
        o = (scores.softmax(-1) @ v).transpose(1, 2).flatten(2)
        h = h + a.o_proj(o)
        h = h + layer.mlp(layer.post_attention_layernorm(h))
    return model.lm_head(inner.norm(h))


def run(model: Any, ids: torch.Tensor, cache: Any = None, **more: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=ids, cache=cache, use_cache=cache is not None, **more).logits


@pytest.fixture(params=FAMILIES)
def model(request: pytest.FixtureRequest) -> Any:
    return build(request.param)


def switch_checkpointing_on(model: Any, reentrant: bool) -> None:
    with warnings.catch_warnings():  # its new name is not known to older transformers
        warnings.simplefilter("ignore", FutureWarning)
        model.gradient_checkpointing_enable({"use_reentrant": reentrant})


# Training


@pytest.mark.parametrize("family", ["gqa", "mha"])
def test_50_random_routings_equal_the_explicit_forward(family: str) -> None:
    model, ids = build(family), ids_of(1, 2, 13)
    cache = RandomCrossLayerCache(DepthShareConfig(p_cross=0.6, seed=3), model)
    seen = set()
    for step in range(50):
        routing = cache.resample(step)
        seen.add(tuple(routing))  # pyright: ignore[reportArgumentType]
        expected = explicit_forward(model, ids, routing)  # pyright: ignore[reportArgumentType]
        assert (run(model, ids, cache) - expected).abs().max() < 1e-5
    assert len(seen) > 20


@pytest.mark.parametrize("family", ["gqa", "mha"])
def test_gradients_flow_into_the_source_as_in_the_explicit_forward(family: str) -> None:
    model, ids = build(family).train(), ids_of(2, 2, 9)
    routed = enable_rcla(model, DepthShareConfig(p_cross=0.7, seed=1))
    for step in range(5):
        routed.begin_step(step)
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        ours, routing = grads(model), routed.cache.routing
        logits = explicit_forward(model, ids, routing)  # pyright: ignore[reportArgumentType]
        expected = F.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
        expected.backward()
        theirs = grads(model)
        assert abs(loss.item() - expected.item()) < 1e-6
        assert ours.keys() == theirs.keys()
        assert max(float((ours[n] - theirs[n]).abs().max()) for n in ours) < 1e-5


def test_without_crossing_training_is_stock_training(model: Any) -> None:
    model.train()
    ids = ids_of(3, 3, 12)
    stock = model(input_ids=ids, labels=ids).loss
    stock.backward()
    expected = grads(model)
    routed = enable_rcla(model, DepthShareConfig(p_cross=0.0))
    loss = model(input_ids=ids, labels=ids).loss
    loss.backward()
    assert abs(loss.item() - stock.item()) < 1e-6
    ours = grads(model)
    assert ours.keys() == expected.keys()
    assert max(float((ours[n] - expected[n]).abs().max()) for n in ours) < 1e-6
    routed.remove()
    cache = RandomCrossLayerCache(DepthShareConfig(p_cross=0.0), model)
    cache.resample(0)
    again = model(input_ids=ids, labels=ids, cache=cache, use_cache=True).loss
    again.backward()
    ours = grads(model)
    assert max(float((ours[n] - expected[n]).abs().max()) for n in ours) < 1e-6


def test_a_draw_per_sequence_gives_each_row_its_own_routing() -> None:
    model, ids = build(), ids_of(4, 4, 11)
    cache = RandomCrossLayerCache(DepthShareConfig(p_cross=0.7, granularity="sequence"), model)
    routing: Any = cache.resample(0, batch=4)
    logits = run(model, ids, cache)
    rows = [[routing[layer][b] for layer in range(LAYERS)] for b in range(4)]
    assert len({tuple(row) for row in rows}) > 1
    for b, row in enumerate(rows):
        assert (logits[b] - explicit_forward(model, ids[b : b + 1], row)[0]).abs().max() < 1e-5
    cache.resample(1, batch=3)
    with pytest.raises(DepthShareError, match="drawn for 3 sequences, the batch has 4"):
        run(model, ids, cache)


@pytest.mark.parametrize("granularity", ["layer", "sequence"])
def test_gradient_checkpointing_recomputes_with_the_routing_of_its_pass(granularity: Any) -> None:
    model, ids = build().train(), ids_of(5, 2, 10)
    routed = enable_rcla(model, DepthShareConfig(p_cross=0.7, granularity=granularity))
    results = []
    for checkpointing in (False, True):
        if checkpointing:
            switch_checkpointing_on(model, reentrant=False)
        routed.begin_step(3)
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        results.append((loss.item(), grads(model)))
    (a, plain), (b, recomputed) = results
    assert abs(a - b) < 1e-6
    assert max(float((plain[n] - recomputed[n]).abs().max()) for n in plain) < 1e-6


def test_reentrant_checkpointing_would_lose_gradients_and_is_refused() -> None:
    model, ids = build().train(), ids_of(5, 2, 10)
    enable_rcla(model, DepthShareConfig(p_cross=0.7))
    switch_checkpointing_on(model, reentrant=True)
    model.enable_input_require_grads()
    with pytest.raises(DepthShareError, match="use_reentrant"):
        model(input_ids=ids, labels=ids).loss.backward()


def test_layers_that_nobody_reads_get_zero_gradients_when_all_shall_have_some() -> None:
    model, ids = build().train(), ids_of(6, 2, 8)
    plain, every = (DepthShareConfig(p_cross=0.9, seed=2, all_gradients=a) for a in (False, True))
    results = []
    for config in (plain, every):
        routed = enable_rcla(model, config)
        routed.begin_step(0)
        model(input_ids=ids, labels=ids).loss.backward()
        results.append(grads(model))
        routed.remove()
    some, all_ = results
    names = {n for n, _ in model.named_parameters()}
    unread = names - some.keys()
    assert unread and all(".k_proj." in n or ".v_proj." in n for n in unread)
    assert all_.keys() == names and all(not all_[n].any() for n in unread)
    assert all(torch.equal(all_[n], some[n]) for n in some)


def test_routing_is_a_function_of_seed_step_and_micro_batch() -> None:
    config, types = DepthShareConfig(seed=7), layer_types(12)
    draws = {(s, m): draw_routing(config, types, s, m) for s in range(20) for m in range(3)}
    assert all(draw_routing(config, types, s, m) == routing for (s, m), routing in draws.items())
    assert len({tuple(r) for r in draws.values()}) == 60  # pyright: ignore[reportArgumentType]
    assert draw_routing(DepthShareConfig(seed=8), types, 0) != draws[0, 0]


def test_sources_are_uniform_over_the_layers_below() -> None:
    config, n = DepthShareConfig(p_cross=0.5), 4000
    counts = [[0] * 6 for _ in range(6)]
    for step in range(n):
        for layer, source in enumerate(draw_routing(config, layer_types(6), step)):
            counts[layer][source] += 1  # pyright: ignore[reportCallIssue, reportArgumentType]
    assert counts[0] == [n, 0, 0, 0, 0, 0]
    for layer in range(1, 6):
        for source in range(6):
            p = 0.5 if source == layer else 0.5 / layer if source < layer else 0.0
            assert abs(counts[layer][source] - n * p) <= 4.5 * math.sqrt(n * p * (1 - p))


def test_protected_layers_and_other_types_are_left_alone() -> None:
    types = layer_types(mixed_model())
    assert list(types) == MIXED
    config = DepthShareConfig(p_cross=0.99, protect_layers=(0, 3))
    for step in range(200):
        routing: Any = draw_routing(config, types, step)
        assert routing[1] == 1 and routing[3] == 3  # the first of its type, and protected
        assert all(types[s] == types[i] for i, s in enumerate(routing))
    anywhere = [
        draw_routing(DepthShareConfig(p_cross=0.9, same_type_only=False), types, s)[1] for s in range(50)
    ]
    assert 0 in anywhere


def test_evaluation_and_what_follows_removal_are_untouched() -> None:
    model, ids = build(), ids_of(7, 2, 9)
    expected = run(model, ids)
    routed = enable_rcla(model, DepthShareConfig(p_cross=0.9))
    assert torch.equal(run(model, ids), expected)
    model.train()
    assert not torch.equal(model(input_ids=ids).logits, expected)
    with torch.no_grad():  # what Trainer would measure with dropout on: still the stock model
        assert torch.equal(model(input_ids=ids).logits, expected)
    routed.remove()
    assert torch.equal(model(input_ids=ids).logits, expected)


def test_a_cache_that_was_not_resampled_is_refused() -> None:
    model, ids = build(), ids_of(8, 1, 6)
    cache = RandomCrossLayerCache(DepthShareConfig(), model)
    cache.resample(0)
    run(model, ids, cache)
    with pytest.raises(DepthShareError, match="call resample"):
        run(model, ids, cache)


def trainer(model: Any, folder: Path, callback: CrossLayerCallback, steps: int, **more: Any) -> t.Trainer:
    rows = [{"input_ids": row, "labels": row} for row in ids_of(9, 24, 12)]
    arguments = t.TrainingArguments(
        str(folder), max_steps=steps, per_device_train_batch_size=2, gradient_accumulation_steps=2,
        learning_rate=1e-2, lr_scheduler_type="constant", report_to=[], disable_tqdm=True, save_steps=3,
        logging_strategy="no", use_cpu=True, seed=4, **more,
    )  # fmt: skip
    return t.Trainer(model, arguments, train_dataset=rows, callbacks=[callback])  # pyright: ignore


def test_a_resumed_trainer_goes_on_as_if_it_had_not_stopped(tmp_path: Path) -> None:
    config = DepthShareConfig(p_cross=0.6, seed=5)
    whole = build()
    trainer(whole, tmp_path / "a", CrossLayerCallback(config), 6).train()
    resumed = build()
    again = CrossLayerCallback(config)
    trainer(resumed, tmp_path / "a", again, 6).train(str(tmp_path / "a" / "checkpoint-3"))
    for a, b in zip(whole.parameters(), resumed.parameters(), strict=True):
        assert torch.equal(a, b)
    assert again.routed is not None and not again.routed._hooks
    plain = build()
    trainer(plain, tmp_path / "b", CrossLayerCallback(DepthShareConfig(p_cross=0.0)), 6).train()
    assert not torch.equal(next(plain.parameters()), next(whole.parameters()))


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_trained_models_say_so_after_saving_and_loading(tmp_path: Path) -> None:
    model = build()
    assert not trained_for_sharing(model)
    trainer(model, tmp_path, CrossLayerCallback(), 1, gradient_checkpointing=True).train()
    model.save_pretrained(tmp_path / "saved")
    assert trained_for_sharing(AutoModelForCausalLM.from_pretrained(tmp_path / "saved"))


# Inference


def test_with_all_layers_it_is_the_stock_cache(model: Any) -> None:
    ids = ids_of(10, 3, 12)
    mask = torch.ones_like(ids)
    mask[1, :4], mask[2, :9] = 0, 0
    ours, stock = DepthSharedCache(model, range(LAYERS)), DynamicCache(config=model.config)
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    a = run(model, ids, ours, attention_mask=mask, position_ids=positions)
    b = run(model, ids, stock, attention_mask=mask, position_ids=positions)
    assert (a - b).abs().max() < 1e-5
    for _ in range(8):
        token, positions = b[:, -1:].argmax(-1), positions[:, -1:] + 1
        mask = torch.cat([mask, torch.ones(3, 1, dtype=mask.dtype)], 1)
        a = run(model, token, ours, attention_mask=mask, position_ids=positions)
        b = run(model, token, stock, attention_mask=mask, position_ids=positions)
        assert (a - b).abs().max() < 1e-5


@pytest.mark.parametrize("beams", [1, 3])
def test_with_all_layers_generate_gives_the_stock_tokens(model: Any, beams: int) -> None:
    ids, mask = ids_of(11, 2, 9), torch.ones(2, 9, dtype=torch.int64)
    mask[1, :5] = 0
    options = {"max_new_tokens": 24, "do_sample": False, "num_beams": beams, "attention_mask": mask}
    expected = model.generate(ids, **options)
    ours = model.generate(ids, cache=DepthSharedCache(model, range(LAYERS)), **options)
    assert torch.equal(ours, expected)


@pytest.mark.filterwarnings("ignore::sharewell.kv.NotTrainedForSharing")
@pytest.mark.parametrize("layers", [(0,), (0, 2, 4), (0, 1, 4), (0, 3)])
def test_any_retained_set_equals_the_explicit_forward_and_the_engine(layers: tuple[int, ...]) -> None:
    model, ids = build(), ids_of(12, 2, 14)
    sources = sources_of(layers, model)
    expected = explicit_forward(model, ids, sources)
    cache = DepthSharedCache(model, layers)
    parts = [run(model, ids[:, a:b], cache) for a, b in ((0, 9), (9, 10), (10, 14))]
    assert (torch.cat(parts, 1) - expected).abs().max() < 1e-5
    engine = PlannedForward(model)
    out = engine(ids, DepthSharePlan(layers, model), want="all")
    assert (out.logits.view(2, 14, VOCAB) - expected).abs().max() < 1e-5
    gone = LAYERS - len(layers)
    assert sum(out.stats.projections_skipped) == 2 * gone * ids.numel()
    # bytes, to the byte
    stock: Any = DynamicCache(config=model.config)
    run(model, ids, stock)
    full = sum(x.keys.nbytes + x.values.nbytes for x in stock.layers)
    assert cache.nbytes * LAYERS == full * len(layers)
    assert cache.nbytes == kv_bytes_per_token(model, len(layers)) * ids.numel() == out.space.nbytes


def test_the_plan_runs_over_the_servers_pages() -> None:
    model, ids, plan = build(), ids_of(20, 1, 21), DepthSharePlan((0, 3), LAYERS)
    expected = explicit_forward(model, ids, plan.sources)[0]
    pages, table = PagedForward(decoder_for(model), 8, 8), np.array([5, 2, 7, 0], np.int32)
    for a, b in ((0, 13), (13, 21)):
        at = np.arange(a, b)
        logits, stats = pages.planned(plan, ids[0, a:b].numpy(), at, table, np.arange(b - a))
        assert (logits - expected[a:b]).abs().max() < 1e-5
        assert sum(stats.projections_skipped) == 2 * 3 * (b - a)


class CopyingCache(DynamicCache):
    """Followers own copies of what their leaders got, so that every layer reorders and crops its own."""

    def __init__(self, config: Any, sources: Sequence[int]) -> None:
        super().__init__(config=config)
        self.sources, self.fresh = sources, {}

    def update(self, key_states: Any, value_states: Any, layer_idx: int, *args: Any, **kwargs: Any) -> Any:
        self.fresh[layer_idx] = key_states, value_states
        k, v = self.fresh[self.sources[layer_idx]]
        return super().update(k.clone(), v.clone(), layer_idx)


@pytest.mark.filterwarnings("ignore::sharewell.kv.NotTrainedForSharing")
def test_beams_crops_and_resets_act_on_the_leaders_and_stay_consistent() -> None:
    model, ids, layers = build(), ids_of(13, 2, 10), (0, 2)
    options: dict[str, Any] = {"max_new_tokens": 16, "do_sample": False, "num_beams": 3}
    copies = CopyingCache(model.config, sources_of(layers, model))
    expected = model.generate(ids, cache=copies, **options)
    assert torch.equal(model.generate(ids, cache=DepthSharedCache(model, layers), **options), expected)
    cache = DepthSharedCache(model, layers)
    full = run(model, ids, cache)
    cache.crop(-4)
    assert cache.get_seq_length() == 6
    assert (run(model, ids[:, 6:], cache) - full[:, 6:]).abs().max() < 1e-5
    cache.reset()
    assert cache.nbytes == 0
    assert torch.equal(run(model, ids, cache), full)


@pytest.mark.filterwarnings("ignore::sharewell.kv.NotTrainedForSharing")
def test_skipped_projections_change_nothing_and_remove_two_products_a_token_and_layer(model: Any) -> None:
    layers, ids = (0, 3), ids_of(14, 2, 11)
    expected = run(model, ids, DepthSharedCache(model, layers))

    def count(call: Any) -> int:
        rows = 0

        def add(module: Any, inputs: Any, output: Any) -> None:
            nonlocal rows
            rows += inputs[0].shape[0] * inputs[0].shape[1]

        hooks = [m.register_forward_hook(add) for m in model.modules() if isinstance(m, torch.nn.Linear)]
        call()
        for hook in hooks:
            hook.remove()
        return rows

    def call() -> torch.Tensor:
        return run(model, ids, DepthSharedCache(model, layers))

    before = count(call)
    handle = skip_follower_projections(model, layers)
    assert before - count(call) == (LAYERS - len(layers)) * 2 * ids.numel()
    assert (call() - expected).abs().max() < 1e-6
    width = SHAPE["hidden_size"] * model.config.num_key_value_heads * 8
    assert handle.saved_bytes == 3 * 2 * width * 4
    for cache in (None, DynamicCache(config=model.config), DepthSharedCache(model, (0, 1))):
        with pytest.raises(DepthShareError, match=r"layer [12] computes no keys"):
            run(model, ids, cache)
    handle.remove()
    assert count(call) == before


@pytest.mark.filterwarnings("ignore::sharewell.kv.NotTrainedForSharing")
def test_layers_of_a_type_share_among_themselves() -> None:
    model, ids = mixed_model(), ids_of(15, 1, 16)
    assert sources_of((0, 1), model) == (0, 1, 0, 0, 1)
    with pytest.raises(DepthShareError, match=r"layer 1 .full_attention. has no retained layer of its type"):
        sources_of((0, 2), model)
    assert choose_layers(model, retention=0.4) == (0, 1)
    with pytest.raises(DepthShareError, match=r"layers \[0, 1\] must keep their own, and only 1 fit"):
        choose_layers(model, retention=0.2)
    everything = DepthSharedCache(model, range(LAYERS))
    assert (run(model, ids, everything) - run(model, ids)).abs().max() < 1e-5
    routed = RandomCrossLayerCache(DepthShareConfig(), model)
    routed.routing = [0, 1, 0, 0, 1]
    expected = run(model, ids, routed)
    assert (run(model, ids, DepthSharedCache(model, (0, 1))) - expected).abs().max() < 1e-5


def test_a_model_that_was_not_trained_for_it_is_warned_about_with_its_perplexity() -> None:
    model, ids = build(), ids_of(16, 4, 12)
    with pytest.warns(NotTrainedForSharing, match="not trained for a cache in 2 of 5 layers$"):
        DepthSharedCache(model, (0, 2))
    ratio = math.exp(depth_loss(model, ids, (0, 2)) - depth_loss(model, ids))
    with pytest.warns(NotTrainedForSharing, match=f"{ratio:.3g} times as high"):
        DepthSharedCache(model, (0, 2), calibration=ids)


@pytest.mark.filterwarnings("ignore::sharewell.kv.NotTrainedForSharing")
def test_nan_of_a_leader_is_found_with_its_layer() -> None:
    model, ids = build(), ids_of(17, 1, 5)
    with torch.no_grad():
        model.model.layers[2].self_attn.v_proj.weight[0, 0] = float("nan")
    with pytest.raises(PlanError, match="layer 2: values"):
        run(model, ids, DepthSharedCache(model, (0, 2), debug=True))


# The choice


@given(st.integers(1, 40), st.data())
def test_sources_are_the_nearest_retained_layer_below(n: int, data: st.DataObject) -> None:
    layers = {0, *data.draw(st.sets(st.integers(0, n - 1)))}
    sources = sources_of(layers, n)
    assert sources == tuple(max(j for j in layers if j <= i) for i in range(n))
    assert DepthSharePlan(layers, n).layers == tuple(sorted(layers))


@given(st.integers(1, 32), st.integers(1, 32))
def test_uniform_choices_are_groups_within_the_budget(n: int, count: int) -> None:
    count = min(n, count)
    layers = choose_layers(n, retention=count / n)
    assert layers[0] == 0 and len(layers) <= count
    g = 1 if len(layers) == 1 and n == 1 else next(g for g in range(1, n + 1) if groups(n, g) == layers)
    assert g == 1 or len(groups(n, g - 1)) > count


def test_a_budget_in_bytes_holds_as_many_layers_as_fit() -> None:
    model = build()
    layer = 2 * 2 * 8 * 4 * 100
    for n in range(1, LAYERS + 1):
        assert retained_count(model, budget_bytes=layer * n, tokens=100) == n
        assert retained_count(model, budget_bytes=layer * n + layer - 1, tokens=100) == n
    assert choose_layers(model, budget_bytes=3 * layer, tokens=100) == (0, 2, 4)
    assert retained_count(model, budget_bytes=layer, tokens=100, itemsize=2) == 2
    with pytest.raises(ValueError, match=f"budget_bytes must be at least {layer}"):
        choose_layers(model, budget_bytes=layer - 1, tokens=100)


def test_greedy_removal_drops_what_costs_least() -> None:
    cost = {1: 5.0, 2: 1.0, 3: 4.0, 4: 2.0}

    def loss(layers: tuple[int, ...]) -> float:
        return sum(c for layer, c in cost.items() if layer not in layers)

    assert choose_layers(5, retention=0.6, loss=loss) == (0, 1, 3)
    model, ids = build(), ids_of(18, 6, 12)
    chosen = choose_layers(model, retention=0.8, calibration=ids)
    each = {s: depth_loss(model, ids, s) for s in ((0, 2, 3, 4), (0, 1, 3, 4), (0, 1, 2, 4), (0, 1, 2, 3))}
    assert chosen == min(each, key=lambda s: each[s])


@pytest.mark.parametrize(
    ("call", "told"),
    [
        (lambda: DepthShareConfig(p_cross=1.0), r"p_cross must be in \[0, 1\), got 1.0"),
        (lambda: DepthShareConfig(granularity="token"), "granularity must be layer or sequence"),  # pyright: ignore
        (lambda: DepthShareConfig(seed=-1), "seed must be at least 0"),
        (lambda: RandomCrossLayerCache(DepthShareConfig(protect_layers=(0, 9)), 4), "number of layers, 4"),
        (lambda: sources_of((), 4), "at least layer 0, got none"),
        (lambda: sources_of((1, 2), 4), r"must hold layer 0.* got \[1, 2\]"),
        (lambda: sources_of((0, 4), 4), r"whole numbers in \[0, 4\), got 4"),
        (lambda: groups(4, 0), r"g must be in \[1, 4\]"),
        (lambda: choose_layers(4, retention=0.0), r"retention must be in \(0, 1\], got 0.0"),
        (lambda: choose_layers(4), "either retention or budget_bytes"),
        (lambda: choose_layers(4, budget_bytes=9), "tokens must be at least 1"),
        (lambda: DepthSharedCache(t.LlamaConfig(**SHAPE), (0, 7)), r"\[0, 5\), got 7"),
        (lambda: depth_loss(build(), torch.zeros(1, 1, dtype=torch.int64)), "length >= 2"),
        (lambda: layer_types(t.Gemma3nTextConfig()), "share keys and values by design already"),
    ],
)
def test_wrong_input_is_refused_by_name(call: Any, told: str) -> None:
    with pytest.raises(ValueError, match=told):
        call()


def test_layers_that_keep_no_keys_and_values_cannot_share() -> None:
    config = t.Qwen3NextConfig(num_hidden_layers=4)
    assert layer_types(config) == ("none", "none", "none", "full_attention")
    with pytest.raises(DepthShareError, match=r"layers \[0, 1, 2\] keep a state"):
        DepthSharedCache(config, (0, 3))
    gpt2 = AutoModelForCausalLM.from_config(t.GPT2Config(n_layer=2, n_embd=32, n_head=4, vocab_size=50))
    with pytest.raises(DepthShareError, match="layer 1 of GPT2LMHeadModel has no k_proj and v_proj"):
        skip_follower_projections(gpt2, (0,))


# What ships, and the command


@pytest.fixture(scope="module")
def trainer_script() -> Any:
    path = Path(__file__).parents[2] / "tools" / "train" / "byte_lm.py"
    spec = importlib.util.spec_from_file_location("byte_lm", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_trainer_goes_on_where_it_stopped(trainer_script: Any, tmp_path: Path) -> None:
    steps = 3
    whole = trainer_script.train("routed", 3, runs=tmp_path / "a", steps=steps, show=False)
    pieces = None
    for _ in range(200):
        pieces = trainer_script.train("routed", 3, runs=tmp_path / "b", steps=steps, seconds=0.2, show=False)
        if pieces is not None:
            break
    assert pieces is not None
    for a, b in zip(whole[0].parameters(), pieces[0].parameters(), strict=True):
        assert torch.equal(a, b)


def test_a_toy_learns_under_routing(trainer_script: Any, tmp_path: Path) -> None:
    trainer_script.train("routed", 0, runs=tmp_path, steps=12, show=False)
    losses = torch.load(tmp_path / "routed-0-12.pt", weights_only=True)["losses"]
    assert losses[0] > 5.0 and losses[-1] < 4.6  # 5.55 nats is to know nothing


@pytest.mark.parametrize("slug", ["byte-lm", "byte-lm-routed"])
def test_shipped_weights_have_the_headline_loss_that_their_manifest_names(
    slug: str, trainer_script: Any
) -> None:
    manifest = shipped_manifest(slug)  # also checks every file's sha256
    model = load_transformers(shipped_models()[slug])
    # half of the windows, and the library of another Python version differs a little
    assert abs(depth_loss(model, trainer_script.held_out(64)) - manifest["model"]["loss"]) < 0.05
    assert trained_for_sharing(model) == (slug == "byte-lm-routed")


def test_only_the_routed_model_stands_a_quarter_of_the_cache(trainer_script: Any) -> None:
    windows = trainer_script.held_out(16)
    ratio = {}
    for slug in ("byte-lm", "byte-lm-routed"):
        model = load_transformers(shipped_models()[slug])
        ratio[slug] = depth_loss(model, windows, groups(8, 4)) / depth_loss(model, windows)
    assert ratio["byte-lm-routed"] < 1.25 < ratio["byte-lm"]


def test_the_command_reports_bytes_and_perplexity(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    text = tmp_path / "text.py"
    text.write_text(Path(__file__).read_text())
    command = ["kv", "depth-report", "byte-lm-routed", "--windows", "4", "--context", "64", "--json"]
    command += ["--new-tokens", "4", "--text"]
    assert main([*command, str(text), "--budget-bytes", str(2 * 2 * 64 * 4 * 100), "--tokens", "100"]) == 0
    report = json.loads(capsys.readouterr().out)
    full, half, quarter, budget = report["rows"]
    assert report["trained"] and report["skipped"]
    assert [len(r["layers"]) for r in report["rows"]] == [8, 4, 2, 2] and budget["layers"] == quarter[
        "layers"
    ]
    assert full["kv_bytes"] == 8 * 2 * 64 * 4 * 68 == 2 * half["kv_bytes"] == 4 * quarter["kv_bytes"]
    assert full["perplexity_ratio"] == 1.0 < quarter["perplexity_ratio"] < 3.0
    assert all(r["ttft_s"] > 0 and r["tokens_per_s"] > 0 for r in report["rows"])
    assert main(["kv", "depth-report", "byte-lm-routed", "--windows", "2", "--context", "32"]) == 0
    assert "retained" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["byte-lm-routed", "--retention", "0"], "--retention must be numbers in (0, 1]"),
        (["byte-lm-routed", "--retention", "half"], "--retention must be numbers in (0, 1]"),
        (["byte-lm-routed", "--text", "no-such-file"], "--text must be a file that exists"),
        (["no-such-model"], "model must be one of"),
        (["byte-lm-routed", "--context", "1"], "context must be at least 2"),
        (["byte-lm-routed", "--budget-bytes", "10"], "budget_bytes must be at least"),
    ],
)
def test_wrong_use_of_the_command_ends_in_one_line(
    arguments: list[str], told: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["kv", "depth-report", *arguments]) == 2
    error = capsys.readouterr().err
    assert told in error and error.count("\n") == 1


def test_a_plan_for_another_number_of_layers_is_refused() -> None:
    with pytest.raises(PlanError, match="sources name 4 layers, the model has 5"):
        PlannedForward(build())(ids_of(19, 1, 4), DepthSharePlan((0, 2), 4))
