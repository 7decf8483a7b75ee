"""LoRA roles over one cache: exactness, bytes and tokens counted, and what cannot share."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as t
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, DynamicCache

from sharewell.cli import main
from sharewell.kv import (
    DivergedPrompt,
    LoraShareConfig,
    LoraShareError,
    MultiLoraSession,
    SharedLoraCache,
    lora_report,
    share_A,
    similarity,
    train_shared_A,
)

VOCAB, LAYERS = 61, 3
SHAPE: dict[str, Any] = {
    "hidden_size": 72, "intermediate_size": 48, "num_hidden_layers": LAYERS, "num_attention_heads": 9,
    "num_key_value_heads": 3, "head_dim": 8, "vocab_size": VOCAB, "max_position_embeddings": 512,
    "initializer_range": 0.2, "bos_token_id": 0, "eos_token_id": None, "pad_token_id": 2,
}  # fmt: skip
FAMILIES = {
    "gqa": lambda: t.LlamaConfig(**SHAPE),
    "mha": lambda: t.LlamaConfig(**{**SHAPE, "num_key_value_heads": 9}),
    "qwen3": lambda: t.Qwen3Config(**SHAPE),
    "shallow": lambda: t.LlamaConfig(**{**SHAPE, "num_hidden_layers": 1}),
}
ROLES = {"plan": "p1", "act": "a1", "review": "r1"}
MODES = ("none", "base", "base_lr", "full")
SHARED = ("base", "base_lr")


def build(
    family: str = "gqa", *, shared: bool = True, equal: bool = False, zero: bool = False, **lora: Any
) -> Any:
    """A model with an adapter a role; their A on v_proj is the same when ``shared``."""
    settings: dict[str, Any] = {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj"], **lora}
    with torch.random.fork_rng():
        torch.random.manual_seed(5)
        model = AutoModelForCausalLM.from_config(FAMILIES[family](), dtype=torch.float32)
        model = get_peft_model(model, LoraConfig(**settings), adapter_name="p1")
        for name in ("a1", "r1"):
            model.add_adapter(name, LoraConfig(**settings))
        for name, weight in model.named_parameters():
            if "lora_B" in name:
                weight.data.normal_(std=0 if zero else 0.3)
    if shared:
        share_A(model, "p1")
    if equal:
        state = dict(model.named_parameters())
        for name, weight in state.items():
            if ".a1.weight" in name or ".r1.weight" in name:
                weight.data.copy_(
                    state[name.replace(".a1.weight", ".p1.weight").replace(".r1.weight", ".p1.weight")]
                )
    return model.eval()


def ids_of(seed: int, *shape: int) -> torch.Tensor:
    return torch.randint(3, VOCAB, shape, generator=torch.Generator().manual_seed(seed))


def stock(model: Any, adapter: str, ids: torch.Tensor, **more: Any) -> torch.Tensor:
    model.set_adapter(adapter)
    with torch.no_grad():
        return model(input_ids=ids, **more).logits


def call(model: Any, cache: SharedLoraCache, ids: torch.Tensor, **more: Any) -> torch.Tensor:
    with cache.attached(), torch.no_grad():
        return model(input_ids=ids, cache=cache, use_cache=True, **more).logits


# Exactness


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("mode", SHARED)
@pytest.mark.parametrize("chunk", [1, 7, 40])
def test_one_agent_equals_peft_through_prefill_chunks_and_decode(family: str, mode: Any, chunk: int) -> None:
    model, ids = build(family), ids_of(1, 2, 40)
    cache = SharedLoraCache(model, {"act": "a1"}, LoraShareConfig(mode))
    parts = [call(model, cache, ids[:, i : i + chunk]) for i in range(0, 40, chunk)]
    assert (torch.cat(parts, 1) - stock(model, "a1", ids)).abs().max() < 1e-4
    assert cache.covered() == cache.stored == 40


@pytest.mark.parametrize("mode", SHARED)
def test_left_padding_equals_peft(mode: Any) -> None:
    model, ids = build(), ids_of(2, 2, 20)
    mask = torch.ones(2, 20, dtype=torch.long)
    mask[1, :6] = 0
    cache = SharedLoraCache(model, ROLES, LoraShareConfig(mode), agent="review")
    first = call(model, cache, ids[:, :15], attention_mask=mask[:, :15])
    then = call(model, cache, ids[:, 15:], attention_mask=mask)
    model.set_adapter("r1")
    kept = DynamicCache()
    with torch.no_grad():
        a = model(input_ids=ids[:, :15], attention_mask=mask[:, :15], cache=kept).logits
        b = model(input_ids=ids[:, 15:], attention_mask=mask, cache=kept).logits
    seen = mask[:, :15].bool()
    assert (first - a)[seen].abs().max() < 1e-4 and (then - b).abs().max() < 1e-4


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("family", ["gqa", "mha"])
def test_without_b_every_mode_is_the_base_model(mode: Any, family: str) -> None:
    model = build(family, zero=True)
    session, ids = MultiLoraSession(model, ROLES, LoraShareConfig(mode)), ids_of(3, 60).tolist()
    for i, role in enumerate((*ROLES, *ROLES)):
        last = session.logits(role, ids[10 * i : 10 * i + 10])[-1]
        with model.disable_adapter(), torch.no_grad():
            expected = model(input_ids=torch.tensor([ids[: 10 * i + 10]])).logits[0, -1]
        assert (last - expected).abs().max() < 1e-5


@pytest.mark.parametrize("mode", MODES)
def test_agents_with_equal_adapters_equal_separate_caches(mode: Any) -> None:
    model = build(equal=True)
    ours = MultiLoraSession(model, ROLES, LoraShareConfig(mode))
    separate = MultiLoraSession(model, ROLES, LoraShareConfig("none"))
    for turn, role in enumerate((*ROLES, "plan", "review")):
        new = ids_of(turn, 9).tolist()
        answers = [s.run(role, new, max_new_tokens=6, do_sample=False) for s in (ours, separate)]
        assert answers[0] == answers[1] and len(answers[0]) == 6
    probe = [s.logits("act", [5])[-1] for s in (ours, separate)]
    assert (probe[0] - probe[1]).abs().max() < 1e-4


@pytest.mark.parametrize("mode", MODES)
def test_one_role_generates_what_peft_generates(mode: Any) -> None:
    model, ids = build(), ids_of(9, 1, 12)
    session = MultiLoraSession(model, ROLES, LoraShareConfig(mode))
    ours = session.run("act", ids[0].tolist(), max_new_tokens=10, do_sample=False)
    model.set_adapter("a1")
    expected = model.generate(input_ids=ids, max_new_tokens=10, do_sample=False)[0, 12:].tolist()
    assert ours == expected and session.transcript == ids[0].tolist() + expected


@pytest.mark.parametrize("writer", ["plan", "act"])
@pytest.mark.parametrize("mode", SHARED)
def test_in_the_first_layer_sharing_is_exact_whoever_wrote(mode: Any, writer: str) -> None:
    model, ids = build("shallow"), ids_of(4, 50).tolist()
    session, full = (MultiLoraSession(model, ROLES, LoraShareConfig(m)) for m in (mode, "full"))
    for s in (session, full):
        s.logits(writer, ids[:40])
    own = stock(model, "r1", torch.tensor([ids]))[0, 40:]
    assert (session.logits("review", ids[40:])[-10:] - own).abs().max() < 1e-4
    assert (full.logits("review", ids[40:])[-10:] - own).abs().max() > 0.1


def test_base_mode_takes_any_ranks() -> None:
    ids = ids_of(4, 50).tolist()
    for family in ("shallow", "gqa"):
        model = build(family, shared=False)
        model.delete_adapter("r1")
        other = LoraConfig(r=7, lora_alpha=3, use_rslora=True, target_modules=["q_proj", "v_proj"])
        model.add_adapter("r1", other)
        for name, weight in model.named_parameters():
            if "lora_B.r1" in name:
                weight.data.normal_(std=0.3, generator=torch.Generator().manual_seed(3))
        own = stock(model.eval(), "r1", torch.tensor([ids]))[0]
        alone = MultiLoraSession(model, {"review": "r1"}, LoraShareConfig("base"))
        assert (alone.logits("review", ids) - own).abs().max() < 1e-4
        both = MultiLoraSession(model, {"plan": "p1", "review": "r1"}, LoraShareConfig("base"))
        both.logits("plan", ids[:40])
        off = (both.logits("review", ids[40:])[-1] - own[-1]).abs().max()
        assert off < 1e-4 if family == "shallow" else off > 1e-3


def test_what_a_role_reads_depends_on_who_wrote() -> None:
    model, ids = build(), ids_of(6, 40).tolist()
    found = {}
    for writer in ROLES:
        session = MultiLoraSession(model, ROLES)
        session.logits(writer, ids[:30])
        found[writer] = session.logits("review", ids[30:])[-1]
        assert [(turn.role, turn.start, turn.end) for turn in session.turns] == [
            (writer, 0, 30),
            ("review", 30, 40),
        ]
    own = stock(model, "r1", torch.tensor([ids]))[0, -1]
    assert (found["review"] - own).abs().max() < 1e-4
    assert (found["plan"] - own).abs().max() > 1e-3  # an approximation, and never called anything else


@pytest.mark.parametrize("mode", MODES)
def test_bfloat16_with_float32_adapters_stays_near_peft(mode: Any) -> None:
    model, ids = build(), ids_of(1, 30).tolist()
    for name, weight in model.named_parameters():
        if "lora_" not in name:
            weight.data = weight.data.bfloat16()
    ours = MultiLoraSession(model, ROLES, LoraShareConfig(mode)).logits("act", ids)
    expected = stock(model, "a1", torch.tensor([ids]))[0]
    assert (ours - expected).float().norm() < 0.05 * expected.float().norm()


# Bytes and tokens, counted


@pytest.mark.parametrize(
    ("mode", "ratio"), [("base_lr", (2 * 192 + 8) / (3 * 2 * 192)), ("base", 1 / 3 + 8 / 384)]
)
def test_memory_is_the_formulas_to_the_byte(mode: Any, ratio: float) -> None:
    shape = {**SHAPE, "head_dim": 64}  # SmolLM2's keys and values: 3 heads of 64
    with torch.random.fork_rng():
        model = AutoModelForCausalLM.from_config(t.LlamaConfig(**shape), dtype=torch.float32)
        model = get_peft_model(model, LoraConfig(r=8, target_modules=["q_proj", "v_proj"]), adapter_name="p1")
        for name in ("a1", "r1"):
            model.add_adapter(name, LoraConfig(r=8, target_modules=["q_proj", "v_proj"]))
    share_A(model, "p1")
    session = MultiLoraSession(model.eval(), ROLES, LoraShareConfig(mode))
    for i, role in enumerate((*ROLES, "plan", "act")):
        session.logits(role, ids_of(i, 13).tolist())
    for role in ("plan", "review"):
        session._catch_up(role)
    memory, tokens = session.memory(), 65
    assert memory.keys == memory.values == 4 * tokens * LAYERS * 192
    assert memory.low_rank == 4 * tokens * LAYERS * 8 * (1 if mode == "base_lr" else 3)
    assert memory.separate == 3 * 2 * 4 * tokens * LAYERS * 192
    assert memory.ratio == pytest.approx(ratio, abs=1e-12)
    if mode == "base_lr":
        assert memory.ratio <= 0.35


def count_tokens(model: Any) -> tuple[list[int], list[Any]]:
    counts = [0] * LAYERS
    layers = model.get_base_model().model.layers

    def hook(i: int) -> Any:
        def count(module: Any, args: Any) -> None:
            counts[i] += args[0].shape[0] * args[0].shape[1]

        return count

    return counts, [layer.register_forward_pre_hook(hook(i)) for i, layer in enumerate(layers)]


@pytest.mark.parametrize("mode", MODES)
def test_tokens_pushed_through_the_layers(mode: Any) -> None:
    model = build()
    counts, hooks = count_tokens(model)
    session = MultiLoraSession(model, ROLES, LoraShareConfig(mode))
    for i in range(2):
        for j, role in enumerate(ROLES):
            session.run(role, ids_of(3 * i + j, 8).tolist(), max_new_tokens=4, do_sample=False)
    for hook in hooks:
        hook.remove()
    total = len(session.transcript) - 1  # nobody has run the last token yet
    assert total == 6 * 12 - 1
    assert counts == [sum(session.computed.values())] * LAYERS
    if mode in ("base_lr", "full"):
        assert counts[0] == total
    else:  # each role runs all up to the end of its own last turn
        assert session.computed == {"plan": 4 * 12 - 1, "act": 5 * 12 - 1, "review": 6 * 12 - 1}


def test_base_mode_computes_no_keys_and_values_twice() -> None:
    model = build()
    session = MultiLoraSession(model, ROLES, LoraShareConfig("base"))
    session.logits("plan", ids_of(0, 20).tolist())
    session.logits("act", ids_of(1, 5).tolist())
    cache = session._shared
    assert cache is not None and cache.projections_skipped == 2 * 20 * LAYERS
    assert cache.covered("plan") == 20 and cache.covered("act") == cache.stored == 25


def test_keys_of_entries_name_backbone_mode_and_what_the_low_rank_part_hangs_on() -> None:
    model = build()
    lr, base = (SharedLoraCache(model, ROLES, LoraShareConfig(mode)) for mode in SHARED[::-1])
    assert lr.key() == lr.fork("act").key() == SharedLoraCache(build(), ROLES).key()
    assert len({lr.key(), base.key(), base.fork("act").key()}) == 3
    before = lr.key(), base.key()
    weights = dict(model.named_parameters())
    weights[next(n for n in weights if "v_proj.lora_B.p1" in n)].data += 1
    assert lr.key() == before[0] and base.key() != before[1]
    weights[next(n for n in weights if "v_proj.lora_A.p1" in n)].data += 1
    assert lr.key() != before[0]
    other = build()
    next(other.parameters()).data += 1
    assert SharedLoraCache(other, ROLES).key() != before[0]


# Sessions


@pytest.mark.parametrize("mode", MODES)
def test_a_cancelled_generation_leaves_nothing(mode: Any) -> None:
    model = build()
    session, twin = (MultiLoraSession(model, ROLES, LoraShareConfig(mode)) for _ in range(2))
    for s in (session, twin):
        s.run("plan", ids_of(0, 9).tolist(), max_new_tokens=3, do_sample=False)

    class Stop(t.StoppingCriteria):
        def __init__(self) -> None:
            self.left = 3

        def __call__(self, input_ids: Any, scores: Any, **kwargs: Any) -> Any:
            self.left -= 1
            if not self.left:
                raise KeyboardInterrupt
            return torch.zeros(1, dtype=torch.bool)

    before = list(session.transcript), list(session.turns)
    with pytest.raises(KeyboardInterrupt):
        criteria = t.StoppingCriteriaList([Stop()])
        session.run(
            "act", ids_of(1, 7).tolist(), max_new_tokens=9, do_sample=False, stopping_criteria=criteria
        )
    assert (session.transcript, session.turns) == before
    answers = [
        s.run("review", ids_of(2, 4).tolist(), max_new_tokens=5, do_sample=False) for s in (session, twin)
    ]
    assert answers[0] == answers[1] and session.memory() == twin.memory()


@pytest.mark.parametrize("mode", MODES)
def test_prompts_share_their_common_beginning_and_say_where_they_part(mode: Any) -> None:
    model = build(equal=True)
    session = MultiLoraSession(model, ROLES, LoraShareConfig(mode))
    text = ids_of(0, 30).tolist()
    session.logits("plan", text)
    other = [*text[:21], (text[21] + 1) % VOCAB, *text[22:28]]
    with pytest.warns(
        DivergedPrompt, match=r"role 'act' parts from the transcript at token 21: .*; 9 tokens"
    ):
        logits = session.logits("act", other, whole=True)
    assert (logits[-1] - stock(model, "a1", torch.tensor([other]))[0, -1]).abs().max() < 1e-4
    assert session.transcript == other
    if mode in ("base_lr", "full"):
        assert session.computed["act"] == 7
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        session.logits("review", [*other, 9, 8], whole=True)  # an extension parts nowhere


def test_the_model_is_as_it_was_behind_a_turn_and_behind_an_error() -> None:
    model = build()
    before = model.get_base_model().config._attn_implementation
    expected = stock(model, "r1", ids_of(1, 1, 9))
    session = MultiLoraSession(model, ROLES)
    session.logits("plan", ids_of(0, 9).tolist())
    with pytest.raises(IndexError):
        session.logits("act", [VOCAB + 5])
    assert session.transcript == ids_of(0, 9).tolist()
    assert model.get_base_model().config._attn_implementation == before and model.active_adapter == "r1"
    assert torch.equal(stock(model, "r1", ids_of(1, 1, 9)), expected)


def test_similarities_are_one_for_equal_adapters_and_measured_for_others() -> None:
    ids = ids_of(0, 25).tolist()
    same = similarity(build(equal=True), ROLES, ids)
    assert min(same.keys, same.base_values, same.values, same.adapter_outputs, same.low_rank or 0) > 1 - 1e-5
    session = MultiLoraSession(build(), ROLES)
    session.logits("plan", ids)
    other = session.similarity_report()
    assert other.adapter_outputs < other.values < other.base_values <= 1
    one = build(shared=False)
    assert similarity(one, ROLES, ids).low_rank is not None


def test_check_similarity_warns_where_roles_drift() -> None:
    model = build()
    for name, weight in model.named_parameters():
        if "lora_B" in name:
            weight.data *= 30
    session = MultiLoraSession(model, ROLES, LoraShareConfig(check_similarity=True))
    session.logits("plan", ids_of(0, 12).tolist())
    with pytest.warns(UserWarning, match=r"alike by 0\.\d\d only"):
        session.logits("act", ids_of(1, 3).tolist())


# Training


def test_shared_a_is_trained_once_and_frozen_for_the_others() -> None:
    model = build(shared=False)
    start = {name: weight.clone() for name, weight in model.named_parameters()}
    data = {
        name: [{"input_ids": ids_of(i, 2, 12), "labels": ids_of(i, 2, 12)} for i in range(3)]
        for name in ("p1", "a1", "r1")
    }
    losses = train_shared_A(model, data, epochs=8, lr_first=5e-3, lr_others=5e-3)
    assert [len(losses[name]) for name in data] == [24, 24, 24]
    assert all(mine[-1] < mine[0] - 0.1 for mine in losses.values())
    for name, weight in model.named_parameters():
        moved = not torch.equal(weight, start[name])
        assert moved == ("lora_" in name), name
        if "v_proj.lora_A.a1" in name or "v_proj.lora_A.r1" in name:
            twin = name.replace("lora_A.a1", "lora_A.p1").replace("lora_A.r1", "lora_A.p1")
            assert torch.equal(weight, dict(model.named_parameters())[twin])
    assert MultiLoraSession(model.eval(), ROLES).logits("act", [1, 2, 3]).shape == (3, VOCAB)
    assert not model.training


# What cannot share


def with_config(**lora: Any) -> Any:
    return build(shared=False, **lora)


@pytest.mark.parametrize(
    ("make", "mode", "message"),
    [
        (
            lambda: build(shared=False),
            "base_lr",
            r"'p1' and 'a1', layer 0: base_lr needs the same A.*share_A",
        ),
        (lambda: with_config(use_dora=True), "base", "adapter 'p1': use_dora changes values"),
        (lambda: with_config(lora_bias=True), "base", "adapter 'p1': lora_bias changes values"),
        (lambda: with_config(target_modules=["q_proj"]), "base", "layer 0: v_proj must carry plain LoRA"),
        (lambda: with_config(target_modules=["k_proj", "v_proj"]), "base", "'p1' has LoRA on k_proj"),
        (lambda: build().get_base_model(), "base", "has no adapters: pass a peft model"),
    ],
)
def test_adapters_that_cannot_share_are_named(make: Any, mode: Any, message: str) -> None:
    with pytest.raises(LoraShareError, match=message):
        MultiLoraSession(make(), ROLES, LoraShareConfig(mode))


@pytest.mark.parametrize(
    ("change", "what"), [({"r": 6}, "one rank, got 4 and 6"), ({"lora_alpha": 9}, "one scale")]
)
def test_base_lr_refuses_unequal_adapters_and_base_takes_them(change: dict[str, Any], what: str) -> None:
    model = build()
    model.delete_adapter("a1")
    model.add_adapter(
        "a1", LoraConfig(**{"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj"], **change})
    )
    with pytest.raises(
        LoraShareError, match=f"'p1' and 'a1', layer 0: base_lr needs {what}.*mode 'base' does not"
    ):
        MultiLoraSession(model, ROLES)
    with pytest.raises(LoraShareError, match="must have one rank and scale to share A"):
        share_A(model, "p1")
    MultiLoraSession(model.eval(), ROLES, LoraShareConfig("base")).logits("act", [1, 2])


def test_merged_and_quantised_layers_are_refused() -> None:
    model = build()
    model.merge_adapter(["p1"])
    with pytest.raises(LoraShareError, match="merged into v_proj"):
        MultiLoraSession(model, ROLES)
    model.unmerge_adapter()

    class Packed(torch.nn.Linear):
        """Stands for a layer whose weights are not plain."""

    values = model.get_base_model().model.layers[1].self_attn.v_proj
    values.base_layer.__class__ = Packed
    with pytest.raises(
        LoraShareError, match="layer 1: v_proj must be an unquantised Linear layer, got Packed"
    ):
        MultiLoraSession(model, ROLES)


def test_wrong_use_is_named() -> None:
    model = build()
    with pytest.raises(ValueError, match="mode must be base_lr, base, full or none, got 'lr'"):
        LoraShareConfig("lr")  # pyright: ignore[reportArgumentType]
    with pytest.raises(ValueError, match=r"targets must be \('v_proj',\)"):
        LoraShareConfig(targets=("k_proj",))
    with pytest.raises(LoraShareError, match="adapter 'x' is not loaded, only a1, p1, r1"):
        MultiLoraSession(model, {"plan": "x"})
    with pytest.raises(LoraShareError, match="a shared cache has mode base or base_lr, got 'full'"):
        SharedLoraCache(model, ROLES, LoraShareConfig("full"))
    session = MultiLoraSession(model, ROLES)
    with pytest.raises(LoraShareError, match="role must be one of plan, act, review, got 'judge'"):
        session.run("judge", [1])
    with pytest.raises(ValueError, match="text needs a tokenizer"):
        session.run("plan", "text")
    with pytest.raises(ValueError, match="new must hold at least one token"):
        session.logits("plan")
    with pytest.raises(LoraShareError, match="use one beam"):
        session.run("plan", [3, 4], max_new_tokens=3, num_beams=2)
    cache = SharedLoraCache(model, ROLES)
    with pytest.raises(LoraShareError, match=r"inside `with cache\.attached"):
        model(input_ids=torch.tensor([[1, 2]]), cache=cache)
    with cache.attached(), pytest.raises(LoraShareError, match="another cache is attached"):
        call(model, cache.fork("act"), torch.tensor([[1]]))
    with pytest.raises(LoraShareError, match="training mode"):
        call(model.train(), cache, torch.tensor([[1]]))
    with pytest.raises(LoraShareError, match="adapter 'x' is not loaded"):
        share_A(model, "x")
    with pytest.raises(ValueError, match="epochs must be at least 1"):
        train_shared_A(model, {"p1": []}, epochs=0)


def test_adapters_on_other_projections_are_taken_with_a_warning() -> None:
    with pytest.warns(UserWarning, match="adapter 'p1' also changes down_proj"):
        session = MultiLoraSession(build(target_modules=["q_proj", "v_proj", "down_proj"]), ROLES)
    ids = ids_of(0, 12)
    assert (
        session.logits("plan", ids.tolist()) - stock(session.model, "p1", ids[None])[0]
    ).abs().max() < 1e-4


# The report


def test_a_report_measures_every_mode_and_says_why_one_cannot() -> None:
    ids = ids_of(0, 60).tolist()
    found, rows = lora_report(build(), ROLES, ids)
    kl: dict[str, Any] = {row.mode: row.kl for row in rows}
    assert kl["none"] == pytest.approx(0, abs=1e-6)
    assert 0 < kl["base_lr"] < kl["full"] and kl["base"] < kl["full"]
    assert {row.mode: row.computed for row in rows} == {"none": 180, "base": 180, "base_lr": 120, "full": 120}
    assert found.low_rank is not None
    _, rows = lora_report(build(shared=False), ROLES, ids, modes=["base_lr"])
    assert rows[0].kl is None and "share_A" in rows[0].reason


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model with the byte model's tokenizer, and two adapters in peft's format."""
    from sharewell.models import load_transformers, shipped_models

    folder, path = shipped_models()["byte-lm-routed"], tmp_path_factory.mktemp("roles")
    model: Any = load_transformers(folder)
    settings = LoraConfig(r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    with torch.random.fork_rng():
        torch.random.manual_seed(0)
        model = get_peft_model(model, settings, adapter_name="plan")
        model.add_adapter("act", settings)
    share_A(model, "plan")
    assert isinstance(model, PeftModel)
    model.save_pretrained(str(path))
    (path / "said.txt").write_text(
        "def add(a, b):\n    return a + b\n\nThe plan: add two numbers, then test it.\n"
    )
    return path


def test_the_command_prints_similarities_and_modes(
    checkpoint: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    adapters = f"plan={checkpoint / 'plan'},act={checkpoint / 'act'}"
    arguments = ["kv", "lora-report", "byte-lm-routed", "--adapters", adapters, "--transcript"]
    assert main([*arguments, str(checkpoint / "said.txt"), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert [row["mode"] for row in found["modes"]] == ["none", "base", "base_lr", "full"]
    assert found["modes"][0]["kl"] < 1e-6 < found["modes"][3]["kl"]
    assert main([*arguments, str(checkpoint / "said.txt")]) == 0
    assert "base_lr" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("adapters", "message"),
    [
        ("plan", "--adapters must be ROLE=FOLDER with commas between, got 'plan'"),
        ("plan=x,plan=y", "--adapters names role 'plan' twice"),
        ("plan=nowhere,act=nowhere", "nowhere"),
    ],
)
def test_the_command_refuses_wrong_use_in_one_line(
    checkpoint: Path, adapters: str, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    said = str(checkpoint / "said.txt")
    assert main(["kv", "lora-report", "byte-lm-routed", "--adapters", adapters, "--transcript", said]) == 2
    err = capsys.readouterr().err
    assert message in err and "Traceback" not in err
