"""Models that are not Llama-like run through their own code on paged keys and values."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from sharewell.kv import PagedForward
from sharewell.models import InterfaceDecoder, ModelError, StockDecoder, WholeDecoder, load_stock_decoder
from sharewell.models.checkpoint import load_transformers

Tiny = Callable[[str], Path]
Ids = Callable[[int, int, int], list[int]]


@pytest.mark.parametrize("family", ["gpt2", "gpt-neox", "gemma", "phi", "opt"])
def test_batched_chunked_decoding_equals_generate(family: str, tiny: Tiny, drive: Any, ids: Ids) -> None:
    decoder = load_stock_decoder(tiny(family))
    assert isinstance(decoder, WholeDecoder)
    driver = drive(PagedForward(decoder, 40, 16), 6)
    prompts = {"a": ids(40, 301, 1), "b": ids(7, 301, 2), "c": ids(19, 301, 3)}
    first = driver.step({"a": prompts["a"][:23], "b": prompts["b"]})
    second = driver.step({"c": prompts["c"], "a": prompts["a"][23:]})
    logits = {"a": second["a"], "b": first["b"], "c": second["c"]}
    out: dict[str, list[int]] = {name: [] for name in prompts}
    for _ in range(12):
        for name, rows in logits.items():
            out[name].append(int(rows[-1].argmax()))
        logits = driver.step({name: [tokens[-1]] for name, tokens in out.items()})
    model = load_transformers(tiny(family))
    for name, prompt in prompts.items():
        options = {"max_new_tokens": 12, "min_new_tokens": 12, "do_sample": False, "eos_token_id": None}
        whole = model.generate(torch.tensor([prompt]), **options)  # pyright: ignore[reportCallIssue]
        assert out[name] == whole[0, len(prompt) :].tolist()


def test_logits_equal_the_model_to_a_ten_thousandth(tiny: Tiny, drive: Any, ids: Ids) -> None:
    driver = drive(PagedForward(InterfaceDecoder.from_folder(tiny("gpt2")), 40, 16), 6)
    tokens = ids(50, 301, 5)
    got = torch.cat([driver.step({"a": part})["a"] for part in (tokens[:30], tokens[30:31], tokens[31:])])
    with torch.inference_mode():
        expected = load_transformers(tiny("gpt2"))(torch.tensor([tokens])).logits[0]
    assert (got - expected).abs().max() < 1e-4


def test_sizes_of_keys_and_values_are_those_that_the_model_computes(tiny: Tiny) -> None:
    config = InterfaceDecoder.from_folder(tiny("gemma")).config
    assert (config.n_layers, config.n_kv_heads, config.head_dim) == (2, 2, 32)


def test_llama_like_models_are_taken_apart_instead(tiny: Tiny) -> None:
    assert isinstance(load_stock_decoder(tiny("qwen2")), StockDecoder)


@pytest.mark.parametrize(
    ("family", "reason"),
    [("gemma3", "sliding_window"), ("bloom", "cannot be served"), ("mamba", "config.json|cannot be served")],
)
def test_what_cannot_run_this_way_is_refused_with_the_reason(family: str, reason: str, tiny: Tiny) -> None:
    with pytest.raises(ModelError, match=reason):
        load_stock_decoder(tiny(family))


def test_an_unknown_architecture_is_refused(tiny: Tiny, tmp_path: Path) -> None:
    raw = json.loads((tiny("gpt2") / "config.json").read_text())
    raw |= {"architectures": ["Nobody"], "model_type": "nobody"}
    (tmp_path / "config.json").write_text(json.dumps(raw))
    (tmp_path / "model.safetensors").write_bytes((tiny("gpt2") / "model.safetensors").read_bytes())
    with pytest.raises(ModelError, match="transformers cannot load Nobody"):
        load_stock_decoder(tmp_path)


def test_adapters_are_refused(tiny: Tiny) -> None:
    from sharewell.models import LoraAdapter

    decoder = load_stock_decoder(tiny("gpt2"))
    decoder.load_adapter(0, None)
    with pytest.raises(ValueError, match="adapter 'x' cannot be used"):
        decoder.load_adapter(0, LoraAdapter("x", 4, 1.0, {}))
