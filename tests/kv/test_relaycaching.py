"""RelayCaching against full prefill and against a slow forward; its baselines; the store under hand-overs."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig

from sharewell.kv import (
    BlockManager,
    KVSegmentStore,
    PinnedPages,
    PlannedForward,
    Segment,
    TensorKV,
    move_keys,
)
from sharewell.kv.relay import RelayConfig, RelayPlan, StudyPlan
from sharewell.kv.relay_baselines import CacheBlendPlan, DirectReusePlan, EpicPlan, TailPlan
from sharewell.kv.relay_pieces import Piece, PiecePlan, RelayDeclined
from sharewell.kv.relay_profile import HandOver, LayerProfile, profile_for, profile_layers, segment_of

VOCAB, LAYERS = 101, 5
INF = math.inf


@pytest.fixture(scope="module")
def engine() -> PlannedForward:
    config = LlamaConfig(
        hidden_size=48, intermediate_size=64, num_hidden_layers=LAYERS, num_attention_heads=6,
        num_key_value_heads=2, vocab_size=VOCAB, max_position_embeddings=512, initializer_range=0.2,
    )  # fmt: skip
    with torch.random.fork_rng():
        torch.random.manual_seed(3)
        return PlannedForward(AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval())


def text(seed: int, a: int = 9, n: int = 40, b: int = 21, s: int = 6) -> HandOver:
    rng = np.random.default_rng(seed)
    return HandOver(*(rng.integers(0, VOCAB, k).tolist() for k in (a, n, b, s)))


def studied(engine: PlannedForward, t: HandOver, layers: tuple[int, int, int], stride: int = 1) -> Segment:
    """What an agent leaves behind: keys, values, hidden states and influence."""
    out = engine([*t.first_prefix, *t.shared])
    places = torch.arange(len(t.first_prefix), len(t.first_prefix) + len(t.shared))
    kv = TensorKV.copied(out.space, 0, places)
    plan = StudyPlan(layers, 6, stride=stride)
    engine(t.shared, plan, space=out.space, positions=places, want=torch.arange(0))
    return Segment(0, "m", torch.tensor(t.shared), places, kv, plan.kept, plan.influence)


def piece(segment: Segment, t: HandOver) -> Piece:
    return Piece(segment, len(t.second_prefix), 0, len(segment))


def test_all_tokens_in_all_layers_equal_full_prefill(engine: PlannedForward) -> None:
    t = text(1)
    config = RelayConfig(tau_dev=0.0, layers=(0, 1, LAYERS - 1), max_recompute=1.0)
    plan = RelayPlan([piece(segment_of(engine, t), t)], config)
    got, full = engine(t.prompt, plan, want="all"), engine(t.prompt, want="all")
    assert (got.logits - full.logits).abs().max() < 1e-4
    assert plan.reuse_rate == 0 and got.stats.token_layers == LAYERS * len(t.prompt)


def test_direct_reuse_behind_the_same_prefix_equals_full_prefill(engine: PlannedForward) -> None:
    t = text(2)
    same = HandOver(t.first_prefix, t.shared, t.first_prefix, t.suffix)
    out = engine(same.prompt, DirectReusePlan([piece(segment_of(engine, same), same)]))
    assert (out.logits - engine(same.prompt).logits).abs().max() < 1e-3
    assert out.stats.token_layers == LAYERS * (len(same.prompt) - len(same.shared))


def test_moving_keys_forth_and_back_is_identity(engine: PlannedForward) -> None:
    k = torch.randn(30, 2, 8, generator=torch.Generator().manual_seed(0))
    at = torch.arange(5, 35)
    there = move_keys(k, at, at + 173, engine.rope)
    assert (there - k).abs().max() > 0.1
    assert (move_keys(there, at + 173, at, engine.rope) - k).abs().max() < 1e-5


def test_keys_of_the_first_layer_moved_equal_recomputed_ones(engine: PlannedForward) -> None:
    """The first layer's keys depend on no other token."""
    t = text(3)
    a = segment_of(engine, t)
    b = segment_of(engine, HandOver(t.second_prefix, t.shared, [], []))
    moved = move_keys(a.read(0, torch.arange(40))[0], a.positions, b.positions, engine.rope)
    assert (moved - b.read(0, torch.arange(40))[0]).abs().max() < 1e-5


class Slow:
    """A layer at a time over dense keys and values, which stored ones replace where a plan reuses them."""

    def __init__(self, engine: PlannedForward) -> None:
        self.engine, self.d = engine, engine.decoder

    def __call__(self, t: HandOver, segment: Segment, sets: list[set[int]], h0: Any, start: int) -> Any:
        ids = torch.tensor(t.prompt)
        at = torch.arange(len(ids))
        b, n = len(t.second_prefix), len(segment)
        h = self.d.embed(ids)
        k_all = v_all = None
        for layer in range(LAYERS):
            if layer == start and h0 is not None:
                h = h.clone()
                h[b : b + n] = h0
            q, k, v = self.d.qkv(layer, h, at)
            old_k, old_v = segment.read(layer, torch.arange(n))
            old_k = move_keys(old_k, segment.positions, at[b : b + n], self.engine.rope)
            for j in range(n):
                if j not in sets[layer]:
                    k[b + j], v[b + j] = old_k[j], old_v[j]
            k_all, v_all = k.repeat_interleave(3, 1), v.repeat_interleave(3, 1)
            o = torch.zeros_like(q)
            for i in range(len(ids)):
                scores = torch.einsum("hd,jhd->hj", q[i], k_all[: i + 1]) / 8**0.5
                o[i] = torch.einsum("hj,jhd->hd", scores.softmax(-1), v_all[: i + 1])
            h = self.d.mlp(layer, self.d.attn_out(layer, h, o))
        return self.d.head(h)


def test_plans_equal_a_slow_forward_with_substituted_keys_and_values(engine: PlannedForward) -> None:
    rng = np.random.default_rng(5)
    slow = Slow(engine)
    for trial in range(20):
        t = text(100 + trial, *(int(x) for x in rng.integers((1, 18, 1, 2), (12, 26, 14, 5))))
        start, detection, end = sorted(rng.integers(0, LAYERS, 3).tolist())
        hidden = bool(rng.integers(2))
        config = RelayConfig(
            tau_dev=float(rng.uniform(0.3, 2)), tau_inf=float(rng.uniform(0.5, 2)),
            suffix=int(rng.integers(0, 6)), seam=int(rng.integers(0, 3)), layers=(start, detection, end),
            store_hidden=hidden, max_recompute=1.0,
        )  # fmt: skip
        segment = studied(engine, t, (start, detection, end))
        plan = RelayPlan([piece(segment, t)], config)
        b, n = len(t.second_prefix), len(t.shared)
        wanted = torch.tensor([*range(b), *range(b + n, len(t.prompt))])
        got = engine(t.prompt, plan, want=wanted).logits
        picked = set((plan.selected[b : b + n]).nonzero().flatten().tolist())
        skips = hidden and start > 0
        every = set(range(n))
        sets = [
            (set() if skips else every) if layer < start
            else every if layer <= detection
            else picked if layer <= end else set()
            for layer in range(LAYERS)
        ]  # fmt: skip
        with torch.no_grad():
            expected = slow(t, segment, sets, segment.hidden.get(start) if skips else None, start)
        assert (got - expected[wanted]).abs().max() < 1e-4, (trial, config)


def test_sets_are_what_their_definitions_say(engine: PlannedForward) -> None:
    t = text(7)
    segment = studied(engine, t, (1, 2, 3))
    config = RelayConfig(layers=(1, 2, 3), suffix=4, seam=2, max_recompute=1.0)
    plan = RelayPlan([piece(segment, t)], config)
    engine(t.prompt, plan)
    b, n = 21, 40
    other = segment_of(engine, HandOver(t.second_prefix, t.shared, [], []))
    tokens = torch.arange(n)
    old, new = (s.read(1, tokens)[1].flatten(1) for s in (segment, other))
    assert (old - new).abs().max() > 1e-3  # the prefix matters
    d = 1 - torch.cosine_similarity(
        segment.read(2, tokens)[1].flatten(1), plan_values(engine, t, config, segment), dim=-1
    )
    s = segment.influence
    assert s is not None
    expected = (d >= 1.5 * d.mean()) | (s >= 1.45 * s.mean()) | (tokens >= n - 4) | (tokens < 2)
    assert torch.equal(plan.selected[b : b + n], expected)
    computed = n * 2 + int(expected.sum())  # layers 1 and 2 in full, layer 3 in part
    assert plan.reuse_rate == pytest.approx(1 - computed / (n * LAYERS))


def plan_values(engine: PlannedForward, t: HandOver, config: RelayConfig, segment: Segment) -> torch.Tensor:
    class Watching(RelayPlan):
        def observe(self, layer: int, slots: Any, k: Any, v: Any, mass: Any = None) -> None:
            if layer == self.detection:
                self.fresh = v.flatten(1).clone()
            super().observe(layer, slots, k, v, mass)

    plan = Watching([piece(segment, t)], config)
    engine(t.prompt, plan)
    b = len(t.second_prefix)
    return plan.fresh[b : b + len(segment)]


def test_switched_off_sets_select_less(engine: PlannedForward) -> None:
    t = text(8)
    segment = studied(engine, t, (1, 1, 4))

    def chosen(**changes: Any) -> torch.Tensor:
        plan = RelayPlan([piece(segment, t)], RelayConfig(layers=(1, 1, 4), max_recompute=1.0, **changes))
        engine(t.prompt, plan)
        return plan.selected

    both, neither = chosen(), chosen(tau_dev=INF, tau_inf=INF)
    for one in (chosen(tau_dev=INF), chosen(tau_inf=INF)):
        assert bool((one & ~both).sum() == 0) and int(neither.sum()) < int(one.sum()) < int(both.sum())
    assert int(neither.sum()) == 11  # the last ten, and the first


def test_influence_is_attention_from_later_tokens(engine: PlannedForward) -> None:
    t, layers = text(9), (1, 2, 3)
    model: Any = engine.decoder
    model = model.model
    before = model.config._attn_implementation
    model.set_attn_implementation("eager")
    try:
        with torch.no_grad():
            out = model(torch.tensor([[*t.first_prefix, *t.shared]]), output_attentions=True)
            hidden = model(
                torch.tensor([[*t.first_prefix, *t.shared]]), output_hidden_states=True
            ).hidden_states
    finally:
        model.set_attn_implementation(before)
    for stride in (1, 7):
        segment = studied(engine, t, layers, stride)
        asking = [j for j in range(40) if (39 - j) % stride == 0]
        expected = torch.zeros(40)
        for j in range(40):
            later = [i for i in asking if i > j]
            if later:
                rows = torch.stack([out.attentions[layer][0, :, 9:, 9:] for layer in (2, 3)])
                expected[j] = rows[:, :, later, j].sum(-1).mean() / len(later)
        assert segment.influence is not None
        assert (segment.influence - expected).abs().max() < 1e-5
        assert (segment.hidden[1] - hidden[1][0, 9:]).abs().max() < 1e-4


def test_baselines_compute_what_they_say(engine: PlannedForward) -> None:
    t = text(10)
    p = [piece(segment_of(engine, t), t)]
    rest = len(t.prompt) - 40

    def computed(plan: PiecePlan) -> list[int]:
        return [c - rest for c in engine(t.prompt, plan).stats.computed]

    assert computed(DirectReusePlan(p)) == [0] * LAYERS
    assert computed(EpicPlan(p)) == computed(TailPlan(p)) == [16] * LAYERS
    assert computed(CacheBlendPlan(p, engine.rope, 0.15)) == [40, 40, 6, 6, 6]
    full = engine(t.prompt).logits
    blended = engine(t.prompt, CacheBlendPlan(p, engine.rope, 1.0)).logits
    assert (blended - full).abs().max() < 1e-4


def test_too_many_selected_tokens_decline_the_plan(engine: PlannedForward) -> None:
    t = text(11)
    p = [piece(segment_of(engine, t), t)]
    plan = RelayPlan(p, RelayConfig(tau_dev=0.0, layers=(0, 1, 4), max_recompute=0.5))
    with pytest.raises(RelayDeclined, match="100% of the reused tokens"):
        engine(t.prompt, plan)
    assert "max_recompute" in plan.declined and plan.reuse_rate == 0
    profile = LayerProfile("x", (0.1,) * 5, (1.0,) * 5, 0, 1, 4, 1, kl_per_deviation=1e6)
    plan = RelayPlan(p, RelayConfig(fallback_kl=0.01, max_recompute=1.0), profile)
    with pytest.raises(RelayDeclined, match="nats is predicted"):
        engine(t.prompt, plan)


def test_a_segment_with_nan_is_declined_and_named(engine: PlannedForward) -> None:
    t = text(12)
    segment = segment_of(engine, t)
    kv: Any = segment.kv
    kv.v[4, 17] = float("nan")
    plan = RelayPlan([piece(segment, t)], RelayConfig(layers=(0, 1, 3), max_recompute=1.0))
    with pytest.raises(RelayDeclined, match="NaN"):
        engine(t.prompt, plan)
    assert plan.damaged == [0]


def test_several_pieces_and_a_prompt_that_ends_in_one(engine: PlannedForward) -> None:
    t = text(13)
    segment = segment_of(engine, t)
    prompt = [*t.second_prefix, *t.shared[4:30], 7, 8, *t.shared]
    pieces = [Piece(segment, 21, 4, 26), Piece(segment, 49, 0, 40)]
    plan = RelayPlan(pieces, RelayConfig(tau_dev=0.0, layers=(0, 0, 4), max_recompute=1.0))
    out = engine(prompt, plan)
    assert (out.logits - engine(prompt).logits).abs().max() < 1e-4
    assert int(plan.shared.sum()) == 26 + 39  # the last token is computed: its logits are wanted


def test_a_profile_finds_where_the_prefix_acts_and_survives_its_file(
    engine: PlannedForward, tmp_path: Path
) -> None:
    texts = [text(20 + i) for i in range(4)]
    profile = profile_layers(engine, texts)
    assert profile.deviation[0] < 1e-5 and profile.start == 1  # the first values depend on no other token
    assert max(profile.deviation) > 0.01 and profile.start <= profile.detection <= profile.end
    assert profile.kl_per_deviation > 0
    profile.save(tmp_path / "p.json")
    assert LayerProfile.load(tmp_path / "p.json") == profile
    (tmp_path / "bad.json").write_text("{}")
    with pytest.raises(ValueError, match="no layer profile"):
        LayerProfile.load(tmp_path / "bad.json")
    unknown = profile_for(engine.decoder.config)
    assert (unknown.start, unknown.end) == (0, LAYERS - 1)


def test_bad_settings_are_refused_by_name() -> None:
    field: str
    value: Any
    for field, value in (("tau_dev", -1), ("suffix", -1), ("max_recompute", 2), ("fallback_kl", 0)):
        with pytest.raises(ValueError, match=field):
            RelayConfig(**{field: value})
    with pytest.raises(ValueError, match="start <= detection"):
        RelayConfig(layers=(3, 2, 4))
    with pytest.raises(ValueError, match="below 5"):
        RelayConfig(layers=(0, 2, 9)).range(None, 5)


def test_a_thousand_hand_overs_with_cancelled_agents_leak_nothing() -> None:
    """Agents decode into pages, some are cancelled, their texts are pinned, found, used and evicted."""
    rng = np.random.default_rng(0)
    blocks = BlockManager(200, 16)
    block_bytes = 1000
    store = KVSegmentStore(60 * block_bytes)

    class Pages:  # what PinnedPages asks of pages
        size = 16

        class config:
            n_layers = 2

        class pool:
            class layout:
                block_bytes = 1000

    used = 0
    for agent in range(1000):
        n_prompt, n = int(rng.integers(5, 60)), int(rng.integers(20, 120))
        while True:
            try:
                blocks.allocate(agent, n_prompt)
                break
            except Exception:
                assert store.shrink()
        done = n if rng.random() < 0.7 else int(rng.integers(0, n))  # the others are cancelled
        blocks.append(agent, done)
        if done >= 16:
            keeper = -10 - agent
            blocks.fork(agent, keeper, first_block=n_prompt // 16)
            places = torch.arange(n_prompt, n_prompt + done) - n_prompt // 16 * 16
            kv = PinnedPages(Pages(), places, lambda keeper=keeper: blocks.free(keeper))  # type: ignore
            ids = rng.integers(0, 1000, done)
            if store.put("m", ids, kv, torch.arange(done)) is None:
                kv.release()
            found = store.find("m", [1, 2, *ids.tolist(), 3])
            if found and rng.random() < 0.5:
                with store.pinned(found[0].segment):
                    used += 1
        blocks.free(agent)
        assert store.stats().bytes_used <= 60 * block_bytes
    assert used > 100 and store.stats().pinned == 0
    store.clear()
    blocks.check_integrity()
    assert blocks.num_used == 0


class Letters:
    """A tokenizer of single characters, and a template that puts messages one behind another."""

    def encode(self, text: str) -> list[int]:
        return [ord(c) % VOCAB for c in text]

    def decode(self, ids: Any) -> str:
        return "".join(chr(i + 200) for i in ids)

    def render(self, messages: Any) -> str:
        return "".join(f"[{m['role']}]{m['content']}" for m in messages)


def session(engine: PlannedForward, **options: Any) -> Any:
    from sharewell.kv import RelaySession
    from sharewell.simulation import VirtualClock

    letters: Any = Letters()
    model: Any = engine.decoder
    options.setdefault("config", RelayConfig(layers=(1, 2, 3), max_recompute=1.0))
    return RelaySession(model.model, letters, letters, clock=VirtualClock(), **options)


def test_a_session_relays_texts_between_its_agents(engine: PlannedForward) -> None:
    s = session(engine, sample=1)
    spec = s.generate("spec", [{"role": "user", "content": "what?"}], max_new_tokens=40, ends=())
    assert len(spec.ids) == 40 and spec.segment is not None
    quoted = [
        {"role": "system", "content": "you review"},
        {"role": "user", "content": ["see: ", spec, " ok?"]},
    ]
    s.generate("review", quoted, max_new_tokens=3, ends=())
    first, second = s.report()
    assert first.found_tokens == 0 and first.sampled_kl is None
    assert second.found_tokens == 39 and 0 < second.reuse_rate < 1  # the last token has no keys and values
    assert second.sampled_kl is not None and not second.declined
    assert s.store.stats().pinned == 0


def test_a_session_that_recomputes_all_says_what_full_prefill_says(engine: PlannedForward) -> None:
    exact = session(engine, config=RelayConfig(tau_dev=0.0, layers=(0, 1, LAYERS - 1), max_recompute=1.0))
    declines = session(engine, config=RelayConfig(tau_dev=0.0, layers=(0, 1, 3), max_recompute=0.1))
    answers = []
    for s in (exact, declines):
        spec = s.generate("spec", [{"role": "user", "content": "what?"}], max_new_tokens=30, ends=())
        prompt = [{"role": "user", "content": ["read ", spec, ", then answer"]}]
        answers.append(s.generate("b", prompt, max_new_tokens=8, ends=()).ids)
        ids = s._prompt(prompt)
    assert answers[0] == answers[1]
    assert "max_recompute" in declines.report()[1].declined
    out, said = engine(ids), []
    for _ in range(8):
        said.append(int(out.logits[-1].argmax()))
        out = engine([said[-1]], space=out.space)
    assert tuple(said) == answers[0]


def test_a_session_computes_what_was_evicted_and_refuses_nul(engine: PlannedForward) -> None:
    s = session(engine)
    spec = s.generate("spec", [{"role": "user", "content": "what?"}], max_new_tokens=30, ends=())
    s.store.clear()
    s.generate("b", [{"role": "user", "content": [spec, "?"]}], max_new_tokens=2, ends=())
    assert s.report()[1].found_tokens == 0
    with pytest.raises(ValueError, match="NUL"):
        s.generate("b", [{"role": "user", "content": "a\x00b"}])
