"""The paged pass: layer by layer in torch and fused must agree with each other and with plain
transformers."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, MistralConfig, Qwen3Config

from sharewell.kv import PagedForward
from sharewell.models import Checkpoint, FusedDecoder, LoraAdapter, StockDecoder, load_transformers

SIZE, BLOCKS, VOCAB = 16, 40, 320
SHAPE: dict[str, Any] = {
    "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 3, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 16, "vocab_size": VOCAB, "max_position_embeddings": 512,
    "initializer_range": 0.2,
}  # fmt: skip
FAMILIES = {
    "llama": LlamaConfig(**SHAPE),
    "qwen3": Qwen3Config(**SHAPE, tie_word_embeddings=True),
    "mistral": MistralConfig(**SHAPE, sliding_window=24),
}


@pytest.fixture(scope="module", params=FAMILIES)
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp(request.param)
    with torch.random.fork_rng():
        torch.random.manual_seed(5)
        model = AutoModelForCausalLM.from_config(FAMILIES[request.param], dtype=torch.float32)
    model.save_pretrained(path)
    return path


def adapter(folder: Path) -> LoraAdapter:
    generator = torch.Generator().manual_seed(9)

    def matrix(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator) * 0.2

    targets = {(i, "q_proj"): (matrix(4, 64), matrix(64, 4)) for i in range(3)}
    targets |= {(i, "down_proj"): (matrix(4, 96), matrix(64, 4)) for i in range(2)}
    return LoraAdapter("a", 4, 2.0, targets)


class Pages:
    """Feeds texts in chunks through a PagedForward over scattered blocks."""

    def __init__(self, decoder: Any, n: int, one_by_one: bool = False) -> None:
        self.forward = PagedForward(decoder, BLOCKS, SIZE, one_by_one)
        order = np.random.default_rng(1).permutation(BLOCKS)
        self.tables = order[: n * (BLOCKS // n)].reshape(n, -1).astype(np.int32)
        self.done = [0] * n

    def step(self, chunks: dict[int, list[int]], slots: dict[int, int] | None = None) -> np.ndarray:
        """Logits behind every token of the step's chunks, packed."""
        ids, positions, where, starts, contexts = [], [], [], [0], []
        for s, tokens in chunks.items():
            at = np.arange(self.done[s], self.done[s] + len(tokens))
            ids += tokens
            positions.append(at)
            where.append(self.tables[s][at // SIZE].astype(np.int64) * SIZE + at % SIZE)
            self.done[s] += len(tokens)
            starts.append(len(ids))
            contexts.append(self.done[s])
        rows = list(chunks)
        adapters = np.array([(slots or {}).get(s, -1) for s in rows], np.int32)
        return (
            self.forward(
                np.array(ids),
                np.concatenate(positions),
                np.concatenate(where),
                np.array(starts, np.int32),
                np.array(contexts, np.int32),
                np.ascontiguousarray(self.tables[rows]),
                np.arange(len(ids)),
                adapters,
            )
            .numpy()[:, :VOCAB]
            .copy()
        )


@pytest.mark.parametrize("kind", ["fused", "layerwise"])
def test_any_chunking_and_company_gives_the_logits_of_plain_transformers(folder: Path, kind: str) -> None:
    rng = np.random.default_rng(2)
    texts = [rng.integers(0, VOCAB, n).tolist() for n in (70, 33, 1, 17)]
    oracle = load_transformers(folder)
    with torch.inference_mode():
        wanted = [oracle(torch.tensor([text])).logits[0].numpy() for text in texts]
    decoder = (
        FusedDecoder(Checkpoint(folder), "float32", max_length=256)
        if kind == "fused"
        else StockDecoder.from_folder(folder)
    )
    pages = Pages(decoder, len(texts))
    while any(done < len(text) for done, text in zip(pages.done, texts, strict=True)):
        chunks = {
            s: text[pages.done[s] : pages.done[s] + int(rng.integers(1, 30))]
            for s, text in enumerate(texts)
            if pages.done[s] < len(text) and rng.random() < 0.7
        }
        if not chunks:
            continue
        starts = {s: pages.done[s] for s in chunks}
        logits = pages.step(chunks)
        ends = np.cumsum([len(c) for c in chunks.values()])
        for s, part in zip(chunks, np.split(logits, ends[:-1]), strict=True):
            np.testing.assert_allclose(part, wanted[s][starts[s] : starts[s] + len(part)], atol=2e-4)


def test_fused_and_layerwise_agree_with_adapters_mixed_in_one_step(folder: Path) -> None:
    rng = np.random.default_rng(3)
    texts = [rng.integers(0, VOCAB, n).tolist() for n in (20, 31, 8)]
    fused = FusedDecoder(Checkpoint(folder), "float32", max_length=256, max_adapters=2, max_lora_rank=8)
    stock = StockDecoder.from_folder(folder, max_adapters=2)
    results = []
    for decoder in (fused, stock):
        decoder.load_adapter(1, adapter(folder))
        pages = Pages(decoder, len(texts))
        slots = {0: 1, 1: -1, 2: 1}
        first = pages.step({s: t[:7] for s, t in enumerate(texts)}, slots)
        results.append(np.concatenate([first, pages.step({s: t[7:] for s, t in enumerate(texts)}, slots)]))
    np.testing.assert_allclose(*results, atol=2e-4)
    plain = Pages(stock, len(texts)).step({0: texts[0][:7]})
    assert np.abs(plain - results[0][:7]).max() > 0.1, "the adapter must matter"


def test_bfloat16_fused_and_layerwise_differ_by_rounding_only(folder: Path) -> None:
    from sharewell import kernels

    if not kernels.available():
        return  # the fused step has no bfloat16 on this CPU; choose() never picks it there
    text = np.random.default_rng(4).integers(0, VOCAB, 40).tolist()
    exact = Pages(StockDecoder.from_folder(folder), 1).step({0: text})
    fused = Pages(FusedDecoder(Checkpoint(folder), "bfloat16", max_length=256), 1).step({0: text})
    stock = Pages(StockDecoder.from_folder(folder, torch.bfloat16), 1).step({0: text})
    scale = np.abs(exact).max()
    assert np.abs(fused - exact).mean() <= max(1e-2 * scale, 1.5 * np.abs(stock - exact).mean())


def test_a_copied_page_reads_as_its_source(folder: Path) -> None:
    text = np.random.default_rng(6).integers(0, VOCAB, 20).tolist()
    for decoder in (
        FusedDecoder(Checkpoint(folder), "float32", max_length=256),
        StockDecoder.from_folder(folder),
    ):
        pages = Pages(decoder, 2)
        pages.step({0: text[:16]})
        pages.forward.copy_block(int(pages.tables[0, 0]), int(pages.tables[1, 0]))
        pages.done[1] = 16
        a, b = pages.step({0: text[16:]}), pages.step({1: text[16:]})
        assert np.array_equal(a, b)


@pytest.mark.parametrize("kind", ["float32", "bfloat16", "int8", "int4", "one by one"])
def test_logits_depend_neither_on_company_nor_on_cuts_to_the_last_bit(tmp_path: Path, kind: str) -> None:
    from sharewell import kernels

    if kind in ("bfloat16", "int8", "int4") and not kernels.available():
        return  # the fused step has only float32 on this CPU
    shape: dict[str, Any] = {**SHAPE, "head_dim": 32, "intermediate_size": 128}
    with torch.random.fork_rng():
        torch.random.manual_seed(6)
        AutoModelForCausalLM.from_config(LlamaConfig(**shape), dtype=torch.float32).save_pretrained(tmp_path)
    decoder: Any = (
        StockDecoder.from_folder(tmp_path)
        if kind == "one by one"
        else FusedDecoder(Checkpoint(tmp_path), kind, max_length=256)
    )
    rng = np.random.default_rng(8)
    texts = [rng.integers(0, VOCAB, n).tolist() for n in (37, 24, 50)]
    results = []
    for cuts in ((50,), (7, 19), (16, 17, 32), (1, 2, 3)):
        for together in (True, False):
            pages = Pages(decoder, 3, one_by_one=kind == "one by one")
            rows: list[list[np.ndarray]] = [[], [], []]
            for s, chunk in _cut(texts, cuts, together):
                logits = pages.step({i: chunk[i] for i in s})
                ends = np.cumsum([len(chunk[i]) for i in s])
                for i, part in zip(s, np.split(logits, ends[:-1]), strict=True):
                    rows[i].append(part)
            results.append(np.concatenate([np.concatenate(r) for r in rows]))
    assert all(np.array_equal(results[0], other) for other in results[1:])


def _cut(texts: list[list[int]], cuts: tuple[int, ...], together: bool) -> Any:
    """Steps as (texts that take part, their chunks)."""
    at = 0
    for length in itertools.cycle(cuts):
        chunks = [text[at : at + length] for text in texts]
        left = [i for i, chunk in enumerate(chunks) if chunk]
        if not left:
            return
        yield from [(left, chunks)] if together else [([i], chunks) for i in reversed(left)]
        at += length
