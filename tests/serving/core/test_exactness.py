"""The real model: float32 greedy tokens are those of transformers `generate`, whatever the engine is doing
meanwhile.

Two programs that add in different orders round differently, so where the reference's best two logits lie
closer than 1e-3 either may come out first. Such a difference is accepted when it is counted: at most 2 of 64
requests. From there on the reference reads the engine's own tokens, so that every token is judged."""

from __future__ import annotations

import gc
import json
import math
import random
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from hash_runner import tokens_of

from sharewell.models import LoraAdapter, Tokenizer, load_peft_adapter, load_transformers
from sharewell.serving.core.config import EngineConfig
from sharewell.serving.core.engine import EngineCore
from sharewell.serving.core.messages import (
    EngineInfo,
    EngineRequest,
    GrammarSpec,
    SamplingParams,
    TokenOutput,
)
from sharewell.serving.core.paged_runner import PagedRunner

TIE = 1e-3
NEW, MANY_NEW = 10, 16  # tokens of each answer, in CI and nightly
RUNNERS = ("fused", "stock")
TEXT = Path(__file__).parents[3] / "LICENSE"


@dataclass(frozen=True)
class Case:
    """A prompt, the adapter that answers it, and what transformers answers: tokens and, for each, by how much
    the best logit leads the second."""

    prompt: tuple[int, ...]
    adapter: str | None
    answer: tuple[int, ...] = ()
    leads: tuple[float, ...] = ()


class Oracle:
    """transformers with the dequantised float32 weights, and peft for the adapters ("x" and "y", saved in
    ``adapters``)."""

    def __init__(self, folder: Path, adapters: Path) -> None:
        from peft import LoraConfig, get_peft_model

        projections = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
        base = load_transformers(folder)
        assert base.generation_config is not None
        base.generation_config.eos_token_id = None
        base.generation_config.pad_token_id = 0
        with torch.random.fork_rng():
            torch.random.manual_seed(1)
            two = LoraConfig(r=8, lora_alpha=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
            all_ = LoraConfig(r=4, lora_alpha=1, target_modules=projections, init_lora_weights=False)
            self.model: Any = get_peft_model(base, two, adapter_name="x")  # pyright: ignore[reportArgumentType]
            self.model.add_adapter("y", all_)
        self.model.save_pretrained(adapters)
        self.model.eval()

    def _as(self, adapter: str | None) -> Any:
        if adapter is None:
            return self.model.disable_adapter()
        self.model.set_adapter(adapter)
        from contextlib import nullcontext

        return nullcontext()

    @torch.inference_mode()
    def answered(self, cases: Sequence[Case], new: int, batch: int) -> list[Case]:
        """``cases`` with the answers of `generate`, computed ``batch`` at a time."""
        done: dict[Case, Case] = {}
        for adapter in (None, "x", "y"):
            mine = sorted((c for c in cases if c.adapter == adapter), key=lambda c: len(c.prompt))
            for start in range(0, len(mine), batch):
                part = mine[start : start + batch]
                width = max(len(c.prompt) for c in part)
                ids = torch.tensor([[0] * (width - len(c.prompt)) + list(c.prompt) for c in part])
                mask = torch.tensor([[0] * (width - len(c.prompt)) + [1] * len(c.prompt) for c in part])
                leads: list[torch.Tensor] = []

                def record(_: torch.Tensor, scores: torch.Tensor, leads: Any = leads) -> torch.Tensor:
                    best = scores.topk(2).values
                    leads.append(best[:, 0] - best[:, 1])
                    return scores

                with self._as(adapter):
                    out = self.model.generate(
                        input_ids=ids,
                        attention_mask=mask,
                        do_sample=False,
                        max_new_tokens=new,
                        logits_processor=[record],
                    )
                for i, case in enumerate(part):
                    answer = tuple(out[i, width:].tolist())
                    assert len(answer) == new
                    done[case] = Case(case.prompt, adapter, answer, tuple(float(lead[i]) for lead in leads))
        return [done[c] for c in cases]

    @torch.inference_mode()
    def ties(self, case: Case, tokens: Sequence[int]) -> int:
        """In how many places ``tokens`` differs from greedy choice at a tie; fails where it does without
        one."""
        first = next((i for i, (a, b) in enumerate(zip(tokens, case.answer, strict=True)) if a != b), None)
        if first is None:
            return 0
        assert case.leads[first] < TIE, f"token {first} differs where the best leads by {case.leads[first]}"
        with self._as(case.adapter):
            logits = self.model(input_ids=torch.tensor([[*case.prompt, *tokens]])).logits[0]
        differences = 0
        for i in range(first, len(tokens)):
            row = logits[len(case.prompt) + i - 1]
            behind = float(row.max() - row[tokens[i]])
            assert behind < TIE, f"token {i} differs where the best leads by {behind}"
            differences += behind > 0 or i == first
        return differences


def prompts(folder: Path, count: int, longest: int, seed: int) -> list[Case]:
    """Cuts of English text of 8 to ``longest`` tokens, evenly spread in the logarithm; every third begins
    like another one, and of five one asks adapter x and one adapter y."""
    text = Tokenizer(folder).encode(TEXT.read_text("utf-8"))
    rng = random.Random(seed)
    cases: list[Case] = []
    for i in range(count):
        length = round(8 * (longest / 8) ** (i / (count - 1)))
        start = rng.randrange(len(text) - length)
        cut = text[start : start + length]
        adapter = {3: "x", 4: "y"}.get(i % 5)
        if i % 3 == 2:
            before = next(c.prompt for c in reversed(cases) if c.adapter == adapter) if i > 4 else ()
            cut = [*before, *cut][: max(length, 8)]
        cases.append(Case(tuple(cut), adapter))
    assert len(set(cases)) == count
    rng.shuffle(cases)
    return cases


@dataclass(frozen=True)
class Mix:
    """What the engine is doing while it answers. ``spread``: mean steps between two arrivals (0: all at
    once); ``pages``: cache size in units of the longest request (0: plenty)."""

    name: str
    chunk: int = 256
    spread: float = 0.0
    preempt_every: int = 0
    pages: float = 0.0
    sharing: bool = True
    cancelled_neighbours: int = 0
    rounds: int = 1
    alone: bool = False


MIXES = (
    Mix("alone", alone=True, sharing=False),
    Mix("together and once more from the cache", rounds=2),
    Mix(
        "small chunks, arrivals one by one, preempted, neighbours cancelled",
        32,
        3.0,
        7,
        cancelled_neighbours=4,
    ),
    Mix("few pages", 96, 1.0, 7, pages=1.6),
)
NIGHTLY = (
    *MIXES,
    Mix("alone, shared", alone=True, chunk=64),
    Mix("chunks of 64", 64, 0.5),
    Mix("chunks of 128, arrivals one by one", 128, 2.0, cancelled_neighbours=20),
    Mix("no sharing, preempted", 256, 0.5, 7, sharing=False),
    Mix("few pages, no sharing", 32, 2.0, 7, pages=2.5, sharing=False, cancelled_neighbours=12),
    Mix("twice, preempted", 128, 1.0, 7, rounds=2, cancelled_neighbours=12),
)
STOCK = ("alone, shared", "few pages", "twice, preempted")  # the slow runner's share of the nightly mixes


class Bench:
    """One runner with both adapters, and engines over it: pages stay as the engine before has left them."""

    def __init__(self, folder: Path, adapters: Path, kind: Any, num_blocks: int) -> None:
        self.folder = folder
        self.config = EngineConfig(dtype="float32", runner=kind, num_blocks=num_blocks, max_adapters=2)
        self.runner = PagedRunner(folder, self.config, threads=1)
        self.adapters = {name: load_peft_adapter(adapters / name, self.runner.model, name) for name in "xy"}

    def core(self, num_blocks: int = 0, **settings: Any) -> EngineCore:
        most = num_blocks or self.runner.num_blocks
        config = EngineConfig(dtype="float32", num_blocks=most, max_adapters=2, **settings)
        model = self.runner.model
        info = EngineInfo(
            "smollm2", "float32", "cpu", self.runner.max_length, model.vocab_size, model.eos_token_ids,
            config.block_size, most, config.max_seqs, 1, self.runner.revision,
        )  # fmt: skip
        core = EngineCore(config, self.runner, info, time.monotonic, self.folder / "tokenizer.json")
        for name, adapter in self.adapters.items():
            core.load_adapter(name, adapter)
        return core

    def answers(self, cases: Sequence[Case], mix: Mix, new: int, seed: int = 5) -> list[list[int]]:
        """What the engine answers to each case in ``mix``."""
        rng = random.Random(seed)
        longest = -(-(max(len(c.prompt) for c in cases) + new) // 16)
        core = self.core(
            math.ceil(mix.pages * longest),
            max_batch_tokens=mix.chunk,
            max_seqs=min(32, mix.chunk),
            forced_preemption_every=mix.preempt_every,
            prefix_sharing=mix.sharing,
        )
        sampling = SamplingParams(temperature=0, max_tokens=new, ignore_eos=True)
        results: dict[str, list[int]] = {}
        for turn in range(mix.rounds):
            arrivals: list[tuple[float, EngineRequest]] = []
            at = 0.0
            for i, case in enumerate(cases):
                request = EngineRequest(f"{turn}-{i}", case.prompt, sampling, adapter=case.adapter)
                if mix.alone:
                    core.submit(request)
                    _step_all(core, results)
                    continue
                arrivals.append((at, request))
                at += rng.expovariate(1 / mix.spread) if mix.spread else 0
            leaving: dict[str, float] = {}
            for i in range(mix.cancelled_neighbours):
                like = rng.choice(cases)
                prompt = (*like.prompt[: rng.randint(1, len(like.prompt))], *range(rng.randint(1, 40)))
                request = EngineRequest(f"gone-{turn}-{i}", prompt, sampling, adapter=like.adapter)
                arrivals.append((start := rng.uniform(0, at + 1), request))
                leaving[request.request_id] = start + rng.randint(1, 12)
            arrivals.sort(key=lambda a: a[0])
            step = 0
            while arrivals or core.has_work:
                while arrivals and arrivals[0][0] <= step:
                    core.submit(arrivals.pop(0)[1])
                for name in [n for n, when in leaving.items() if when <= step]:
                    del leaving[name]
                    core.cancel(name)
                _collect(core.step(0.0), results)
                step += 1
        core.blocks.check_integrity()
        stats = core.stats()
        assert stats.blocks_free == stats.blocks_total
        if mix.preempt_every:
            assert stats.preemptions > 0
        if mix.rounds > 1:
            assert stats.cached_prompt_tokens > 0.3 * stats.prompt_tokens
        last = mix.rounds - 1
        assert all(
            results[f"{turn}-{i}"] == results[f"{last}-{i}"]
            for turn in range(last)
            for i in range(len(cases))
        )
        return [results[f"{last}-{i}"] for i in range(len(cases))]


def _collect(outputs: Sequence[TokenOutput], results: dict[str, list[int]]) -> None:
    for output in outputs:
        assert output.finish_reason in (None, "length"), output
        results.setdefault(output.request_id, []).extend(output.token_ids)


def _step_all(core: EngineCore, results: dict[str, list[int]]) -> None:
    while core.has_work:
        _collect(core.step(0.0), results)


def assert_exact(oracle: Oracle, cases: Sequence[Case], answers: Sequence[Sequence[int]]) -> int:
    """How many requests hold a tie that went the other way."""
    flipped = sum(oracle.ties(c, tokens) > 0 for c, tokens in zip(cases, answers, strict=True))
    assert flipped <= max(1, len(cases) * 2 // 64), f"{flipped} of {len(cases)} requests differ at ties"
    return flipped


@pytest.fixture(scope="module")
def adapters(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("adapters")


@pytest.fixture(scope="module")
def oracle(smollm2: Path, adapters: Path) -> Oracle:
    return Oracle(smollm2, adapters)


_benches: dict[str, Bench] = {}


@pytest.fixture(scope="module")
def benches(smollm2: Path, adapters: Path, oracle: Oracle) -> Iterator[Any]:
    def get(kind: str) -> Bench:
        if kind not in _benches:
            _benches[kind] = Bench(smollm2, adapters, kind, 1500)
        return _benches[kind]

    yield get
    _benches.clear()
    gc.collect()


@pytest.fixture(scope="module")
def few(smollm2: Path, oracle: Oracle) -> list[Case]:
    return oracle.answered(prompts(smollm2, 7, 120, seed=1), NEW, batch=8)


@pytest.fixture(scope="module")
def many(smollm2: Path, oracle: Oracle) -> list[Case]:
    """64 requests, each answered by a `generate` of its own."""
    return oracle.answered(prompts(smollm2, 64, 700, seed=2), MANY_NEW, batch=1)


@pytest.mark.parametrize("mix", MIXES, ids=lambda m: m.name)
def test_greedy_tokens_are_those_of_transformers(
    mix: Mix, oracle: Oracle, benches: Any, few: list[Case]
) -> None:
    assert_exact(oracle, few, benches("fused").answers(few, mix, NEW))


def test_the_stock_runner_gives_the_same_tokens(oracle: Oracle, benches: Any, few: list[Case]) -> None:
    assert_exact(oracle, few, benches("stock").answers(few, MIXES[2], NEW))


@pytest.mark.nightly
@pytest.mark.parametrize(
    ("kind", "mix"),
    [*(("fused", mix) for mix in NIGHTLY), *(("stock", mix) for mix in NIGHTLY if mix.name in STOCK)],
    ids=lambda x: getattr(x, "name", x),
)
def test_64_requests_are_exact_in_every_mix(
    kind: str, mix: Mix, oracle: Oracle, benches: Any, many: list[Case], record_property: Any
) -> None:
    flipped = assert_exact(oracle, many, benches(kind).answers(many, mix, MANY_NEW))
    record_property("ties", flipped)
    print(f"{kind}, {mix.name}: {flipped} of {len(many)} requests differ at a tie")


@pytest.mark.parametrize("kind", RUNNERS)
def test_nan_logits_fail_only_their_request_and_leave_nothing_in_the_pages(
    kind: str, oracle: Oracle, benches: Any, few: list[Case]
) -> None:
    bench = benches(kind)
    sampling = SamplingParams(temperature=0, max_tokens=6, ignore_eos=True)
    broken = {key: (a * math.nan, b) for key, (a, b) in bench.adapters["x"].targets.items()}
    base = [Case(c.prompt, None, c.answer[:6], c.leads[:6]) for c in few if c.adapter is None][:3]
    # pages for little more than the requests, so that those that held NaN are used again
    core = bench.core(2 + sum(-(-(len(c.prompt) + 6) // 16) for c in base), max_batch_tokens=64, max_seqs=8)
    core.load_adapter("x", LoraAdapter("x", bench.adapters["x"].rank, 1.0, broken))
    core.submit(EngineRequest("bad", base[0].prompt, sampling, adapter="x"))
    core.submit(EngineRequest("beside", base[1].prompt, sampling))
    outputs: dict[str, list[TokenOutput]] = {}
    for turn in range(2):
        while core.has_work:
            for output in core.step(0.0):
                outputs.setdefault(output.request_id, []).append(output)
        for i, case in enumerate(base):
            core.submit(EngineRequest(f"{turn}-{i}", case.prompt, sampling))
    while core.has_work:
        for output in core.step(0.0):
            outputs.setdefault(output.request_id, []).append(output)
    assert [(o.token_ids, o.error) for o in outputs["bad"]] == [((), "nan_logits")]
    answers = [tokens_of(outputs[f"{turn}-{i}"]) for turn in range(2) for i in range(len(base))]
    assert_exact(oracle, [*base * 2, base[1]], [*answers, tokens_of(outputs["beside"])])
    bench.runner.load_adapter(0, bench.adapters["x"])


@pytest.mark.parametrize("family", ["gpt2", "gpt_neox"])
def test_other_families_run_through_their_own_code_and_are_exact(family: str, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM, GPT2Config, GPTNeoXConfig

    size: dict[str, Any] = {"vocab_size": 300, "bos_token_id": 0, "eos_token_id": 299}
    config = {
        "gpt2": GPT2Config(n_embd=64, n_layer=3, n_head=4, n_positions=256, initializer_range=0.3, **size),
        "gpt_neox": GPTNeoXConfig(
            hidden_size=64, num_hidden_layers=3, num_attention_heads=4, intermediate_size=96,
            max_position_embeddings=256, initializer_range=0.3, **size,
        ),
    }[family]  # fmt: skip
    with torch.random.fork_rng():
        torch.random.manual_seed(3)
        model: Any = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    model.save_pretrained(tmp_path)
    settings = EngineConfig(
        dtype="float32", num_blocks=40, max_batch_tokens=24, max_seqs=8, forced_preemption_every=7
    )
    runner = PagedRunner(tmp_path, settings, threads=1)
    assert runner.choice.runner == "stock"
    info = EngineInfo(family, "float32", "cpu", runner.max_length, 300, (299,), 16, 40, 8, 1, runner.revision)
    core = EngineCore(settings, runner, info, time.monotonic)
    rng = random.Random(4)
    prompts = [tuple(rng.randrange(299) for _ in range(n)) for n in (1, 9, 30, 61, 17, 44)]
    for i, prompt in enumerate(prompts):
        sampling = SamplingParams(temperature=0, max_tokens=20, ignore_eos=True)
        core.submit(EngineRequest(str(i), prompt, sampling))
    results: dict[str, list[int]] = {}
    _step_all(core, results)
    model.generation_config.eos_token_id = None
    for i, prompt in enumerate(prompts):
        ids = torch.tensor([prompt])
        expected = model.generate(
            ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=20
        )
        assert results[str(i)] == expected[0, len(prompt) :].tolist()
    with pytest.raises(ValueError, match="adapter 'x' cannot be used"):
        core.load_adapter("x", LoraAdapter("x", 1, 1.0, {}))


SCHEMAS = (
    {
        "type": "object",
        "properties": {
            "name": {"type": "string", "maxLength": 12},
            "age": {"type": "integer", "maximum": 150},
        },
        "required": ["name", "age"],
        "additionalProperties": False,
    },
    {"type": "array", "items": {"enum": ["red", "green", "blue"]}, "minItems": 1, "maxItems": 4},
    {"type": "object"},
)


def constrained(bench: Bench, count: int, max_tokens: int) -> int:
    """Answers that stopped, out of ``count`` that were asked for all at once; each of them is checked."""
    core = bench.core(max_batch_tokens=128, max_seqs=16, forced_preemption_every=7)
    tokenizer = Tokenizer(bench.folder)
    outputs: dict[str, list[TokenOutput]] = {}
    for i in range(count):
        spec = GrammarSpec("json_schema", json.dumps(SCHEMAS[i % 3]))
        sampling = SamplingParams(temperature=(i % 4) / 3, seed=i, max_tokens=max_tokens, grammar=spec)
        core.submit(EngineRequest(str(i), tuple(tokenizer.encode(f"Give me {i + 2} as JSON: ")), sampling))
    while core.has_work:
        for output in core.step(0.0):
            outputs.setdefault(output.request_id, []).append(output)
    stopped = 0
    for i in range(count):
        got = outputs[str(i)]
        assert got[-1].finish_reason in ("stop", "length")
        if got[-1].finish_reason == "stop":
            stopped += 1
            value: Any = json.loads(tokenizer.decode(tokens_of(got)))
            assert type(value).__name__ == ("list" if i % 3 == 1 else "dict")
            if i % 3 == 0:
                assert set(value) == {"name", "age"} and value["age"] <= 150 and len(value["name"]) <= 12
            if i % 3 == 1:
                assert 1 <= len(value) <= 4 and set(value) <= {"red", "green", "blue"}
    return stopped


def test_constrained_answers_parse_whenever_they_stop(benches: Any) -> None:
    assert constrained(benches("fused"), 6, 20) >= 2


@pytest.mark.nightly
def test_many_constrained_answers_parse_whenever_they_stop(benches: Any) -> None:
    assert constrained(benches("fused"), 96, 160) >= 60


@pytest.mark.nightly
@pytest.mark.parametrize("kind", RUNNERS)
def test_32_requests_over_one_system_prompt_compute_a_tenth_and_answer_the_same(
    kind: str, benches: Any
) -> None:
    bench: Bench = benches(kind)
    text = Tokenizer(bench.folder).encode(TEXT.read_text("utf-8"))
    requests = [(*text[:512], *text[600 + 40 * i : 632 + 40 * i]) for i in range(32)]
    sampling = SamplingParams(temperature=0, max_tokens=16, ignore_eos=True)
    results: list[dict[str, list[int]]] = []
    for sharing in (True, False):
        core = bench.core(max_batch_tokens=256, max_seqs=32, prefix_sharing=sharing)
        for i, prompt in enumerate(requests):
            core.submit(EngineRequest(str(i), prompt, sampling))
        results.append({})
        _step_all(core, results[-1])
        stats = core.stats()
        if sharing:
            assert stats.computed_prompt_tokens == 512 + 32 * 32 <= 0.12 * stats.prompt_tokens
    assert results[0] == results[1]
