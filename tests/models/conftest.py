"""Tiny random models in Hugging Face folders, and a driver that feeds packed steps to a paged forward
pass.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from sharewell.kv import PagedForward

if str(Path(__file__).parent) not in sys.path:  # for ``tiny_gguf``
    sys.path.insert(0, str(Path(__file__).parent))

_COMMON: dict[str, Any] = {
    "hidden_size": 192,
    "intermediate_size": 160,
    "num_hidden_layers": 2,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "vocab_size": 301,
    "max_position_embeddings": 512,
    "initializer_range": 0.12,
    "bos_token_id": 0,
    "eos_token_id": 1,
}
_LLAMA3: dict[str, Any] = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
_SMALL: dict[str, Any] = {"vocab_size": 301, "bos_token_id": 0, "eos_token_id": 1, "initializer_range": 0.1}


def _configs() -> dict[str, Callable[[], Any]]:
    import transformers as t

    return {
        "llama": lambda: t.LlamaConfig(**_COMMON),
        "llama-tied": lambda: t.LlamaConfig(**_COMMON, tie_word_embeddings=True),
        "llama3-rope": lambda: t.LlamaConfig(**_COMMON, rope_parameters=_LLAMA3),
        "qwen2": lambda: t.Qwen2Config(**_COMMON),
        "qwen3": lambda: t.Qwen3Config(**{**_COMMON, "hidden_size": 128}),  # not heads * head_dim
        "mistral": lambda: t.MistralConfig(**{**_COMMON, "sliding_window": 24}),
        "gpt2": lambda: t.GPT2Config(
            **_SMALL, n_embd=48, n_layer=3, n_head=4, n_positions=256, attn_pdrop=0.0, resid_pdrop=0.0
        ),
        "gpt-neox": lambda: t.GPTNeoXConfig(
            **_SMALL,
            hidden_size=64,
            intermediate_size=96,
            num_hidden_layers=2,
            num_attention_heads=4,
            max_position_embeddings=256,
        ),
        "gemma": lambda: t.GemmaConfig(**_COMMON),
        "phi": lambda: t.PhiConfig(
            **_SMALL,
            hidden_size=64,
            intermediate_size=96,
            num_hidden_layers=2,
            num_attention_heads=4,
            max_position_embeddings=256,
        ),
        "opt": lambda: t.OPTConfig(
            vocab_size=301,
            hidden_size=64,
            ffn_dim=96,
            num_hidden_layers=2,
            num_attention_heads=4,
            max_position_embeddings=256,
            word_embed_proj_dim=64,
            init_std=0.1,
            bos_token_id=0,
            eos_token_id=1,
            pad_token_id=2,
        ),
        "gemma3": lambda: t.Gemma3TextConfig(**_COMMON, sliding_window=16),
        "bloom": lambda: t.BloomConfig(vocab_size=301, hidden_size=64, n_layer=2, n_head=4),
        "mamba": lambda: t.MambaConfig(vocab_size=301, hidden_size=32, num_hidden_layers=2, state_size=4),
    }


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """``tiny("qwen3")``: the folder of a tiny random model of that family, made once."""
    made: dict[str, Path] = {}

    def make(family: str) -> Path:
        if family not in made:
            from transformers import AutoModelForCausalLM

            folder = tmp_path_factory.mktemp(family)
            with torch.random.fork_rng(devices=[]):
                torch.default_generator.manual_seed(7)
                model = AutoModelForCausalLM.from_config(_configs()[family]())
                for value in model.parameters():  # biases and norms must matter
                    if value.ndim == 1:
                        with torch.no_grad():
                            value.add_(0.2 * torch.randn(value.shape))
            model.save_pretrained(folder)
            raw = json.loads((folder / "config.json").read_text())
            assert raw["architectures"], family
            made[family] = folder
        return made[family]

    return make


class PackedDriver:
    """Feeds steps of several sequences to a :class:`PagedForward`, whose pages it hands out in a mixed
    order.
    """

    def __init__(self, forward: PagedForward, blocks_each: int, seed: int = 0) -> None:
        self.forward, self.each = forward, blocks_each
        self._free = np.random.default_rng(seed).permutation(forward.pool.num_blocks).tolist()
        self.tables: dict[str, list[int]] = {}
        self.lengths: dict[str, int] = {}

    def step(
        self, new: dict[str, list[int]], adapters: dict[str, int] | None = None
    ) -> dict[str, torch.Tensor]:
        """Append tokens to sequences in one packed step; float32 logits ``[new tokens, vocab]`` of each."""
        size = self.forward.block_size
        for name in new:
            if name not in self.tables:
                self.tables[name] = [self._free.pop() for _ in range(self.each)]
                self.lengths[name] = 0
        positions = [np.arange(self.lengths[n], self.lengths[n] + len(ids)) for n, ids in new.items()]
        tables = np.array([self.tables[n] for n in new], np.int32)
        slots = [tables[s][p // size].astype(np.int64) * size + p % size for s, p in enumerate(positions)]
        counts = [len(ids) for ids in new.values()]
        starts = np.concatenate([[0], np.cumsum(counts)]).astype(np.int32)
        for n, ids in new.items():
            self.lengths[n] += len(ids)
        logits = self.forward(
            np.concatenate([np.array(i, np.int64) for i in new.values()]),
            np.concatenate(positions),
            np.concatenate(slots),
            starts,
            np.array([self.lengths[n] for n in new], np.int32),
            tables,
            np.arange(int(starts[-1])),
            np.array([(adapters or {}).get(n, -1) for n in new], np.int32),
        ).clone()
        return {n: logits[starts[s] : starts[s + 1]] for s, n in enumerate(new)}


@pytest.fixture(scope="session")
def drive() -> type[PackedDriver]:
    return PackedDriver


def token_ids(n: int, vocab: int, seed: int) -> list[int]:
    """``n`` random token ids."""
    return np.random.default_rng(seed).integers(2, vocab, n).tolist()


@pytest.fixture(scope="session")
def ids() -> Callable[[int, int, int], list[int]]:
    return token_ids
