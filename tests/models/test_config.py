from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from sharewell.models import ModelConfig, load_transformers
from sharewell.models.rope import inverse_frequencies, rope_tables, rotate

_RAW = {
    "architectures": ["LlamaForCausalLM"],
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "vocab_size": 50,
}


def _config(tmp_path: Path, **changes: Any) -> ModelConfig:
    (tmp_path / "config.json").write_text(json.dumps(_RAW | changes))
    return ModelConfig.from_folder(tmp_path)


def test_defaults_are_those_of_the_architecture(tmp_path: Path) -> None:
    config = _config(tmp_path)
    assert (config.n_kv_heads, config.head_dim, config.kv_width) == (4, 16, 64)
    assert config.fusable
    assert _config(tmp_path, architectures=["Qwen2ForCausalLM"]).attention_bias
    assert _config(tmp_path, architectures=["Qwen3ForCausalLM"]).qk_norm


def test_end_tokens_come_from_the_generation_settings_first(tmp_path: Path) -> None:
    assert _config(tmp_path, eos_token_id=7).eos_token_ids == (7,)
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": [3, 4]}')
    assert _config(tmp_path, eos_token_id=7).eos_token_ids == (3, 4)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"architectures": ["GemmaForCausalLM"]}, "architecture GemmaForCausalLM"),
        ({"hidden_act": "gelu"}, "hidden_act must be silu, got gelu"),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 4}}, "rope scaling type must be .*, got yarn"),
        ({"attention_bias": True}, "have a bias"),
        ({"mlp_bias": True}, "have a bias"),
        ({"layer_types": ["full_attention", "sliding_attention"] * 2}, "mix kinds of attention"),
        ({"layer_types": ["linear_attention"] * 4}, "mix kinds of attention"),
    ],
)
def test_what_the_fused_layers_do_not_cover_is_said(tmp_path: Path, changes: dict, reason: str) -> None:
    config = _config(tmp_path, **changes)
    assert not config.fusable
    with pytest.raises(AssertionError, match=reason):
        raise AssertionError(config.not_fusable)


def test_windows_count_only_where_the_model_uses_them(tmp_path: Path) -> None:
    mistral, qwen = ["MistralForCausalLM"], ["Qwen2ForCausalLM"]
    assert _config(tmp_path, architectures=mistral, sliding_window=32).sliding_window == 32
    assert _config(tmp_path, architectures=qwen, sliding_window=32).sliding_window is None
    used = {"architectures": qwen, "sliding_window": 32, "use_sliding_window": True}
    every = _config(tmp_path, **used, max_window_layers=0)
    assert every.sliding_window == 32
    assert every.fusable
    assert _config(tmp_path, **used, max_window_layers=2).mixed_attention
    assert _config(tmp_path, **used, max_window_layers=4).sliding_window is None


@pytest.mark.parametrize("family", ["llama", "llama3-rope"])
def test_rotary_tables_are_those_of_transformers(family: str, tiny: Callable[[str], Path]) -> None:
    config = ModelConfig.from_folder(tiny(family))
    inverse = inverse_frequencies(config.head_dim, config.rope_theta, config.rope_scaling)
    cos, sin = rope_tables(inverse, 500)
    rotary = load_transformers(tiny(family)).model.rotary_emb
    expected = rotary(torch.zeros(1, 1, 1), torch.arange(500)[None])
    assert (cos - expected[0][0, :, :16]).abs().max() < 1e-5
    assert (sin - expected[1][0, :, :16]).abs().max() < 1e-5


def test_linear_scaling_stretches_positions() -> None:
    plain, stretched = (
        inverse_frequencies(8, 1e4, s) for s in (None, {"rope_type": "linear", "factor": 4.0})
    )
    assert torch.equal(plain, stretched * 4)
    with pytest.raises(ValueError, match="rope scaling type must be default, linear or llama3, got 'yarn'"):
        inverse_frequencies(8, 1e4, {"rope_type": "yarn", "factor": 4.0})


def test_rotation_keeps_lengths_and_depends_on_distance_only() -> None:
    cos, sin = rope_tables(inverse_frequencies(16, 1e4), 64)
    q, k = torch.randn(2, 1, 1, 16, generator=torch.Generator().manual_seed(0))
    at = [torch.tensor([i]) for i in (3, 10, 40, 47)]
    a, b, c, d = (rotate(x, cos[p], sin[p]) for x, p in zip((q, k, q, k), at, strict=True))
    assert a.norm().item() == pytest.approx(q.norm().item(), rel=1e-6)
    assert (a * b).sum().item() == pytest.approx((c * d).sum().item(), abs=1e-5)
