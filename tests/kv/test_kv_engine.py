"""The engine against transformers' own forward, and any plan against a slow reference."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
import transformers as t
from transformers import AutoModelForCausalLM

from sharewell.kv import (
    KVPlan,
    LowRank,
    OwnPlan,
    PlanError,
    PlannedForward,
    Read,
    ReusePlan,
    Segment,
    SourcePlan,
    TensorKV,
    UnsupportedModel,
    decoder_for,
    move_keys,
)

VOCAB = 97
SHAPE: dict[str, Any] = {
    "hidden_size": 48, "intermediate_size": 64, "num_hidden_layers": 4, "num_attention_heads": 6,
    "num_key_value_heads": 2, "head_dim": 8, "vocab_size": VOCAB, "max_position_embeddings": 512,
    "initializer_range": 0.15, "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2,
}  # fmt: skip
LLAMA3 = {
    "rope_type": "llama3", "rope_theta": 1e4, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}  # fmt: skip
FAMILIES: dict[str, Callable[[], Any]] = {
    "llama": lambda: t.LlamaConfig(**SHAPE),
    "llama-mha": lambda: t.LlamaConfig(**{**SHAPE, "num_key_value_heads": 6}),
    "smollm2": lambda: t.LlamaConfig(**SHAPE, tie_word_embeddings=True, rope_parameters=LLAMA3),
    "mistral": lambda: t.MistralConfig(**SHAPE, sliding_window=24),
    "qwen2": lambda: t.Qwen2Config(**SHAPE),
    "qwen3": lambda: t.Qwen3Config(**SHAPE),
    "gemma": lambda: t.GemmaConfig(**SHAPE),
}
SMALL = {**SHAPE, "num_hidden_layers": 3, "num_attention_heads": 4}  # for the reference in float64


def build(family: str, dtype: torch.dtype = torch.float32) -> Any:
    with torch.random.fork_rng():
        torch.random.manual_seed(11)
        config = t.Qwen3Config(**SMALL) if family == "small" else FAMILIES[family]()
        model = AutoModelForCausalLM.from_config(config, dtype=dtype).eval()
        for p in model.parameters():  # biases and norms must matter
            if p.ndim == 1:
                with torch.no_grad():
                    p.add_(0.1 * torch.randn(p.shape))
    model.generation_config.eos_token_id = None
    return model


@pytest.fixture(scope="module", params=FAMILIES)
def model(request: pytest.FixtureRequest) -> Any:
    return build(request.param)


@pytest.fixture(scope="module")
def llama() -> Any:
    return build("llama")


@pytest.fixture(scope="module")
def exact() -> Any:
    return build("small", torch.float64)


def random_ids(seed: int, *shape: int) -> torch.Tensor:
    return torch.from_numpy(np.random.default_rng(seed).integers(3, VOCAB, shape))


def stock(model: Any, ids: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
    with torch.inference_mode():
        if mask is None:
            return model(ids).logits
        positions = (mask.cumsum(-1) - 1).clamp(min=0)
        return model(ids, attention_mask=mask, position_ids=positions).logits


# 1. The plain cache is the stock forward


@pytest.mark.parametrize("batch", [1, 4])
@pytest.mark.parametrize("chunk", [1, 7, 64])
def test_own_plan_in_chunks_equals_the_stock_forward(model: Any, batch: int, chunk: int) -> None:
    ids = random_ids(1, batch, 66)
    engine = PlannedForward(model)
    space, parts = engine.space(batch), []
    for start in range(0, 66, chunk):
        part = ids[:, start : start + chunk]
        out = engine(part, OwnPlan(), space=space, want="all")
        parts.append(out.logits.view(batch, part.shape[1], VOCAB))
    assert (torch.cat(parts, 1) - stock(model, ids)).abs().max() < 1e-4


@pytest.mark.parametrize("batch", [1, 4])
def test_64_greedy_tokens_equal_generate_with_left_padding(model: Any, batch: int) -> None:
    ids = random_ids(2, batch, 20)
    mask = torch.ones_like(ids)
    for row, padding in enumerate((0, 5, 11, 19)[:batch]):
        mask[row, :padding] = 0
    ids[mask == 0] = 2
    options = {"max_new_tokens": 64, "min_new_tokens": 64, "do_sample": False, "eos_token_id": None}
    expected = model.generate(ids, attention_mask=mask, **options)[:, 20:]
    engine = PlannedForward(model)
    out = engine(ids, attention_mask=mask)
    assert (out.logits - stock(model, ids, mask)[:, -1]).abs().max() < 1e-4
    tokens = []
    for _ in range(64):
        tokens.append(out.logits.argmax(-1))
        out = engine(tokens[-1][:, None], space=out.space)
    assert torch.equal(torch.stack(tokens, 1), expected)


def test_ragged_sequences_give_what_each_gives_alone(llama: Any) -> None:
    engine = PlannedForward(llama)
    texts = [random_ids(3 + i, n).tolist() for i, n in enumerate((1, 17, 40, 5))]
    out = engine(texts, want="all")
    alone = torch.cat([stock(llama, torch.tensor([text]))[0] for text in texts])
    assert (out.logits - alone).abs().max() < 1e-4
    more = [random_ids(9 + i, n).tolist() for i, n in enumerate((3, 1, 2, 6))]
    out = engine(more, space=out.space)
    for row, (a, b) in enumerate(zip(texts, more, strict=True)):
        assert (out.logits[row] - stock(llama, torch.tensor([a + b]))[0, -1]).abs().max() < 1e-4


def test_the_full_mask_is_attention_without_a_mask(llama: Any) -> None:
    class Full(KVPlan):
        mask = "full"

    ids = random_ids(4, 2, 9)
    with torch.inference_mode():
        expected = llama(ids, attention_mask=torch.zeros(2, 1, 9, 9)).logits
    for attention in ("sdpa", "eager"):
        out = PlannedForward(llama, attention)(ids, Full(), want="all")
        assert (out.logits.view(2, 9, VOCAB) - expected).abs().max() < 1e-4


def test_own_plan_equals_smollm2_with_its_real_weights() -> None:
    from sharewell.models import load_transformers, resolve_model

    model = load_transformers(resolve_model("smollm2"))
    ids = random_ids(5, 2, 24)
    engine = PlannedForward(model)
    out = engine(ids, want="all")
    assert (out.logits.view(2, 24, -1) - stock(model, ids)).abs().max() < 1e-4
    generate: Any = model.generate
    expected = generate(
        ids[:1], max_new_tokens=8, min_new_tokens=8, do_sample=False, eos_token_id=None, pad_token_id=2
    )
    step, tokens = engine(ids[:1]), []
    for _ in range(8):
        tokens.append(int(step.logits.argmax()))
        step = engine([tokens[-1]], space=step.space)
    assert tokens == expected[0, 24:].tolist()


# 2. Any plan equals a loop over tokens


@dataclass
class Scripted(KVPlan):
    """A plan that is fully written down: per layer the active slots, the source, and reads."""

    actives: list[torch.Tensor]
    sources: list[int]
    reads: list[list[tuple[torch.Tensor, Read]]]
    given: list[torch.Tensor]  # hidden states of all slots for each layer
    low: list[LowRank | None]
    mask: Any = "causal"

    def active(self, layer: int) -> torch.Tensor | None:
        return self.actives[layer]

    def source(self, layer: int) -> int:
        return self.sources[layer]

    def read(self, layer: int) -> Iterable[tuple[torch.Tensor, Read]]:
        return self.reads[layer]

    def hidden(self, layer: int, slots: torch.Tensor) -> torch.Tensor | None:
        return self.given[layer][slots]

    def low_rank(self, layer: int) -> LowRank | None:
        return self.low[layer]


def random_plan(rng: np.random.Generator, model: Any, ids: list[list[int]], past: list[int]) -> Scripted:
    """Every mechanism in one plan: sets that change, sources, segments, moves, layer copies, low rank."""
    c = model.config
    n, layers, kv, dim = sum(map(len, ids)), c.num_hidden_layers, c.num_key_value_heads, c.head_dim
    generator = torch.Generator().manual_seed(int(rng.integers(1 << 30)))

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    segment = Segment(
        0, "m", torch.arange(12), torch.from_numpy(rng.integers(0, 300, 12)),
        TensorKV(normal(layers, 12, kv, dim), normal(layers, 12, kv, dim)),
    )  # fmt: skip
    actives, sources, reads, low = [], [], [], []
    rank, use_low = 3, rng.random() < 0.3
    for layer in range(layers):
        active = torch.from_numpy(np.flatnonzero(rng.random(n) < rng.choice([0.3, 0.7, 1.0])))
        if layer == layers - 1 and not len(active):
            active = torch.tensor([n - 1])
        own = [j for j in range(layer) if sources[j] == j and len(actives[j])]
        # a source's low-rank plane would be the leader's: keep those plans apart
        source = int(rng.choice(own)) if own and rng.random() < 0.3 and not past[0] and not use_low else layer
        rest = torch.from_numpy(np.setdiff1d(np.arange(n), active.numpy()))
        read: list[tuple[torch.Tensor, Read]] = []
        if source == layer and len(rest):
            copied = rest[torch.from_numpy(rng.random(len(rest)) < 0.5)] if own and not past[0] else rest[:0]
            if len(copied):
                read.append((copied, Read(layer=int(rng.choice(own)))))
            rest = rest[~torch.isin(rest, copied)]
            tokens = torch.from_numpy(rng.integers(0, 12, len(rest)))
            origin = None if rng.random() < 0.5 else int(rng.integers(layers))
            if len(rest):
                read.append((rest, Read(segment, tokens, layer=origin, move=bool(rng.random() < 0.7))))
        actives.append(active)
        sources.append(source)
        reads.append(read)
        low.append(LowRank(normal(rank, c.hidden_size), normal(rank, kv * dim), 0.3) if use_low else None)
    if use_low:  # inactive tokens have no low-rank plane of their own: let all be active
        actives, reads = [torch.arange(n)] * layers, [[] for _ in range(layers)]
    given = [normal(n, c.hidden_size) for _ in range(layers)]
    mask = "causal" if rng.random() < 0.7 else "full"
    return Scripted(actives, sources, reads, given, low, mask)


def slow_reference(
    engine: PlannedForward, plan: Scripted, ids: list[list[int]], past: list[list[int]]
) -> dict[int, torch.Tensor]:
    """Token by token, head by head, with dictionaries: logits of the slots active in the last layer."""
    decoder: Any = engine.decoder
    c = decoder.config
    group, rope = c.n_heads // c.n_kv_heads, engine.rope
    store: dict[tuple[int, int, int], tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]] = {}
    exists: dict[int, list[int]] = {}

    def attention(layer: int, s: int, place: int, q: torch.Tensor, mask: str, low: LowRank | None) -> Any:
        out = torch.zeros(c.n_heads, c.head_dim, dtype=torch.float64)
        seen = [p for p in exists[s] if mask == "full" or p <= place]
        for head in range(c.n_heads):
            scores = [float(q[head] @ store[layer, s, p][0][head // group]) * c.head_dim**-0.5 for p in seen]
            weights = np.exp(np.array(scores) - max(scores))
            weights /= weights.sum()
            for w, p in zip(weights.tolist(), seen, strict=True):
                _, v, z = store[layer, s, p]
                out[head] += w * v[head // group]
                if low is not None:
                    assert z is not None
                    dim, kv_head = c.head_dim, head // group
                    out[head] += w * low.scale * (z @ low.b[:, kv_head * dim : (kv_head + 1) * dim])
        return out

    def run(tokens: list[tuple[int, int, int]], script: Scripted | None) -> dict[int, torch.Tensor]:
        for s, place, _ in tokens:
            exists.setdefault(s, []).append(place)
        h = {i: decoder.embed(torch.tensor([token]))[0] for i, (_, _, token) in enumerate(tokens)}
        before = set(h)
        for layer in range(c.n_layers):
            active = set(h) if script is None else set(script.actives[layer].tolist())
            source = layer if script is None else script.sources[layer]
            low = None if script is None else script.low[layer]
            mask = "causal" if script is None else script.mask
            state = {
                i: h[i] if layer == 0 or i in before else script.given[layer][i]  # type: ignore
                for i in active
            }
            for slots, read in script.reads[layer] if script is not None else ():
                for j, i in enumerate(slots.tolist()):
                    s, place, _ = tokens[i]
                    if read.segment is None:
                        store[layer, s, place] = store[read.layer, s, place]  # type: ignore
                        continue
                    origin = layer if read.layer is None else read.layer
                    token = read.tokens[j : j + 1]  # type: ignore
                    k, v = read.segment.read(origin, token)
                    if read.move:
                        k = move_keys(k, read.segment.positions[token], torch.tensor([place]), rope)
                    store[layer, s, place] = k[0], v[0], None
            queries = {}
            for i in active:
                s, place, _ = tokens[i]
                q, k, v = decoder.qkv(layer, state[i][None], torch.tensor([place]))
                z = decoder.attn_in(layer, state[i][None])[0] @ low.a.T if low is not None else None
                if source == layer:
                    store[layer, s, place] = k[0], v[0], z
                queries[i] = q[0]
            h = {}
            for i in active:
                s, place, _ = tokens[i]
                o = attention(source, s, place, queries[i], mask, low)
                h[i] = decoder.mlp(layer, decoder.attn_out(layer, state[i][None], o[None]))[0]
            before = active
        return {i: decoder.head(x[None])[0] for i, x in h.items()}

    if any(past):
        run([(s, p, token) for s, row in enumerate(past) for p, token in enumerate(row)], None)
    new = [(s, len(past[s]) + p, token) for s, row in enumerate(ids) for p, token in enumerate(row)]
    return run(new, plan)


@pytest.mark.parametrize("seed", range(200))
def test_a_random_plan_equals_the_slow_reference(seed: int, exact: Any) -> None:
    rng = np.random.default_rng(seed)
    count = int(rng.integers(1, 3))
    ids = [rng.integers(3, VOCAB, int(rng.integers(1, 6))).tolist() for _ in range(count)]
    past = [rng.integers(3, VOCAB, 2).tolist() if seed % 3 == 0 else [] for _ in range(count)]
    engine = PlannedForward(exact, "eager" if seed % 2 else "sdpa")
    plan = random_plan(rng, exact, ids, [len(p) for p in past])
    if any(past):  # what came before has no low-rank plane
        plan.low = [None] * len(plan.low)
    space = engine.space(count)
    if any(past):
        engine(past, space=space)
    with torch.no_grad():
        expected = slow_reference(engine, plan, ids, past)
    slots = torch.tensor(sorted(expected))
    out = engine(ids, plan, space=space, want=slots)
    assert out.logits.dtype == torch.float64
    assert (out.logits - torch.stack([expected[i] for i in slots.tolist()])).abs().max() < 1e-6


# 3. The counts are what a recount gives


def test_counts_equal_a_recount_by_hooks() -> None:
    model = build("qwen3")
    calls = {"q_proj": 0, "k_proj": 0, "v_proj": 0}
    for layer in model.model.layers:
        for name in calls:

            def count(module: Any, args: Any, out: torch.Tensor, name: str = name) -> None:
                calls[name] += out.shape[0]

            getattr(layer.self_attn, name).register_forward_hook(count)
    engine = PlannedForward(model)
    kv = TensorKV(torch.zeros(4, 10, 2, 8), torch.zeros(4, 10, 2, 8))
    segment = Segment(0, "m", torch.arange(10), torch.arange(10), kv)
    reuse = ReusePlan([(torch.arange(3, 13), segment, torch.arange(10))])
    for plan, q, k, read in (
        (OwnPlan(), 80, 80, 0),
        (SourcePlan([0, 0, 2, 2]), 80, 40, 0),
        (reuse, 40, 40, 40),
    ):
        calls.update(dict.fromkeys(calls, 0))
        stats = engine(random_ids(6, 20), plan).stats
        assert calls == {"q_proj": q, "k_proj": k, "v_proj": k}
        assert stats.token_layers == q and sum(stats.projections_skipped) == 2 * (q - k)
        assert sum(stats.tokens_read) == read and sum(stats.bytes_read) == read * 2 * 2 * 8 * 4
        kept = 2 if isinstance(plan, SourcePlan) else 4
        assert stats.bytes_held == 20 * kept * 2 * 2 * 8 * 4


def test_attention_mass_is_what_transformers_attends(llama: Any) -> None:
    class Mass(KVPlan):
        def __init__(self) -> None:
            self.got: list[list[torch.Tensor]] = []

        def wants_attention(self, layer: int) -> bool:
            return True

        def observe(self, layer: int, slots: Any, k: Any, v: Any, mass: Any = None) -> None:
            self.got.append(mass)

    plan = Mass()
    texts = [random_ids(7, 8).tolist(), random_ids(8, 5).tolist()]
    PlannedForward(llama)(texts, plan)
    eager = build("llama")
    eager.set_attn_implementation("eager")
    for row, text in enumerate(texts):
        with torch.inference_mode():
            attentions = eager(torch.tensor([text]), output_attentions=True).attentions
        for layer, expected in enumerate(attentions):
            assert torch.allclose(plan.got[layer][row], expected[0].sum((0, 1)), atol=1e-4)


# Bad input


class Fixed(KVPlan):
    """Any moment by name."""

    def __init__(self, **moments: Any) -> None:
        for name, value in moments.items():
            plain = callable(value) or isinstance(value, str)
            setattr(self, name, value if plain else lambda *a, value=value: value)


def segment_of(n: int) -> Segment:
    kv = TensorKV(torch.zeros(4, n, 2, 8), torch.zeros(4, n, 2, 8))
    return Segment(0, "m", torch.arange(n), torch.arange(n), kv)


READ = torch.arange(3)
FLASH: Any = "flash"


@pytest.mark.parametrize(
    ("plan", "message"),
    [
        (Fixed(active=torch.tensor([5])), "layer 0: slot 0 is neither active nor read"),
        (Fixed(active=torch.tensor([0, 6])), r"layer 0: active slots must be in \[0, 6\), got 6"),
        (Fixed(active=torch.tensor([3, 1])), "layer 0: active slots must be ascending"),
        (Fixed(active=torch.tensor([1.0])), "layer 0: active slots must be int64"),
        (Fixed(active=lambda layer: torch.arange(6) if layer == 3 else READ,
               read=lambda layer: [(READ + 3, Read(segment_of(3), READ))] if layer < 3 else []),
         r"layer 3: slot 3 becomes active and needs a hidden state \[3, 48\]"),
        (Fixed(source=lambda layer: layer + 1), r"layer 0: source must be in \[0, 0\], got 1"),
        (Fixed(read=[(READ, Read(segment_of(3), READ))]), "layer 0: slot 0 is both active and read"),
        (Fixed(active=READ + 3, read=[(READ, Read(segment_of(2), torch.arange(2)))]),
         "layer 0: read of 3 slots must name as many tokens"),
        (Fixed(active=READ + 3, read=[(READ, Read(layer=0))]), r"layer must be in \[0, 0\), got 0"),
        (Fixed(active=READ + 3, read=[(READ, Read(segment_of(3), READ, transform=lambda k, v: (k[:1], v)))]),
         "keys and values read must have shape"),
        (SourcePlan([0, 0]), "sources name 2 layers, the model has 4"),
    ],
)  # fmt: skip
def test_a_plan_that_cannot_be_carried_out_names_layer_and_slot(
    llama: Any, plan: KVPlan, message: str
) -> None:
    with pytest.raises(PlanError, match=message):
        PlannedForward(llama)(random_ids(9, 6), plan, want=torch.tensor([5]))


def test_logits_of_an_inactive_slot_are_refused(llama: Any) -> None:
    plan = ReusePlan([(torch.arange(3), segment_of(3), torch.arange(3))])
    with pytest.raises(PlanError, match="layer 3: logits of slot 1 are wanted"):
        PlannedForward(llama)(random_ids(9, 6), plan, want=torch.tensor([1]))


def test_a_hole_of_an_earlier_pass_is_found_later_even_by_the_plain_cache(llama: Any) -> None:
    engine = PlannedForward(llama)
    space = engine(random_ids(10, 6), SourcePlan([0, 0, 2, 2])).space
    with pytest.raises(PlanError, match="layer 1: position 0 of sequence 0 is neither active nor read"):
        engine([5], OwnPlan(), space=space)
    assert engine([5], SourcePlan([0, 0, 2, 2]), space=space, positions=[6]).logits.shape == (1, VOCAB)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda e: e([]), "ids must hold at least one token"),
        (lambda e: e([3, 4], positions=[1]), "positions must have one for each token"),
        (lambda e: e([3, 4], positions=[4, 4]), "must be ascending, got 4 after 4"),
        (lambda e: e([3], positions=[-1]), "positions must be at least 0, got -1"),
        (lambda e: e([3], want="first"), "want must be last, all or slots"),
        (lambda e: e([3], want=torch.tensor([1])), r"wanted slots must be in \[0, 1\), got \[1\]"),
        (lambda e: e([[3], [4]], space=e.space(1)), "holds 1 sequences, the call names sequence 1"),
        (lambda e: e(torch.zeros(1, 2, 3)), "ids must have 1 or 2 dimensions, got 3"),
        (lambda e: e([[3, 4], [5]], attention_mask=torch.ones(2, 2)), "attention_mask must have the shape"),
        (lambda e: e([3], Fixed(mask="diagonal")), "mask must be causal or full"),
        (
            lambda e: PlannedForward(e.decoder, FLASH),
            "attention must be sdpa or eager, got 'flash'",
        ),
        (lambda e: e.space(0), "n_sequences must be at least 1"),
        (lambda e: SourcePlan([0, 2, 2]), r"sources\[1\] must be a layer in \[0, 1\]"),
        (lambda e: SourcePlan([]), "sources must name"),
    ],
)
def test_wrong_calls_name_what_is_wrong(llama: Any, call: Any, message: str) -> None:
    engine = PlannedForward(llama)
    with pytest.raises(ValueError, match=message):
        call(engine)


def test_models_that_cannot_be_taken_apart_are_refused_by_name() -> None:
    small: dict[str, Any] = {"vocab_size": 50, "hidden_size": 32, "num_hidden_layers": 2}
    mamba = AutoModelForCausalLM.from_config(t.MambaConfig(**small, state_size=4))
    mixed = AutoModelForCausalLM.from_config(t.Gemma3TextConfig(**SHAPE, sliding_window=16))
    qwen = AutoModelForCausalLM.from_config(
        t.Qwen2Config(**SHAPE, use_sliding_window=True, sliding_window=16, max_window_layers=2)
    )
    for model, reason in ((mamba, "Mamba"), (mixed, "Gemma3"), (qwen, "mix kinds of attention")):
        with pytest.raises(UnsupportedModel, match=reason):
            decoder_for(model)
    with pytest.raises(UnsupportedModel, match="dict has neither"):
        decoder_for({})


def test_nan_is_named_in_debug_mode() -> None:
    model = build("llama")
    with torch.no_grad():
        model.model.layers[2].mlp.down_proj.weight[0, 0] = float("nan")
    with pytest.raises(PlanError, match="layer 2 computed NaN"):
        PlannedForward(model, debug=True)(random_ids(12, 4))


def test_another_dtype_is_converted_and_counted(llama: Any) -> None:
    kv = TensorKV(*(torch.zeros(4, 3, 2, 8, dtype=torch.float64) for _ in range(2)))
    segment = Segment(0, "m", torch.arange(3), torch.arange(3), kv)
    out = PlannedForward(llama)(random_ids(13, 6), ReusePlan([(READ, segment, READ)]))
    assert out.stats.converted == 3 * 4 and out.logits.dtype == torch.float32


def test_forgotten_places_are_as_if_they_had_never_been(llama: Any) -> None:
    engine = PlannedForward(llama)
    ids = random_ids(14, 12)
    space = engine(ids).space
    space.forget(0, 7)
    again = engine(ids[7:], space=space, want="all").logits
    assert (again - stock(llama, ids[None])[0, 7:]).abs().max() < 1e-4


def test_positions_with_gaps_leave_no_ghosts(llama: Any) -> None:
    ids, at = random_ids(15, 7), torch.tensor([2, 3, 9, 10, 11, 30, 31])
    with torch.inference_mode():
        expected = llama(ids[None], position_ids=at[None]).logits[0]
    out = PlannedForward(llama)(ids, positions=at, want="all")
    assert (out.logits - expected).abs().max() < 1e-4
