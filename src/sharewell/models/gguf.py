"""Conversion of a Llama-like GGUF file to our own folder: the same integers, Hugging Face names, no loss."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from .config import ModelError

_LAYER_NAMES = {
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
    "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
}
_TOP_NAMES = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}


def _hf_name(name: str) -> str:
    stem = name.removesuffix(".weight")
    if stem in _TOP_NAMES:
        return _TOP_NAMES[stem] + ".weight"
    parts = stem.split(".")
    if len(parts) == 3 and parts[0] == "blk" and parts[2] in _LAYER_NAMES:
        return f"model.layers.{parts[1]}.{_LAYER_NAMES[parts[2]]}.weight"
    raise ModelError(f"GGUF tensor {name!r} is not part of a Llama-like model")


def _unpermute(rows: np.ndarray, heads: int) -> np.ndarray:
    """llama.cpp pairs neighbouring rows for the rotation; Hugging Face pairs the halves of a head."""
    return (
        rows.reshape(heads, rows.shape[0] // heads // 2, 2, *rows.shape[1:])
        .swapaxes(1, 2)
        .reshape(rows.shape)
    )


def convert_gguf(path: Path, out: Path, progress: Callable[[int, int], None] | None = None) -> None:
    """Write ``config.json``, tokenizer files and ``weights.safetensors`` of the GGUF at ``path`` into
    ``out``.

    ``progress(done, total)`` counts tensors. Raises ModelError for a file that is not a readable Llama GGUF
    with Q4_1, Q8_0, F16 or F32 tensors.
    """
    from gguf import GGUFReader
    from safetensors.numpy import save_file

    from .checkpoint import FORMAT, OWN_FILE

    try:
        reader = GGUFReader(str(path))
    except Exception as error:  # the reader raises whatever numpy does on a cut file
        raise ModelError(f"{path} is not a readable GGUF file: {error}") from None
    meta = {name: field.contents() for name, field in reader.fields.items()}
    if meta.get("general.architecture") != "llama":
        raise ModelError(
            f"{path}: general.architecture must be 'llama', got {meta.get('general.architecture')!r}"
        )
    heads = {"attn_q": meta["llama.attention.head_count"], "attn_k": meta["llama.attention.head_count_kv"]}
    tensors: dict[str, np.ndarray] = {}
    for done, tensor in enumerate(reader.tensors):
        name, kind = _hf_name(tensor.name), tensor.tensor_type.name
        permuted = next((n for part, n in heads.items() if f".{part}." in tensor.name), None)

        def arrange(rows: np.ndarray, permuted: int | None = permuted) -> np.ndarray:
            return np.ascontiguousarray(_unpermute(rows, permuted) if permuted else rows)

        if kind == "Q4_1":
            blocks = tensor.data.reshape(tensor.data.shape[0], -1, 20)
            scales = blocks[:, :, :4].copy().view(np.float16)
            packed = blocks[:, :, 4:]
            q = np.concatenate([packed & 15, packed >> 4], -1).reshape(blocks.shape[0], -1)
            tensors[name + ".q"] = arrange(q[:, ::2] | (q[:, 1::2] << 4))
            tensors[name + ".d"], tensors[name + ".m"] = arrange(scales[:, :, 0]), arrange(scales[:, :, 1])
        elif kind == "Q8_0":
            blocks = tensor.data.reshape(tensor.data.shape[0], -1, 34)
            tensors[name + ".d"] = arrange(blocks[:, :, :2].copy().view(np.float16)[:, :, 0])
            tensors[name + ".q"] = arrange(blocks[:, :, 2:].copy().view(np.int8).reshape(blocks.shape[0], -1))
        elif kind in ("F32", "F16"):
            tensors[name] = arrange(np.array(tensor.data))
        else:
            raise ModelError(
                f"{path}: tensor {tensor.name!r} has type {kind}; supported are Q4_1, Q8_0, F16, F32"
            )
        if progress:
            progress(done + 1, len(reader.tensors))
    out.mkdir(parents=True, exist_ok=True)
    save_file(tensors, out / OWN_FILE, metadata={"format": FORMAT})
    tied = not any(t.name == "output.weight" for t in reader.tensors)
    _write_config(meta, out, tied)
    _write_tokenizer(meta, out)


def _write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", "utf-8")


def _write_config(meta: dict[str, Any], out: Path, tied: bool) -> None:
    hidden, heads = meta["llama.embedding_length"], meta["llama.attention.head_count"]
    eos, bos = meta.get("tokenizer.ggml.eos_token_id"), meta.get("tokenizer.ggml.bos_token_id")
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": hidden,
        "intermediate_size": meta["llama.feed_forward_length"],
        "num_hidden_layers": meta["llama.block_count"],
        "num_attention_heads": heads,
        "num_key_value_heads": meta["llama.attention.head_count_kv"],
        "head_dim": hidden // heads,
        "vocab_size": meta["llama.vocab_size"],
        "max_position_embeddings": meta["llama.context_length"],
        "rms_norm_eps": round(meta["llama.attention.layer_norm_rms_epsilon"], 12),
        "rope_theta": meta["llama.rope.freq_base"],
        "hidden_act": "silu",
        "attention_bias": False,
        "mlp_bias": False,
        "tie_word_embeddings": tied,
        "bos_token_id": bos,
        "eos_token_id": eos,
        "pad_token_id": meta.get("tokenizer.ggml.padding_token_id"),
    }
    _write_json(out / "config.json", config)
    _write_json(out / "generation_config.json", {"bos_token_id": bos, "eos_token_id": eos})


def _write_tokenizer(meta: dict[str, Any], out: Path) -> None:
    """A byte-level BPE from the metadata; "smollm" splits digits one by one before the GPT-2 pattern."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    kind, pre = meta.get("tokenizer.ggml.model"), meta.get("tokenizer.ggml.pre")
    if kind != "gpt2" or pre not in ("smollm", "gpt-2", "default"):
        raise ModelError(f"GGUF tokenizer must be gpt2 (smollm, gpt-2 or default), got {kind!r} ({pre!r})")
    tokens = meta["tokenizer.ggml.tokens"]
    merges = [tuple(m.split(" ", 1)) for m in meta["tokenizer.ggml.merges"]]
    tokenizer = Tokenizer(models.BPE({t: i for i, t in enumerate(tokens)}, merges))
    splits = [pre_tokenizers.Digits(individual_digits=True)] if pre == "smollm" else []
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(  # pyright: ignore[reportAttributeAccessIssue]
        [*splits, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)]
    )
    tokenizer.decoder = decoders.ByteLevel()  # pyright: ignore[reportAttributeAccessIssue]
    control = [t for t, k in zip(tokens, meta["tokenizer.ggml.token_type"], strict=True) if k == 3]
    tokenizer.add_special_tokens([AddedToken(t, special=True, normalized=False) for t in control])
    tokenizer.save(str(out / "tokenizer.json"))
    named = {
        f"{role}_token": tokens[meta[f"tokenizer.ggml.{key}_token_id"]]
        for role, key in (("bos", "bos"), ("eos", "eos"), ("unk", "unknown"), ("pad", "padding"))
        if f"tokenizer.ggml.{key}_token_id" in meta
    }
    _write_json(
        out / "tokenizer_config.json",
        {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "model_max_length": meta["llama.context_length"],
            "clean_up_tokenization_spaces": False,
            "chat_template": meta.get("tokenizer.chat_template"),
            **named,
        },
    )
