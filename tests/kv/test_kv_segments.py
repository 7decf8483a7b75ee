"""Moving keys, the store of segments against a plain model of it, its files, and plans as caches."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers as t
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM

from sharewell.kv import (
    DenseKV,
    KVPlan,
    KVSegmentStore,
    OwnPlan,
    PlanCache,
    PlanError,
    PlannedForward,
    RopeSpec,
    Segment,
    SourcePlan,
    TensorKV,
    UnsupportedModel,
    model_key,
    move_keys,
    rope_of,
)
from sharewell.kv.store import window_hashes

# transformers calls the argument ``cache`` from 5.24 on, and keeps the old name until 6
pytestmark = pytest.mark.filterwarnings("ignore:`past_key_values` is deprecated")
SHAPE: dict[str, Any] = {
    "hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4,
    "num_key_value_heads": 2, "vocab_size": 90, "max_position_embeddings": 1 << 16, "initializer_range": 0.15,
    "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2,
}  # fmt: skip
LLAMA3 = {
    "rope_type": "llama3", "rope_theta": 5e5, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}  # fmt: skip
LINEAR = {"rope_type": "linear", "rope_theta": 1e4, "factor": 4.0}
YARN = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 16384}
ROPES = {
    "llama": t.LlamaConfig(**SHAPE),
    "llama3": t.LlamaConfig(**SHAPE, rope_parameters=LLAMA3),
    "linear": t.LlamaConfig(**SHAPE, rope_parameters=LINEAR),
    "yarn": t.Qwen2Config(**SHAPE, rope_parameters=YARN),
    "mistral": t.MistralConfig(**SHAPE),
    "qwen3": t.Qwen3Config(**SHAPE, head_dim=32),
    "gemma": t.GemmaConfig(**SHAPE, head_dim=32),
    "phi": t.PhiConfig(**{**SHAPE, "partial_rotary_factor": 0.5}),
}  # fmt: skip


def build(config: Any, seed: int = 3) -> Any:
    with torch.random.fork_rng():
        torch.random.manual_seed(seed)
        return AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def llama() -> Any:
    return build(ROPES["llama"])


def ids_of(seed: int, n: int) -> torch.Tensor:
    return torch.from_numpy(np.random.default_rng(seed).integers(3, 90, n))


# 5. Moving keys


@pytest.mark.parametrize("name", ROPES)
def test_moved_keys_are_those_that_the_model_computes_there(name: str) -> None:
    model = build(ROPES[name])
    rope, n = rope_of(model), 40
    ids = ids_of(1, n)
    rng = np.random.default_rng(2)
    start, end = (torch.from_numpy(np.sort(rng.integers(0, 32_000, n))) for _ in range(2))

    def keys(positions: torch.Tensor) -> torch.Tensor:  # of layer 0: no prefix acts on them
        cache = t.DynamicCache()
        with torch.inference_mode():
            model(ids[None], position_ids=positions[None], past_key_values=cache)
        first: Any = cache.layers[0]
        return first.keys[0].transpose(0, 1)

    old, new = keys(start), keys(end)
    scale = float(new.abs().max())
    assert (move_keys(old, start, end, rope) - new).abs().max() < 1e-5 * max(1.0, scale)
    back = move_keys(move_keys(old, start, end, rope), end, start, rope)
    assert (back - old).abs().max() < 1e-6 * max(1.0, scale)
    assert (old - new).abs().max() > 0.01 * scale, "the move must matter"


@settings(deadline=None, max_examples=60)
@given(
    st.lists(st.tuples(*[st.integers(0, 32_768)] * 3), min_size=1, max_size=8),
    st.booleans(),
    st.sampled_from([torch.float32, torch.float64]),
)  # fmt: skip
def test_moves_compose_and_keep_length(moves: list[Any], interleaved: bool, dtype: torch.dtype) -> None:
    rope = RopeSpec(1.0 / 1e4 ** (torch.arange(0, 8, 2) / 8).float(), interleaved)
    a, b, c = (torch.tensor(x) for x in zip(*moves, strict=True))
    k = torch.randn(len(a), 2, 10, generator=torch.Generator().manual_seed(len(a))).to(dtype)  # 2 not rotated
    direct, detour = move_keys(k, a, c, rope), move_keys(move_keys(k, a, b, rope), b, c, rope)
    assert (direct - detour).abs().max() < 3e-6
    assert torch.equal(direct[..., 8:], k[..., 8:]) and direct.dtype == dtype
    assert (direct.norm(dim=-1) - k.norm(dim=-1)).abs().max() < 3e-6


def test_bfloat16_keys_are_rotated_in_float32() -> None:
    rope = RopeSpec(1.0 / 1e4 ** (torch.arange(0, 64, 2) / 64).float())
    k = torch.randn(50, 2, 64, generator=torch.Generator().manual_seed(1)).bfloat16()
    a, b = torch.arange(50), torch.arange(50) + 20_000
    exact = move_keys(k.double(), a, b, rope)
    assert (move_keys(k, a, b, rope).double() - exact).abs().max() < 1.01 * 2**-8 * exact.abs().max()


def test_ropes_that_cannot_be_moved_are_refused() -> None:
    dynamic = build(
        t.LlamaConfig(**SHAPE, rope_parameters={"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0})
    )
    with pytest.raises(UnsupportedModel, match="'dynamic' depends on the text's length"):
        rope_of(dynamic)
    gpt2 = build(t.GPT2Config(vocab_size=50, n_embd=32, n_layer=1, n_head=2))
    with pytest.raises(UnsupportedModel, match="GPT2LMHeadModel: keys cannot be moved"):
        rope_of(gpt2)


# 6. The store


def kv_of(n: int, fill: float = 0.0) -> TensorKV:
    return TensorKV(torch.full((2, n, 1, 4), fill), torch.full((2, n, 1, 4), fill))


def brute_force(texts: dict[int, list[int]], ids: list[int], least: int) -> int:
    """Length of the longest common run with any text."""
    best = 0
    for held in texts.values():
        for i in range(len(ids)):
            for j in range(len(held)):
                n = 0
                while i + n < len(ids) and j + n < len(held) and ids[i + n] == held[j + n]:
                    n += 1
                best = max(best, n)
    return best if best >= least else 0


def test_ten_thousand_random_operations_against_a_plain_model() -> None:
    rng = np.random.default_rng(4)
    store = KVSegmentStore(40_000, block=4)
    texts: dict[int, tuple[str, list[int]]] = {}
    pins: dict[int, int] = {}
    for step in range(10_000):
        scope = "ab"[int(rng.integers(2))]
        action = rng.choice(["put", "find", "pin", "release", "drop"], p=[0.3, 0.4, 0.13, 0.13, 0.04])
        if action == "put":
            ids = rng.integers(0, 4, int(rng.integers(1, 60))).tolist()
            new = store.put("m", ids, kv_of(len(ids), step), np.arange(len(ids)), scope=scope)
            if new is not None:
                texts[new] = scope, ids
            else:
                assert sum(pins.values()) > 0 or len(ids) > 300
        elif action == "find":
            ids = rng.integers(0, 4, int(rng.integers(1, 40))).tolist()
            taken: set[int] = set()
            for m in store.find("m", ids, scope=scope):
                where, held = texts[m.segment]
                assert where == scope and m.length >= 4
                assert held[m.offset : m.offset + m.length] == ids[m.start : m.start + m.length]
                span = set(range(m.start, m.start + m.length))
                assert not taken & span
                taken |= span
        elif action == "pin" and texts:
            chosen = int(rng.choice(list(texts)))
            try:
                segment = store.pin(chosen)
                assert segment.token_ids.tolist() == texts[chosen][1]
                pins[chosen] = pins.get(chosen, 0) + 1
            except KeyError:
                assert chosen not in store
        elif action == "release" and pins:
            chosen = int(rng.choice(list(pins)))
            store.release(chosen)
            pins[chosen] -= 1
            if not pins[chosen]:
                del pins[chosen]
        elif action == "drop" and texts:
            store.drop(int(rng.choice(list(texts))))
        stats = store.stats()
        assert stats.bytes_used <= store.budget_bytes
        assert stats.pinned == len(pins)
        if step % 100 == 0:
            alive = {s for s in texts if s in store}
            assert pins.keys() <= store._entries.keys()
            texts = {s: x for s, x in texts.items() if s in alive or s in pins}
            assert stats.bytes_used == sum(e.segment.nbytes for e in store._entries.values())
    for chosen, n in pins.items():
        for _ in range(n):
            store.release(chosen)
    store.clear()
    assert store.stats().bytes_used == 0 and not store._index


@settings(deadline=None, max_examples=80)
@given(st.lists(st.lists(st.integers(0, 2), min_size=1, max_size=24), min_size=1, max_size=4), st.data())
def test_the_longest_common_run_is_found(texts: list[list[int]], data: st.DataObject) -> None:
    store = KVSegmentStore(1 << 20, block=4)
    for ids in texts:
        store.put("m", ids, kv_of(len(ids)), range(len(ids)))
    ids = data.draw(st.lists(st.integers(0, 2), min_size=1, max_size=20))
    got = max((m.length for m in store.find("m", ids)), default=0)
    assert got == brute_force(dict(enumerate(texts)), ids, 4)


def test_repetitive_texts_are_found_without_trying_every_pair() -> None:
    store = KVSegmentStore(1 << 22)
    for _ in range(3):
        store.put("m", [7] * 2000, kv_of(2000), range(2000))
    [m] = store.find("m", [7] * 1500)
    assert (m.start, m.length) == (0, 1500)


def test_hashes_of_equal_windows_are_equal_and_others_differ() -> None:
    ids = np.random.default_rng(5).integers(0, 50_000, 3000)
    hashes = window_hashes(ids, 16)
    assert len(set(hashes.tolist())) == 2985
    again = window_hashes(ids[100:200], 16)
    assert np.array_equal(again, hashes[100:185])


def test_what_saves_least_per_byte_goes_first() -> None:
    size = Segment(0, "m", torch.arange(32), torch.arange(32), kv_of(32)).nbytes
    store = KVSegmentStore(3 * size + 10, block=16)
    rng = np.random.default_rng(6)
    texts = [rng.integers(0, 1000, 32) for _ in range(4)]
    a, b, c = (store.put("m", ids, kv_of(32), range(32)) for ids in texts[:3])
    assert a is not None and b is not None and c is not None
    for _ in range(3):
        store.find("m", texts[0])
        store.find("m", texts[2])
    assert store.put("m", texts[3], kv_of(32), range(32)) is not None
    assert a in store and c in store and b not in store
    hidden = {1: torch.zeros(8, 4000)}
    assert store.put("m", range(8), kv_of(8), range(8), hidden=hidden) is None, "larger than the budget"
    assert a in store and store.stats().refused == 1


def test_pinned_segments_stay_and_dropped_ones_go_with_the_last_pin() -> None:
    size = Segment(0, "m", torch.arange(32), torch.arange(32), kv_of(32)).nbytes
    store = KVSegmentStore(2 * size)
    a = store.put("m", range(32), kv_of(32), range(32))
    assert a is not None
    with store.pinned(a, a) as held:
        store.put("m", range(100, 132), kv_of(32), range(32))
        store.put("m", range(200, 232), kv_of(32), range(32))
        assert a in store and store.stats().evictions == 1
        store.drop(a)
        assert a not in store and store.find("m", range(32)) == []
        assert held[0].read(0, torch.tensor([3]))[0].shape == (1, 1, 4)
        with pytest.raises(KeyError):
            store.pin(a)
    assert len(store) == 1 and store.stats().bytes_used == size


def test_keys_scopes_and_chosen_segments_keep_texts_apart() -> None:
    store = KVSegmentStore(1 << 20)
    a = store.put("m", range(40), kv_of(40), range(40), scope="alice")
    b = store.put("m", range(40), kv_of(40), range(40), scope="alice")
    assert a is not None and b is not None
    assert store.find("m", range(40), scope="bob") == [] and store.find("n", range(40), scope="alice") == []
    assert store.find("m", range(40), scope="alice", among=[b])[0].segment == b
    [m] = store.find("m", [7, 7, *range(5, 30), 8], scope="alice", among=[a])
    assert (m.start, m.offset, m.length) == (2, 5, 25)
    assert store.find("m", range(25), scope="alice", min_tokens=30) == []


def test_bad_segments_name_the_field() -> None:
    store = KVSegmentStore(1 << 20)
    nan = torch.zeros(2, 4, 1, 4)
    nan[1, 2] = float("nan")
    for wrong, message in (
        (lambda: TensorKV(nan, torch.zeros(2, 4, 1, 4)), "k must be finite, layer 1"),
        (lambda: TensorKV(torch.zeros(2, 4, 1, 4), torch.zeros(2, 3, 1, 4)), "k and v must both be"),
        (lambda: store.put("m", [], kv_of(1), []), "token_ids must hold at least one"),
        (lambda: store.put("m", [1, 2], kv_of(2), [0]), "positions must have one entry for each of the 2"),
        (lambda: store.put("m", [1, 2], kv_of(3), [0, 1]), "kv must hold the 2 tokens, got 3"),
        (
            lambda: store.put("m", [1], kv_of(1), [0], influence=torch.tensor([float("nan")])),
            "influence must",
        ),
        (lambda: store.put("m", [1], kv_of(1), [0], hidden={2: torch.zeros(2, 4)}), r"hidden\[2\] must"),
        (lambda: KVSegmentStore(0), "budget_bytes must be at least 1, got 0"),
        (lambda: KVSegmentStore(9, block=1), "block must be at least 2, got 1"),
    ):
        with pytest.raises(ValueError, match=message):
            wrong()
    a = store.put("m", range(3), kv_of(3), range(3))
    assert a is not None
    with pytest.raises(ValueError, match="is not pinned"):
        store.release(a)
    with pytest.raises(KeyError):
        store.release(99)


def test_segments_survive_a_restart_and_a_flipped_byte_is_a_miss(tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(8)
    store = KVSegmentStore(1 << 20)
    for i in range(3):
        k, v = (torch.randn(2, 20, 1, 4, generator=generator) for _ in range(2))
        store.put("m", range(i * 100, i * 100 + 20), TensorKV(k, v), range(5, 25),
                  hidden={1: torch.randn(20, 6, generator=generator)},
                  influence=torch.rand(20, generator=generator), writer=f"w{i}")  # fmt: skip
    assert store.save(tmp_path) == 3 and store.save(tmp_path) == 3 and len(list(tmp_path.iterdir())) == 3
    again = KVSegmentStore(1 << 20)
    assert again.load(tmp_path) == 3 and again.load(tmp_path, "another") == 0
    [m] = again.find("m", range(100, 120))
    old = store.find("m", range(100, 120))[0].segment
    with store.pinned(old) as [a], again.pinned(m.segment) as [b]:
        every = torch.arange(20)
        for layer in range(2):
            assert all(
                torch.equal(x, y) for x, y in zip(a.read(layer, every), b.read(layer, every), strict=True)
            )
        assert torch.equal(a.hidden[1], b.hidden[1]) and b.influence is not None and a.influence is not None
        assert torch.equal(a.influence, b.influence) and a.writer == b.writer
        assert torch.equal(a.positions, b.positions)
    rng = np.random.default_rng(9)
    for path in list(tmp_path.iterdir()):
        data = bytearray(path.read_bytes())
        for _ in range(12):  # anywhere in the file: header, labels or tensors
            at = int(rng.integers(len(data)))
            data[at] ^= 1 << int(rng.integers(8))
            path.write_bytes(bytes(data))
            fresh = KVSegmentStore(1 << 20)
            loaded = fresh.load(tmp_path)
            assert loaded + fresh.stats().damaged == len(list(tmp_path.iterdir()))
            assert fresh.stats().damaged >= 1
            data[at] ^= 0
    (tmp_path / "short.safetensors").write_bytes(b"abc")
    fresh = KVSegmentStore(1 << 20)
    assert fresh.load(tmp_path) == 0 and fresh.find("m", range(20)) == []


def test_recomputing_for_one_reader_leaves_the_segment_alone(llama: Any) -> None:
    engine, ids = PlannedForward(llama), ids_of(10, 30)
    kv = TensorKV.copied(engine(ids).space, 0, torch.arange(30))  # type: ignore[arg-type]
    before = kv.k.clone(), kv.v.clone()

    class Some(KVPlan):
        def active(self, layer: int) -> torch.Tensor:
            return torch.arange(40) if layer == 1 else torch.tensor([*range(5), *range(20, 40)])

        def read(self, layer: int) -> Any:
            from sharewell.kv import Read

            slots = torch.arange(5, 20)
            return [] if layer == 1 else [(slots, Read(segment, slots - 5))]

        def hidden(self, layer: int, slots: torch.Tensor) -> torch.Tensor:
            return torch.zeros(len(slots), 64)

    segment = Segment(0, "m", ids, torch.arange(30), kv)
    engine(torch.cat([ids_of(11, 5), ids, ids_of(12, 5)]), Some())
    assert torch.equal(kv.k, before[0]) and torch.equal(kv.v, before[1])


def test_model_keys_tell_weights_dtypes_and_ropes_apart() -> None:
    keys = [model_key(build(c)) for c in ROPES.values()]
    keys += [model_key(build(ROPES["llama"], 4)), model_key(build(ROPES["llama"]).bfloat16())]
    keys += [
        model_key(build(ROPES["llama"]), adapter="x"),
        model_key(build(ROPES["llama"]), quantisation="int8"),
    ]
    assert len(set(keys)) == len(keys)
    assert model_key(build(ROPES["llama"])) == keys[0]


# Plans as transformers caches


OPTIONS: dict[str, Any] = {
    "max_new_tokens": 24,
    "min_new_tokens": 24,
    "do_sample": False,
    "eos_token_id": None,
}


def padded(n: int = 3) -> tuple[torch.Tensor, torch.Tensor]:
    ids = torch.stack([ids_of(20 + i, 12) for i in range(n)])
    mask = torch.ones_like(ids)
    for row in range(n):
        mask[row, : 2 * row] = 0
    return ids, mask


@pytest.mark.parametrize("beams", [1, 3])
def test_generate_with_the_plain_plan_is_generate(llama: Any, beams: int) -> None:
    ids, mask = padded()
    expected = llama.generate(ids, attention_mask=mask, num_beams=beams, **OPTIONS)
    cache = PlanCache(3, OwnPlan())
    got = llama.generate(ids, attention_mask=mask, num_beams=beams, past_key_values=cache, **OPTIONS)
    assert torch.equal(got, expected)


def test_any_causal_model_of_transformers_takes_a_plan_cache() -> None:
    model = build(t.GPT2Config(vocab_size=90, n_embd=32, n_layer=3, n_head=4, initializer_range=0.2))
    ids, _ = padded()
    expected = model.generate(ids, **OPTIONS)
    assert torch.equal(model.generate(ids, past_key_values=PlanCache(3), **OPTIONS), expected)


def test_a_source_plan_is_the_same_as_a_cache_and_in_the_engine(llama: Any) -> None:
    plan, ids = SourcePlan([0, 0, 2]), ids_of(30, 15)
    cache = PlanCache(3, plan)
    with torch.inference_mode():
        first = llama(ids[None, :9], past_key_values=cache).logits[0]
        second = llama(ids[None, 9:], past_key_values=cache).logits[0]
    out = PlannedForward(llama)(ids, plan, want="all")
    assert (torch.cat([first, second]) - out.logits).abs().max() < 1e-4
    assert cache.nbytes == out.stats.bytes_held == 15 * 2 * 2 * 2 * 16 * 4
    assert cache.get_seq_length() == 15 and len(cache) == 3
    cache.crop(-5)
    with torch.inference_mode():
        again = llama(ids[None, 10:], past_key_values=cache).logits[0]
    assert (again - out.logits[10:]).abs().max() < 1e-4
    got = llama.generate(ids[None], past_key_values=PlanCache(3, plan), num_beams=2, **OPTIONS)
    assert got.shape == (1, 39)


def test_generate_goes_on_from_stored_segments_at_another_place(llama: Any) -> None:
    ids = ids_of(31, 20)
    cache = PlanCache(3)
    with torch.inference_mode():
        llama(ids[None], position_ids=torch.arange(100, 120)[None], past_key_values=cache)
    segment = Segment(0, "m", ids, torch.arange(100, 120), cache.segment(0, 0, 20))
    begun = PlanCache.begun_with(llama, [(segment, torch.arange(20))])
    question = torch.cat([ids, ids_of(32, 4)])[None]
    expected = llama.generate(question, **OPTIONS)
    assert torch.equal(llama.generate(question, past_key_values=begun, **OPTIONS), expected)


def test_gradients_pass_through_the_cache(llama: Any) -> None:
    ids = ids_of(33, 10)[None]
    model = build(ROPES["llama"])
    losses = []
    for cache in (None, PlanCache(3)):
        model.zero_grad()
        loss = model(ids, labels=ids, past_key_values=cache, use_cache=cache is not None).loss
        loss.backward()
        losses.append((loss.item(), model.model.layers[0].self_attn.k_proj.weight.grad.clone()))
    assert abs(losses[0][0] - losses[1][0]) < 1e-6 and torch.allclose(losses[0][1], losses[1][1], atol=1e-6)


def test_plans_that_a_cache_cannot_follow_are_refused(llama: Any) -> None:
    class Leaves(KVPlan):
        def active(self, layer: int) -> torch.Tensor | None:
            return None

    class Full(KVPlan):
        mask = "full"

    with pytest.raises(PlanError, match=r"Leaves decides active\(\), which a cache cannot do"):
        PlanCache(3, Leaves())
    with pytest.raises(PlanError, match="cannot change the mask"):
        PlanCache(3, Full())
    with pytest.raises(PlanError, match="no keys and values of their own"):
        PlanCache(3, SourcePlan([0, 0, 0])).segment(0, 0, 1)


def test_a_space_grows_and_forgets() -> None:
    config = PlannedForward(build(ROPES["llama"])).decoder.config
    space = DenseKV(config, 2, capacity=4)
    assert space.nbytes == 0 and space.lengths == [0, 0]
