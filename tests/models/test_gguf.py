"""Conversion of a GGUF file against the ``gguf`` package's own dequantisation and transformers' loader."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from tiny_gguf import DIM, HEADS, KV, LAYERS, write_gguf

from sharewell.models import Checkpoint, ModelError, Tokenizer, load_transformers
from sharewell.models.gguf import convert_gguf


@pytest.fixture(scope="module")
def converted(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, dict[str, np.ndarray]]:
    folder = tmp_path_factory.mktemp("gguf")
    meant = write_gguf(folder / "tiny.gguf")
    steps: list[tuple[int, int]] = []
    convert_gguf(folder / "tiny.gguf", folder / "out", lambda done, total: steps.append((done, total)))
    assert steps == [(i + 1, len(meant)) for i in range(len(meant))]
    return folder / "tiny.gguf", folder / "out", meant


def _paired(rows: np.ndarray, heads: int) -> np.ndarray:
    """Rows 2 i and 2 i + 1 of a head in llama.cpp are rows i and i + dim / 2 in Hugging Face's order."""
    out = np.empty_like(rows)
    for head in range(heads):
        for i in range(DIM // 2):
            out[head * DIM + i] = rows[head * DIM + 2 * i]
            out[head * DIM + DIM // 2 + i] = rows[head * DIM + 2 * i + 1]
    return out


def test_every_tensor_equals_what_the_gguf_package_dequantises(converted: tuple) -> None:
    _, out, meant = converted
    checkpoint = Checkpoint(out)
    assert checkpoint.stored_bits == 4
    pairs = {"model.embed_tokens": meant["token_embd"], "model.norm": meant["output_norm"]}
    for i in range(LAYERS):
        for ours, theirs in {
            "self_attn.v_proj": "attn_v",
            "self_attn.o_proj": "attn_output",
            "mlp.gate_proj": "ffn_gate",
            "mlp.up_proj": "ffn_up",
            "mlp.down_proj": "ffn_down",
            "input_layernorm": "attn_norm",
            "post_attention_layernorm": "ffn_norm",
        }.items():
            pairs[f"model.layers.{i}.{ours}"] = meant[f"blk.{i}.{theirs}"]
        for ours, theirs, heads in (("q_proj", "attn_q", HEADS), ("k_proj", "attn_k", KV)):
            pairs[f"model.layers.{i}.self_attn.{ours}"] = _paired(meant[f"blk.{i}.{theirs}"], heads)
    assert checkpoint.names() == sorted(name + ".weight" for name in pairs)
    for name, value in pairs.items():
        assert np.array_equal(checkpoint.tensor(name + ".weight", torch.float32).numpy(), value), name


def test_the_converted_model_is_the_one_that_transformers_reads_from_the_file(converted: tuple) -> None:
    from transformers import AutoModelForCausalLM

    path, out, _ = converted
    theirs = AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=torch.float32)
    ours = load_transformers(out)
    ids = torch.arange(3, 40)[None]
    with torch.inference_mode():
        assert (ours(ids).logits - theirs(ids).logits).abs().max() < 1e-4


def test_integers_are_kept_and_not_rounded_again(converted: tuple) -> None:
    stored = Checkpoint(converted[1]).quantized("model.layers.0.mlp.up_proj.weight")
    assert stored is not None
    assert stored.group == 32
    assert stored.m is not None
    assert int(stored.q.max()) == 15
    embedding = Checkpoint(converted[1]).quantized("model.embed_tokens.weight")
    assert embedding is not None
    assert embedding.m is None
    assert embedding.q.dtype == torch.int8


def test_the_tokenizer_splits_digits_and_keeps_special_tokens(converted: tuple) -> None:
    tokenizer = Tokenizer(converted[1])
    assert tokenizer.decode(tokenizer.encode("hello 123")) == "hello 123"
    assert tokenizer.encode("hel") == [tokenizer.id_of("hel")]
    assert len(tokenizer.encode("123")) == 3
    assert tokenizer.encode("<|im_end|>") == [2]
    assert tokenizer.special_ids == {0, 1, 2}


def test_files_that_are_no_llama_gguf_are_refused(tmp_path: Path, converted: tuple) -> None:
    bad = tmp_path / "bad.gguf"
    bad.write_bytes(b"not a model at all")
    with pytest.raises(ModelError, match="is not a readable GGUF file"):
        convert_gguf(bad, tmp_path / "out")
    data = converted[0].read_bytes()
    bad.write_bytes(data[: len(data) // 2])
    with pytest.raises(ModelError, match="is not a readable GGUF file"):
        convert_gguf(bad, tmp_path / "out")
    write_gguf(bad, architecture="mamba")
    with pytest.raises(ModelError, match="architecture must be 'llama', got 'mamba'"):
        convert_gguf(bad, tmp_path / "out")
    write_gguf(bad, kind="Q5_0")
    with pytest.raises(ModelError, match="has type Q5_0; supported are Q4_1, Q8_0, F16, F32"):
        convert_gguf(bad, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("kind", ["Q8_0", "F32"])
def test_other_types_convert_exactly_too(kind: str, tmp_path: Path) -> None:
    meant = write_gguf(tmp_path / "tiny.gguf", kind)
    convert_gguf(tmp_path / "tiny.gguf", tmp_path / "out")
    value = Checkpoint(tmp_path / "out").tensor("model.layers.1.mlp.down_proj.weight", torch.float32)
    assert np.array_equal(value.numpy(), meant["blk.1.ffn_down"])
