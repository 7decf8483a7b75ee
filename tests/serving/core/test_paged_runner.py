"""What a configuration becomes on this model and this machine, and what is refused with which words."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest

from sharewell import kernels
from sharewell.models import ModelConfig
from sharewell.serving.core.config import EngineConfig
from sharewell.serving.core.paged_runner import choose, memory_budget

SMOLLM2 = ModelConfig("LlamaForCausalLM", 30, 576, 1536, 9, 3, 64, 49152, 8192)
GPT2 = dataclasses.replace(SMOLLM2, architecture="GPT2LMHeadModel", hidden_act="gelu_new")


def test_auto_takes_the_fastest_that_keeps_quality() -> None:
    quick = kernels.available()
    four, plain = (choose(EngineConfig(), SMOLLM2, bits) for bits in (4, 16))
    assert four.runner == plain.runner == "fused"
    assert not quick or (four.format, plain.format) == ("int4", "bfloat16")
    assert choose(EngineConfig(device="cuda"), SMOLLM2, 4).format == "bfloat16"


def test_what_the_fused_runner_cannot_run_goes_to_the_stock_one() -> None:
    for config, model in (
        (EngineConfig(), GPT2),
        (EngineConfig(dtype="float32", runner="stock"), SMOLLM2),
        (EngineConfig(dtype="float32", block_size=8), SMOLLM2),
        (EngineConfig(dtype="float32"), dataclasses.replace(SMOLLM2, head_dim=40)),
    ):
        choice = choose(config, model, 16)
        assert (choice.runner, choice.format) == ("stock", "float32")


@pytest.mark.parametrize(
    ("settings", "model", "message"),
    [
        ({"runner": "fused"}, GPT2, "runner must be stock or auto for this model: fused cannot run it"),
        ({"runner": "fused", "block_size": 8}, SMOLLM2, "runner must be stock or auto"),
        ({"dtype": "int4"}, GPT2, "dtype int4 needs the fused runner, which cannot run this model"),
        ({"dtype": "int8", "runner": "stock"}, SMOLLM2, "dtype int8 needs the fused runner"),
        ({"dtype": "int4", "device": "cuda"}, SMOLLM2, "it runs on CPU only"),
    ],
)
def test_combinations_that_cannot_run_are_refused(
    settings: dict[str, Any], model: ModelConfig, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        choose(EngineConfig(**{"dtype": "float32", **settings}), model, 16)


@pytest.mark.parametrize(
    ("field", "value", "allowed"),
    [
        ("dtype", "float8", "auto, float32, bfloat16, int8 or int4"),
        ("device", "tpu", "cpu or cuda"),
        ("runner", "quick", "auto, fused or stock"),
        ("block_size", 48, r"a power of two in \[1, 512\]"),
        ("kv_cache_bytes", 0, "None or positive"),
        ("num_blocks", 1, "None or at least 2"),
        ("max_model_len", 1, "None or at least 2"),
        ("max_seqs", 0, "at least 1"),
        ("max_batch_tokens", 8, r"at least max_seqs \(64\)"),
        ("max_waiting", -1, "at least 0"),
        ("max_adapters", -1, "at least 0"),
        ("max_lora_rank", 0, r"in \[1, 512\]"),
        ("threads", 0, "None or at least 1"),
    ],
)
def test_a_bad_setting_is_named_with_what_is_allowed(field: str, value: Any, allowed: str) -> None:
    with pytest.raises(ValueError, match=f"{field} must be {allowed}, got {value!r}"):
        EngineConfig(**{field: value})


def test_pages_get_at_most_a_quarter_of_the_memory() -> None:
    assert 0 < memory_budget("cpu") <= 2 << 30
