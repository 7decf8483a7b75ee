"""dKV-Cache against a reference that always computes every position of a row with the model's own modules,
and puts the stale keys and values where the cache would read them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from transformers import LlamaConfig, LlamaForCausalLM, Qwen2Config, Qwen2ForCausalLM

from sharewell.kv import (
    DKVConfig,
    NotFiniteLogits,
    denoise,
    generate_masked_diffusion,
    load_masked_diffusion,
)
from sharewell.kv.dkv import nearest
from sharewell.kv.worked_sums import WorkedSums, decode, encode, score, solve
from sharewell.models import ModelError
from sharewell.models.rope import rotate

MASK, VOCAB, LAYERS = 23, 24, 3
SHAPE: Any = {
    "vocab_size": VOCAB, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": LAYERS,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 128,
}  # fmt: skip


@pytest.fixture(scope="module")
def model() -> LlamaForCausalLM:
    torch.manual_seed(5)
    made = LlamaForCausalLM(LlamaConfig(**SHAPE)).double().eval()
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.mul_(3)  # so that tokens matter to each other
    return made


def prompts_of(*lengths: int, seed: int = 1) -> list[list[int]]:
    rng = np.random.default_rng(seed)
    return [rng.integers(0, MASK, n).tolist() for n in lengths]


class Reference:
    """One row, the slow way: sets of positions, written from the paper's section 3 and its appendix."""

    def __init__(self, model: Any, prompt: list[int], gen: int, config: DKVConfig) -> None:
        self.model, self.config, self.gen = model, config, gen
        self.ids = [*prompt, *[MASK] * gen]
        self.n_prompt = len(prompt)
        self.kept: list[tuple[torch.Tensor, torch.Tensor] | None] = [None] * LAYERS
        self.decided = set(range(len(prompt)))
        self.before = set(self.decided)
        self.candidates: dict[int, tuple[int, float]] = {}

    def queries(self, step: int, first: bool, block: set[int], coming: list[int]) -> set[int]:
        c, every = self.config, set(range(len(self.ids)))
        if first or c.variant == "none":
            return every
        behind = {i - 1 for i in block} if c.shift else set()
        if c.variant == "block":
            return every if step == 0 else block | behind
        base = every if c.variant in ("decode", "greedy") else set(range(self.n_prompt, len(self.ids)))
        refresh = c.refresh or (2 if c.variant == "greedy" else 8)
        if c.variant == "prefill" or step % refresh == 0:
            return base
        if c.variant == "greedy":
            around = {i - 1 for i in coming} if c.shift else set()
            free = [i for i in every if i not in self.decided and i not in coming]
            near, reach = [], 1
            while len(near) < min(c.window, len(free)):
                for i in coming:
                    for j in (i - reach, i + reach):
                        if j in free and j not in near and len(near) < c.window:
                            near.append(j)
                reach += 1
            return set(coming) | around | (self.decided - self.before) | set(near)
        if step == 1 and c.delay:
            return base
        known = self.before if c.delay else self.decided
        last = len(self.ids) - 1
        if c.shift in (None, "right"):
            cached = known
        elif c.shift == "un":
            cached = {i for i in every if (i + 1 if i < last else i) in known}
        else:
            cached = {i for i in every if i in known and (i + 1 if i < last else i) in known}
        return base - cached

    @torch.no_grad()
    def logits(self, queries: set[int]) -> torch.Tensor:
        inner = self.model.model
        places = torch.arange(len(self.ids))
        h = inner.embed_tokens(torch.tensor(self.ids))
        cos, sin = (x[0, :, : x.shape[-1] // 2] for x in inner.rotary_emb(h[None].float(), places[None]))
        new = torch.tensor(sorted(queries))
        for number, layer in enumerate(inner.layers):
            x, attention = layer.input_layernorm(h), layer.self_attn
            q, k, v = (
                p(x).view(len(h), -1, 8) for p in (attention.q_proj, attention.k_proj, attention.v_proj)
            )
            q, k = rotate(q, cos, sin), rotate(k, cos, sin)
            kept = self.kept[number]
            if kept is not None:
                keys, values = kept[0].clone(), kept[1].clone()
                keys[new], values[new] = k[new], v[new]
                k, v = keys, values
            self.kept[number] = k, v
            k, v = k.repeat_interleave(2, 1), v.repeat_interleave(2, 1)
            p = (torch.einsum("qhd,khd->hqk", q, k) / 8**0.5).softmax(-1)
            o = torch.einsum("hqk,khd->qhd", p, v).reshape(len(h), -1)
            h = h + attention.o_proj(o)
            h = h + layer.mlp(layer.post_attention_layernorm(h))
        return self.model.lm_head(inner.norm(h))

    def run(
        self, steps: int, block_length: int, order: list[int] | None = None, guide: Reference | None = None
    ) -> list[int]:
        blocks = self.gen // block_length
        for b in range(blocks):
            start = self.n_prompt + b * block_length
            block = set(range(start, start + block_length))
            self.before = set(self.decided)
            per = steps // blocks
            for step in range(per):
                size = block_length // per + (step < block_length % per)
                left = sorted(block - self.decided)
                coming = [i for i in order or [] if i in left][:size]
                queries = self.queries(step, b == 0 and step == 0, block, sorted(coming))
                logits = self.logits(queries).clone()
                logits[:, MASK] = -torch.inf
                for i in left:
                    at = i - 1 if self.config.shift else i
                    if at in queries:
                        p = logits[at].softmax(-1)
                        self.candidates[i] = int(p.argmax()), float(p.max())
                chosen = coming or sorted(left, key=lambda i: (-self.candidates.get(i, (0, -1.0))[1], i))
                chosen = [i for i in chosen if i in self.candidates][:size]
                self.before = set(self.decided)
                for i in chosen:
                    self.ids[i] = self.candidates[i][0]
                    self.decided.add(i)
        return self.ids[self.n_prompt :]


CONFIGS = [
    DKVConfig("none"),
    DKVConfig("decode", refresh=4),
    DKVConfig("decode", refresh=3, delay=0),
    DKVConfig("decode", refresh=4, shift="un"),
    DKVConfig("decode", refresh=4, shift="un_right"),
    DKVConfig("decode", refresh=4, shift="right"),
    DKVConfig("prefill"),
    DKVConfig("prefill", shift="un"),
    DKVConfig("pd", refresh=4),
    DKVConfig("pd", refresh=4, shift="un_right"),
    DKVConfig("block"),
    DKVConfig("block", shift="un"),
]


def name_of(config: DKVConfig) -> str:
    return f"{config.variant}-{config.shift}-delay{config.delay}"


@pytest.mark.parametrize("config", CONFIGS, ids=name_of)
@pytest.mark.parametrize(("lengths", "block"), [((7,), 16), ((5, 9, 2, 7), 16), ((3, 8), 4)])
def test_equals_full_passes_with_stale_keys_and_values(
    model: LlamaForCausalLM, config: DKVConfig, lengths: tuple[int, ...], block: int
) -> None:
    prompts = prompts_of(*lengths)
    got = generate_masked_diffusion(model, prompts, 16, 8, mask_id=MASK, block_length=block, cache=config)
    for prompt, answer in zip(prompts, got.answers.tolist(), strict=True):
        assert answer == Reference(model, prompt, 16, config).run(8, block)
        assert MASK not in answer


@pytest.mark.parametrize("refresh", [1, 2, 3])
@pytest.mark.parametrize("shift", [None, "un"])
def test_greedy_equals_full_passes_with_stale_keys_and_values(
    model: LlamaForCausalLM, refresh: int, shift: Any
) -> None:
    config = DKVConfig("greedy", refresh=refresh, window=3, shift=shift)
    prompts = prompts_of(6, 3)
    steps = list(denoise(model, prompts, 12, 6, mask_id=MASK, remasking="random", cache=config, seed=4))
    plain = list(denoise(model, prompts, 12, 6, mask_id=MASK, remasking="random", seed=4))
    for row, prompt in enumerate(prompts):
        order = [i for s in steps for i in s.decided[row].nonzero().flatten().tolist()]
        assert order == [i for s in plain for i in s.decided[row].nonzero().flatten().tolist()]
        answer = Reference(model, prompt, 12, config).run(6, 12, order)
        assert steps[-1].ids[row, len(prompt) : len(prompt) + 12].tolist() == answer


@pytest.mark.parametrize("variant", ["decode", "pd", "greedy"])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_refresh_in_every_step_is_no_cache(
    model: LlamaForCausalLM, variant: Any, temperature: float
) -> None:
    prompts = prompts_of(6, 9)
    options: Any = {"mask_id": MASK, "remasking": "random", "temperature": temperature, "seed": 3}
    plain = generate_masked_diffusion(model, prompts, 12, 12, **options)
    cached = generate_masked_diffusion(model, prompts, 12, 12, cache=DKVConfig(variant, refresh=1), **options)
    if variant != "pd":
        assert cached.stats.positions == plain.stats.positions
        assert torch.equal(cached.answers, plain.answers)
    else:  # the prompt's keys and values stay as they were first
        assert cached.stats.positions == plain.stats.positions - 11 * (6 + 9)


def test_temperature_draws_by_seed_step_row_and_position_alone(model: LlamaForCausalLM) -> None:
    prompt = prompts_of(6)
    draw = [
        generate_masked_diffusion(model, prompt * n, 8, 4, mask_id=MASK, temperature=2.0, seed=seed).answers[
            0
        ]
        for n, seed in ((1, 1), (3, 1), (1, 2))
    ]
    assert torch.equal(draw[0], draw[1]) and not torch.equal(draw[0], draw[2])


def test_padding_on_either_side_is_ignored(model: LlamaForCausalLM) -> None:
    a, b = prompts_of(4, 6)
    expected = generate_masked_diffusion(model, [a, b], 8, 4, mask_id=MASK, cache=DKVConfig()).answers
    for pad, keep in (([0, 0, *a], [0, 0, 1, 1, 1, 1]), ([*a, 0, 0], [1, 1, 1, 1, 0, 0])):
        got = generate_masked_diffusion(
            model, torch.tensor([pad, b]), 8, 4, mask_id=MASK, cache=DKVConfig(),
            attention_mask=torch.tensor([keep, [1] * 6]),
        )  # fmt: skip
        assert torch.equal(got.answers, expected)


def test_work_of_decode_follows_the_formula(model: LlamaForCausalLM) -> None:
    """Per step (P + G) / n + (1 - 1/n) (G / 2 + k): the card's line 3, at P = G = 64 and n = 8."""
    prompt = prompts_of(64)
    stats = generate_masked_diffusion(model, prompt, 64, 64, mask_id=MASK, cache=DKVConfig("decode")).stats
    expected = 128 / 8 + 7 / 8 * (32 + 1)
    assert abs(np.mean(stats.per_step) / expected - 1) < 0.05
    assert stats.positions_without == 64 * 128 and stats.share < 0.4
    assert stats.passes == 64 and stats.bytes_held == 128 * LAYERS * 2 * 16 * 8


def test_guidance_runs_a_second_cache_without_the_prompt(model: LlamaForCausalLM) -> None:
    """One step, all positions: the formula on two plain passes."""
    (prompt,) = prompts_of(5)
    got = generate_masked_diffusion(model, [prompt], 4, 1, mask_id=MASK, guidance=1.5, cache=DKVConfig())
    ids = torch.tensor([[*prompt, *[MASK] * 4], [MASK] * 9])
    everything = torch.zeros(2, 1, 9, 9, dtype=torch.float64)
    with torch.no_grad():
        plain, masked = model(input_ids=ids, attention_mask=everything).logits
    mixed = (masked + 2.5 * (plain - masked))[5:]
    mixed[:, MASK] = -torch.inf
    assert got.answers[0].tolist() == mixed.argmax(-1).tolist()


def test_a_row_that_has_ended_leaves_and_disturbs_no_other(model: LlamaForCausalLM) -> None:
    prompts = prompts_of(5, 9, 4)
    options: Any = {"mask_id": MASK, "cache": DKVConfig("decode", refresh=3)}
    free = generate_masked_diffusion(model, prompts, 12, 12, **options).answers
    eos = int(free[0].mode().values)  # a token that row 0 says
    got = generate_masked_diffusion(model, prompts, 12, 12, eos_id=eos, **options)
    ended = 0
    for row, prompt in enumerate(prompts):
        alone = generate_masked_diffusion(model, [prompt], 12, 12, eos_id=eos, **options)
        assert torch.equal(got.answers[row], alone.answers[0])
        says = (alone.answers[0] == eos).nonzero().flatten()
        if len(says):
            ended += 1
            assert bool((alone.answers[0][int(says[0]) :] == eos).all())
    assert ended
    assert got.stats.positions <= 12 * sum(len(p) + 12 for p in prompts)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"gen_length": 0}, "gen_length must be at least 1, got 0"),
        ({"block_length": 5}, "gen_length must be a multiple of block_length, got 12 and 5"),
        ({"block_length": 4, "steps": 7}, "steps must be a multiple of the number of blocks, 3, got 7"),
        ({"steps": 13}, "steps must be at most gen_length, 12"),
        ({"remasking": "best"}, "remasking must be one of low_confidence, entropy, random, got 'best'"),
        ({"temperature": -1.0}, "temperature must be at least 0, got -1.0"),
        ({"guidance": -0.5}, "guidance must be at least 0, got -0.5"),
        ({"cache": DKVConfig("greedy")}, "remasking must be random, got 'low_confidence'"),
        (
            {"cache": DKVConfig("greedy", window=13), "remasking": "random"},
            "window must be at most gen_length",
        ),
        ({"input_ids": [[1, MASK]]}, "prompt 0 must not contain mask_id, 23, got it at position 1"),
        ({"input_ids": [[1], []]}, "input_ids must hold a prompt of at least one token"),
        ({"budget_bytes": 100}, "budget_bytes must be at least 10,752 .*got 100"),
    ],
)
def test_bad_arguments_are_named(model: LlamaForCausalLM, change: dict[str, Any], message: str) -> None:
    given = {"input_ids": [[1, 2]], "gen_length": 12, "steps": 6, "mask_id": MASK, **change}
    with pytest.raises(ValueError, match=message):
        next(denoise(model, **given))


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("variant", "all", "variant must be one of none, decode, greedy, prefill, pd, block, got 'all'"),
        ("refresh", 0, "refresh must be at least 1, got 0"),
        ("window", -1, "window must be at least 0, got -1"),
        ("shift", "left", "shift must be None or one of un, un_right, right, got 'left'"),
        ("delay", 2, "delay must be 0 or 1, got 2"),
    ],
)
def test_bad_configurations_are_named(field: str, value: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        DKVConfig(**{field: value})


def test_nan_stops_with_step_and_layer() -> None:
    torch.manual_seed(0)
    broken: Any = LlamaForCausalLM(LlamaConfig(**SHAPE)).eval()
    with torch.no_grad():
        broken.model.layers[1].mlp.down_proj.weight[0, 0] = float("nan")
    with pytest.raises(NotFiniteLogits, match=r"step 0: logits are not finite \(layer 1 "):
        generate_masked_diffusion(broken, [[1, 2]], 4, 4, mask_id=MASK)


@given(st.sets(st.integers(0, 40)), st.sets(st.integers(0, 40), min_size=1), st.integers(0, 50))
def test_nearest_takes_the_nearest_on_both_sides(free: set[int], targets: set[int], count: int) -> None:
    free -= targets
    got = nearest(sorted(targets), sorted(free), count)
    assert len(got) == len(set(got)) == min(count, len(free)) and set(got) <= free
    far = [min(abs(p - t) for t in targets) for p in got]
    assert far == sorted(far)
    left = [min(abs(p - t) for t in targets) for p in free - set(got)]
    assert not left or not far or max(far) <= min(left)


LLADA = {
    "self_attn.q_proj": "q_proj", "self_attn.k_proj": "k_proj", "self_attn.v_proj": "v_proj",
    "self_attn.o_proj": "attn_out", "mlp.gate_proj": "ff_proj", "mlp.up_proj": "up_proj",
    "mlp.down_proj": "ff_out", "input_layernorm": "attn_norm", "post_attention_layernorm": "ff_norm",
}  # fmt: skip


def write_llada(model: LlamaForCausalLM, folder: Path, **changes: Any) -> None:
    """A folder as LLaDA-8B's is laid out."""
    names = {"model.embed_tokens": "wte", "model.norm": "ln_f", "lm_head": "ff_out"}
    tensors = {}
    for name, tensor in model.state_dict().items():
        stem, kind = name.rsplit(".", 1)
        if stem.startswith("model.layers."):
            _, _, number, part = stem.split(".", 3)
            stem = f"blocks.{number}.{LLADA[part]}"
        else:
            stem = names[stem]
        tensors[f"model.transformer.{stem}.{kind}"] = tensor.float().contiguous()
    save_file(tensors, folder / "model-00001-of-00001.safetensors")
    config = {
        "model_type": "llada", "architectures": ["LLaDAModelLM"], "d_model": 32, "n_heads": 4,
        "n_kv_heads": 2,
        "n_layers": LAYERS, "mlp_hidden_size": 48, "vocab_size": VOCAB, "embedding_size": VOCAB,
        "max_sequence_length": 128, "rms_norm_eps": 1e-6, "rope_theta": 10000.0, "mask_token_id": MASK,
        "eos_token_id": 1, "block_type": "llama", "weight_tying": False, **changes,
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps({k: v for k, v in config.items() if v is not None}))


def test_a_llada_folder_gives_the_model_it_was_written_from(model: LlamaForCausalLM, tmp_path: Path) -> None:
    write_llada(model, tmp_path)
    loaded = load_masked_diffusion(tmp_path)
    assert (loaded.mask_id, loaded.eos_id, loaded.shift) == (MASK, 1, None)
    prompts = prompts_of(5, 7)
    expected = generate_masked_diffusion(model.float(), prompts, 8, 8, mask_id=MASK, cache=DKVConfig())
    got = generate_masked_diffusion(loaded.model, prompts, 8, 8, mask_id=MASK, cache=DKVConfig())
    model.double()
    assert torch.equal(got.answers, expected.answers)


def test_a_dream_folder_is_a_shifted_qwen2(tmp_path: Path) -> None:
    torch.manual_seed(2)
    source = Qwen2ForCausalLM(Qwen2Config(**SHAPE)).eval()
    source.save_pretrained(tmp_path)
    raw = json.loads((tmp_path / "config.json").read_text())
    raw.update(model_type="Dream", architectures=["DreamModel"], mask_token_id=MASK)
    (tmp_path / "config.json").write_text(json.dumps(raw))
    loaded = load_masked_diffusion(tmp_path)
    assert loaded.shift == "un"
    ids = torch.randint(0, MASK, (1, 9))
    with torch.no_grad():
        assert torch.equal(loaded.model(ids).logits, source(ids).logits)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"mask_token_id": None}, "field 'mask_token_id' is missing"),
        ({"d_model": None}, "field 'd_model' is missing"),
        ({"block_type": "sequential"}, "block_type must be llama, got 'sequential'"),
        ({"n_layers": LAYERS + 1}, "weights are missing"),
    ],
)
def test_a_folder_that_cannot_be_used_says_why(
    model: LlamaForCausalLM, tmp_path: Path, change: dict[str, Any], message: str
) -> None:
    write_llada(model, tmp_path, **change)
    with pytest.raises(ModelError, match=message):
        load_masked_diffusion(tmp_path)


def test_worked_sums_are_checked_exactly() -> None:
    assert solve("342+143;") == "1111040;" and solve("203+104;") == "0010312;"
    assert solve("<430142;") == ">012344;"
    prompts, answers = WorkedSums(problems=4, seed=1).batch(50)
    assert score(prompts, answers).all() and prompts.shape == answers.shape == (50, 32)
    wrong = answers.copy()
    wrong[3, 5] = (wrong[3, 5] + 1) % 5
    assert score(prompts, wrong).sum() == 199 and not score(prompts, wrong)[3, 0]
    assert np.array_equal(WorkedSums(4, 1).batch(50)[0], prompts)
    assert not np.array_equal(WorkedSums(4, 2).batch(50)[0], prompts)


@settings(max_examples=50)
@given(st.integers(0, 124), st.integers(0, 124))
def test_a_sum_and_its_carries_agree(a: int, b: int) -> None:
    said = solve(f"{np.base_repr(a, 5):0>3}+{np.base_repr(b, 5):0>3};")
    assert int(said[3:7], 5) == a + b
    carries = [int(c) for c in said[:3]]
    lowest = a % 5 + b % 5 >= 5
    middle = a % 25 + b % 25 >= 25
    assert carries == [int(a + b >= 125), int(middle), int(lowest)]


def test_text_and_ids_are_inverse() -> None:
    assert decode(encode("12+<>;")) == "12+<>;"
    with pytest.raises(ValueError, match=r"text must consist of .* got 'x'"):
        encode("1x")
