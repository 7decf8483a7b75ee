"""The real SmolLM2: fused float32 against transformers, and what the smaller formats cost."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from sharewell.kernels import available
from sharewell.kv import PagedForward
from sharewell.models import Checkpoint, FusedDecoder, Tokenizer, load_transformers

TEXT = (
    "The licenses for most software are designed to take away your freedom to share and change it. "
    "In 1969, humans walked on the Moon; 12.7 GHz waves carried the picture home (naïve, n'est-ce pas?).\n"
    "def f(x):\n    return [i**2 for i in range(x)]\n"
)


def test_float32_logits_equal_transformers_on_real_weights(smollm2: Path, drive: Any) -> None:
    ids = Tokenizer(smollm2).encode(TEXT)
    driver = drive(PagedForward(FusedDecoder(Checkpoint(smollm2), "float32", max_length=256), 12, 16), 6)
    got = torch.cat([driver.step({"a": part})["a"] for part in (ids[:40], ids[40:41], ids[41:])])
    with torch.inference_mode():
        expected = load_transformers(smollm2)(torch.tensor([ids])).logits[0]
    assert (got - expected).abs().max() < 2e-3  # logits reach 30; the error is 1e-4 of that
    assert torch.equal(got.argmax(-1), expected.argmax(-1))


@pytest.mark.skipif(not available(), reason="needs AVX512-VNNI")
def test_perplexity_of_every_format_stays_near_the_dequantised_model(smollm2: Path) -> None:
    from benchmarks.serving.perplexity import compare

    found = compare(smollm2, tokens=512, window=256)
    # The full run, 32,768 tokens, holds int4 to 0.3 %; on this many tokens chance alone moves it by that
    # much.
    for format, bound in {"bfloat16": 1.005, "int8": 1.02, "int4": 1.01}.items():
        assert 1 / bound < found[format] / found["float32"] < bound, found
    assert 2 < found["float32"] < 60


@pytest.mark.skipif(not available(), reason="needs AVX512-VNNI")
def test_int4_keeps_the_stored_integers(smollm2: Path) -> None:
    """The packed matrices stand for exactly the numbers of the GGUF's blocks."""
    from sharewell.kernels import pack_int4, pack_int8, unpack

    checkpoint = Checkpoint(smollm2)
    stored = checkpoint.quantized("model.layers.7.mlp.down_proj.weight")
    assert stored is not None
    assert stored.m is not None
    name = "model.layers.7.mlp.down_proj.weight"
    assert torch.equal(
        unpack(pack_int4(stored.q, stored.d, stored.m)), checkpoint.tensor(name, torch.float32)
    )
    head = checkpoint.quantized("model.embed_tokens.weight")
    assert head is not None
    assert torch.equal(
        unpack(pack_int8(head.q, head.d)), checkpoint.tensor("model.embed_tokens.weight", torch.float32)
    )
