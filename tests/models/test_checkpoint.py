from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from sharewell.models import Checkpoint, FusedDecoder, ModelConfig, ModelError, export_hf, load_transformers

Tiny = Callable[[str], Path]


def _copy(folder: Path, to: Path) -> Path:
    return Path(shutil.copytree(folder, to / "model"))


def test_tensors_are_read_by_their_names(tiny: Tiny) -> None:
    checkpoint = Checkpoint(tiny("qwen2"))
    plain = load_file(tiny("qwen2") / "model.safetensors")
    assert checkpoint.names() == sorted(plain)
    for name, value in plain.items():
        assert torch.equal(checkpoint.tensor(name, torch.float32), value)
        assert checkpoint.quantized(name) is None
    assert checkpoint.stored_bits == 16


def test_a_sharded_folder_reads_like_a_whole_one(tiny: Tiny, tmp_path: Path) -> None:
    model = load_transformers(tiny("llama"))
    model.save_pretrained(tmp_path, max_shard_size="200KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    whole, sharded = Checkpoint(tiny("llama")), Checkpoint(tmp_path)
    assert whole.names() == sharded.names()
    for name in whole.names():
        assert torch.equal(whole.tensor(name, torch.float32), sharded.tensor(name, torch.float32))


@pytest.mark.parametrize("kept", [0, 4, 100, 0.5, 0.99])
def test_a_truncated_file_is_refused_and_named(kept: float, tiny: Tiny, tmp_path: Path) -> None:
    path = _copy(tiny("llama"), tmp_path) / "model.safetensors"
    data = path.read_bytes()
    path.write_bytes(data[: int(kept * len(data)) if isinstance(kept, float) else kept])
    with pytest.raises(ModelError, match=r"model\.safetensors cannot be read"):
        Checkpoint(path.parent)


def test_a_corrupt_header_is_refused_and_named(tiny: Tiny, tmp_path: Path) -> None:
    path = _copy(tiny("llama"), tmp_path) / "model.safetensors"
    data = bytearray(path.read_bytes())
    data[8:40] = b"\xff" * 32
    path.write_bytes(data)
    with pytest.raises(ModelError, match=r"model\.safetensors cannot be read"):
        Checkpoint(path.parent)


def test_a_missing_tensor_is_named(tiny: Tiny, tmp_path: Path) -> None:
    path = _copy(tiny("llama"), tmp_path) / "model.safetensors"
    tensors = load_file(path)
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, path)
    with pytest.raises(ModelError, match=r"has no tensor 'model\.layers\.1\.mlp\.up_proj\.weight'"):
        FusedDecoder(Checkpoint(path.parent), "float32")


def test_a_tensor_of_another_shape_is_named(tiny: Tiny, tmp_path: Path) -> None:
    path = _copy(tiny("llama"), tmp_path) / "model.safetensors"
    tensors = load_file(path)
    tensors["model.layers.0.self_attn.k_proj.weight"] = torch.zeros(32, 192)
    save_file(tensors, path)
    with pytest.raises(
        ModelError, match=r"'model\.layers\.0\.self_attn\.k_proj\.weight'.*\(64, 192\).*\(32, 192\)"
    ):
        FusedDecoder(Checkpoint(path.parent), "float32")


def test_folders_that_are_no_models_are_refused(tmp_path: Path, tiny: Tiny) -> None:
    with pytest.raises(ModelError, match=r"config\.json is missing"):
        Checkpoint(tmp_path)
    shutil.copy(tiny("llama") / "config.json", tmp_path)
    with pytest.raises(ModelError, match=r"holds no \*\.safetensors weights"):
        Checkpoint(tmp_path)
    (tmp_path / "config.json").write_text('{"hidden_size": 4')
    with pytest.raises(ModelError, match=r"config\.json cannot be read"):
        Checkpoint(tmp_path)
    (tmp_path / "config.json").write_text("[]")
    with pytest.raises(ModelError, match="must hold a JSON object, got list"):
        Checkpoint(tmp_path)
    (tmp_path / "config.json").write_text('{"hidden_size": 4}')
    with pytest.raises(ModelError, match="field 'num_attention_heads' is missing"):
        ModelConfig.from_folder(tmp_path)


def test_the_revision_changes_with_the_weights(tiny: Tiny, tmp_path: Path) -> None:
    folder = _copy(tiny("llama"), tmp_path)
    assert Checkpoint(folder).revision == Checkpoint(tiny("llama")).revision
    tensors = load_file(folder / "model.safetensors")
    tensors["lm_head.weight"][-1, -1] += 1
    save_file(tensors, folder / "model.safetensors")
    assert Checkpoint(folder).revision != Checkpoint(tiny("llama")).revision


def test_an_exported_folder_loads_in_transformers_with_the_same_logits(smollm2: Path, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    out = export_hf(smollm2, tmp_path / "out", torch.float32)
    ids = torch.tensor([[1, 4093, 198, 2683, 359, 253]])
    exported = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32)
    with torch.inference_mode():
        assert torch.equal(exported(ids).logits, load_transformers(smollm2)(ids).logits)
    assert json.loads((out / "config.json").read_text())["dtype"] == "float32"
    text = "Naïve café: 12,345 tokens 🙂\n\tend"
    assert (
        AutoTokenizer.from_pretrained(out).decode(AutoTokenizer.from_pretrained(out)(text).input_ids) == text
    )
    assert Checkpoint(out).stored_bits == 16
