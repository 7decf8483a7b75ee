"""LoRA adapters against peft, several of them in one step."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from sharewell.kv import PagedForward
from sharewell.models import (
    AdapterError,
    Checkpoint,
    FusedDecoder,
    ModelConfig,
    StockDecoder,
    load_peft_adapter,
    load_transformers,
)

Tiny = Callable[[str], Path]
Ids = Callable[[int, int, int], list[int]]
ALL = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


@pytest.fixture(scope="module")
def adapters(tiny: Tiny, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Three peft adapters for the tiny Qwen2: all projections, few of them, and rank-stabilised scaling."""
    from peft import LoraConfig, get_peft_model

    folders = {}
    for seed, (name, options) in enumerate(
        {
            "all": {"r": 5, "lora_alpha": 10, "target_modules": ALL},
            "few": {"r": 16, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj", "down_proj"]},
            "stable": {"r": 4, "lora_alpha": 6, "target_modules": ["k_proj", "up_proj"], "use_rslora": True},
        }.items()
    ):
        model: Any = get_peft_model(load_transformers(tiny("qwen2")), LoraConfig(**options))
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for key, value in model.named_parameters():
                if "lora_" in key:
                    value.copy_(0.1 * torch.randn(value.shape, generator=generator))
        folders[name] = tmp_path_factory.mktemp(name)
        model.save_pretrained(folders[name])
    return folders


def _peft_logits(tiny: Tiny, folder: Path | None, tokens: list[int]) -> torch.Tensor:
    from peft import PeftModel

    model: Any = load_transformers(tiny("qwen2"))
    if folder is not None:
        model = PeftModel.from_pretrained(model, folder)
    with torch.inference_mode():
        return model(torch.tensor([tokens])).logits[0]


@pytest.mark.parametrize("kind", ["fused", "stock"])
def test_adapters_mixed_in_one_step_equal_peft(
    kind: str, tiny: Tiny, adapters: dict[str, Path], drive: Any, ids: Ids
) -> None:
    folder = tiny("qwen2")
    if kind == "fused":
        decoder: Any = FusedDecoder(Checkpoint(folder), "float32", threads=2, max_adapters=3)
    else:
        decoder = StockDecoder.from_folder(folder, max_adapters=3)
    for slot, name in enumerate(adapters):
        decoder.load_adapter(slot, load_peft_adapter(adapters[name], decoder.config))
    driver = drive(PagedForward(decoder, 60, 16), 4)
    prompts = {name: ids(30, 301, seed) for seed, name in enumerate(["all", "base", "few", "stable"])}
    slots = {name: slot for slot, name in enumerate(adapters)}
    got: dict[str, list[torch.Tensor]] = {name: [] for name in prompts}
    for first, end in [(0, 17), (17, 18), (18, 30)]:
        new = {name: tokens[first:end] for name, tokens in prompts.items()}
        for name, logits in driver.step(new, slots).items():
            got[name].append(logits)
    for name, parts in got.items():
        expected = _peft_logits(tiny, adapters.get(name), prompts[name])
        assert (torch.cat(parts) - expected).abs().max() < 1e-4, name
    plain = _peft_logits(tiny, None, prompts["all"])
    assert (torch.cat(got["all"]) - plain).abs().max() > 0.1  # the adapter does change something


def test_an_emptied_slot_is_the_base_model_again(
    tiny: Tiny, adapters: dict[str, Path], drive: Any, ids: Ids
) -> None:
    decoder = FusedDecoder(Checkpoint(tiny("qwen2")), "bfloat16", max_adapters=1)
    tokens = ids(20, 301, 8)
    before = drive(PagedForward(decoder, 4, 16), 2).step({"a": tokens}, {"a": 0})["a"]
    decoder.load_adapter(0, load_peft_adapter(adapters["all"], decoder.config))
    during = drive(PagedForward(decoder, 4, 16), 2).step({"a": tokens}, {"a": 0})["a"]
    decoder.load_adapter(0, None)
    after = drive(PagedForward(decoder, 4, 16), 2).step({"a": tokens}, {"a": 0})["a"]
    assert torch.equal(before, after)
    assert not torch.equal(before, during)


def test_ranks_above_the_limit_are_refused(tiny: Tiny, adapters: dict[str, Path]) -> None:
    decoder = FusedDecoder(Checkpoint(tiny("qwen2")), "float32", max_adapters=1, max_lora_rank=8)
    with pytest.raises(ValueError, match="rank of adapter 'mine' must be at most 8, got 16"):
        decoder.load_adapter(0, load_peft_adapter(adapters["few"], decoder.config, "mine"))


def _broken(adapters: dict[str, Path], to: Path) -> Path:
    return Path(shutil.copytree(adapters["all"], to / "adapter"))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"peft_type": "IA3"}, "peft_type must be LORA, got 'IA3'"),
        ({"use_dora": True}, "use_dora is not supported"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save is not supported"),
        ({"rank_pattern": {"q_proj": 3}}, "rank_pattern is not supported"),
        ({"bias": "all"}, "bias must be 'none', got 'all'"),
        ({"r": 0}, "r must be a positive integer"),
        ({"r": 6}, r"must have shape \(6, \d+\)|must have shape \(\d+, 6\)"),
    ],
)
def test_settings_that_cannot_be_honoured_are_refused(
    change: dict, message: str, tiny: Tiny, adapters: dict[str, Path], tmp_path: Path
) -> None:
    folder = _broken(adapters, tmp_path)
    settings = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps(settings | change))
    with pytest.raises(AdapterError, match=message):
        load_peft_adapter(folder, ModelConfig.from_folder(tiny("qwen2")))


def test_damaged_tensors_are_refused_and_named(tiny: Tiny, adapters: dict[str, Path], tmp_path: Path) -> None:
    config = ModelConfig.from_folder(tiny("qwen2"))
    folder = _broken(adapters, tmp_path)
    path = folder / "adapter_model.safetensors"
    good = load_file(path)
    name = next(k for k in good if "q_proj.lora_A" in k)

    def load_with(tensors: dict[str, torch.Tensor]) -> None:
        save_file(tensors, path)
        load_peft_adapter(folder, config)

    with pytest.raises(AdapterError, match="holds NaN or infinite values"):
        load_with(good | {name: torch.full_like(good[name], float("nan"))})
    with pytest.raises(AdapterError, match="must have shape"):
        load_with(good | {name: torch.zeros(5, 7)})
    with pytest.raises(AdapterError, match=r"layer 0 q_proj has only one of A and B"):
        load_with({k: v for k, v in good.items() if k != name})
    with pytest.raises(AdapterError, match="is for layer 9, the model has 2"):
        load_with(good | {name.replace("layers.0", "layers.9"): good[name].clone()})
    with pytest.raises(AdapterError, match="is not a LoRA matrix"):
        load_with(good | {"base_model.model.lm_head.lora_A.weight": good[name].clone()})
    path.write_bytes(path.read_bytes()[:50])
    with pytest.raises(AdapterError, match="cannot be read"):
        load_peft_adapter(folder, config)
    path.unlink()
    torch.save(good, folder / "adapter_model.bin")  # a pickle is never opened
    with pytest.raises(AdapterError, match="only safetensors is accepted"):
        load_peft_adapter(folder, config)
    (folder / "adapter_config.json").unlink()
    with pytest.raises(AdapterError, match=r"adapter_config\.json cannot be read"):
        load_peft_adapter(folder, config)
